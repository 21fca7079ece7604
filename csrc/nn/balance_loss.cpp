// SPDX-License-Identifier: Apache-2.0
#include "balance_loss.h"

#include <cmath>

namespace equipoise::nn {

SwitchBalanceLossImpl::SwitchBalanceLossImpl(SwitchBalanceLossOptions options) : options(options) {
  reset();
}

void SwitchBalanceLossImpl::reset() {
  TORCH_CHECK(std::isfinite(options.coeff()) && options.coeff() >= 0,
              "SwitchBalanceLoss: coeff must be finite and >= 0, got ", options.coeff());
}

void SwitchBalanceLossImpl::pretty_print(std::ostream& stream) const {
  stream << "equipoise::nn::SwitchBalanceLoss(coeff=" << options.coeff() << ")";
}

at::Tensor SwitchBalanceLossImpl::forward(const RoutingResult& routing) {
  return equipoise::balance_loss(routing, {{"switch", options.coeff()}}).total;
}

}  // namespace equipoise::nn

// SPDX-License-Identifier: Apache-2.0
#include "advanced_load_balancing_loss.h"

#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/log.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>

#include <cmath>
#include <utility>

#include "../checks.h"
#include "leave_autocast.h"

namespace equipoise::nn {
namespace {

constexpr const char* kName = "AdvancedLoadBalancingLoss";

at::Tensor log_of(const at::Tensor& p) { return at::log(p + 1e-8); }

at::Tensor entropy_of(const at::Tensor& p) { return -(p * log_of(p)).sum(-1); }

/// [B, 1] 1 over the length of each row, 0 for a row of zeros.
at::Tensor reciprocal_norm(const at::Tensor& rows) {
  const auto norm = at::linalg_vector_norm(rows, 2, {1}, /*keepdim=*/true);
  // Twice, or the gradient at 0 would be that of 1 / 0 times 0.
  return at::where(norm > 0, 1 / at::where(norm > 0, norm, 1), 0);
}

/// mean_ij cos(x_i, x_j) cos(g_i, g_j) = ||U^T V||_F^2 / B^2.
at::Tensor similarity_correlation(const at::Tensor& inputs, const at::Tensor& gates) {
  // Both norms on the narrow side: the inputs are not copied.
  const auto scaled = gates * reciprocal_norm(gates) * reciprocal_norm(inputs);
  const auto rows = static_cast<double>(inputs.size(0));
  return at::matmul(inputs.t(), scaled).square().sum() / (rows * rows);
}

}  // namespace

AdvancedLoadBalancingLossImpl::AdvancedLoadBalancingLossImpl(
    AdvancedLoadBalancingLossOptions options)
    : options(std::move(options)) {
  reset();
}

void AdvancedLoadBalancingLossImpl::reset() {
  TORCH_CHECK(options.num_components() >= 1, kName, ": num_components must be >= 1, got ",
              options.num_components());
  const auto check = [](const char* name, double lambda) {
    TORCH_CHECK(std::isfinite(lambda) && lambda >= 0, kName, ": ", name,
                " must be finite and >= 0, got ", lambda);
  };
  check("lambda_uniform", options.lambda_uniform());
  check("lambda_entropy", options.lambda_entropy());
  check("lambda_mi", options.lambda_mi());
  check("lambda_variance", options.lambda_variance());
  TORCH_CHECK(options.mi() == "similarity" || options.mi() == "information", kName,
              ": mi must be similarity or information, got ", options.mi());
}

void AdvancedLoadBalancingLossImpl::pretty_print(std::ostream& stream) const {
  stream << "equipoise::nn::" << kName << "(num_components=" << options.num_components()
         << ", lambda_uniform=" << options.lambda_uniform()
         << ", lambda_entropy=" << options.lambda_entropy() << ", lambda_mi=" << options.lambda_mi()
         << ", lambda_variance=" << options.lambda_variance() << ", mi=" << options.mi() << ")";
}

AdvancedLoadBalancingTerms AdvancedLoadBalancingLossImpl::forward(
    const at::Tensor& gating_weights, const std::optional<at::Tensor>& input_features) {
  const auto num_components = options.num_components();
  check_floating(kName, "gating_weights", gating_weights);
  TORCH_CHECK(gating_weights.dim() >= 2 &&
                  c10::multiply_integers(gating_weights.sizes().slice(1)) == num_components,
              kName,
              ": gating_weights must have shape [B, ...] with num_components = ", num_components,
              " numbers a row, got ", gating_weights.sizes());
  const auto rows = gating_weights.size(0);
  if (input_features) {
    check_floating(kName, "input_features", *input_features);
    check_device(kName, "input_features", *input_features, "gating_weights", gating_weights);
    TORCH_CHECK(input_features->dim() >= 2 && input_features->size(0) == rows, kName,
                ": input_features must have shape [B, ...] with the B = ", rows,
                " of gating_weights, got ", input_features->sizes());
  }
  const LeaveAutocast leave_autocast;
  const auto type = accumulate_type(gating_weights.scalar_type());
  const auto gates = gating_weights.to(type).reshape({rows, num_components});
  const auto zero = (gates * 0).sum();
  if (rows == 0 || num_components == 1) return {zero, zero, zero, zero, zero};
  const auto mean = gates.mean(0);
  const auto log_num_components = std::log(static_cast<double>(num_components));

  AdvancedLoadBalancingTerms terms;
  terms.uniform = options.lambda_uniform() * (-log_num_components - log_of(mean).mean());
  terms.entropy = options.lambda_entropy() * (log_num_components - entropy_of(mean));
  terms.variance = options.lambda_variance() * mean.var(/*unbiased=*/true);
  if (options.mi() == "information") {
    terms.mutual_info = options.lambda_mi() * (entropy_of(gates).mean() - entropy_of(mean));
  } else if (input_features) {
    const auto features = input_features->to(type).flatten(1);
    terms.mutual_info = options.lambda_mi() * similarity_correlation(features, gates);
  } else {
    terms.mutual_info = zero;
  }
  terms.total = terms.uniform + terms.entropy + terms.variance + terms.mutual_info;
  return terms;
}

}  // namespace equipoise::nn

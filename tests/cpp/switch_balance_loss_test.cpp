// SPDX-License-Identifier: Apache-2.0
// nn::SwitchBalanceLoss: the scaled switch loss of balance_loss.
#include <limits>
#include <sstream>

#include "nn/balance_loss.h"
#include "nn/router.h"
#include "test_util.h"

namespace equipoise {
namespace {

using nn::SwitchBalanceLoss;
using nn::SwitchBalanceLossImpl;
using nn::SwitchBalanceLossOptions;
using test::close;
using test::fails;
using test::gradients;

TEST(SwitchBalanceLoss, IsTheScaledSwitchLoss) {
  at::manual_seed(0);
  nn::TopKRouter router(6, 5, 2);
  SwitchBalanceLoss balance(SwitchBalanceLossOptions().coeff(0.5));
  const auto routing = router(at::randn({40, 6}));
  const auto loss = balance(routing);
  EXPECT_EQ(loss.dim(), 0);
  EXPECT_TRUE(close(loss, 0.5 * switch_loss(routing), 1e-6));
  EXPECT_TRUE(close(gradients(loss, {router->weight})[0],
                    gradients(0.5 * switch_loss(routing), {router->weight})[0], 1e-6));
  EXPECT_NEAR(SwitchBalanceLoss()(routing).item<double>(), 0.02 * loss.item<double>(), 1e-6);
}

TEST(SwitchBalanceLoss, ClonesAndPrints) {
  SwitchBalanceLoss balance(SwitchBalanceLossOptions(0.25));
  const auto copy = std::dynamic_pointer_cast<SwitchBalanceLossImpl>(balance->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_EQ(copy->options.coeff(), 0.25);
  std::ostringstream stream;
  stream << balance;
  EXPECT_EQ(stream.str(), "equipoise::nn::SwitchBalanceLoss(coeff=0.25)");
}

TEST(SwitchBalanceLoss, NamesTheWrongArgument) {
  EXPECT_TRUE(fails([] { SwitchBalanceLoss(SwitchBalanceLossOptions(-1.0)); },
                    {"SwitchBalanceLoss", "coeff", "-1"}));
  EXPECT_TRUE(fails(
      [] { SwitchBalanceLoss(SwitchBalanceLossOptions(std::numeric_limits<double>::quiet_NaN())); },
      {"SwitchBalanceLoss", "coeff", "nan"}));
}

}  // namespace
}  // namespace equipoise

// SPDX-License-Identifier: Apache-2.0
// nn::MoELayer against a loop over tokens and their experts, in float64 and through grouped GEMMs.
#include "nn/moe_layer.h"

#include <cstring>
#include <set>
#include <sstream>

#include "test_util.h"

namespace equipoise {
namespace {

using nn::MoELayer;
using nn::MoELayerImpl;
using nn::MoELayerOptions;
using test::close;
using test::fails;
using test::random_leaf;
using test::same;

/// y_t = sum_k g_tk w_out[e] activation(w_in[e] x_t), one token and one expert at a time, x [T,
/// d_model].
at::Tensor per_token_loop(MoELayerImpl& layer, const at::Tensor& x, const at::Tensor& token_mask) {
  const auto& options = layer.options;
  const auto prob = at::softmax(x.matmul(layer.router->weight.t()), 1);
  const auto chosen = std::get<1>(prob.topk(options.top_k(), 1));
  auto gates = prob.gather(1, chosen);
  if (options.norm_topk_prob()) gates = gates / gates.sum(1, true);
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < x.size(0); ++t) {
    auto y = at::zeros({options.d_model()}, x.options());
    for (int64_t k = 0; k < options.top_k() && token_mask[t].item<bool>(); ++k) {
      const auto expert = chosen[t][k].item<int64_t>();
      auto hidden = layer.w_in[expert].mv(x[t]);
      if (options.activation() == "relu") {
        hidden = hidden.clamp_min(0);
      } else if (options.activation() == "gelu") {
        hidden = 0.5 * hidden * (1 + at::erf(hidden / std::sqrt(2.0)));
      } else {
        const auto gate = hidden.slice(0, 0, options.d_hidden());
        hidden = gate * at::sigmoid(gate) * hidden.slice(0, options.d_hidden());
      }
      y = y + gates[t][k] * layer.w_out[expert].mv(hidden);
    }
    rows.push_back(y);
  }
  return at::stack(rows);
}

/// Gradients of x and of every parameter.
std::vector<at::Tensor> layer_gradients(MoELayerImpl& layer, const at::Tensor& y,
                                        const at::Tensor& x) {
  return test::gradients(y, {x, layer.router->weight, layer.w_in, layer.w_out});
}

void expect_equals_loop(MoELayerImpl& layer, const at::Tensor& x, const at::Tensor& token_mask,
                        double tolerance) {
  const auto y = std::get<0>(layer.forward(x, token_mask));
  const auto want = per_token_loop(layer, x, token_mask);
  EXPECT_TRUE(close(y, want, tolerance));
  const auto got_gradients = layer_gradients(layer, y, x);
  const auto want_gradients = layer_gradients(layer, want, x);
  for (size_t i = 0; i < got_gradients.size(); ++i) {
    EXPECT_TRUE(close(got_gradients[i], want_gradients[i], tolerance)) << "gradient " << i;
  }
}

/// Whether a node whose name contains `name` is in the graph that computed `tensor`.
bool computed_by(const at::Tensor& tensor, const char* name) {
  std::vector<torch::autograd::Node*> todo{tensor.grad_fn().get()};
  std::set<torch::autograd::Node*> seen;
  while (!todo.empty()) {
    auto* node = todo.back();
    todo.pop_back();
    if (node == nullptr || !seen.insert(node).second) continue;
    if (std::strstr(node->name().c_str(), name) != nullptr) return true;
    for (const auto& edge : node->next_edges()) todo.push_back(edge.function.get());
  }
  return false;
}

class MoELayerTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { at::manual_seed(0); }

  /// With a router strong enough that rounding changes no choice of expert.
  static MoELayer make(MoELayerOptions options, at::ScalarType type) {
    MoELayer layer(options.activation(GetParam()));
    layer->to(type);
    torch::NoGradGuard no_grad;
    layer->router->weight.mul_(50);
    return layer;
  }
};

TEST_P(MoELayerTest, EqualsThePerTokenLoopInDouble) {
  for (const bool norm_topk_prob : {false, true}) {
    auto layer = make(MoELayerOptions(6, 10, 5, 2).norm_topk_prob(norm_topk_prob), at::kDouble);
    expect_equals_loop(*layer, random_leaf({23, 6}), at::ones({23}, at::kBool), 1e-12);
  }
}

TEST_P(MoELayerTest, EqualsThePerTokenLoopThroughGroupedGemm) {
  auto layer = make(MoELayerOptions(8, 12, 5, 2), at::kFloat);
  const auto x = random_leaf({23, 8}, at::kFloat);
  expect_equals_loop(*layer, x, at::ones({23}, at::kBool), 1e-5);
  EXPECT_TRUE(computed_by(std::get<0>(layer(x)), "GroupedMm"));
}

TEST_P(MoELayerTest, EqualsThePerTokenLoopInOddWidths) {
  for (const auto& [d_model, d_hidden] :
       std::vector<std::pair<int64_t, int64_t>>{{7, 12}, {8, 5}, {1, 1}}) {
    auto layer = make(MoELayerOptions(d_model, d_hidden, 4, 2), at::kFloat);
    const auto x = random_leaf({11, d_model}, at::kFloat);
    expect_equals_loop(*layer, x, at::ones({11}, at::kBool), 1e-5);
    EXPECT_FALSE(computed_by(std::get<0>(layer(x)), "GroupedMm"));
  }
}

TEST_P(MoELayerTest, MaskedTokensGetZeroAndReadNoUninitialisedRow) {
  const test::NanFilledMemory nan_filled_memory;
  const auto mask = torch::tensor({1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1}).to(at::kBool);
  const auto kept = mask.nonzero().flatten();
  for (const auto type : {at::kFloat, at::kDouble}) {
    const double tolerance = type == at::kFloat ? 1e-5 : 1e-12;
    auto layer = make(MoELayerOptions(8, 12, 6, 2), type);
    const auto x = random_leaf({11, 8}, type);
    expect_equals_loop(*layer, x, mask, tolerance);

    const auto [y, routing] = layer->forward(x, mask);
    EXPECT_TRUE(same(y.index_select(0, (~mask).nonzero().flatten()), at::zeros({4, 8}, type)));
    EXPECT_EQ(routing.tokens_per_expert.sum().item<int64_t>(), 2 * 7);
    // The same tokens alone give the same gradients.
    const auto grad_y = at::randn_like(y);
    const std::vector<at::Tensor> inputs{x, layer->router->weight, layer->w_in, layer->w_out};
    const auto masked = torch::autograd::grad({y}, inputs, {grad_y});
    const auto y_kept = std::get<0>(layer(x.index_select(0, kept)));
    const auto alone = torch::autograd::grad({y_kept}, inputs, {grad_y.index_select(0, kept)});
    for (size_t i = 0; i < masked.size(); ++i)
      EXPECT_TRUE(close(masked[i], alone[i], tolerance)) << "gradient " << i;
  }
}

TEST_P(MoELayerTest, TakesLeadingDimensionsOneTokenAndNone) {
  for (const auto type : {at::kFloat, at::kDouble}) {
    auto layer = make(MoELayerOptions(8, 12, 6, 2), type);
    const auto x = random_leaf({2, 5, 8}, type);
    const auto [y, routing] = layer->forward(x);
    EXPECT_EQ(routing.topk_indices.sizes(), at::IntArrayRef({2, 5, 2}));
    EXPECT_TRUE(same(y.reshape({10, 8}), std::get<0>(layer(x.reshape({10, 8})))));
    EXPECT_TRUE(close(std::get<0>(layer(x[0][0])), y[0][0], 1e-5));

    // No token at all, and none but masked ones: zero gradients, not absent or uninitialised ones.
    const test::NanFilledMemory nan_filled_memory;
    const auto none = random_leaf({0, 8}, type);
    const auto y_none = std::get<0>(layer(none));
    EXPECT_EQ(y_none.sizes(), at::IntArrayRef({0, 8}));
    const auto y_masked = std::get<0>(layer(x, at::zeros({2, 5}, at::kBool)));
    EXPECT_TRUE(same(y_masked, at::zeros_like(x)));
    for (const auto& grad : layer_gradients(*layer, y_none, none))
      EXPECT_TRUE(same(grad, at::zeros_like(grad)));
    for (const auto& grad : layer_gradients(*layer, y_masked, x))
      EXPECT_TRUE(same(grad, at::zeros_like(grad)));
  }
}

TEST_P(MoELayerTest, AutocastLeavesDoubleAlone) {
  auto layer = make(MoELayerOptions(8, 12, 4, 2), at::kDouble);
  const test::CpuAutocast cpu_autocast;
  EXPECT_EQ(std::get<0>(layer(at::randn({5, 8}, at::kDouble))).scalar_type(), at::kDouble);
}

TEST_P(MoELayerTest, RunsInHalfTypes) {
  for (const auto type : {at::kBFloat16, at::kHalf}) {
    auto layer = make(MoELayerOptions(16, 24, 4, 2), type);
    const auto x = random_leaf({20, 16}, type);
    const auto [y, routing] = layer->forward(x);
    EXPECT_EQ(y.scalar_type(), type);
    EXPECT_EQ(routing.topk_weights.scalar_type(), at::kFloat);
    auto widened = std::dynamic_pointer_cast<MoELayerImpl>(layer->clone());
    widened->to(at::kFloat);
    const auto want = std::get<0>(widened->forward(x.to(at::kFloat)));
    EXPECT_TRUE(close(y.to(at::kFloat), want, 0.03));
    for (const auto& grad : layer_gradients(*layer, y, x))
      EXPECT_TRUE(grad.isfinite().all().item<bool>());
  }
}

TEST_P(MoELayerTest, RunsTheExpertsInTheTypeOfAutocast) {
  for (const int64_t width : {16, 5}) {
    auto layer = make(MoELayerOptions(width, width, 4, 2), at::kFloat);
    const auto x = random_leaf({20, width}, at::kFloat);
    const auto want = std::get<0>(layer(x));
    at::Tensor y;
    {
      const test::CpuAutocast cpu_autocast;
      y = std::get<0>(layer(x));
      EXPECT_EQ(y.scalar_type(), at::kBFloat16);
      EXPECT_EQ(std::get<0>(layer(x.to(at::kBFloat16))).scalar_type(), at::kBFloat16);
    }
    EXPECT_TRUE(close(y.to(at::kFloat), want, 0.05));
    for (const auto& grad : layer_gradients(*layer, y, x)) {
      EXPECT_EQ(grad.scalar_type(), at::kFloat);
      EXPECT_TRUE(grad.isfinite().all().item<bool>());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Activations, MoELayerTest, ::testing::Values("relu", "gelu", "swiglu"),
                         [](const auto& info) { return std::string(info.param); });

TEST(MoELayer, HasTheParametersOfItsTwin) {
  MoELayer layer(MoELayerOptions(8, 12, 5, 2).activation("swiglu"));
  const auto parameters = layer->named_parameters();
  ASSERT_EQ(parameters.size(), 3);
  EXPECT_EQ(parameters["router.weight"].sizes(), at::IntArrayRef({5, 8}));
  EXPECT_EQ(parameters["w_in"].sizes(), at::IntArrayRef({5, 24, 8}));
  EXPECT_EQ(parameters["w_out"].sizes(), at::IntArrayRef({5, 8, 12}));
  EXPECT_EQ(MoELayer(8, 12, 5, 2)->w_in.sizes(), at::IntArrayRef({5, 12, 8}));
}

TEST(MoELayer, StartsUniformWithinItsBounds) {
  at::manual_seed(0);
  MoELayer layer(16, 64, 4, 2);
  for (const auto& [weight, bound] :
       std::vector<std::pair<at::Tensor, double>>{{layer->w_in, 0.25}, {layer->w_out, 0.125}}) {
    EXPECT_LE(weight.abs().max().item<double>(), bound);
    EXPECT_GT(weight.abs().max().item<double>(), 0.98 * bound);
    EXPECT_NEAR(weight.std().item<double>(), bound / std::sqrt(3.0), 0.03 * bound);
  }
  EXPECT_NEAR(layer->router->weight.std().item<double>(), 0.02, 5e-3);
}

TEST(MoELayer, ClonesAndPrints) {
  at::manual_seed(0);
  MoELayer layer(MoELayerOptions(8, 12, 5, 2).activation("gelu").norm_topk_prob(false));
  const auto copy = std::dynamic_pointer_cast<MoELayerImpl>(layer->clone());
  ASSERT_NE(copy, nullptr);
  const auto x = at::randn({9, 8});
  const auto y = std::get<0>(layer(x));
  EXPECT_TRUE(same(std::get<0>(copy->forward(x)), y));
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : copy->parameters()) parameter.zero_();
  }
  EXPECT_TRUE(same(std::get<0>(copy->forward(x)), at::zeros({9, 8})));
  EXPECT_TRUE(same(std::get<0>(layer(x)), y));

  std::ostringstream stream;
  stream << layer;
  EXPECT_EQ(
      stream.str(),
      "equipoise::nn::MoELayer(d_model=8, d_hidden=12, num_experts=5, top_k=2, activation=gelu, "
      "norm_topk_prob=false)(\n"
      "  (router): equipoise::nn::TopKRouter(d_model=8, num_experts=5, top_k=2, "
      "score_function=softmax, "
      "norm_topk_prob=false, scaling_factor=1)\n)");
}

TEST(MoELayer, IsSavedAndLoaded) {
  at::manual_seed(0);
  MoELayer layer(8, 12, 5, 2);
  MoELayer other(8, 12, 5, 2);
  const auto x = at::randn({9, 8});
  const auto y = std::get<0>(layer(x));
  EXPECT_FALSE(std::get<0>(other(x)).equal(y));
  std::stringstream stream;
  torch::save(layer, stream);
  torch::load(other, stream);
  EXPECT_TRUE(same(std::get<0>(other(x)), y));
}

TEST(MoELayer, NamesTheWrongArgument) {
  EXPECT_TRUE(fails([] { MoELayer(0, 12, 5, 2); }, {"MoELayer", "d_model", "0"}));
  EXPECT_TRUE(fails([] { MoELayer(8, 0, 5, 2); }, {"MoELayer", "d_hidden", "0"}));
  EXPECT_TRUE(fails([] { MoELayer(8, 12, 0, 1); }, {"MoELayer", "num_experts", "0"}));
  EXPECT_TRUE(fails([] { MoELayer(8, 12, 5, 6); }, {"MoELayer", "top_k", "5", "6"}));
  EXPECT_TRUE(fails([] { MoELayer(MoELayerOptions(8, 12, 5, 2).activation("tanh")); },
                    {"MoELayer", "activation", "tanh", "relu, gelu or swiglu"}));
  MoELayer layer(8, 12, 5, 2);
  EXPECT_TRUE(fails([&] { layer(at::randn({3, 7})); }, {"x", "8", "[3, 7]"}));
  EXPECT_TRUE(fails(
      [&] {
        layer(at::randn({3, 8}, at::kDouble));
      },
      {"MoELayer", "x", "Float", "Double"}));
  EXPECT_TRUE(fails(
      [&] {
        layer(at::randn({3, 8}), at::ones({4}, at::kBool));
      },
      {"token_mask", "[4]"}));
}

}  // namespace
}  // namespace equipoise

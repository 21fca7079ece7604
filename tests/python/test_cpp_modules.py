# SPDX-License-Identifier: Apache-2.0
"""The C++ modules (`equipoise.cpp`) and their twins (`equipoise.nn`) hold the same numbers."""

import pytest
import torch

import equipoise
import equipoise.functional as F
from equipoise import _C, cpp, nn

LAYER = {"d_model": 8, "d_hidden": 12, "num_experts": 5, "top_k": 2}
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3},
}
ROUTER = {"d_model": 8, "num_experts": 5, "top_k": 2}


def parameters_of(module):
    return dict(module.named_parameters())


def give_weights(source, target, strength=1.0):
    """Copies the parameters by name; `strength` spreads the router's choices."""
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith("router.weight") or name == "weight":
                parameter.mul_(strength)
            parameters_of(target)[name].copy_(parameter)


def assert_same_parameters(cpp_module, python_module):
    ours, theirs = parameters_of(cpp_module), python_module.state_dict()
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert parameter.shape == theirs[name].shape and parameter.requires_grad


def assert_same_routing(routing, expected, dtype):
    assert isinstance(routing, F.RoutingResult)
    assert torch.equal(routing.topk_indices, expected.topk_indices)
    assert torch.equal(routing.tokens_per_expert, expected.tokens_per_expert)
    for name in ("topk_weights", "lse", "sums"):
        torch.testing.assert_close(
            getattr(routing, name), getattr(expected, name), **TOLERANCE[dtype]
        )


def assert_same_gradients(output, expected, x, cpp_module, python_module, dtype):
    """Of a fixed weighted sum of the outputs, for x and every parameter."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    names = list(parameters_of(cpp_module))
    got = torch.autograd.grad(
        output, [x, *parameters_of(cpp_module).values()], weights, retain_graph=True
    )
    theirs = parameters_of(python_module)
    want = torch.autograd.grad(
        expected, [x, *(theirs[name] for name in names)], weights, retain_graph=True
    )
    for name, g, w in zip(["x", *names], got, want, strict=True):
        torch.testing.assert_close(g, w, **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": True, "scaling_factor": 2.5}])
def test_router_equals_its_twin(dtype, options):
    ours = cpp.TopKRouter(**ROUTER, **options)
    ours.to(dtype)
    theirs = nn.TopKRouter(**ROUTER, **options, dtype=dtype)
    assert_same_parameters(ours, theirs)
    give_weights(theirs, ours, strength=50)
    x = torch.randn(6, 3, 8, dtype=dtype, requires_grad=True)
    mask = torch.rand(6, 3) > 0.3
    routing, expected = ours(x, token_mask=mask), theirs(x, token_mask=mask)
    assert_same_routing(routing, expected, dtype)
    for name in ("topk_weights", "lse", "prob_sum"):
        assert_same_gradients(
            getattr(routing, name), getattr(expected, name), x, ours, theirs, dtype
        )


def test_router_takes_the_bias_of_a_balancer():
    balancer = nn.LossFreeBalancer(num_experts=5)
    ours, theirs = cpp.TopKRouter(**ROUTER), nn.TopKRouter(**ROUTER, balancer=balancer)
    balancer.expert_bias.copy_(torch.linspace(-0.5, 0.5, 5))
    give_weights(theirs, ours, strength=50)
    x = torch.randn(16, 8)
    routing = ours(x, expert_bias=balancer.expert_bias)
    assert_same_routing(routing, theirs(x), torch.float32)
    assert not torch.equal(routing.topk_indices, ours(x).topk_indices)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_balance_loss_equals_its_twin(dtype):
    router = cpp.TopKRouter(**ROUTER)
    router.to(dtype)
    x = torch.randn(16, 8, dtype=dtype)
    routing = router(x)
    ours, theirs = cpp.SwitchBalanceLoss(coeff=0.5), nn.SwitchBalanceLoss(coeff=0.5)
    torch.testing.assert_close(ours(routing), theirs(routing), **TOLERANCE[dtype])
    torch.testing.assert_close(ours(routing), 0.5 * F.switch_loss(routing), **TOLERANCE[dtype])
    (got,) = torch.autograd.grad(ours(routing), router.weight, retain_graph=True)
    (want,) = torch.autograd.grad(theirs(routing), router.weight)
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])
    assert cpp.SwitchBalanceLoss()(routing) == nn.SwitchBalanceLoss()(routing)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("widths", [(8, 12), (7, 5)])  # grouped GEMM, and widths that it refuses
def test_layer_equals_its_twin(dtype, activation, widths):
    sizes = {**LAYER, "d_model": widths[0], "d_hidden": widths[1], "activation": activation}
    ours = cpp.MoELayer(**sizes)
    ours.to(dtype)
    theirs = nn.MoELayer(**sizes, dtype=dtype)
    assert_same_parameters(ours, theirs)
    give_weights(theirs, ours, strength=50)
    for shape, mask in [((9, 2), None), ((9, 2), torch.rand(9, 2) > 0.3), ((0,), None)]:
        x = torch.randn(*shape, widths[0], dtype=dtype, requires_grad=True)
        (y, routing), (expected_y, expected) = ours(x, mask), theirs(x, mask)
        assert_same_routing(routing, expected, dtype)
        torch.testing.assert_close(y, expected_y, **TOLERANCE[dtype])
        assert_same_gradients(y, expected_y, x, ours, theirs, dtype)


def test_layer_equals_its_twin_under_autocast():
    ours, theirs = cpp.MoELayer(**LAYER), nn.MoELayer(**LAYER)
    give_weights(theirs, ours)
    x = torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        (y, routing), (expected_y, expected) = ours(x), theirs(x)
    assert y.dtype == expected_y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected_y, **TOLERANCE[torch.bfloat16])
    assert_same_routing(routing, expected, torch.float32)


@pytest.mark.parametrize("reset", [False, True])
def test_same_seed_draws_the_same_parameters(reset):
    drawn = []
    for module in (cpp, nn):
        torch.manual_seed(7)
        layer = module.MoELayer(**LAYER)
        if reset:
            layer.reset_parameters()
        drawn.append(parameters_of(layer))
    for name in drawn[0]:
        assert torch.equal(drawn[0][name], drawn[1][name]), name


def test_layer_trains_inside_a_python_module():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = cpp.MoELayer(**LAYER)
            self.balance = cpp.SwitchBalanceLoss(coeff=1e-2)

        def forward(self, x):
            y, routing = self.layer(x)
            return (y - x).square().mean(), self.balance(routing)

    model = Model()
    optimizer = torch.optim.Adam(model.layer.parameters(), lr=1e-2)
    x = torch.randn(64, 8)
    losses = []
    for _ in range(20):
        loss, balance = model(x)
        optimizer.zero_grad()
        (loss + balance).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_library_and_package_have_one_version():
    assert _C.version() == equipoise.__version__


def test_repr_names_the_options():
    assert repr(cpp.SwitchBalanceLoss(coeff=0.5)) == "equipoise::nn::SwitchBalanceLoss(coeff=0.5)"
    printed = repr(cpp.MoELayer(**LAYER, activation="swiglu"))
    assert str(cpp.MoELayer(**LAYER, activation="swiglu")) == printed
    for words in ("equipoise::nn::MoELayer", "d_hidden=12", "activation=swiglu", "(router): "):
        assert words in printed
    for module in (cpp.TopKRouter, cpp.SwitchBalanceLoss, cpp.MoELayer):
        assert module.__module__ == "equipoise.cpp"
        assert "Args:" in module.__doc__


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cpp.TopKRouter(d_model=8, num_experts=4, top_k=5), "TopKRouter: top_k"),
        (lambda: cpp.SwitchBalanceLoss(coeff=-1.0), "SwitchBalanceLoss: coeff"),
        (lambda: cpp.MoELayer(**LAYER, activation="tanh"), "MoELayer: activation"),
        (lambda: cpp.TopKRouter(**ROUTER)(torch.randn(3, 7)), "TopKRouter: x"),
    ],
)
def test_errors_name_the_argument(make, words):
    with pytest.raises(RuntimeError, match=words) as error:
        make()
    assert "frame #" not in str(error.value)  # the message, without a C++ stack


def test_balance_loss_refuses_what_is_no_routing_result():
    with pytest.raises(TypeError, match="RoutingResult"):
        cpp.SwitchBalanceLoss()(torch.randn(3))

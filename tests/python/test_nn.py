# SPDX-License-Identifier: Apache-2.0
"""The modules of equipoise.nn against a loop over tokens, and under every way to run a module."""

import pytest
import torch
from helpers import tolerance

import equipoise.functional as F
from equipoise import nn
from equipoise.nn.moe import _grouped_linear

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "swiglu": lambda h: torch.nn.functional.silu(h.chunk(2)[0]) * h.chunk(2)[1],
}


def loop(layer, x, token_mask=None):
    """MoELayer's meaning, one token and one expert after the other."""
    outputs = []
    mask = [True] * len(x) if token_mask is None else token_mask.tolist()
    for token, real in zip(x.unbind(0), mask, strict=True):
        y = torch.zeros_like(token)
        weights, experts = (layer.router.weight @ token).softmax(0).topk(layer.top_k)
        for weight, expert in zip(weights / weights.sum(), experts.tolist(), strict=True):
            hidden = ACTIVATIONS[layer.activation](layer.w_in[expert] @ token)
            y = y + weight * (layer.w_out[expert] @ hidden)
        outputs.append(y if real else torch.zeros_like(token))
    return torch.stack(outputs)


def gradients(y, x, layer):
    """Gradients of a loss with a different weight at every output."""
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return torch.autograd.grad(loss, [x, *layer.parameters()])


@pytest.fixture
def poison():
    """Fills memory that nobody has written with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("backend")
def test_moe_layer_equals_the_loop(dtype, activation, masked, poison):
    for d_model, d_hidden in [(8, 16), (5, 7)]:
        layer = nn.MoELayer(d_model, d_hidden, 6, 3, activation=activation, dtype=dtype)
        torch.nn.init.normal_(layer.router.weight)  # far from ties
        x = torch.randn(23, d_model, dtype=dtype, requires_grad=True)
        mask = torch.arange(23) % 3 > 0 if masked else None
        y, routing = layer(x, mask)
        want = loop(layer, x, mask)
        assert y.dtype == dtype and routing.tokens_per_expert.sum() == 3 * (15 if masked else 23)
        torch.testing.assert_close(y, want, **tolerance(dtype))
        for got, expected in zip(gradients(y, x, layer), gradients(want, x, layer), strict=True):
            torch.testing.assert_close(got, expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moe_layer_in_half_types(dtype):
    layer = nn.MoELayer(16, 32, 4, 2).to(dtype)
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(40, 16, dtype=dtype, requires_grad=True)
    y, _ = layer(x)
    assert y.dtype == dtype
    exact = nn.MoELayer(16, 32, 4, 2, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x64 = x.detach().double().requires_grad_()
    want, _ = exact(x64)
    close = (
        {"rtol": 4e-2, "atol": 4e-2} if dtype == torch.bfloat16 else {"rtol": 5e-3, "atol": 5e-3}
    )
    torch.testing.assert_close(y.double(), want, **close)
    loss = [(out * out).sum() for out in (y.double(), want)]
    for got, expected in zip(
        torch.autograd.grad(loss[0], [x, *layer.parameters()]),
        torch.autograd.grad(loss[1], [x64, *exact.parameters()]),
        strict=True,
    ):
        error = (got.double() - expected).norm() / expected.norm()
        assert got.dtype == dtype and error < (2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.usefixtures("backend")
def test_uninitialised_rows_reach_nothing(poison):
    """grouped_mm leaves the rows of masked tokens unwritten: here they are NaN."""
    offsets = torch.tensor([0, 2, 3])
    assert _grouped_linear(torch.zeros(5, 8), torch.zeros(2, 4, 8), offsets)[3:].isnan().all()
    for activation in ACTIVATIONS:
        layer = nn.MoELayer(8, 16, 4, 2, activation=activation)
        x = torch.randn(12, 8, requires_grad=True)
        for mask in (torch.arange(12) < 5, torch.zeros(12, dtype=torch.bool)):
            y, routing = layer(x, mask)
            assert (y[~mask] == 0).all() and y.isfinite().all()
            total = y.square().sum() + F.switch_loss(routing)
            for gradient in torch.autograd.grad(total, [x, *layer.parameters()]):
                assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 8), (2, 3, 8), (2, 0, 8)])
def test_leading_dimensions(shape, poison):
    layer = nn.MoELayer(8, 16, 4, 2)
    x = torch.randn(shape, requires_grad=True)
    y, routing = layer(x)
    assert y.shape == shape and routing.topk_indices.shape == (*shape[:-1], 2)
    y.sum().backward()
    assert x.grad.shape == shape
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all()
        assert x.numel() or (parameter.grad == 0).all()


def test_meta_device_and_reset_parameters():
    sizes = {"num_experts": 8, "top_k": 2, "d_hidden": 32}
    for make in [
        lambda device: nn.TopKRouter(
            64, 8, 2, bias=True, balancer=nn.LossFreeBalancer(8), device=device
        ),
        lambda device: nn.MoELayer(64, device=device, **sizes),
        lambda device: nn.MoETransformerBlock(64, 4, device=device, **sizes),
        lambda device: nn.MoETransformerLM(
            256, 64, num_layers=2, num_heads=4, max_seq_len=16, device=device, **sizes
        ),
    ]:
        module = make("meta")
        assert all(p.is_meta for p in module.parameters())
        module.to_empty(device="cpu")
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan"))
        torch.manual_seed(1)
        module.reset_parameters()
        torch.manual_seed(1)
        fresh = make("cpu")
        for (name, got), (_, want) in zip(
            module.state_dict().items(), fresh.state_dict().items(), strict=True
        ):
            assert got.isfinite().all(), name
            torch.testing.assert_close(got.std(), want.std(), rtol=0.3, atol=0)
    layer = nn.MoELayer(64, **sizes)
    assert abs(layer.router.weight.std() - 0.02) < 0.003
    assert 0.12 < layer.w_in.max() <= 64**-0.5 and 0.17 < layer.w_out.max() <= 32**-0.5


def test_forward_on_the_meta_device():
    y, routing = nn.MoELayer(8, 16, 4, 2, device="meta")(torch.empty(5, 8, device="meta"))
    assert y.is_meta and y.shape == (5, 8) and routing.topk_indices.shape == (5, 2)


def test_state_dict():
    layer = nn.MoELayer(8, 16, 4, 2, activation="swiglu")
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {"w_in": (4, 32, 8), "w_out": (4, 8, 16), "router.weight": (4, 8)}
    other = nn.MoELayer(8, 16, 4, 2, activation="swiglu")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(layer(x)[0], other(x)[0])
    balanced = nn.TopKRouter(8, 4, 2, bias=True, balancer=nn.LossFreeBalancer(4))
    assert set(balanced.state_dict()) == {"weight", "bias", "balancer.expert_bias"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compile(compiled, activation):
    layer = nn.MoELayer(8, 16, 4, 2, activation=activation)
    function = compiled(layer)
    for tokens in (7, 12):
        x = torch.randn(tokens, 8, requires_grad=True)
        mask = torch.arange(tokens) > 2
        y, routing = function(x, mask)
        want, want_routing = layer(x, mask)
        torch.testing.assert_close(y, want)
        assert torch.equal(routing.tokens_per_expert, want_routing.tokens_per_expert)
        for a, b in zip(gradients(y, x, layer), gradients(want, x, layer), strict=True):
            torch.testing.assert_close(a, b)


def test_compile_float64_and_a_whole_model_with_balancers(compiled):
    layer = nn.MoELayer(5, 7, 4, 2, dtype=torch.float64)
    x = torch.randn(9, 5, dtype=torch.float64)
    torch.testing.assert_close(compiled(layer)(x)[0], layer(x)[0])

    model = small_model(
        num_layers=1, make_router=lambda: nn.TopKRouter(8, 4, 2, balancer=nn.LossFreeBalancer(4))
    )
    balance = nn.SwitchBalanceLoss()

    def objective(tokens):
        logits, routings = model(tokens)
        return logits.square().mean() + sum(balance(routing) for routing in routings)

    step = compiled(objective)
    for tokens in (torch.randint(256, (2, 6)), torch.randint(256, (3, 9))):
        counts = model.blocks[0].moe.router.balancer.tokens_per_expert
        before = int(counts.sum())
        torch.testing.assert_close(step(tokens), objective(tokens))
        assert int(counts.sum()) - before == 2 * tokens.numel() * 2  # once compiled, once not


def test_compile_under_autocast(compiled):
    layer = nn.MoELayer(8, 16, 4, 2)
    x = torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(layer)(x)[0], layer(x)[0])


@pytest.mark.usefixtures("backend")
def test_compiled_autograd():
    """The gradients of all ops as a graph, permuted weights included."""
    layer = nn.MoELayer(8, 16, 6, 3)
    tokens = torch.randn(23, 8)

    def grads(compiled):
        layer.zero_grad()
        x = tokens.clone().requires_grad_()
        y, routing = layer(x)
        loss = y.square().sum() + F.balance_loss(routing, {"switch": 1.0, "z": 1.0}).total
        p = F.moe_permute(x, routing.topk_indices, 6, routing.topk_weights)
        loss = loss + (p.permuted.sum(1) * p.permuted_weights).sum()
        loss = (
            loss + F.expert_bincount(routing.topk_indices, 6, routing.topk_weights).square().sum()
        )
        with torch._dynamo.config.patch(compiled_autograd=compiled):
            torch.compile(lambda: loss.backward(), backend="eager")()
        return [x.grad, *(parameter.grad for parameter in layer.parameters())]

    torch.testing.assert_close(grads(True), grads(False))


def test_export():
    layer = nn.MoELayer(8, 16, 4, 2).eval()
    x = torch.randn(6, 8)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},))
    x = torch.randn(11, 8)
    y, routing = program.module()(x)
    torch.testing.assert_close(y, layer(x)[0])
    assert isinstance(routing, F.RoutingResult)
    names = {str(node.target) for node in program.graph.nodes}
    assert "equipoise.topk_gating.default" in names and "equipoise.moe_permute.default" in names


def test_autocast_runs_experts_in_bfloat16_and_the_router_in_float32():
    layer = nn.MoELayer(8, 16, 4, 2)
    x = torch.randn(30, 8, requires_grad=True)
    want, want_routing = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x)
    assert y.dtype == torch.bfloat16
    for got, expected in zip(routing, want_routing, strict=True):
        assert torch.equal(got, expected)
    torch.testing.assert_close(y.float(), want, rtol=4e-2, atol=4e-2)
    y.sum().backward()
    assert layer.w_in.grad.dtype == torch.float32 and layer.router.weight.grad is not None


def test_router_matmul_is_float32_for_half_tokens():
    router = nn.TopKRouter(64, 8, 2).to(torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    logits = router.logits(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ router.weight.float().T)
    assert router.double().logits(x.double()).dtype == torch.float64


def test_router_options():
    x = torch.randn(3, 7, 16)
    router = nn.TopKRouter(16, 8, 3, norm_topk_prob=True, scaling_factor=2.5, bias=True)
    torch.nn.init.normal_(router.bias)
    weights, indices = (x @ router.weight.T + router.bias).softmax(-1).topk(3)
    result = router(x)
    assert torch.equal(result.topk_indices, indices)
    want = 2.5 * weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(result.topk_weights, want)


def test_balancer_steers_the_selection_only():
    router = nn.TopKRouter(16, 8, 2, balancer=nn.LossFreeBalancer(8))
    x = torch.randn(50, 16)
    router.balancer.expert_bias[5] = 10.0
    result = router(x)
    assert (result.topk_indices[:, 0] == 5).all()
    chosen = (x @ router.weight.T).softmax(-1).gather(-1, result.topk_indices)
    torch.testing.assert_close(result.topk_weights, chosen)
    assert torch.equal(router.balancer.tokens_per_expert, result.tokens_per_expert)


def test_a_router_of_ones_own():
    router = nn.TopKRouter(8, 4, 2, norm_topk_prob=False)
    layer = nn.MoELayer(8, 16, 4, 2, router=router)
    x = torch.randn(5, 8)
    assert layer.router is router
    assert torch.equal(layer(x)[1].topk_weights, router(x).topk_weights)


@pytest.mark.filterwarnings("ignore:balance_loss. 'switch' is left out")
def test_switch_balance_loss():
    logits = torch.randn(30, 6, requires_grad=True)
    routing = F.topk_gating(logits, 2)
    loss = nn.SwitchBalanceLoss(coeff=0.05)(routing)
    p = logits.softmax(-1).mean(0)
    f = routing.tokens_per_expert / routing.tokens_per_expert.sum()
    want = 0.05 * 6 * (f * p).sum()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, want))
    )
    assert nn.SwitchBalanceLoss()(F.topk_gating(logits, 6)) == 0  # dense: nothing to balance


def small_model(num_layers=2, **options):
    return nn.MoETransformerLM(
        256,
        8,
        num_layers=num_layers,
        num_heads=2,
        d_hidden=16,
        num_experts=4,
        top_k=2,
        max_seq_len=16,
        **options,
    )


def test_language_model_is_causal():
    model = small_model()
    tokens = torch.randint(256, (3, 10))
    changed = tokens.clone()
    changed[:, 6:] = torch.randint(256, (3, 4))
    logits, routings = model(tokens)
    assert logits.shape == (3, 10, 256) and len(routings) == 2
    torch.testing.assert_close(logits[:, :6], model(changed)[0][:, :6])
    assert not torch.equal(logits[:, 6:], model(changed)[0][:, 6:])


def test_language_model_does_not_see_masked_tokens():
    model = small_model()
    tokens = torch.randint(256, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 2:5] = False
    changed = torch.where(mask, tokens, 0)
    (a, routings), (b, _) = model(tokens, mask), model(changed, mask)
    torch.testing.assert_close(a[mask], b[mask])
    assert all(int(routing.tokens_per_expert.sum()) == 2 * 12 for routing in routings)
    everything = torch.ones_like(mask)
    torch.testing.assert_close(model(tokens, everything)[0], model(tokens)[0])


def test_language_model_learns():
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = torch.arange(16).repeat(4, 1)
    losses = []
    for _ in range(30):
        logits, _ = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.TopKRouter(8, 4, 5), "top_k must be between 1 and num_experts = 4, got 5"),
        (lambda: nn.TopKRouter(8, 4, 0), "top_k must be between 1"),
        (lambda: nn.TopKRouter(0, 4, 2), "d_model must be at least 1, got 0"),
        (lambda: nn.MoELayer(8, 0, 4, 2), "d_hidden must be at least 1, got 0"),
        (lambda: nn.TopKRouter(8, 4, 2, balancer=nn.LossFreeBalancer(5)), "got one for 5"),
        (lambda: nn.MoELayer(8, 16, 4, 2, activation="tanh"), "relu, gelu, swiglu, got 'tanh'"),
        (lambda: nn.MoELayer(8, 16, 4, 2, capacity_factor=1.0), "capacity_factor must be None"),
        (lambda: nn.MoELayer(8, 16, 4, 2, router=nn.TopKRouter(8, 4, 1)), r"got \(4, 1\)"),
        (
            lambda: nn.MoETransformerBlock(8, 3, 16, 4, 2),
            "num_heads must divide d_model = 8, got 3",
        ),
        (lambda: nn.SwitchBalanceLoss(-1.0), "coeff must not be negative, got -1.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_inputs():
    layer = nn.MoELayer(8, 16, 4, 2)
    with pytest.raises(RuntimeError, match=r"x must have shape .* = \[..., 8\], got \[5, 7\]"):
        layer(torch.randn(5, 7))
    with pytest.raises(RuntimeError, match="x must be floating, got torch.int64"):
        layer(torch.ones(5, 8, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="token_mask"):
        layer(torch.randn(5, 8), torch.ones(4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="type of w_in .torch.float32., got torch.bfloat16"):
        layer(torch.randn(5, 8, dtype=torch.bfloat16))

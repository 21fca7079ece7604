# SPDX-License-Identifier: Apache-2.0
"""The routers of equipoise.nn: their formulas, alone and inside MoELayer and MoETransformerLM."""

import copy
import math

import pytest
import torch
from helpers import tolerance
from torch.autograd import gradcheck

import equipoise.functional as F
from equipoise import nn, reference

D, E, K = 8, 6, 2

#: One of each kind, with options that are not the defaults.
MAKE = {
    "topk": lambda **o: nn.TopKRouter(D, E, K, temperature=0.5, bias=True, **o),
    "groups": lambda **o: nn.TopKRouter(D, E, K, "sigmoid", num_groups=3, group_topk=2, **o),
    "dropout": lambda **o: nn.TopKRouter(D, E, K, jitter_eps=0.1, expert_dropout=0.3, **o),
    "random": lambda **o: nn.TopKRouter(D, E, K, routing="random", **o),
    "balanced": lambda **o: nn.TopKRouter(D, E, K, routing="balanced", **o),
    "noisy": lambda **o: nn.NoisyTopKRouter(D, E, K, **o),
    "sinkhorn": lambda **o: nn.SinkhornRouter(D, E, K, num_iters=3, **o),
    "dense": lambda **o: nn.DenseRouter(D, E, **o),
    "sequential": lambda **o: nn.SequentialRouter(D, E, K, influence=0.7, **o),
    "damped": lambda **o: nn.SequentialRouter(
        D, E, K, hidden_size=5, damping=0.8, influence=0.9, **o
    ),
    "expert_choice": lambda **o: nn.ExpertChoiceRouter(D, E, K, **o),
}


def make(kind, **options):
    """A router whose choices are far from ties."""
    router = MAKE[kind](**options)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def values(result):
    """The tensors of either kind of result that have a gradient."""
    return [t for t in result if t is not None and t.requires_grad]


@pytest.fixture
def load_loss(monkeypatch):
    """Stands in for functional.load_loss and remembers what it was given."""
    given = []

    def stand_in(clean_logits, noisy_logits, noise_stddev, top_k, token_mask=None):
        given.append((clean_logits, noisy_logits, noise_stddev, top_k, token_mask))
        return ((noisy_logits - clean_logits) / noise_stddev).square().mean()

    monkeypatch.setattr(F, "load_loss", stand_in, raising=False)
    return given


# ---- every router --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKE)
def test_shapes_and_gradients(kind):
    router = make(kind)
    x = torch.randn(3, 5, D, requires_grad=True)
    mask = torch.rand(3, 5) < 0.7
    result = router(x, mask)
    if kind == "expert_choice":
        capacity = math.ceil(K * 15 / E)
        assert result.token_indices.shape == result.token_weights.shape == (E, capacity)
        assert not torch.isin(result.token_indices, (~mask).flatten().nonzero()).any()
    else:
        slots = E if kind == "dense" else K
        assert result.topk_indices.shape == (3, 5, slots) and result.topk_indices.max() < E
        assert (result.topk_indices[~mask] == -1).all() and (result.topk_indices[mask] >= 0).all()
        assert result.tokens_per_expert.sum() == slots * mask.sum()
        ranked = result.topk_indices[mask].sort().values
        assert (ranked.diff() > 0).all()  # no expert twice
    loss = sum((t * torch.rand_like(t)).sum() for t in values(result))
    leaves = [x, *router.parameters()]
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert gradient.shape == leaf.shape and gradient.isfinite().all()
        assert (gradient != 0).any()
    assert f"d_model={D}, num_experts={E}" in repr(router)


@pytest.mark.parametrize("kind", MAKE)
def test_eval_is_deterministic_and_saved_and_loaded(kind):
    router, other = make(kind).eval(), make(kind).eval()
    other.load_state_dict(router.state_dict())
    x = torch.randn(3, 5, D)
    if kind == "random":  # by intent; the logits that the weights come from are not
        assert not torch.equal(router(x).topk_indices, router(x).topk_indices)
        assert torch.equal(router.logits(x), other.logits(x))
        return
    for a, b, c in zip(router(x), router(x), copy.deepcopy(other)(x), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("kind", MAKE)
def test_reset_parameters_and_the_meta_device(kind):
    router = MAKE[kind](device="meta")
    assert all(p.is_meta for p in router.parameters())
    router.to_empty(device="cpu")
    tensors = {**router.state_dict(), **dict(router.named_buffers())}
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    torch.manual_seed(1)
    router.reset_parameters()
    fresh = MAKE[kind]()
    for name, want in {**fresh.state_dict(), **dict(fresh.named_buffers())}.items():
        got = tensors[name]
        assert got.isfinite().all(), name
        if want.numel() > 1:
            torch.testing.assert_close(got.std(), want.std(), rtol=0.5, atol=0)
        else:
            assert got == want


@pytest.mark.parametrize("kind", MAKE)
def test_half_tokens_float64_and_autocast(kind):
    router = make(kind).eval()
    x = torch.randn(3, 5, D)
    seed = torch.random.get_rng_state()
    want = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.random.set_rng_state(seed)
        for a, b in zip(router(x), want, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    half = copy.deepcopy(router).to(torch.bfloat16)
    assert all(t.dtype == torch.float32 for t in values(half(x.to(torch.bfloat16))))
    double = make(kind, router_dtype=torch.float64).eval()
    double.load_state_dict(router.state_dict())
    torch.random.set_rng_state(seed)
    exact = double(x)
    assert all(t.dtype == torch.float64 for t in values(exact))
    if kind != "random":
        for a, b in zip(want, exact, strict=True):
            torch.testing.assert_close(a, b, check_dtype=False, **tolerance(torch.float32))
    layer = nn.MoELayer(D, 16, E, double.top_k, router=double)
    assert layer(x)[0].dtype == torch.float32


@pytest.mark.parametrize("kind", MAKE)
def test_gradients(kind):
    """Through tokens and parameters, in float64; the choice itself is held still."""
    router = make(kind, dtype=torch.float64)
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in router.named_parameters()]
    seed = torch.random.get_rng_state()

    def outputs(x, *parameters):
        torch.random.set_rng_state(seed)
        named = dict(zip(names, parameters, strict=True))
        return values(torch.func.functional_call(router, named, (x,)))

    assert gradcheck(outputs, (x, *router.parameters()))


@pytest.mark.parametrize("kind", MAKE)
def test_compile(kind, compiled):
    router = make(kind)
    fast = compiled(router)
    for batch, masked in ((2, False), (3, False), (2, True)):
        x = torch.randn(batch, 3, D, requires_grad=True)
        mask = torch.arange(batch * 3).view(batch, 3) % 4 > 0 if masked else None
        leaves = [x, *router.parameters()]
        results, gradients = [], []
        for call in (fast, router):
            torch.manual_seed(3)
            results.append(call(x, mask))
            loss = sum(t.square().sum() for t in values(results[-1]))
            gradients.append(torch.autograd.grad(loss, leaves))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
    router.eval()
    with torch.no_grad():
        torch.manual_seed(3)
        got = fast(x)
        torch.manual_seed(3)
        for a, b in zip(got, router(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", MAKE)
def test_in_a_language_model(kind):
    model = nn.MoETransformerLM(
        32,
        D,
        num_layers=2,
        num_heads=2,
        d_hidden=12,
        num_experts=E,
        top_k=MAKE[kind]().top_k,
        max_seq_len=8,
        make_router=lambda: make(kind),
    )
    tokens = torch.randint(32, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    logits, routings = model(tokens, mask)
    assert logits.shape == (3, 7, 32) and len(routings) == 2
    logits[mask].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert (model.blocks[0].moe.w_in.grad != 0).any()


@pytest.mark.parametrize("kind", MAKE)
def test_no_tokens(kind):
    for shape in ((0, 5, D), (2, 0, D)):
        x = torch.zeros(shape, requires_grad=True)
        result = make(kind)(x)
        assert result[0].numel() == 0 or (result.topk_indices.shape[:-1] == shape[:-1])
        nn.MoELayer(D, 12, E, MAKE[kind]().top_k, router=make(kind))(x)[0].sum().backward()
        assert x.grad.shape == shape


# ---- options of TopKRouter -----------------------------------------------------------------------


def test_defaults_are_plain_gating():
    router = nn.TopKRouter(D, E, K)
    x = torch.randn(5, D)
    want = F.topk_gating(x @ router.weight.T, K)
    for a, b in zip(router(x), want, strict=True):
        torch.testing.assert_close(a, b)
    assert router.temperature is None and set(router.state_dict()) == {"weight"}


def test_groups_segments_and_forced_indices():
    router = make("groups")
    x, segments = torch.randn(4, 3, D), torch.arange(4).repeat_interleave(3).view(4, 3)
    forced = torch.randint(E, (4, 3, 1))
    forced = torch.cat([forced, (forced + 1) % E], -1)
    for indices in (None, forced):
        got = router(x, segment_ids=segments, num_segments=4, forced_indices=indices)
        want = reference.topk_gating(
            x @ router.weight.T,
            K,
            "sigmoid",
            num_groups=3,
            group_topk=2,
            segment_ids=segments,
            num_segments=4,
            forced_indices=indices,
        )
        assert torch.equal(got.topk_indices, want[1]) and got.tokens_per_expert.shape == (4, E)
        torch.testing.assert_close(got.topk_weights, want[0])


def test_jitter():
    router = make("dropout")
    router.expert_dropout = 0.0
    x = torch.ones(2000, D)
    torch.nn.init.eye_(router.weight)
    factor = router.logits(x)[:, :E]
    assert 0.9 <= factor.min() < 0.902 and 1.098 < factor.max() <= 1.1
    assert abs(factor.mean() - 1) < 2e-3
    assert torch.equal(router.eval().logits(x)[:, :E], torch.ones(2000, E))


def test_expert_dropout():
    router = make("dropout")
    x = torch.randn(50, D)
    dropped = torch.stack([router(x).prob_sum == 0 for _ in range(400)])
    assert (dropped.float().mean(0) - 0.3).abs().max() < 0.1
    assert not (router.eval()(x).prob_sum == 0).any()
    router.train().expert_dropout = 0.999  # top_k experts stay, whatever happens
    for _ in range(5):
        result = router(x)
        assert (result.prob_sum > 0).sum() == K and (result.topk_indices >= 0).all()


def test_random_routing():
    router = make("random")
    result = router(torch.randn(3000, D))
    share = result.tokens_per_expert / 3000
    assert (share - K / E).abs().max() < 0.05
    chosen = router.logits(torch.ones(1, D)).softmax(-1)
    weights = router(torch.ones(1, D))
    torch.testing.assert_close(
        weights.topk_weights, chosen.gather(-1, weights.topk_indices)
    )  # of the plain scores
    first = router(torch.randn(2, D), forced_indices=torch.tensor([[0, 1], [2, 3]]))
    assert first.topk_indices.tolist() == [[0, 1], [2, 3]]  # replay comes first


def test_balanced_routing():
    router = make("balanced")
    result = router(torch.randn(9, D))
    assert result.topk_indices[:4].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert result.tokens_per_expert.tolist() == [3] * 6
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1, 1]).bool()
    assert router(torch.randn(9, D), mask).tokens_per_expert.tolist() == [2] * 6


class Switched(torch.nn.Module):
    """What TopKRouter wants of active_experts."""

    def __init__(self, *active):
        super().__init__()
        self.register_buffer("active_experts", torch.tensor(active).bool())
        self.counts = torch.zeros(len(active), dtype=torch.int64)

    def record(self, tokens_per_expert):
        self.counts += tokens_per_expert


def test_active_experts():
    active = Switched(1, 0, 1, 1, 0, 1)
    x = torch.randn(60, D)
    for routing in ("learned", "random", "balanced"):
        for dropout in (0.0, 0.9):
            router = nn.TopKRouter(
                D, E, K, active_experts=active, routing=routing, expert_dropout=dropout
            )
            active.counts.zero_()
            result = router(x)
            assert not torch.isin(result.topk_indices, torch.tensor([-1, 1, 4])).any()
            assert (result.prob_sum[[1, 4]] == 0).all()
            assert torch.equal(active.counts, result.tokens_per_expert)
            if routing == "balanced" and not dropout:
                assert result.tokens_per_expert.tolist() == [30, 0, 30, 30, 0, 30]
    active.active_experts[1] = True  # in place, at once
    assert (router.eval()(x).prob_sum[1] > 0).all()


class Scored(torch.nn.Module):
    """A balancer that wants the scores."""

    num_experts, needs_scores = E, True

    def __init__(self):
        super().__init__()
        self.register_buffer("expert_bias", torch.zeros(E))

    def record(self, tokens_per_expert, scores):
        self.seen = (tokens_per_expert, scores)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus", "identity"])
def test_a_balancer_that_needs_scores(score_function):
    router = nn.NoisyTopKRouter(D, E, K, score_function=score_function, balancer=Scored())
    x, mask = torch.randn(2, 5, D), torch.rand(2, 5) < 0.6
    mask[0, 0] = True
    result = router(x, mask, mask.long(), 2)
    counts, scores = router.balancer.seen
    assert torch.equal(counts, result.tokens_per_expert.sum(0)) and not scores.requires_grad
    assert (scores[~mask] == -torch.inf).all()
    want = reference.topk_gating(router.noisy_logits, E, score_function)
    want = torch.zeros(2, 5, E).scatter(-1, want[1], want[0])
    torch.testing.assert_close(scores[mask], want[mask])


def test_temperature():
    plain, router = nn.TopKRouter(D, E, K), nn.TopKRouter(D, E, K, temperature=2.0)
    router.load_state_dict(plain.state_dict())
    x = torch.randn(5, D)
    torch.testing.assert_close(router.logits(x), plain.logits(x) / 2)
    router.to(torch.bfloat16)
    assert router.temperature.dtype == torch.float32
    router.float()
    compiles = 0

    def counting(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph

    torch._dynamo.reset()
    fast = torch.compile(router, fullgraph=True, backend=counting)
    for temperature in (2.0, 1.9, 1.8, 0.1):
        router.temperature.fill_(temperature)
        torch.testing.assert_close(fast(x).lse, (router.logits(x)).logsumexp(-1))
    assert compiles == 1


def test_init_std():
    weight = nn.TopKRouter(100, 50, K, bias=True, init_std=0.005)
    assert 0.0045 < weight.weight.std() < 0.0055 and (weight.bias == 0).all()


# ---- NoisyTopKRouter -----------------------------------------------------------------------------


def test_noisy_gating_formula_and_seed():
    def run(seed, **options):
        router.generator = torch.Generator().manual_seed(seed)
        return router(x, **options)

    router = make("noisy", norm_topk_prob=True)
    x = torch.randn(20, D)
    result = run(5)
    clean = x @ router.weight.T
    stddev = torch.nn.functional.softplus(x @ router.noise_weight.T) + 0.01
    epsilon = torch.randn(20, E, generator=torch.Generator().manual_seed(5))
    noisy = clean + epsilon * stddev
    torch.testing.assert_close(router.clean_logits, clean)
    torch.testing.assert_close(router.noise_stddev, stddev)
    torch.testing.assert_close(router.noisy_logits, noisy)
    torch.testing.assert_close(result.topk_weights, noisy.topk(K).values.softmax(-1))
    torch.testing.assert_close(result.lse, noisy.logsumexp(-1))
    assert torch.equal(run(5).topk_weights, result.topk_weights)
    assert not torch.equal(run(6).topk_weights, result.topk_weights)
    router.eval()
    torch.testing.assert_close(router(x).lse, clean.logsumexp(-1))
    router.generator = None
    torch.manual_seed(7)
    first = router.train()(x)
    torch.manual_seed(7)
    assert torch.equal(first.topk_weights, router(x).topk_weights)


def test_noise_at_the_start():
    router = nn.NoisyTopKRouter(D, E, K, noise_epsilon=0.1)
    router(torch.randn(4, D))
    torch.testing.assert_close(router.noise_stddev, torch.full((4, E), math.log(2) + 0.1))
    router.reset_parameters()
    assert router.noise_stddev is None


def test_load_loss(load_loss):
    router = make("noisy")
    with pytest.raises(RuntimeError, match="NoisyTopKRouter: load_loss.. needs a forward pass"):
        router.load_loss()
    router.eval()(torch.randn(4, D))
    with pytest.raises(RuntimeError, match="needs a forward pass in training mode"):
        router.load_loss()
    x, mask = torch.randn(4, D), torch.tensor([True, False, True, True])
    router.train()(x, mask)
    gradients = torch.autograd.grad(router.load_loss(), list(router.parameters()))
    clean, noisy, stddev, top_k, token_mask = load_loss[-1]
    assert clean is router.clean_logits and noisy is router.noisy_logits
    assert stddev is router.noise_stddev and top_k == K and token_mask is mask
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_load_loss_knows_who_is_absent(load_loss):
    router = make("noisy", active_experts=Switched(1, 0, 1, 1, 1, 1))
    result = router(torch.randn(4, D))
    router.load_loss()
    for logits in load_loss[-1][:2]:
        assert (logits[:, 1] == -torch.inf).all() and logits[:, 2:].isfinite().all()
    torch.testing.assert_close(router.noisy_logits.logsumexp(-1), result.lse)


def test_a_trained_noisy_router_can_be_copied():
    router = make("noisy")
    router.generator = torch.Generator().manual_seed(1)
    router(torch.randn(4, D))
    other = copy.deepcopy(router)
    assert other.clean_logits is None and router.clean_logits is not None
    x = torch.randn(4, D)
    assert torch.equal(router(x).topk_weights, other(x).topk_weights)


# ---- SinkhornRouter ------------------------------------------------------------------------------


def test_sinkhorn_router():
    router = make("sinkhorn")
    x = torch.randn(40, D)
    logits = router.logits(x)
    result = router(x)
    assert torch.equal(result.topk_indices, F.sinkhorn(logits, 3).topk(K).indices)
    scores = logits.softmax(-1)
    torch.testing.assert_close(result.topk_weights, scores.gather(-1, result.topk_indices))
    assert torch.equal(router.eval()(x).topk_indices, scores.topk(K).indices)
    forced = torch.arange(80).view(40, 2) % E
    assert torch.equal(router.train()(x, forced_indices=forced).topk_indices, forced)


def test_sinkhorn_router_balances():
    router = nn.SinkhornRouter(D, E, 1, num_iters=50)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(600, D) + 2
    assert router.eval()(x).tokens_per_expert.max() > 200
    assert router.train()(x).tokens_per_expert.max() < 120


def test_sinkhorn_router_prefers_a_hopeless_expert_to_an_absent_one():
    router = nn.SinkhornRouter(1, 3, 2, active_experts=Switched(0, 1, 1))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.0], [0.0], [1000.0]]))
    assert router(torch.ones(4, 1)).topk_indices.tolist() == [[2, 1]] * 4  # its part underflows


# ---- ExpertChoiceRouter --------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.usefixtures("backend")
def test_expert_choice_layer_equals_the_loop(masked, activation):
    torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN
    try:
        router = make("expert_choice", dtype=torch.float64)
        options = {"activation": activation, "router": router, "dtype": torch.float64}
        layer = nn.MoELayer(D, 12, E, K, **options)
        x = torch.randn(2, 11, D, dtype=torch.float64, requires_grad=True)
        mask = torch.arange(22).view(2, 11) % 7 == 0 if masked else None  # fewer than C
        y, choice = layer(x, mask)
        assert isinstance(choice, F.ExpertChoiceResult)
        assert choice.token_indices.shape == (E, math.ceil(K * 22 / E))
        assert (choice.token_indices == -1).any() == masked

        probs = (x.view(22, D) @ router.weight.T).softmax(-1)
        want = [torch.zeros(D, dtype=torch.float64) for _ in range(22)]
        for expert in range(E):
            for token in choice.token_indices[expert].tolist():
                if token >= 0:
                    hidden = layer.w_in[expert] @ x.view(22, D)[token]
                    if activation == "relu":
                        hidden = hidden.relu()
                    else:
                        gate, up = hidden.chunk(2)
                        hidden = torch.nn.functional.silu(gate) * up
                    out = layer.w_out[expert] @ hidden
                    want[token] = want[token] + probs[token, expert] * out
        want = torch.stack(want).view(2, 11, D)
        torch.testing.assert_close(y, want, **tolerance(torch.float64))
        leaves = [x, *layer.parameters()]
        weights = torch.randn_like(want)
        for got, expected in zip(
            torch.autograd.grad((y * weights).sum(), leaves),
            torch.autograd.grad((want * weights).sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, **tolerance(torch.float64))
    finally:
        torch.use_deterministic_algorithms(False)


def test_expert_choice_is_balanced_and_ceil():
    router = make("expert_choice")
    for tokens, capacity in ((1, 1), (2, 1), (3, 1), (4, 2), (100, 34)):
        choice = router(torch.randn(tokens, D) + 3)
        assert choice.token_indices.shape == (E, capacity) and (choice.token_indices >= 0).all()
    assert nn.ExpertChoiceRouter(D, E, E)(torch.randn(7, D)).token_indices.shape == (E, 7)


def test_expert_choice_layer_compiles_and_runs_in_half_types(compiled):
    layer = nn.MoELayer(D, 16, E, K, router=make("expert_choice"))
    fast = compiled(layer)
    for tokens in (5, 9):
        x = torch.randn(tokens, D, requires_grad=True)
        results = [call(x)[0] for call in (fast, layer)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in results))
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), results[1], rtol=4e-2, atol=4e-2)


# ---- SequentialRouter ----------------------------------------------------------------------------


def by_hand(router, x, mask=None, reset=None):
    """Logits [B, S, E] by the equations of the GRU."""
    gru, logits = router.gru, []
    for b in range(x.shape[0]):
        h = x.new_zeros(router.hidden_size)
        for t in range(x.shape[1]):
            if reset is not None and reset[b, t]:
                h = torch.zeros_like(h)
            if mask is None or mask[b, t]:
                carried = router.damping * h
                of_x = (gru.weight_ih_l0 @ x[b, t] + gru.bias_ih_l0).chunk(3)
                of_h = (gru.weight_hh_l0 @ carried + gru.bias_hh_l0).chunk(3)
                r, z = ((a + c).sigmoid() for a, c in zip(of_x[:2], of_h[:2], strict=True))
                h = (1 - z) * (of_x[2] + r * of_h[2]).tanh() + z * carried
            token = router.weight @ x[b, t]
            logits.append(
                router.influence * (router.sequence_weight @ h) + (1 - router.influence) * token
            )
    return torch.stack(logits).view(*x.shape[:2], -1)


@pytest.mark.parametrize("options", [{}, {"influence": 0.3}, {"damping": 0.6, "hidden_size": 3}])
def test_sequential_formula(options):
    router = nn.SequentialRouter(D, E, K, dtype=torch.float64, **options)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 6, D, dtype=torch.float64)
    mask, reset = torch.rand(3, 6) < 0.7, torch.rand(3, 6) < 0.3
    for arguments in ((None, None), (mask, None), (None, reset), (mask, reset)):
        got, want = router.logits(x, *arguments), by_hand(router, x, *arguments)
        torch.testing.assert_close(got, want, **tolerance(torch.float64))
        routing = router(x, *arguments)
        plain = F.topk_gating(want, K, token_mask=arguments[0])
        assert torch.equal(routing.topk_indices, plain.topk_indices)


def test_sequential_is_causal_and_starts_anew():
    router = make("damped")
    x = torch.randn(2, 6, D)
    changed = torch.cat([x[:, :4], torch.randn(2, 2, D)], 1)
    logits = router.logits(x)
    torch.testing.assert_close(logits[:, :4], router.logits(changed)[:, :4])
    assert not torch.allclose(logits[:, 4:], router.logits(changed)[:, 4:])
    torch.testing.assert_close(logits[1:], router.logits(x[1:]))  # sequences do not see each other
    reset = torch.tensor([[False, False, True, False, False, False]]).expand(2, 6)
    packed = router.logits(x, reset=reset)
    apart = torch.cat([router.logits(x[:, :2]), router.logits(x[:, 2:])], 1)
    torch.testing.assert_close(packed, apart)


def test_sequential_does_not_see_masked_tokens():
    router = make("sequential")
    x = torch.randn(2, 6, D)
    mask = torch.tensor([0, 1, 0, 1, 1, 0]).bool().expand(2, 6)
    whole = router.logits(x, mask)
    torch.testing.assert_close(whole[:, [1, 3, 4]], router.logits(x[:, [1, 3, 4]]))
    broken = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    routing = router(broken, mask)
    routing.topk_weights.sum().backward()
    assert router.gru.weight_ih_l0.grad.isfinite().all()


def test_sequential_without_influence_is_a_topk_router():
    router = make("sequential")
    router.influence = 0.0
    x = torch.randn(2, 3, D)
    torch.testing.assert_close(router.logits(x), x @ router.weight.T)


# ---- DenseRouter, router_parameters --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:balance_loss. 'switch' is left out")
def test_dense_router_has_no_balance_loss():
    router = make("dense")
    x = torch.randn(7, D)
    result = router(x)
    dense = torch.zeros(7, E).scatter(-1, result.topk_indices, result.topk_weights)
    torch.testing.assert_close(dense, (x @ router.weight.T).softmax(-1))
    report = F.balance_loss(result, {"switch": 1.0, "z": 1.0})
    assert report.unscaled["switch"] == 0 and report.unscaled["z"] > 0
    assert nn.DenseRouter(D, E, E).top_k == E


def test_router_parameters():
    shared = nn.TopKRouter(D, E, K, bias=True)
    model = torch.nn.ModuleList(
        [
            nn.MoELayer(D, 4, E, K, router=make("sequential")),
            torch.nn.Linear(3, 3),
            nn.MoELayer(D, 4, E, K, router=shared),
            nn.MoELayer(D, 4, E, K, router=shared),
            make("expert_choice"),
        ]
    )
    got = [id(p) for p in nn.router_parameters(model)]
    routers = (model[0].router, shared, model[4])
    assert got == [id(p) for router in routers for p in router.parameters()]
    assert len(got) == 6 + 2 + 1
    assert len(nn.router_parameters(shared)) == 2
    with pytest.raises(ValueError, match="router_parameters: model .* got a Linear without one"):
        nn.router_parameters(torch.nn.Linear(3, 3))


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: nn.TopKRouter(D, E, K, jitter_eps=1.0), r"jitter_eps must be in \[0, 1\), got 1"),
        (lambda: nn.TopKRouter(D, E, K, expert_dropout=-0.1), "expert_dropout must be in .* got -"),
        (
            lambda: nn.TopKRouter(D, E, K, routing="none"),
            "routing must be 'learned', .* got 'none'",
        ),
        (
            lambda: nn.TopKRouter(D, E, K, temperature=0.0),
            "temperature must be None or above 0, got",
        ),
        (lambda: nn.TopKRouter(D, E, K, init_std=-1.0), "init_std must not be negative, got -1"),
        (
            lambda: nn.TopKRouter(D, E, K, router_dtype=torch.bfloat16),
            "router_dtype must be torch.float32 or torch.float64, got torch.bfloat16",
        ),
        (lambda: nn.TopKRouter(D, E, K, num_groups=4, group_topk=1), "num_groups must divide"),
        (lambda: nn.TopKRouter(D, E, K, num_groups=3), "group_topk must be given"),
        (lambda: nn.TopKRouter(D, E, K, score_function="tanh"), "score_function must be"),
        (
            lambda: nn.TopKRouter(D, E, K, active_experts=Switched(1, 1, 1)),
            r"active_experts must have a buffer of shape \[E\] = \[6\], got \[3\]",
        ),
        (lambda: nn.NoisyTopKRouter(D, E, K, noise_epsilon=0.0), "noise_epsilon must be above 0"),
        (lambda: nn.SinkhornRouter(D, E, K, num_iters=0), "num_iters must be at least 1, got 0"),
        (
            lambda: nn.SinkhornRouter(D, E, K, balancer=nn.LossFreeBalancer(E)),
            "balancer must be None",
        ),
        (
            lambda: nn.SinkhornRouter(D, E, K, num_groups=2, group_topk=1),
            "num_groups must be 1: .* got 2",
        ),
        (
            lambda: nn.SinkhornRouter(D, E, K, routing="random"),
            "routing must be 'learned', got 'ra",
        ),
        (lambda: nn.DenseRouter(D, E, K), "top_k must be None or num_experts = 6, got 2"),
        (lambda: nn.ExpertChoiceRouter(D, E, 7), "top_k must be between 1 and num_experts = 6"),
        (lambda: nn.SequentialRouter(D, E, K, hidden_size=0), "hidden_size must be at least 1"),
        (lambda: nn.SequentialRouter(D, E, K, damping=0.0), r"damping must be in \(0, 1\], got 0"),
        (
            lambda: nn.SequentialRouter(D, E, K, influence=1.1),
            r"influence must be in \[0, 1\], got",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=f"^[A-Za-z]+Router: {message}"):
        make()


def test_bad_active_experts_of_a_rule():
    active = Switched(1, 1, 1, 1, 1, 1)
    active.min_experts = 1
    with pytest.raises(ValueError, match="must keep at least top_k = 2 experts, got 1"):
        nn.TopKRouter(D, E, K, active_experts=active)


@pytest.mark.parametrize("kind", MAKE)
def test_bad_inputs(kind):
    router = make(kind)
    name = type(router).__name__
    with pytest.raises(
        RuntimeError, match=rf"{name}: x must have shape .* \[..., 8\], got \[5, 7\]"
    ):
        router(torch.randn(5, 7))
    with pytest.raises(RuntimeError, match=f"{name}: x must be floating, got torch.int64"):
        router(torch.ones(1, 5, D, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="token_mask must have shape"):
        router(torch.randn(1, 5, D), torch.ones(4, dtype=torch.bool))


def test_bad_inputs_of_the_sequential_router():
    router = make("sequential")
    with pytest.raises(RuntimeError, match=r"x must have shape \[B, S, d_model\], got \[5, 8\]"):
        router(torch.randn(5, D))
    x = torch.randn(2, 5, D)
    with pytest.raises(RuntimeError, match=r"reset must have shape .* = \[2, 5\], got \[5\]"):
        router(x, reset=torch.ones(5, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="reset must be torch.bool, got torch.float32"):
        router(x, reset=torch.ones(2, 5))

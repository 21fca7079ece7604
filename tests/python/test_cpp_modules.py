# SPDX-License-Identifier: Apache-2.0
"""The C++ modules (`equipoise.cpp`) and their twins (`equipoise.nn`) hold the same numbers."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

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
    how = {"retain_graph": True, "materialize_grads": True}  # no noise in eval
    got = torch.autograd.grad(output, [x, *parameters_of(cpp_module).values()], weights, **how)
    theirs = parameters_of(python_module)
    want = torch.autograd.grad(expected, [x, *(theirs[name] for name in names)], weights, **how)
    for name, g, w in zip(["x", *names], got, want, strict=True):
        torch.testing.assert_close(g, w, **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


def twins(name, dtype, **options):
    """A C++ module and its twin, with the same parameters, large enough to spread the choices."""
    ours, theirs = getattr(cpp, name)(**options), getattr(nn, name)(**options, dtype=dtype)
    ours.to(dtype)
    assert_same_parameters(ours, theirs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(-1, 1)
    give_weights(theirs, ours)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TopKRouter", {}),
        ("TopKRouter", {"norm_topk_prob": True, "scaling_factor": 2.5}),
        ("TopKRouter", {"bias": True, "jitter_eps": 0.3}),
        ("TopKRouter", {"num_groups": 3, "group_topk": 1, "group_score": "max"}),
        ("TopKRouter", {"expert_dropout": 0.6, "init_std": 0.5}),
        ("NoisyTopKRouter", {"noise_epsilon": 0.5}),
        ("NoisyTopKRouter", {"score_function": "sigmoid", "norm_topk_prob": True, "bias": True}),
        ("SequentialRouter", {}),
        ("SequentialRouter", {"hidden_size": 3, "influence": 0.3, "bias": True}),
        ("SequentialRouter", {"damping": 0.7, "jitter_eps": 0.2}),
        ("SinkhornRouter", {"num_iters": 3, "expert_dropout": 0.3}),
        ("DenseRouter", {"score_function": "sigmoid"}),
    ],
)
def test_router_equals_its_twin(name, options, dtype):
    """In training, where both draw the same numbers from one seed, and in eval."""
    sizes = {"d_model": 8, "num_experts": 6} | ({} if name == "DenseRouter" else {"top_k": 2})
    ours, theirs = twins(name, dtype, **sizes, **options)
    x = torch.randn(6, 3, 8, dtype=dtype, requires_grad=True)
    mask = torch.rand(6, 3) > 0.3
    for training in (True, False):
        results = []
        for router in (ours, theirs):
            router.train(training)
            torch.manual_seed(3)
            results.append(router(x, token_mask=mask))
        assert_same_routing(*results, dtype)
        for field in ("topk_weights", "lse", "prob_sum"):
            got, want = (getattr(result, field) for result in results)
            assert_same_gradients(got, want, x, ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_expert_choice_router_equals_its_twin(dtype):
    ours, theirs = twins("ExpertChoiceRouter", dtype, **ROUTER, bias=True, jitter_eps=0.2)
    x = torch.randn(6, 3, 8, dtype=dtype, requires_grad=True)
    results = []
    for router in (ours, theirs):
        torch.manual_seed(3)
        results.append(router(x, token_mask=torch.arange(18).view(6, 3) % 3 > 0))
    got, want = results
    assert isinstance(got, F.ExpertChoiceResult)
    assert got.token_indices.shape == (5, 8)  # ceil(2 * 18 / 5)
    assert torch.equal(got.token_indices, want.token_indices)
    torch.testing.assert_close(got.token_weights, want.token_weights, **TOLERANCE[dtype])
    assert_same_gradients(got.token_weights, want.token_weights, x, ours, theirs, dtype)


@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_sequential_router_resets_as_its_twin(damping):
    sizes = {"d_model": 8, "num_experts": 6, "top_k": 2}
    ours, theirs = twins("SequentialRouter", torch.float64, **sizes, damping=damping)
    x = torch.randn(4, 9, 8, dtype=torch.float64)
    reset = torch.rand(4, 9) > 0.6
    routing = ours(x, reset=reset)
    assert_same_routing(routing, theirs(x, reset=reset), torch.float64)
    assert not torch.equal(routing.lse, ours(x).lse)


def test_noisy_router_keeps_what_the_load_loss_needs():
    ours, theirs = twins("NoisyTopKRouter", torch.float64, **ROUTER)
    assert ours.noise_stddev is None
    for _ in range(2):  # of the last forward, not of the first
        x = torch.randn(6, 8, dtype=torch.float64)
        for router in (ours, theirs):
            torch.manual_seed(3)
            router(x)
        for name in ("clean_logits", "noisy_logits", "noise_stddev"):
            got, want = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(got, want, **TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LossFreeBalancer", {"bias_update_rate": 0.3}),
        ("LossFreeBalancer", {"mode": "proportional", "center": True}),
        ("EMABalancer", {}),
        ("EMABalancer", {"balancing_strength": 0.5, "beta": 0.0}),
    ],
)
def test_balancer_equals_its_twin(name, options):
    ours, theirs = getattr(cpp, name)(5, **options), getattr(nn, name)(5, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["expert_bias"]
    for balancer in (ours, theirs):
        with pytest.raises(RuntimeError, match=f"{name}: update.* before any recorded forward"):
            balancer.update()
    for step in range(5):
        counts = torch.randint(100, (3, 5)) if step < 4 else torch.zeros(1, 5, dtype=torch.int64)
        for balancer in (ours, theirs):
            for micro_batch in counts:
                balancer.record(micro_batch)
            assert torch.equal(balancer.tokens_per_expert, counts.sum(0))
            balancer.update()
            assert balancer.tokens_per_expert.sum() == 0
        torch.testing.assert_close(ours.expert_bias, theirs.expert_bias, rtol=1e-6, atol=1e-8)
    other = getattr(cpp, name)(5)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.expert_bias, ours.expert_bias)
    ours.reset_parameters()
    assert ours.expert_bias.count_nonzero() == 0


def test_bias_of_a_balancer_stays_float32():
    model = torch.nn.ModuleDict({"router": cpp.TopKRouter(**ROUTER), "b": cpp.EMABalancer(5)})
    bias = torch.tensor([1.001, -0.3, 1e-7, 0.0, 3.0])
    model["b"].expert_bias.copy_(bias)
    for cast in (model.bfloat16, model["b"].bfloat16, model["b"].half, model["b"].double):
        cast()
        assert torch.equal(model["b"].expert_bias, bias)
    model["b"].to(torch.bfloat16)
    assert torch.equal(model["b"].expert_bias, bias)
    assert model["router"].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_once(use_reentrant):
    router, balancer = cpp.TopKRouter(**ROUTER), cpp.LossFreeBalancer(5)

    def forward(x):
        routing = router(x, expert_bias=balancer.expert_bias)
        balancer.record(routing.tokens_per_expert)
        return routing.topk_weights.sin()

    x = torch.randn(10, 8, requires_grad=True)
    checkpoint(forward, x, use_reentrant=use_reentrant).sum().backward()
    assert balancer.tokens_per_expert.sum() == 20
    balancer.eval()
    forward(x)
    assert balancer.tokens_per_expert.sum() == 20


RANK = """
import sys, torch
from equipoise import cpp
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
balancer = cpp.LossFreeBalancer(3, bias_update_rate=1.0)
world = torch.distributed.group.WORLD
try:
    balancer.update(group=world)  # all ranks raise
except RuntimeError as error:
    assert "before any recorded" in str(error)
if rank == 0:  # the other has nothing to record, and makes the same step
    balancer.record(torch.tensor([9, 2, 4]))
balancer.update(group=world)
print(balancer.expert_bias.tolist(), balancer.tokens_per_expert.tolist())
torch.distributed.destroy_process_group()
"""


def test_ranks_make_the_same_step(tmp_path):
    store = (tmp_path / "store").as_uri()
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), store], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert printed == [b"[-1.0, 1.0, 1.0] [0, 0, 0]\n"] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mi", ["similarity", "information"])
def test_advanced_loss_equals_its_twin(mi, dtype):
    options = {"lambda_uniform": 0.1, "lambda_entropy": 0.2, "lambda_mi": 0.3, "lambda_variance": 4}
    ours = cpp.AdvancedLoadBalancingLoss(6, **options, mi=mi)
    theirs = nn.AdvancedLoadBalancingLoss(6, **options, mi=mi)
    logits = torch.randn(9, 2, 3, dtype=dtype, requires_grad=True)
    x = torch.randn(9, 4, dtype=dtype, requires_grad=True)
    gates = (3 * logits).flatten(1).softmax(1).view_as(logits)
    for features in (x, None):
        got, want = ours(gates, features), theirs(gates, features)
        assert list(got) == list(want)
        for name in got:
            torch.testing.assert_close(got[name], want[name], **TOLERANCE[dtype])
        wanted = [logits, x] if mi == "similarity" and features is not None else [logits]
        for g, w in zip(
            torch.autograd.grad(got["total"], wanted, retain_graph=True),
            torch.autograd.grad(want["total"], wanted, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(g, w, **TOLERANCE[dtype])


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
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MoELayer", LAYER),
        ("NoisyTopKRouter", ROUTER | {"bias": True, "init_std": 0.5}),
        ("SequentialRouter", ROUTER | {"hidden_size": 3, "init_std": 0.5}),
        ("ExpertChoiceRouter", ROUTER),
    ],
)
def test_same_seed_draws_the_same_parameters(name, options, reset):
    drawn = []
    for module in (cpp, nn):
        torch.manual_seed(7)
        layer = getattr(module, name)(**options)
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
    for name in cpp.__all__:
        module = getattr(cpp, name)
        assert module.__module__ == "equipoise.cpp"
        assert "Args:" in module.__doc__


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cpp.TopKRouter(d_model=8, num_experts=4, top_k=5), "TopKRouter: top_k"),
        (lambda: cpp.NoisyTopKRouter(**ROUTER, noise_epsilon=-1), "NoisyTopKRouter: noise_eps"),
        (lambda: cpp.SequentialRouter(**ROUTER, damping=2), "SequentialRouter: damping"),
        (lambda: cpp.SinkhornRouter(**ROUTER, num_iters=0), "SinkhornRouter: num_iters"),
        (lambda: cpp.ExpertChoiceRouter(8, 4, 5), "ExpertChoiceRouter: top_k"),
        (lambda: cpp.DenseRouter(d_model=0, num_experts=4), "DenseRouter: d_model"),
        (lambda: cpp.LossFreeBalancer(0), "LossFreeBalancer: num_experts"),
        (lambda: cpp.EMABalancer(4, beta=1.0), "EMABalancer: beta"),
        (lambda: cpp.AdvancedLoadBalancingLoss(4, mi="x"), "AdvancedLoadBalancingLoss: mi"),
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

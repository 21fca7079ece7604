# SPDX-License-Identifier: Apache-2.0
"""topk_gating against its plain PyTorch meaning: values, gradients, second gradients, tracing,
edge cases.
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from helpers import FLOATS, tolerance
from simt import SIMT
from torch.autograd import gradcheck, gradgradcheck

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = pytest.mark.usefixtures("backend")


def make_logits(tokens, experts, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)).to(dtype)


def sample_inputs(dtype=torch.float32):
    """(logits, keyword arguments) that every kind of test goes through."""
    yield make_logits(5, 8, dtype), dict(top_k=2)
    yield make_logits(7, 5, dtype), dict(top_k=3, norm_topk_prob=True, scaling_factor=2.5)
    yield make_logits(33, 70, dtype), dict(top_k=8, norm_topk_prob=True)
    bias = torch.linspace(-0.2, 0.2, 8)
    yield make_logits(6, 8, dtype), dict(top_k=2, norm_topk_prob=True, expert_bias=bias)
    mask = torch.tensor([True, False, True, True, False])
    yield make_logits(5, 4, dtype), dict(top_k=2, token_mask=mask)
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0])
    yield make_logits(4, 6, dtype), dict(top_k=3, norm_topk_prob=True, token_mask=weights)
    yield make_logits(3, 4, dtype), dict(top_k=4)
    logits = make_logits(4, 6, dtype)
    logits[0, 1] = -torch.inf
    logits[1, :] = -torch.inf
    logits[2, :5] = -torch.inf
    logits[3, 2] = torch.nan
    yield logits, dict(top_k=2, norm_topk_prob=True)
    yield logits, dict(top_k=3)


def exact_reference(logits, **arguments):
    """The reference in float64 on the same numbers."""
    if arguments.get("expert_bias") is not None:
        arguments["expert_bias"] = arguments["expert_bias"].double()
    return reference.topk_gating(logits.double(), **arguments)


def assert_matches(result, logits, **arguments):
    expected = F.RoutingResult(*exact_reference(logits, **arguments))
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert torch.equal(result.topk_indices, expected.topk_indices)
    assert torch.equal(result.tokens_per_expert, expected.tokens_per_expert)
    for name in ("topk_weights", "lse", "sums"):
        got, want = getattr(result, name), getattr(expected, name)
        assert got.dtype == compute
        torch.testing.assert_close(got.double(), want, **tolerance(compute))
    chosen = result.topk_indices.flatten()
    counts = torch.bincount(chosen[chosen >= 0], minlength=logits.size(-1))
    assert torch.equal(result.tokens_per_expert, counts)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values(dtype):
    for logits, arguments in sample_inputs(dtype):
        assert_matches(F.topk_gating(logits, **arguments), logits, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("experts", [1, 2, 8, 16, 17, 31, 32, 33, 64, 100, 128, 256, 512, 1000])
def test_sizes(experts, dtype, backend):
    for top_k in sorted({1, 2, 8, 16, 17, 33, experts}):
        if top_k > experts:
            continue
        tokens = 37 if backend == "cpu" or experts * top_k < 4000 else 3  # that takes its time
        logits = make_logits(tokens, experts, dtype, seed=top_k)
        for norm in (False, True):
            arguments = dict(top_k=top_k, norm_topk_prob=norm)
            assert_matches(F.topk_gating(logits, **arguments), logits, **arguments)


def test_large_expert_counts_and_many_blocks(backend):
    sizes = [(3, 8192, 8), (2, 8192, 8192), (5000, 32, 4), (20000, 8, 2)]
    if backend == "simt":
        sizes = [(2, 8192, 8), (1, 2000, 2000), (700, 32, 4), (3000, 8, 2)]
    for tokens, experts, top_k in sizes:
        logits = make_logits(tokens, experts)
        assert_matches(F.topk_gating(logits, top_k), logits, top_k=top_k)


@pytest.mark.parametrize("experts,top_k", [(8, 3), (64, 6), (128, 8), (200, 20)])
def test_ties_go_to_the_lowest_index(experts, top_k):
    for levels in (1, 2, 3):
        logits = torch.randint(0, levels, (50, experts)).float()
        logits[logits == 0] = torch.where(torch.rand(int((logits == 0).sum())) < 0.5, -0.0, 0.0)
        assert_matches(F.topk_gating(logits, top_k), logits, top_k=top_k)
        bias = torch.randint(0, 2, (experts,)).float()
        assert_matches(
            F.topk_gating(logits, top_k, expert_bias=bias), logits, top_k=top_k, expert_bias=bias
        )


def test_absent_experts():
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [1.0, -inf, 0.0, nan],
            [-inf, -inf, -inf, -inf],
            [nan, nan, nan, nan],
            [inf, 0.0, inf, -inf],
            [-inf, -inf, 3.0, -inf],
        ]
    )
    for bias in (None, torch.tensor([0.0, 9.0, 0.0, 9.0])):
        r = F.topk_gating(logits, 3, norm_topk_prob=True, expert_bias=bias)
        assert r.topk_indices.tolist() == [
            [0, 2, -1],
            [-1, -1, -1],
            [-1, -1, -1],
            r.topk_indices[3].tolist(),
            [2, -1, -1],
        ]
        assert sorted(r.topk_indices[3].tolist()) == [0, 1, 2]
        assert r.num_nan_rows.item() == 2
        assert r.num_tokens.item() == 3
        assert r.lse[1] == 0 and r.lse[2] == 0
        assert torch.isfinite(r.sums).all() and torch.isfinite(r.topk_weights).all()
        torch.testing.assert_close(
            r.topk_weights[3, :2],
            torch.tensor([0.5, 0.5]) if bias is None else r.topk_weights[3, :2],
        )


def test_masked_tokens_enter_nothing():
    logits = make_logits(6, 5)
    mask = torch.tensor([True, True, False, True, False, False])
    r = F.topk_gating(logits, 2, token_mask=mask)
    kept = F.topk_gating(logits[mask], 2)
    assert (r.topk_indices[~mask] == -1).all() and (r.topk_weights[~mask] == 0).all()
    torch.testing.assert_close(r.sums, kept.sums)
    assert torch.equal(r.tokens_per_expert, kept.tokens_per_expert)
    poisoned = logits.clone()
    poisoned[~mask] = torch.nan
    assert torch.equal(F.topk_gating(poisoned, 2, token_mask=mask).sums, r.sums)


def test_bias_moves_the_selection_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    r = F.topk_gating(logits, 1, expert_bias=torch.tensor([0.0, 0.0, 5.0]))
    assert r.topk_indices.item() == 2
    torch.testing.assert_close(r.topk_weights, logits.softmax(-1)[:, 2:])


def test_underflowing_choices_keep_finite_weights():
    logits = torch.tensor([[300.0, 0.0, -1.0]])
    bias = torch.tensor([-5.0, 0.0, 0.0])
    r = F.topk_gating(logits, 2, norm_topk_prob=True, expert_bias=bias)
    assert r.topk_indices.tolist() == [[1, 2]]
    torch.testing.assert_close(r.topk_weights, torch.tensor([[0.0, -1.0]]).softmax(-1))


def test_leading_dimensions_and_layouts():
    logits = make_logits(24, 6).view(2, 3, 4, 6)
    r = F.topk_gating(logits, 2)
    flat = F.topk_gating(logits.view(24, 6), 2)
    assert r.topk_indices.shape == (2, 3, 4, 2) and r.lse.shape == (2, 3, 4)
    assert torch.equal(r.topk_indices.view(24, 2), flat.topk_indices)
    one = F.topk_gating(logits[0, 0, 0], 2)
    assert one.topk_indices.shape == (2,) and one.lse.shape == ()
    base = make_logits(9, 16)
    views = [base[:, 3:11], base[::2], base.t(), base[:1].expand(5, 16), base[:, ::2]]
    views += [base[:, :7], base.bfloat16()[:, :15]]  # aligned rows with other data behind them
    for view in views:
        assert_matches(F.topk_gating(view, 3), view.contiguous(), top_k=3)


@pytest.mark.no_launch
def test_no_tokens():
    logits = torch.empty(0, 4, requires_grad=True)
    r = F.topk_gating(logits, 2)
    assert r.topk_indices.shape == (0, 2) and r.tokens_per_expert.tolist() == [0] * 4
    assert r.sums.abs().sum() == 0
    r.topk_weights.sum().backward()
    assert logits.grad.shape == (0, 4)


def test_huge_rows_apart(backend):
    """Offsets beyond 2^31: three rows a huge stride apart, over memory that is reserved and never
    touched.
    """
    import mmap

    stride = 3 << 29  # elements; rows 0, 1.6e9, 3.2e9
    buffer = mmap.mmap(-1, (2 * stride + 8) * 4, flags=mmap.MAP_PRIVATE | 0x4000)  # MAP_NORESERVE
    memory = torch.frombuffer(buffer, dtype=torch.float32)
    far = memory.as_strided((3, 8), (stride, 1))
    logits = make_logits(3, 8)
    far.copy_(logits)
    far.requires_grad_()
    with SIMT.knowing(memory) if backend == "simt" else contextlib.nullcontext():
        r = F.topk_gating(far, 2)
        assert_matches(r, logits, top_k=2)
        (grad,) = torch.autograd.grad(r.topk_weights.sum(), far)
    near = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.topk_gating(near, 2).topk_weights.sum(), near)
    assert torch.equal(grad, expected)


def test_without_statistics():
    for logits, arguments in sample_inputs():
        full, lean = (
            F.topk_gating(logits, **arguments),
            F.topk_gating(logits, **arguments, stats=False),
        )
        assert lean.lse.numel() == 0 and lean.sums.numel() == 0
        assert torch.equal(full.topk_indices, lean.topk_indices)
        torch.testing.assert_close(full.topk_weights, lean.topk_weights)
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        probe = torch.randn_like(full.topk_weights)
        (F.topk_gating(x, **arguments).topk_weights * probe).sum().backward()
        (F.topk_gating(y, **arguments, stats=False).topk_weights * probe).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


# ---- gradients -----------------------------------------------------------------------------------


def differentiable_outputs(function):
    """A function of the logits whose outputs are all differentiable: without load, weight sums and
    counts.
    """

    def outputs(logits, arguments):
        weights, indices, _, lse, sums = function(logits, **arguments)
        experts = logits.size(-1)
        return weights, lse, sums[:experts], sums[2 * experts + 1 : 2 * experts + 3]

    return outputs


@pytest.mark.parametrize("case", range(9))
def test_gradcheck_and_gradgradcheck(case):
    logits, arguments = list(sample_inputs(torch.float64))[case]
    logits = logits[:6, :9].clone()
    arguments = dict(arguments, top_k=min(arguments["top_k"], logits.size(1)))
    op = differentiable_outputs(F.topk_gating)
    finite = torch.isfinite(logits)
    values = logits[finite].requires_grad_()

    def function(values):  # absent experts stay out: a difference quotient of -inf means nothing
        return op(logits.masked_scatter(finite, values), arguments)

    assert gradcheck(function, (values,))
    assert gradgradcheck(function, (values,))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_match_the_reference(dtype):
    for logits, arguments in sample_inputs(dtype):
        x = logits.clone().requires_grad_()
        exact = logits.double().requires_grad_()
        got = differentiable_outputs(F.topk_gating)(x, arguments)
        want = differentiable_outputs(exact_reference)(exact, arguments)
        probes = [torch.randn_like(w) for w in want]
        subsets = [range(4), [0], [1], [2], [3], [0, 2]]
        for subset in subsets:  # an absent gradient takes another path through the kernel
            (a,) = torch.autograd.grad(
                [got[i] for i in subset],
                x,
                [probes[i].to(got[i].dtype) for i in subset],
                retain_graph=True,
            )
            (b,) = torch.autograd.grad(
                [want[i] for i in subset], exact, [probes[i] for i in subset], retain_graph=True
            )
            assert a.dtype == dtype
            scale = b.abs().max().item() + 1
            bounds = tolerance(dtype)
            torch.testing.assert_close(
                a.double(), b, rtol=bounds["rtol"], atol=bounds["atol"] * scale
            )


def test_gradient_of_more_tokens_than_a_grid_takes_at_once():
    """Threads that go on to another row take nothing along from the one before."""
    logits = make_logits(16500, 260)
    x, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    arguments = dict(top_k=2, norm_topk_prob=True)
    weights = F.topk_gating(x, **arguments, stats=False).topk_weights
    probe = torch.randn_like(weights)
    (got,) = torch.autograd.grad(weights, x, probe)
    (want,) = torch.autograd.grad(
        reference.topk_gating(exact, **arguments)[0], exact, probe.double()
    )
    torch.testing.assert_close(got.double(), want, **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_extreme_logits(dtype):
    """Large logits, absent experts and a strong entropy term: no 0 * inf, and p is not off."""
    logits = torch.tensor(
        [[600.0, 599.5, 0.0, -600.0], [3.0, -torch.inf, 2.0, torch.nan], [1e17, 1e17, 5.0, 1.0]]
    ).to(dtype)
    x, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    outputs = F.topk_gating(x, 2).sums, reference.topk_gating(exact, 2)[4]
    probe = 100 * torch.randn(outputs[1].shape, dtype=torch.float64)
    probe[-4] = 0  # lse^2 of 1e17 has no place in a comparison
    (got,) = torch.autograd.grad(outputs[0], x, probe.to(dtype))
    (want,) = torch.autograd.grad(outputs[1], exact, probe)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3)


def test_composite_backward_equals_the_kernel():
    """Under create_graph the gradient is made of ATen calls; it must be the same gradient."""
    for logits, arguments in sample_inputs(torch.float64):
        x = logits.clone().requires_grad_()
        out = differentiable_outputs(F.topk_gating)(x, arguments)
        probes = [torch.randn_like(o) for o in out]
        (kernel,) = torch.autograd.grad(out, x, probes, retain_graph=True)
        (composite,) = torch.autograd.grad(out, x, probes, create_graph=True)
        torch.testing.assert_close(composite, kernel, rtol=1e-12, atol=1e-12)


def test_top_1_renormalised_has_no_gate_gradient():
    logits = make_logits(4, 5).requires_grad_()
    r = F.topk_gating(logits, 1, norm_topk_prob=True, scaling_factor=2.0)
    assert (r.topk_weights == 2.0).all()
    r.topk_weights.sum().backward()
    assert (logits.grad == 0).all()


# ---- tracing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(9))
def test_opcheck(case):
    logits, arguments = list(sample_inputs())[case]
    top_k = arguments.pop("top_k")
    for requires_grad in (False, True):
        inputs = (logits.clone().requires_grad_(requires_grad), top_k)
        torch.library.opcheck(ops.topk_gating, inputs, arguments)


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck_backward(norm):
    logits = make_logits(5, 6)
    weights, indices, _, lse, sums = ops.topk_gating(logits, 2)
    arguments = (
        torch.randn_like(weights),
        torch.randn_like(lse),
        torch.randn_like(sums),
        logits,
        indices,
        lse,
    )
    torch.library.opcheck(ops.topk_gating_backward, (*arguments, "softmax", norm, 1.0))
    differentiable = tuple(
        a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments[:5]
    )
    torch.library.opcheck(
        ops.topk_gating_backward,
        (*differentiable, lse, "softmax", norm, 1.0),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compile(compiled):
    def step(logits, bias, mask):
        r = F.topk_gating(logits * 2, 2, norm_topk_prob=True, expert_bias=bias, token_mask=mask)
        return r.topk_weights.square().sum() + F.switch_loss(r) + F.z_loss(r), r.topk_indices

    fast = compiled(step)
    for tokens in (3, 5, 8):
        x = make_logits(tokens, 6).requires_grad_()
        y = x.detach().clone().requires_grad_()
        mask, bias = torch.rand(tokens) < 0.7, torch.randn(6)
        (loss, indices), (expected, expected_indices) = fast(x, bias, mask), step(y, bias, mask)
        torch.testing.assert_close(loss, expected)
        assert torch.equal(indices, expected_indices)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(x.grad, y.grad)


class Gate(torch.nn.Module):
    def forward(self, logits):
        return F.topk_gating(logits, 2)


def test_export():
    exported = torch.export.export(
        Gate(), (make_logits(5, 6),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},)
    )
    assert ops.topk_gating.name().replace("::", ".") in exported.graph_module.code
    logits = make_logits(9, 6)
    for got, want in zip(exported.module()(logits), Gate()(logits), strict=True):
        assert torch.equal(got, want)


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    logits = make_logits(9, 6)
    torch._dynamo.reset()
    for got, want in zip(
        torch.compile(Gate(), fullgraph=True)(logits), Gate()(logits), strict=True
    ):
        torch.testing.assert_close(got, want)
    exported = torch.export.export(Gate(), (logits,))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "gate.pt2")
    )
    for got, want in zip(
        torch._inductor.aoti_load_package(package)(logits), Gate()(logits), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_autocast_casts_nothing():
    logits = make_logits(5, 6, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        r = F.topk_gating(logits, 2)
    assert r.topk_weights.dtype == torch.float32
    assert torch.equal(r.sums, F.topk_gating(logits, 2).sums)


@pytest.mark.no_launch
def test_meta_device():
    r = F.topk_gating(torch.empty(3, 4, 6, device="meta"), 2)
    assert r.topk_weights.shape == (3, 4, 2) and r.sums.shape == (17,) and r.lse.shape == (3, 4)


# ---- determinism ---------------------------------------------------------------------------------


@pytest.mark.cpu_only("about threads of the CPU")
def test_same_bits_for_any_number_of_threads():
    logits = make_logits(6000, 48).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            r = F.topk_gating(logits, 4)
            (grad,) = torch.autograd.grad(r.sums.square().sum() + r.topk_weights.sum(), logits)
            results.append((r, grad))
    finally:
        torch.set_num_threads(threads)
    for r, grad in results[1:]:
        assert torch.equal(grad, results[0][1])
        for a, b in zip(r, results[0][0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.cpu_only("about instruction sets of the CPU")
def test_every_instruction_set_chooses_the_same_experts():
    code = (
        "import torch, equipoise.functional as F; torch.manual_seed(1);"
        "x = torch.randn(300, 100); x[::7] = x[::7].round(); r = F.topk_gating(x.bfloat16(), 8);"
        "s = F.topk_gating(x, 8, norm_topk_prob=True); d = F.topk_gating(x.double(), 20);"
        "print(*[g.topk_indices.sum(0).tolist() for g in (r, s, d)],"
        " [round(v, 4) for v in r.sums.tolist() + s.sums.tolist()])"
    )
    outputs = []
    for capability in ("default", "avx2", "avx512"):
        environment = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(run.stdout)
    indices = [output.split("[round")[0].rsplit("[", 1)[0] for output in outputs]
    assert indices[0] == indices[1] == indices[2]
    sums = [torch.tensor(eval(output[output.rindex("[") :])) for output in outputs]
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(sums[0], sums[2], rtol=1e-4, atol=2e-4)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logits,arguments,message",
    [
        (torch.zeros(2, 4), dict(top_k=5), "top_k must be from 1 to num_experts = 4, got 5"),
        (torch.zeros(2, 4), dict(top_k=0), "top_k must be from 1 to num_experts = 4, got 0"),
        (torch.zeros(2, 4, dtype=torch.long), dict(top_k=1), "logits must be float32.*got Long"),
        (torch.zeros(()), dict(top_k=1), "logits must have shape"),
        (torch.zeros(2, 0), dict(top_k=1), "logits must have at least one expert"),
        (
            torch.zeros(2, 4),
            dict(top_k=1, score_function="tanh"),
            "score_function must be .*got 'tanh'",
        ),
        (
            torch.zeros(2, 4),
            dict(top_k=1, expert_bias=torch.zeros(3)),
            r"expert_bias must have shape \[E\]",
        ),
        (
            torch.zeros(2, 4),
            dict(top_k=1, expert_bias=torch.zeros(4).bfloat16()),
            "expert_bias must be float32",
        ),
        (
            torch.zeros(2, 4),
            dict(top_k=1, token_mask=torch.ones(3).bool()),
            "token_mask must have shape",
        ),
        (
            torch.zeros(2, 4),
            dict(top_k=1, token_mask=torch.ones(2).long()),
            "token_mask must be bool or floating",
        ),
        (
            torch.zeros(2, 4),
            dict(top_k=1, token_mask=torch.tensor([1.0, -1.0])),
            "token_mask must hold weights >= 0",
        ),
        (
            torch.zeros(2, 4),
            dict(top_k=1, token_mask=torch.tensor([1.0, torch.nan])),
            "token_mask must hold weights",
        ),
        (
            torch.zeros(2, 4),
            dict(top_k=1, token_mask=torch.ones(2, device="meta")),
            "token_mask must be on the device",
        ),
        (torch.zeros(2, 4), dict(top_k=1, num_groups=2), "num_groups must be 1"),
    ],
)
@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input(logits, arguments, message):
    with pytest.raises(RuntimeError, match=f"topk_gating: {message}"):
        F.topk_gating(logits, **arguments)
    if arguments.get("token_mask") is None or "values" not in message:
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        if "hold weights" in message or "on the device" in message:
            return  # values are only looked at where there are some
        with pytest.raises(RuntimeError, match=f"topk_gating: {message}"):
            F.topk_gating(logits.to("meta"), **meta)


@pytest.mark.parametrize(
    "lse,message",
    [
        (torch.zeros(2, device="meta"), "lse must be on the device of logits"),
        (torch.zeros(3), "lse must have shape"),
        (torch.zeros(2).double(), "lse must be Float, got Double"),
    ],
)
@pytest.mark.cpu_only("the checks are shared")
def test_bad_lse_for_the_gradient(lse, message):
    weights, indices, *_ = ops.topk_gating(logits := torch.zeros(2, 4), 1)
    with pytest.raises(RuntimeError, match=f"topk_gating_backward: {message}"):
        ops.topk_gating_backward(weights, None, None, logits, indices, lse, "softmax", False, 1.0)

# SPDX-License-Identifier: Apache-2.0
"""moe_unpermute against indexing and a weighted sum."""

import pytest
import torch
from helpers import FLOATS, tolerance
from torch.autograd import gradcheck, gradgradcheck

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = pytest.mark.usefixtures("backend")


def make_map(tokens, slots, rows, used):
    """[T, K] with `used` of the rows, each in a slot of its own wherever; -1 elsewhere."""
    row_id_map = torch.full((tokens * slots,), -1)
    row_id_map[torch.randperm(tokens * slots)[:used]] = torch.randperm(rows)[:used]
    return row_id_map.view(tokens, slots)


def sample_inputs(dtype=torch.float32):
    """(permuted, row_id_map, topk_weights): maps as moe_permute makes them, and some with more rows
    than slots, with weights of every allowed type.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for tokens, top_k, rows, used, width in [
        (5, 2, 10, 8, 3),
        (1, 1, 1, 1, 1),
        (20, 8, 160, 144, 70),
        (6, 3, 18, 18, 129),
        (3, 32, 96, 90, 1),
        (3, 40, 30, 26, 5),  # a slot per expert, most of them empty
        (2, 2, 9, 4, 8),  # empty rows between
        (1, 2, 2, 2, 4096),
    ]:
        row_id_map = make_map(tokens, top_k, rows, used)
        permuted = torch.randn(rows, width, dtype=torch.float64).to(dtype)
        for kind in dict.fromkeys((None, compute, dtype)):  # in an order that does not change
            yield permuted, row_id_map, None if kind is None else torch.rand(tokens, top_k).to(kind)


@pytest.fixture
def nan_filled_memory():
    """What no kernel has written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values(dtype):
    for permuted, row_id_map, weights in sample_inputs(dtype):
        got = F.moe_unpermute(permuted, row_id_map, weights)
        exact = None if weights is None else weights.double()
        want = reference.moe_unpermute(permuted.double(), row_id_map, exact)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **tolerance(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_exact(dtype, nan_filled_memory):
    """Where every sum has a float32, results are the float64 ones rounded once, gradients too."""

    def numbers(*shape):
        return torch.randint(-8, 9, shape).to(torch.float64)

    for permuted, row_id_map, weights in sample_inputs(dtype):
        exact = [numbers(*permuted.shape).requires_grad_()]
        if weights is not None:
            exact.append((numbers(*weights.shape) / 4).requires_grad_())
        types = [i.dtype for i in (permuted, weights) if i is not None]
        ours = [i.detach().to(t).requires_grad_() for i, t in zip(exact, types, strict=True)]
        want = reference.moe_unpermute(exact[0], row_id_map, *exact[1:])
        got = F.moe_unpermute(ours[0], row_id_map, *ours[1:])
        assert torch.equal(got, want.to(dtype))
        probe = numbers(*want.shape)
        want = torch.autograd.grad(want, exact, probe)
        got = torch.autograd.grad(got, ours, probe.to(dtype))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b.to(a.dtype))


def test_half_types_are_summed_in_float32():
    permuted = torch.tensor([[256.0], [1.0], [-256.0]]).bfloat16()
    assert F.moe_unpermute(permuted, torch.tensor([[0, 1, 2]])).item() == 1.0  # 257 has no bfloat16


def test_undoes_permute():
    x, indices = torch.randn(50, 33), torch.randint(0, 6, (50, 1))
    p = F.moe_permute(x, indices, 6)
    assert torch.equal(F.moe_unpermute(p.permuted, p.row_id_map), x)


def test_empty_slots_read_nothing():
    """Rows that no slot names may hold anything: they are uninitialised after a grouped GEMM."""
    permuted = torch.full((4, 3), torch.nan)
    permuted[0] = 1
    out = F.moe_unpermute(permuted, torch.tensor([[0, -1], [-1, -1]]), torch.ones(2, 2))
    assert out.tolist() == [[1.0] * 3, [0.0] * 3]


def test_layouts_and_empty():
    base = torch.randn(6, 16)
    row_id_map = torch.tensor([[0, 3], [1, 5]]).t()
    for permuted in (torch.randn(5, 6).t(), base[:, 3:10], base[:, :8], base[:1].expand(6, 16)):
        weights = torch.rand(2, 2).t().requires_grad_()
        want = reference.moe_unpermute(permuted.contiguous(), row_id_map, weights)
        got = F.moe_unpermute(permuted, row_id_map, weights)
        torch.testing.assert_close(got, want)
        # The gradient of a sum is one number, expanded; a slice has its rows apart.
        for probe in (None, torch.randn(2, 20)[:, 3 : 3 + want.size(1)]):
            picked = (lambda o: o.sum()) if probe is None else (lambda o, p=probe: (o * p).sum())
            (grad,) = torch.autograd.grad(picked(got), weights, retain_graph=True)
            (want_grad,) = torch.autograd.grad(picked(want), weights, retain_graph=True)
            torch.testing.assert_close(grad, want_grad)
    for tokens, top_k, width in [(0, 2, 3), (3, 0, 3), (3, 2, 0)]:
        rows = torch.empty(tokens * top_k, width)
        row_id_map = torch.arange(tokens * top_k).view(tokens, top_k)
        out = F.moe_unpermute(rows, row_id_map, torch.ones(tokens, top_k))
        assert out.shape == (tokens, width) and (out == 0).all()


def test_gradients():
    for permuted, row_id_map, weights in sample_inputs(torch.float64):
        if permuted.numel() > 200:
            continue
        inputs = [permuted.requires_grad_()] + (
            [] if weights is None else [weights.requires_grad_()]
        )

        def unpermute(permuted, weights=None, row_id_map=row_id_map):
            return F.moe_unpermute(permuted, row_id_map, weights)

        assert gradcheck(unpermute, inputs)
        assert gradgradcheck(unpermute, inputs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_match_the_reference(dtype):
    for permuted, row_id_map, weights in sample_inputs(dtype):
        inputs = [permuted] if weights is None else [permuted, weights]
        ours = [i.clone().requires_grad_() for i in inputs]
        exact = [i.double().requires_grad_() for i in inputs]
        probe = torch.randn(row_id_map.size(0), permuted.size(1)).to(dtype)
        got = torch.autograd.grad(F.moe_unpermute(ours[0], row_id_map, *ours[1:]), ours, probe)
        want = torch.autograd.grad(
            reference.moe_unpermute(exact[0], row_id_map, *exact[1:]), exact, probe.double()
        )
        for a, b, i in zip(got, want, inputs, strict=True):
            assert a.dtype == i.dtype
            bounds = tolerance(i.dtype)
            torch.testing.assert_close(a.double(), b, rtol=bounds["rtol"], atol=20 * bounds["atol"])


def test_weights_without_gradient(nan_filled_memory):
    """Their gradient alone needs the rows, which are not kept then."""
    for permuted, row_id_map, weights in sample_inputs():
        if weights is None:
            continue
        leaf = permuted.requires_grad_()
        rows = leaf * 1
        out = F.moe_unpermute(rows, row_id_map, weights)
        with torch.no_grad():
            rows.zero_()  # an error in the backward of who has kept them
        probe = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, leaf, probe)
        (want,) = torch.autograd.grad(
            reference.moe_unpermute(leaf, row_id_map, weights), leaf, probe
        )
        torch.testing.assert_close(grad, want)


@pytest.mark.cpu_only("the threads of the CPU")
def test_same_bits_for_any_number_of_threads():
    tokens, slots, rows, width = 700, 6, 4500, 71
    row_id_map = make_map(tokens, slots, rows, 4000)
    probe, results = torch.randn(tokens, width), []
    inputs = [torch.randn(rows, width).requires_grad_(), torch.rand(tokens, slots).requires_grad_()]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            out = F.moe_unpermute(inputs[0], row_id_map, inputs[1])
            results.append([out, *torch.autograd.grad(out, inputs, probe)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cpu_only("results that the CPU writes past its caches")
@pytest.mark.parametrize(
    "dtype,width",
    [(torch.float32, 1001), (torch.float32, 1024), (torch.float64, 501), (torch.bfloat16, 2003)],
)
def test_more_than_caches_hold(dtype, width, nan_filled_memory):
    tokens, slots, rows = 2200, 4, 8790
    row_id_map = make_map(tokens, slots, rows, 8500)
    grad = torch.randn(tokens, width).to(dtype)
    permuted = torch.randn(1, width).to(dtype).expand(rows, width)
    weights = torch.rand(tokens, slots, dtype=torch.promote_types(dtype, torch.float32))
    plain, none = ops.moe_unpermute_backward(grad, None, row_id_map, None, rows)
    got, grad_weights = ops.moe_unpermute_backward(grad, permuted, row_id_map, weights, rows)
    alone, _ = ops.moe_unpermute_backward(grad, None, row_id_map, weights, rows)
    assert got.nbytes > 32 << 20 and none.numel() == 0
    kept = row_id_map >= 0
    token = torch.arange(tokens).unsqueeze(1).expand_as(kept)[kept]
    for result, factor in ((plain, None), (got, weights), (alone, weights)):
        want = grad[token] if factor is None else (grad[token] * factor[kept].unsqueeze(1))
        assert torch.equal(result[row_id_map[kept]], want.to(dtype))
        empty = torch.ones(rows, dtype=torch.bool)
        empty[row_id_map[kept]] = False
        assert (result[empty] == 0).all()
    want = (grad.double() @ permuted[0].double()).unsqueeze(1) * kept
    torch.testing.assert_close(grad_weights.double(), want, rtol=1e-4, atol=1e-3)


def test_opcheck():
    for permuted, row_id_map, weights in sample_inputs():
        if permuted.numel() <= 150:
            torch.library.opcheck(ops.moe_unpermute, (permuted, row_id_map, weights))
            grad = torch.randn(row_id_map.size(0), permuted.size(1))
            saved = None if weights is None else permuted
            for rows in dict.fromkeys((saved, None)):
                backward = (grad, rows, row_id_map, weights, permuted.size(0))
                torch.library.opcheck(ops.moe_unpermute_backward, backward)
            inputs = (
                permuted.requires_grad_(),
                row_id_map,
                None if weights is None else weights.requires_grad_(),
            )
            torch.library.opcheck(ops.moe_unpermute, inputs)


def test_compile(compiled):
    fast = compiled(lambda p, m, w: F.moe_unpermute(p, m, w).square().sum())
    for permuted, row_id_map, weights in list(sample_inputs())[:2]:
        if weights is None:
            continue
        permuted.requires_grad_()
        weights.requires_grad_()
        got = torch.autograd.grad(fast(permuted, row_id_map, weights), (permuted, weights))
        want = torch.autograd.grad(
            F.moe_unpermute(permuted, row_id_map, weights).square().sum(), (permuted, weights)
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(row_id_map=torch.tensor([[4], [0]])), r"row_id_map must be in \[-1, N = 4\), got 4"),
        (
            dict(row_id_map=torch.tensor([[-2], [0]])),
            r"row_id_map must be in \[-1, N = 4\), got -2",
        ),
        (
            dict(row_id_map=torch.tensor([[3], [2**63 - 1]])),
            r"row_id_map must be in \[-1, N = 4\), got 9223372036854775807",
        ),
        (
            dict(row_id_map=torch.tensor([[-(2**63)], [0]])),
            r"row_id_map must be in \[-1, N = 4\), got -9223372036854775808",
        ),
        (dict(row_id_map=torch.zeros(2, dtype=torch.long)), r"row_id_map must have shape \[T, K\]"),
        (dict(row_id_map=torch.zeros(2, 1)), "row_id_map must be Long"),
        (dict(permuted=torch.zeros(4)), "permuted must have two dimensions"),
        (dict(topk_weights=torch.zeros(2, 2)), r"topk_weights must have shape \[T, K\]"),
        (
            dict(topk_weights=torch.zeros(2, 1).half()),
            "topk_weights must be Float or the dtype of permuted",
        ),
    ],
)
@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input(change, message):
    arguments = dict(permuted=torch.zeros(4, 3), row_id_map=torch.tensor([[1], [0]])) | change
    with pytest.raises(RuntimeError, match=f"moe_unpermute: {message}"):
        F.moe_unpermute(**arguments)

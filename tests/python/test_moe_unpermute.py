# SPDX-License-Identifier: Apache-2.0
"""moe_unpermute against indexing and a weighted sum."""

import pytest
import torch
from helpers import FLOATS, tolerance
from torch.autograd import gradcheck, gradgradcheck

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = pytest.mark.usefixtures("backend")


def sample_inputs(dtype=torch.float32):
    """(permuted, row_id_map, topk_weights): a map as moe_permute makes it, with weights of every
    allowed type.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for tokens, top_k, experts, width in [
        (5, 2, 4, 3),
        (1, 1, 1, 1),
        (20, 8, 9, 70),
        (6, 3, 4, 129),
    ]:
        indices = torch.randint(-1, experts, (tokens, top_k))
        row_id_map = F.moe_permute(torch.zeros(tokens, 1), indices, experts).row_id_map
        permuted = torch.randn(tokens * top_k, width, dtype=torch.float64).to(dtype)
        for kind in dict.fromkeys((None, compute, dtype)):  # in an order that does not change
            yield permuted, row_id_map, None if kind is None else torch.rand(tokens, top_k).to(kind)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values(dtype):
    for permuted, row_id_map, weights in sample_inputs(dtype):
        got = F.moe_unpermute(permuted, row_id_map, weights)
        exact = None if weights is None else weights.double()
        want = reference.moe_unpermute(permuted.double(), row_id_map, exact)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **tolerance(dtype))


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
        (grad,) = torch.autograd.grad(got.sum(), weights)
        (want_grad,) = torch.autograd.grad(want.sum(), weights)
        torch.testing.assert_close(grad, want_grad)
    for tokens, top_k, width in [(0, 2, 3), (3, 0, 3), (3, 2, 0)]:
        rows = torch.empty(tokens * top_k, width)
        row_id_map = torch.arange(tokens * top_k).view(tokens, top_k)
        out = F.moe_unpermute(rows, row_id_map, torch.ones(tokens, top_k))
        assert out.shape == (tokens, width) and (out == 0).all()


def test_gradients():
    for permuted, row_id_map, weights in sample_inputs(torch.float64):
        if permuted.numel() > 400:
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


def test_opcheck():
    for permuted, row_id_map, weights in sample_inputs():
        if permuted.numel() <= 400:
            torch.library.opcheck(ops.moe_unpermute, (permuted, row_id_map, weights))
            grad = torch.randn(row_id_map.size(0), permuted.size(1))
            saved = None if weights is None else permuted
            backward = (grad, saved, row_id_map, weights, permuted.size(0))
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

# SPDX-License-Identifier: Apache-2.0
"""topk_gating against its plain PyTorch meaning: values, gradients, second gradients, tracing,
edge cases.
"""

import contextlib
import os
import re
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

    # Score functions, plain, with a bias and in groups.
    x, bias = make_logits(3, 6, dtype), torch.tensor([0.5, -0.3, 0.0, 0.4, -0.1, 0.2])
    yield x, dict(top_k=2, score_function="sigmoid", scaling_factor=1.5, expert_bias=bias)
    yield x, dict(top_k=3, score_function="sigmoid", norm_topk_prob=True)
    yield x, dict(top_k=2, score_function="sqrtsoftplus", scaling_factor=0.5)
    yield x, dict(top_k=3, score_function="sqrtsoftplus", norm_topk_prob=True, expert_bias=bias)
    yield x, dict(top_k=3, score_function="identity", scaling_factor=-2.0)
    groups = dict(num_groups=3, group_topk=2)
    yield x, dict(top_k=2, score_function="identity", expert_bias=bias, group_score="max", **groups)
    yield x, dict(top_k=3, scaling_factor=2.0, group_score="max", **groups)
    yield x, dict(top_k=3, norm_topk_prob=True, expert_bias=bias, **groups)
    yield x, dict(top_k=4, score_function="sigmoid", **groups)
    yield x, dict(top_k=3, score_function="sqrtsoftplus", num_groups=6, group_topk=4)
    yield x, dict(top_k=3, score_function="sigmoid", num_groups=3, group_topk=3)
    for score_function in ("softmax", "sigmoid"):  # the last row has too few experts in its groups
        partly = make_logits(4, 6, dtype)
        partly[0, 2:4] = -torch.inf
        partly[1, 1:] = torch.nan
        partly[2, :] = -torch.inf
        partly[3, [0, 3, 4]] = torch.nan
        yield partly, dict(top_k=4, score_function=score_function, expert_bias=bias, **groups)

    # Noise and forced experts.
    noise = make_logits(4, 6, dtype, seed=5)
    yield make_logits(4, 6, dtype), dict(top_k=2, norm_topk_prob=True, noise=noise)
    yield logits, dict(top_k=3, score_function="sigmoid", noise=noise)
    forced = torch.tensor([[3, 1, 0], [2, 3, 4], [-1, 5, 0], [2, -1, 1]])
    yield logits, dict(top_k=3, forced_indices=forced)
    yield (
        logits,
        dict(top_k=3, score_function="sigmoid", norm_topk_prob=True, forced_indices=forced),
    )
    nobody = torch.tensor([[-1, -1], [5, 0], [-1, -1]])
    yield x, dict(top_k=2, score_function="identity", forced_indices=nobody)
    yield x, dict(top_k=2, norm_topk_prob=True, forced_indices=nobody, expert_bias=bias)

    # Segments; the one in the middle has no token.
    segments = dict(segment_ids=torch.tensor([0, 0, 2, 2]), num_segments=4)
    weights = torch.tensor([0.5, 1.5, 2.0, 0.0])
    yield make_logits(4, 6, dtype), dict(top_k=2, token_mask=weights, **segments)
    segments["segment_ids"] = torch.tensor([3, 0, 3, 2])
    yield logits, dict(top_k=3, score_function="sqrtsoftplus", **segments)

    # Together, as DeepSeek-V3 does it, and all at once.
    arguments = dict(top_k=3, score_function="sigmoid", norm_topk_prob=True, scaling_factor=2.5)
    arguments |= dict(expert_bias=bias, noise=noise, **groups, **segments)
    yield make_logits(4, 6, dtype), arguments | dict(token_mask=torch.tensor([True] * 3 + [False]))
    arguments |= dict(score_function="sqrtsoftplus", norm_topk_prob=False, token_mask=weights)
    yield logits, arguments | dict(forced_indices=forced)
    arguments = dict(top_k=8, score_function="sigmoid", norm_topk_prob=True, num_groups=7)
    arguments |= dict(group_topk=3, expert_bias=torch.linspace(0.3, -0.3, 70))
    ids = torch.arange(33).div(7, rounding_mode="floor")
    yield make_logits(33, 70, dtype), arguments | dict(segment_ids=ids, num_segments=5)


SAMPLES = range(len(list(sample_inputs())))
SMALL_SAMPLES = [i for i, (x, _) in enumerate(sample_inputs()) if x.numel() < 100]


def exact_reference(logits, **arguments):
    """The reference in float64 on the same numbers."""
    for name in ("expert_bias", "noise"):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name].double()
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
    assert torch.equal(result.tokens_per_expert.view(-1, logits.size(-1)).sum(0), counts)


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


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus", "identity"])
@pytest.mark.parametrize(
    "experts,num_groups,group_topk,top_k",
    [
        (2, 2, 1, 1),
        (24, 8, 3, 4),
        (33, 3, 2, 17),
        (64, 64, 40, 33),
        (100, 4, 3, 8),
        (160, 8, 3, 6),
        (256, 8, 4, 8),
        (384, 2, 1, 8),
        (1032, 129, 100, 20),
    ],
)
def test_sizes_with_groups(experts, num_groups, group_topk, top_k, score_function, backend):
    tokens = 37 if backend == "cpu" else 5
    logits = make_logits(tokens, experts, seed=experts)
    for group_score, bias in (("max", None), ("top2_sum", torch.linspace(-0.1, 0.1, experts))):
        arguments = dict(top_k=top_k, score_function=score_function, expert_bias=bias)
        arguments |= dict(num_groups=num_groups, group_topk=group_topk, group_score=group_score)
        assert_matches(F.topk_gating(logits, **arguments), logits, **arguments)


def test_many_segments(backend):
    """More than a block's worth of them, in order and not, some empty; none is mixed up."""
    tokens = 3000 if backend == "cpu" else 300
    logits = make_logits(tokens, 12)
    ids = torch.randint(0, 200, (tokens,))
    for segment_ids in (ids, ids.sort().values):
        arguments = dict(top_k=2, segment_ids=segment_ids, num_segments=256)
        r = F.topk_gating(logits, **arguments)
        assert r.tokens_per_expert.shape == (256, 12) and r.sums.shape == (256, 29)
        assert_matches(r, logits, **arguments)
        assert torch.equal(r.num_tokens, torch.bincount(segment_ids, minlength=256).float())


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


@pytest.mark.parametrize("score_function", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_underflowing_scores_keep_finite_weights(score_function, dtype):
    """exp(-200) and less is 0 in float32, exp(-2000) in float64; log s knows better."""
    step = torch.tensor([0.0, 1.0, 3.0, -2.0], dtype=dtype)
    for low in (-200.0, -2000.0):
        logits = (low + step).expand(2, 4).clone().requires_grad_()
        # That far down s(x) is exp(x), or its root.
        power = 1.0 if score_function == "sigmoid" else 0.5
        arguments = dict(score_function=score_function, norm_topk_prob=True)
        r = F.topk_gating(logits, 2, **arguments)
        assert r.topk_indices.tolist() == [[2, 1], [2, 1]]
        expected = (power * step[[2, 1]]).softmax(-1).expand(2, 2)
        torch.testing.assert_close(r.topk_weights, expected, rtol=2e-5, atol=0)
        torch.testing.assert_close(r.prob_sum, 2 * (power * step).softmax(-1), rtol=2e-5, atol=1e-9)
        probe = torch.randn(r.sums.shape, dtype=dtype)
        loss = (r.sums * probe).sum() + r.topk_weights[:, 0].sum()
        (grad,) = torch.autograd.grad(loss, logits)
        exact = logits.detach().double().requires_grad_()
        reference_out = reference.topk_gating(exact, 2, **arguments)
        loss = (reference_out[4] * probe).sum() + reference_out[0][:, 0].sum()
        (expected,) = torch.autograd.grad(loss, exact)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)
        bias = torch.tensor([0.0, 0.0, 0.0, 1.0])  # the bias decides, then the logits
        r = F.topk_gating(logits, 2, **arguments, expert_bias=bias)
        assert r.topk_indices.tolist() == [[3, 2], [3, 2]]
        expected = (power * step[[3, 2]]).softmax(-1).expand(2, 2)
        torch.testing.assert_close(r.topk_weights, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus", "identity"])
def test_saturated_scores_choose_the_larger_logit(score_function):
    logits = torch.tensor([[30.0, 40.0, 35.0, 50.0], [-30.0, -40.0, -50.0, -35.0]]) * 4
    arguments = dict(score_function=score_function)
    for groups in (dict(), dict(num_groups=2, group_topk=2)):  # all groups are kept: as none
        r = F.topk_gating(logits, 3, **arguments, **groups)
        assert r.topk_indices.tolist() == [[3, 1, 2], [0, 3, 1]]
    # Equal keys go by the logit: sigmoid(120) = sigmoid(200) = 1.
    bias = torch.tensor([0.0, 0.0, 0.0, -0.5])
    r = F.topk_gating(logits[:1], 2, score_function="sigmoid", expert_bias=bias)
    assert r.topk_indices.tolist() == [[1, 2]]


def test_extreme_biases():
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[1.0, 4.0, 3.0, -inf, 2.0]])
    for score_function in ("softmax", "sigmoid", "identity"):
        for low in (-inf, nan):  # last of those that are present; the absent expert stays out
            bias = torch.tensor([-5.0, low, -5.0, 9.0, -5.0])
            r = F.topk_gating(logits, 5, score_function=score_function, expert_bias=bias)
            assert r.topk_indices.tolist() == [[2, 4, 0, 1, -1]]
            assert torch.isfinite(r.topk_weights).all()
        bias = torch.tensor([inf, 0.0, inf, inf, 0.0])
        r = F.topk_gating(logits, 3, score_function=score_function, expert_bias=bias)
        assert r.topk_indices.tolist() == [[2, 0, 1]]
        # Groups of such experts tie, the lower one is kept; but not one that has nobody.
        given = dict(expert_bias=torch.full((4,), -inf), num_groups=2, group_topk=1)
        given |= dict(score_function=score_function)
        r = F.topk_gating(torch.tensor([[1.0, 2.0, 4.0, 3.0], [-inf, -inf, 4.0, 3.0]]), 2, **given)
        assert r.topk_indices.tolist() == [[1, 0], [2, 3]]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus", "identity"])
@pytest.mark.parametrize("scale", [0, 2, -1.5])
def test_scaling_factor(score_function, scale):
    logits = torch.tensor([[0.5, -1.0, 2.0, 1.0], [-300.0, -400.0, -350.0, -torch.inf]])
    for norm in (False, True)[: 1 if score_function == "identity" else 2]:
        arguments = dict(score_function=score_function, norm_topk_prob=norm)
        grads = []
        for factor in (1.0, scale):
            x = logits.clone().requires_grad_()
            r = F.topk_gating(x, 2, scaling_factor=factor, **arguments)
            grads.append((r, *torch.autograd.grad(r.topk_weights[:, 0].sum(), x)))
        (one, grad_one), (scaled, grad_scaled) = grads
        torch.testing.assert_close(scaled.topk_weights, scale * one.topk_weights)
        torch.testing.assert_close(grad_scaled, scale * grad_one)
        assert torch.equal(scaled.topk_indices, one.topk_indices)
        assert torch.equal(scaled.sums, one.sums)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forcing_the_choice_changes_nothing(norm, dtype):
    logits = make_logits(33, 20, dtype)
    noise = make_logits(33, 20, dtype, seed=3)
    logits[4, :18] = -torch.inf
    logits[5] = torch.nan
    for arguments in (
        dict(score_function="softmax"),
        dict(score_function="sigmoid", expert_bias=torch.linspace(0.5, -0.5, 20)),
        dict(score_function="sqrtsoftplus", num_groups=5, group_topk=2, noise=noise),
    ):
        arguments |= dict(norm_topk_prob=norm, scaling_factor=1.25)
        free = F.topk_gating(logits, 4, **arguments)
        forced = F.topk_gating(logits, 4, **arguments, forced_indices=free.topk_indices)
        for a, b in zip(forced, free, strict=True):
            bound = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)
        # Any order: the weights move along.
        back = free.topk_indices.flip(-1)
        forced = F.topk_gating(logits, 4, **arguments, forced_indices=back)
        assert torch.equal(forced.topk_indices, back)
        torch.testing.assert_close(forced.topk_weights, free.topk_weights.flip(-1))


def test_forced_experts_that_are_absent_or_masked():
    logits = torch.tensor([[1.0, -torch.inf, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, torch.nan]])
    forced = torch.tensor([[1, 2], [0, 1], [-1, 2]])
    mask = torch.tensor([True, False, True])
    x = logits.clone().requires_grad_()
    r = F.topk_gating(x, 2, norm_topk_prob=True, forced_indices=forced, token_mask=mask)
    assert r.topk_indices.tolist() == [[-1, 2], [-1, -1], [-1, -1]]
    assert r.topk_weights.tolist() == [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert r.tokens_per_expert.tolist() == [0, 0, 1]
    # The last row has no choice and still is a token: its lse and p count and have gradients.
    assert r.num_tokens.item() == 2 and r.num_nan_rows.item() == 1
    torch.testing.assert_close(r.lse[2], logits[2, :2].logsumexp(-1))
    (grad,) = torch.autograd.grad(F.z_loss(r), x)
    assert (grad[2, :2] != 0).all() and grad[2, 2] == 0 and (grad[1] == 0).all()


@pytest.mark.no_launch
def test_segment_ids_of_packed_sequences():
    lengths = torch.tensor([3, 0, 2])
    cu_seqlens = torch.tensor([0, 3, 3, 5])
    for dtype in (torch.int32, torch.int64):
        ids = F.segment_ids_from_cu_seqlens(cu_seqlens.to(dtype), 5)
        assert ids.dtype == torch.int64 and ids.tolist() == [0, 0, 0, 2, 2]
        assert torch.equal(ids, torch.arange(3).repeat_interleave(lengths))


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
    per_token = dict(
        segment_ids=torch.arange(24).view(2, 3, 4) % 3,
        noise=make_logits(24, 6, seed=2).view(2, 3, 4, 6),
        forced_indices=flat.topk_indices.view(2, 3, 4, 2),
        token_mask=torch.rand(2, 3, 4),
    )
    flat = {name: value.flatten(0, 2) for name, value in per_token.items()}
    r = F.topk_gating(logits, 2, num_segments=3, **per_token)
    flat = F.topk_gating(logits.view(24, 6), 2, num_segments=3, **flat)
    assert r.topk_indices.shape == (2, 3, 4, 2) and r.lse.shape == (2, 3, 4)
    assert r.tokens_per_expert.shape == (3, 6) and r.sums.shape == (3, 17)
    assert torch.equal(r.topk_weights.view(24, 2), flat.topk_weights)
    assert torch.equal(r.sums, flat.sums)
    one = {name: value[0, 0, 0] for name, value in per_token.items()}
    one = F.topk_gating(logits[0, 0, 0], 2, num_segments=3, **one)
    torch.testing.assert_close(one.topk_weights, r.topk_weights[0, 0, 0])
    base = make_logits(9, 16)
    views = [base[:, 3:11], base[::2], base.t(), base[:1].expand(5, 16), base[:, ::2]]
    views += [base[:, :7], base.bfloat16()[:, :15]]  # aligned rows with other data behind them
    for view in views:
        assert_matches(F.topk_gating(view, 3), view.contiguous(), top_k=3)
    tokens = dict(
        logits=make_logits(9, 8),
        noise=base.t()[:8].t(),
        segment_ids=(torch.arange(18) % 4)[::2],
        forced_indices=torch.stack([torch.arange(9) % 8, torch.arange(1, 10) % 8]).t(),
        token_mask=torch.rand(18)[::2],
    )
    compact = {name: value.contiguous() for name, value in tokens.items()}
    assert not any(value.is_contiguous() for name, value in tokens.items() if name != "logits")
    a, b = (F.topk_gating(top_k=2, num_segments=4, **given) for given in (tokens, compact))
    for got, want in zip(a, b, strict=True):
        assert torch.equal(got, want)
    spread = dict(noise=make_logits(1, 8).expand(9, 8), segment_ids=torch.tensor([1]).expand(9))
    assert_matches(
        F.topk_gating(tokens["logits"], 2, num_segments=2, **spread),
        tokens["logits"],
        top_k=2,
        num_segments=2,
        **spread,
    )


@pytest.mark.no_launch
def test_no_tokens():
    logits = torch.empty(0, 4, requires_grad=True)
    r = F.topk_gating(logits, 2)
    assert r.topk_indices.shape == (0, 2) and r.tokens_per_expert.tolist() == [0] * 4
    assert r.sums.abs().sum() == 0
    r.topk_weights.sum().backward()
    assert logits.grad.shape == (0, 4)
    r = F.topk_gating(
        logits,
        2,
        num_groups=2,
        group_topk=1,
        segment_ids=torch.empty(0, dtype=torch.long),
        num_segments=3,
        noise=torch.empty(0, 4),
        forced_indices=torch.empty(0, 2, dtype=torch.long),
    )
    assert torch.equal(r.tokens_per_expert, torch.zeros(3, 4, dtype=torch.long))
    assert torch.equal(r.sums, torch.zeros(3, 13))


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
        noisy = F.topk_gating(near := logits.clone().requires_grad_(), 2, noise=far)
        (grad_noise,) = torch.autograd.grad(noisy.topk_weights.sum(), far)
    (expected,) = torch.autograd.grad(F.topk_gating(near, 2).topk_weights.sum(), near)
    assert torch.equal(grad, expected)
    assert_matches(noisy, 2 * logits, top_k=2)
    (expected,) = torch.autograd.grad(F.topk_gating(2 * near, 2).topk_weights.sum(), near)
    assert torch.equal(2 * grad_noise, expected)


def test_without_statistics():
    for logits, arguments in sample_inputs():
        full, lean = (
            F.topk_gating(logits, **arguments),
            F.topk_gating(logits, **arguments, stats=False),
        )
        assert lean.lse is None and lean.sums is None
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
        return weights, lse, sums[..., :experts], sums[..., 2 * experts + 1 : 2 * experts + 3]

    return outputs


def leaves(logits, arguments, dtype=None):
    """What gradients go to (logits, and noise if there is any), and the arguments with it."""
    dtype = dtype or logits.dtype
    inputs = [logits.to(dtype).detach().clone().requires_grad_()]
    if arguments.get("noise") is not None:
        inputs.append(arguments["noise"].to(dtype).detach().clone().requires_grad_())
        arguments = dict(arguments, noise=inputs[1])
    return inputs, arguments


@pytest.mark.parametrize("case", SMALL_SAMPLES)
def test_gradcheck_and_gradgradcheck(case):
    logits, arguments = list(sample_inputs(torch.float64))[case]
    (_, *noise), arguments = leaves(logits, arguments)
    op = differentiable_outputs(F.topk_gating)
    finite = torch.isfinite(logits)
    values = logits[finite].requires_grad_()

    def function(values, *noise):
        # Absent experts stay out: a difference quotient of -inf means nothing.
        given = dict(arguments, noise=noise[0]) if noise else arguments
        return op(logits.masked_scatter(finite, values), given)

    assert gradcheck(function, (values, *noise))
    assert gradgradcheck(function, (values, *noise), fast_mode=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_match_the_reference(dtype):
    for logits, arguments in sample_inputs(dtype):
        inputs, given = leaves(logits, arguments)
        exact, exactly_given = leaves(logits, arguments, torch.float64)
        got = differentiable_outputs(F.topk_gating)(inputs[0], given)
        want = differentiable_outputs(exact_reference)(exact[0], exactly_given)
        probes = [torch.randn_like(w) for w in want]
        subsets = [range(4), [0], [1], [2], [3], [0, 2]]
        for subset in subsets:  # an absent gradient takes another path through the kernel
            grads = torch.autograd.grad(
                [got[i] for i in subset],
                inputs,
                [probes[i].to(got[i].dtype) for i in subset],
                retain_graph=True,
            )
            exact_grads = torch.autograd.grad(
                [want[i] for i in subset], exact, [probes[i] for i in subset], retain_graph=True
            )
            for a, b in zip(grads, exact_grads, strict=True):
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
        inputs, arguments = leaves(logits, arguments)
        out = differentiable_outputs(F.topk_gating)(inputs[0], arguments)
        probes = [torch.randn_like(o) for o in out]
        kernel = torch.autograd.grad(out, inputs, probes, retain_graph=True)
        composite = torch.autograd.grad(out, inputs, probes, create_graph=True)
        torch.testing.assert_close(composite, kernel, rtol=1e-12, atol=1e-12)


def test_top_1_renormalised_has_no_gate_gradient():
    logits = make_logits(4, 5).requires_grad_()
    r = F.topk_gating(logits, 1, norm_topk_prob=True, scaling_factor=2.0)
    assert (r.topk_weights == 2.0).all()
    r.topk_weights.sum().backward()
    assert (logits.grad == 0).all()


# ---- tracing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAMPLES)
def test_opcheck(case):
    logits, arguments = list(sample_inputs())[case]
    top_k = arguments.pop("top_k")
    for requires_grad in (False, True):
        inputs = (logits.clone().requires_grad_(requires_grad), top_k)
        torch.library.opcheck(ops.topk_gating, inputs, arguments)


@pytest.mark.parametrize(
    "score_function,norm",
    [
        ("softmax", False),
        ("softmax", True),
        ("sigmoid", False),
        ("sigmoid", True),
        ("sqrtsoftplus", True),
        ("identity", False),
    ],
)
def test_opcheck_backward(score_function, norm):
    logits = make_logits(5, 6)
    optional = {}
    if score_function != "softmax":
        optional["token_mask"] = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])
        optional["segment_ids"] = torch.tensor([0, 1, 2, 2, 0])
        optional["num_segments"] = 3
        optional["noise"] = make_logits(5, 6, seed=1)
    weights, indices, _, lse, sums = ops.topk_gating(logits, 2, score_function, norm, **optional)
    arguments = (
        torch.randn_like(weights),
        torch.randn_like(lse),
        torch.randn_like(sums),
        logits,
        indices,
        lse,
    )
    torch.library.opcheck(
        ops.topk_gating_backward, (*arguments, score_function, norm, 1.0), optional
    )
    differentiable = tuple(
        a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments[:5]
    )
    torch.library.opcheck(
        ops.topk_gating_backward,
        (*differentiable, lse, score_function, norm, 1.0),
        optional,
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


# All that a model of the DeepSeek-V3 kind asks for, and segments.
EVERYTHING = dict(score_function="sigmoid", norm_topk_prob=True, scaling_factor=2.5)
EVERYTHING |= dict(num_groups=3, group_topk=2)


def test_compile_with_groups_and_segments(compiled):
    def step(logits, noise, bias, segment_ids):
        given = dict(expert_bias=bias, segment_ids=segment_ids, num_segments=3, noise=noise)
        r = F.topk_gating(logits * 2, 3, **EVERYTHING, **given)
        return r.topk_weights.square().sum() + r.sums.sum(0)[:9].square().sum(), r.topk_indices

    fast = compiled(step)
    for tokens in (3, 5, 8):
        inputs = [make_logits(tokens, 9), make_logits(tokens, 9, seed=1)]
        x, y = ([i.clone().requires_grad_() for i in inputs] for _ in range(2))
        others = torch.linspace(-0.1, 0.1, 9), torch.randint(0, 3, (tokens,))
        (loss, indices), (expected, expected_indices) = fast(*x, *others), step(*y, *others)
        torch.testing.assert_close(loss, expected)
        assert torch.equal(indices, expected_indices)
        loss.backward()
        expected.backward()
        for a, b in zip(x, y, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


class Gate(torch.nn.Module):
    def forward(self, logits):
        return F.topk_gating(logits, 2)


class GateOfSegments(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("expert_bias", torch.linspace(-0.1, 0.1, 9))

    def forward(self, logits, segment_ids):
        given = dict(expert_bias=self.expert_bias, segment_ids=segment_ids, num_segments=4)
        return F.topk_gating(logits, 3, **EVERYTHING, **given)


def test_export_with_groups_and_segments():
    tokens = torch.export.Dim("tokens", min=2)
    arguments = make_logits(5, 9), torch.tensor([0, 0, 1, 3, 3])
    exported = torch.export.export(
        GateOfSegments(), arguments, dynamic_shapes=({0: tokens}, {0: tokens})
    )
    arguments = make_logits(7, 9), torch.tensor([0, 0, 1, 3, 3, 0, 1])
    for got, want in zip(exported.module()(*arguments), GateOfSegments()(*arguments), strict=True):
        assert torch.equal(got, want)


def test_export():
    exported = torch.export.export(
        Gate(), (make_logits(5, 6),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},)
    )
    assert ops.topk_gating.name().replace("::", ".") in exported.graph_module.code
    logits = make_logits(9, 6)
    for got, want in zip(exported.module()(logits), Gate()(logits), strict=True):
        assert torch.equal(got, want)


class TwoGates(torch.nn.Module):
    def forward(self, logits):
        return *F.topk_gating(logits, 2), *F.topk_gating(logits, 2, stats=False)[:3]


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    logits = make_logits(9, 6)
    gates = TwoGates()
    torch._dynamo.reset()
    for got, want in zip(torch.compile(gates, fullgraph=True)(logits), gates(logits), strict=True):
        torch.testing.assert_close(got, want)
    exported = torch.export.export(gates, (logits,))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "gates.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    for got, want in zip(run(logits), gates(logits), strict=True):
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
    ids = torch.empty(3, 4, dtype=torch.long, device="meta")
    r = F.topk_gating(
        torch.empty(3, 4, 6, device="meta"), 2, segment_ids=ids, num_segments=5, num_groups=1
    )
    assert r.tokens_per_expert.shape == (5, 6) and r.sums.shape == (5, 17)


# ---- determinism ---------------------------------------------------------------------------------


@pytest.mark.cpu_only("about threads of the CPU")
@pytest.mark.parametrize("segments", [None, "in order", "in no order"])
def test_same_bits_for_any_number_of_threads(segments):
    logits = make_logits(6000, 48).requires_grad_()
    arguments = {}
    if segments:
        ids = torch.randint(0, 40, (6000,))
        ids = ids.sort().values if segments == "in order" else ids
        arguments = dict(score_function="sigmoid", norm_topk_prob=True, segment_ids=ids)
        arguments |= dict(num_segments=41, num_groups=6, group_topk=2, token_mask=torch.rand(6000))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            r = F.topk_gating(logits, 4, **arguments)
            (grad,) = torch.autograd.grad(r.sums.square().sum() + r.topk_weights.sum(), logits)
            results.append((r, grad))
    finally:
        torch.set_num_threads(threads)
    for r, grad in results[1:]:
        assert torch.equal(grad, results[0][1])
        for a, b in zip(r, results[0][0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.cpu_only("about threads of the CPU")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_tokens_are_split_among_threads():
    """In a process of its own, whose other calls are too small for a second thread."""
    code = """
import os, torch, equipoise.functional as F
torch.set_num_threads(3)
x = torch.empty(60000, 8).requires_grad_()
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
F.topk_gating(x.detach(), 2)
print(threads() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 2


@pytest.mark.cpu_only("about instruction sets of the CPU, and the CUDA source beside them")
def test_every_instruction_set_chooses_the_same_experts(tmp_path):
    """Bit for bit from the same logits; weights and lse to a few ulp."""
    code = """
import sys, torch, equipoise
name, library, file = sys.argv[1:]
if library: torch.ops.load_library(library)
gate = getattr(torch.ops, name).topk_gating
torch.manual_seed(1)
x = torch.rand(300, 100) * 8 - 4  # randn has other bits on another instruction set
x[::7] = x[::7].round()
results = [
    gate(x.bfloat16(), 8),
    gate(x, 8),
    gate(x, 8, norm_topk_prob=True),
    gate(x.double(), 20),
    gate(x, 8, score_function="sqrtsoftplus", norm_topk_prob=True),
]
# With a bias or groups the scores decide, which may differ by some ulp: keys far enough apart.
apart = torch.stack([torch.randperm(100) for _ in range(300)]) / 10 - 5
bias = torch.randint(-1, 2, (100,)) * 4.0
for score_function in ("softmax", "sigmoid", "sqrtsoftplus", "identity"):
    given = dict(score_function=score_function, num_groups=10, group_topk=3)
    results.append(gate(apart, 8, expert_bias=bias, **given))
    results.append(gate(apart, 8, group_score="max", **given))
    results.append(gate(apart, 8, score_function, expert_bias=bias))
torch.save(results, file)
"""
    kinds = [("equipoise", "", capability) for capability in ("default", "avx2", "avx512")]
    if SIMT is not None:
        kinds.append(("equipoise_simt", SIMT.path, "default"))
    outputs = []
    for name, library, capability in kinds:
        environment = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
        command = [sys.executable, "-c", code, name, library, str(tmp_path / "results")]
        subprocess.run(command, env=environment, check=True)
        outputs.append(torch.load(tmp_path / "results"))
    for output in outputs[1:]:
        for got, want in zip(output, outputs[0], strict=True):
            weights, indices, counts, lse, sums = want
            assert torch.equal(got[1], indices) and torch.equal(got[2], counts)
            ulp = torch.finfo(weights.dtype).eps
            torch.testing.assert_close(got[0], weights, rtol=6 * ulp, atol=0)
            torch.testing.assert_close(got[3], lse, rtol=2 * ulp, atol=2 * ulp)
            torch.testing.assert_close(got[4], sums, rtol=1000 * ulp, atol=1000 * ulp)


def test_bad_segment_masks_in_the_differentiable_backward():
    """As it does in the kernels on CUDA; those on the CPU refuse it."""
    logits = make_logits(3, 4).requires_grad_()
    ids, mask = torch.tensor([1, 2, -1]), torch.tensor([True, False, False])
    routing = F.topk_gating(logits, 2, token_mask=mask)
    fixed = (torch.ones(3, 2), torch.ones(3), torch.ones(2, 13), logits, routing.topk_indices)
    fixed += (routing.lse.detach(), "softmax", False, 1.0)
    got = ops.topk_gating_backward(*fixed, segment_ids=ids, num_segments=2)
    want = ops.topk_gating_backward(*fixed, mask, segment_ids=ids.clamp(0, 1), num_segments=2)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changed", ["logits", "noise", "token_mask", "segment_ids", "indices", "lse"]
)
def test_gradient_notices_what_was_changed_in_place(changed):
    """A gradient of other numbers than the result's would be wrong without a word."""
    inputs = dict(
        logits=make_logits(3, 4).requires_grad_() * 1,
        noise=make_logits(3, 4, seed=1),
        token_mask=torch.tensor([1.0, 0.0, 2.0]),
        segment_ids=torch.tensor([0, 1, 0]),
    )
    routing = F.topk_gating(top_k=2, num_segments=2, **inputs)
    results = dict(indices=routing.topk_indices, lse=routing.lse)
    with torch.no_grad():
        (inputs | results)[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        routing.sums.sum().backward()


@pytest.mark.cpu_only("about a shortcut of the CPU kernel for at most 16 choices")
def test_rough_sigmoid_keys_choose_like_exact_ones():
    torch.manual_seed(2)
    for scale, num_experts in ((1.0, 256), (1e-3, 64), (8.0, 100)):
        x = torch.randn(500, num_experts) * scale
        x[::7, ::3] = float("-inf")
        for bias in (torch.randn(num_experts) * width for width in (0.0, 1e-4, 0.1, 1e5, 3e38)):
            given = dict(score_function="sigmoid", expert_bias=bias)
            exact = F.topk_gating(x, 17, **given).topk_indices
            assert torch.equal(F.topk_gating(x, 8, **given).topk_indices, exact[:, :8])


# ---- bad input -----------------------------------------------------------------------------------

INTEGERS = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    "logits,message",
    [
        (
            torch.zeros(2, 4, dtype=torch.long),
            "logits must be float32, float64, bfloat16 or float16, got Long",
        ),
        (torch.zeros(()), "logits must have shape [..., E], got a scalar"),
        (torch.zeros(2, 0), "logits must have at least one expert"),
    ],
)
@pytest.mark.cpu_only("the checks are shared")
def test_bad_logits(logits, message):
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=re.escape(f"topk_gating: {message}")):
            F.topk_gating(logits.to(device), 1)


@pytest.mark.cpu_only("of any library")
def test_logits_without_kernels():
    with pytest.raises(NotImplementedError, match="equipoise::topk_gating"):
        F.topk_gating(torch.zeros(2, 4).to_mkldnn(), 1)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(top_k=5), "top_k must be from 1 to num_experts = 4, got 5"),
        (dict(top_k=0), "top_k must be from 1 to num_experts = 4, got 0"),
        (
            dict(score_function="tanh"),
            "score_function must be 'softmax', 'sigmoid', 'sqrtsoftplus' or 'identity', got 'tanh'",
        ),
        (
            dict(score_function="identity", norm_topk_prob=True),
            "norm_topk_prob is not possible with score_function 'identity'",
        ),
        (
            dict(expert_bias=torch.zeros(3)),
            "expert_bias must have shape [E] = [4], got [3]",
        ),
        (
            dict(expert_bias=torch.zeros(4).bfloat16()),
            "expert_bias must be float32 (a smaller type loses its updates), got BFloat16",
        ),
        (
            dict(expert_bias=torch.zeros(4).long()),
            "expert_bias must be float32 (a smaller type loses its updates), got Long",
        ),
        (
            dict(expert_bias=torch.zeros(4, device="meta")),
            "expert_bias must be on the device of logits (cpu), got meta",
        ),
        (dict(num_groups=3), "num_groups must divide num_experts = 4, got 3"),
        (dict(num_groups=8, group_topk=2), "num_groups must divide num_experts = 4, got 8"),
        (dict(num_groups=0), "num_groups must be >= 1, got 0"),
        (dict(num_groups=2), "group_topk must be given with num_groups = 2"),
        (
            dict(num_groups=2, group_topk=3),
            "group_topk must be from 1 to num_groups = 2, got 3",
        ),
        (
            dict(num_groups=2, group_topk=0),
            "group_topk must be from 1 to num_groups = 2, got 0",
        ),
        (dict(group_topk=2), "group_topk must be from 1 to num_groups = 1, got 2"),
        (
            dict(num_groups=2, group_topk=1, top_k=3),
            "group_topk = 1 groups of 2 experts hold fewer than top_k = 3",
        ),
        (
            dict(num_groups=2, group_topk=1, group_score="mean"),
            "group_score must be 'max' or 'top2_sum', got 'mean'",
        ),
        (
            dict(token_mask=torch.ones(3).bool()),
            "token_mask must have shape of logits without its last = [2], got [3]",
        ),
        (dict(token_mask=INTEGERS), "token_mask must be bool or floating weights, got Long"),
        (
            dict(token_mask=torch.ones(2, device="meta")),
            "token_mask must be on the device of logits (cpu), got meta",
        ),
        (
            dict(segment_ids=INTEGERS.int(), num_segments=2),
            "segment_ids must be Long, got Int",
        ),
        (
            dict(segment_ids=torch.zeros(3, dtype=torch.long), num_segments=2),
            "segment_ids must have shape of logits without its last = [2], got [3]",
        ),
        (
            dict(segment_ids=INTEGERS.to("meta"), num_segments=2),
            "segment_ids must be on the device of logits (cpu), got meta",
        ),
        (dict(segment_ids=INTEGERS), "segment_ids needs num_segments"),
        (dict(num_segments=2), "num_segments needs segment_ids"),
        (
            dict(segment_ids=INTEGERS, num_segments=0),
            "num_segments must be >= 1, got 0",
        ),
        (dict(noise=torch.zeros(2, 4).bfloat16()), "noise must be Float, got BFloat16"),
        (dict(noise=torch.zeros(2, 3)), "noise must have shape"),
        (
            dict(noise=torch.zeros(2, 4, device="meta")),
            "noise must be on the device of logits (cpu), got meta",
        ),
        (
            dict(forced_indices=torch.zeros(2, 1).int()),
            "forced_indices must be Long, got Int",
        ),
        (
            dict(top_k=2, forced_indices=torch.zeros(2, 1).long()),
            "forced_indices must have shape",
        ),
        (
            dict(forced_indices=torch.zeros(2, 1, dtype=torch.long, device="meta")),
            "forced_indices must be on the device of logits (cpu), got meta",
        ),
    ],
)
@pytest.mark.cpu_only("the checks are shared")
def test_bad_input(arguments, message):
    arguments = dict(top_k=1) | arguments
    match = re.escape(f"topk_gating: {message}")
    with pytest.raises(RuntimeError, match=match):
        F.topk_gating(torch.zeros(2, 4), **arguments)
    if "on the device" in message:
        return
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=match):
        F.topk_gating(torch.zeros(2, 4, device="meta"), **meta)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(token_mask=torch.tensor([1.0, -1.0])), "token_mask must hold weights >= 0, got -1"),
        (dict(token_mask=torch.tensor([1.0, torch.nan])), "token_mask must hold weights >= 0"),
        (
            dict(segment_ids=torch.tensor([0, 5]), num_segments=2),
            "segment_ids must be in [0, num_segments) = [0, 2), got 5 for token 1",
        ),
        (
            dict(segment_ids=torch.tensor([-1, 0]), num_segments=2),
            "segment_ids must be in [0, num_segments) = [0, 2), got -1 for token 0",
        ),
        (
            dict(forced_indices=torch.tensor([[7, 0], [0, 1]])),
            "forced_indices must be in [-1, num_experts) = [-1, 4), got 7 for token 0",
        ),
        (
            dict(forced_indices=torch.tensor([[1, 0], [0, -2]])),
            "forced_indices must be in [-1, num_experts) = [-1, 4), got -2 for token 1",
        ),
        (
            dict(forced_indices=torch.tensor([[2, 2], [0, 1]])),
            "forced_indices must be different experts, got 2 twice for token 0",
        ),
    ],
)
@pytest.mark.cpu_only("values are checked on the CPU alone")
def test_bad_values(arguments, message):
    for stats in (True, False):
        with pytest.raises(RuntimeError, match=re.escape(f"topk_gating: {message}")):
            F.topk_gating(torch.zeros(2, 4), 2, **arguments, stats=stats)


def test_one_group_is_no_group():
    logits = make_logits(3, 4)
    for a, b in zip(
        F.topk_gating(logits, 2, num_groups=1, group_topk=1), F.topk_gating(logits, 2), strict=True
    ):
        assert torch.equal(a, b)


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

# SPDX-License-Identifier: Apache-2.0
"""What other routers get or got wrong, one test a row (the name in brackets).

==================================================  ===============================================
elsewhere                                           here
==================================================  ===============================================
NaN logits (padding, CUDA graphs) give expert ids   A NaN expert is absent: never chosen, p = 0. A
twice or out of range, then illegal memory access   row of NaN gets -1 everywhere and counts
(vLLM #37758, #39244, #39391; SGLang #30079; aiter  nowhere. num_nan_rows tells.
#4247) [nan]
Group limits mask what they drop with 0, which      What is dropped is -inf; scores and keys of any
beats negative scores (TransformerEngine #2009)     sign.
[negative]
top_k = 1 is normalised wrongly                     The weight is scaling_factor, the gate gradient
(TransformerEngine #2720) [top_1]                   exactly zero.
A selection bias is refused with softmax            Any score function takes one.
(Megatron-LM #1693) [bias_with]
The bias is folded into the gate value (a common    Weights come from the unbiased scores; the bias
mistake in course work: deepspeed-course #26)       gets no gradient.
[bias_in_weights]
Ties, -inf rows and saturated scores give an        K different experts, or -1; ties go to the
expert twice, or another order under recomputation  lowest index; the same again each time.
(torchtitan #3146, #3436, #3600) [duplicates]
Padding tokens are counted in f, P, z and capacity  token_mask (True = real token) holds for
(Megatron-LM #1984, #2121; transformers #28505) or  everything that comes out.
in P alone (DeepSpeed's top-1 gate) [padding]
P is the mean over the chosen probabilities only    P is the full softmax.
(aprender #2162) [full_softmax]
Scores that underflow are divided by their sum, or  Renormalised from log scores: exact at any
that sum plus an epsilon [underflow]                distance from 0.
Large z from log(sum(exp x)) overflows (Mod-Squad)  Stable lse.
[overflow]
Expert counts and K have limits: fails or is wrong  Any E and K.
above them (TransformerEngine #2582, #2821)
[many_experts]
Recomputation chooses other experts than the        forced_indices takes the choice; the weights
forward pass did (NeMo Automodel #3140) [replay]    are recomputed from the logits.
==================================================  ===============================================

Row offsets beyond 2^31 (TransformerEngine #2907) are in test_topk_gating.py, test_huge_rows_apart.
"""

import pytest
import torch

import equipoise.functional as F

pytestmark = pytest.mark.usefixtures("backend")

SCORE_FUNCTIONS = ["softmax", "sigmoid", "sqrtsoftplus", "identity"]
GROUPS = dict(num_groups=4, group_topk=2)


def assert_sound(r, logits):
    """Ids that may index memory: in range, different, or -1 with weight 0; counts to match."""
    experts = logits.size(-1)
    for row, weights in zip(r.topk_indices.tolist(), r.topk_weights.tolist(), strict=True):
        chosen = [e for e in row if e != -1]
        assert len(set(chosen)) == len(chosen) and all(0 <= e < experts for e in chosen)
        assert all(w == 0 for e, w in zip(row, weights, strict=True) if e == -1)
    assert torch.isfinite(r.topk_weights).all() and torch.isfinite(r.sums).all()
    counted = torch.bincount(r.topk_indices[r.topk_indices >= 0], minlength=experts)
    assert torch.equal(r.tokens_per_expert, counted)


@pytest.mark.parametrize("limits", [dict(), dict(expert_bias=torch.arange(16.0)), GROUPS])
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_nan(score_function, limits):
    logits = torch.randn(40, 16)
    logits[torch.rand(40, 16) < 0.3] = torch.nan
    logits[::5] = torch.nan
    logits[1, 1:] = torch.nan
    x = logits.clone().requires_grad_()
    r = F.topk_gating(x, 6, score_function=score_function, **limits)
    assert_sound(r, logits)
    there = (r.topk_indices >= 0).nonzero(as_tuple=True)
    assert not logits[there[0], r.topk_indices[there]].isnan().any()
    assert r.topk_indices[1].tolist() == [0, -1, -1, -1, -1, -1]
    assert (r.topk_indices[::5] == -1).all() and (r.topk_weights[::5] == 0).all()
    if "num_groups" not in limits:  # as many as there are
        present = (~logits.isnan()).sum(-1).clamp(max=6)
        assert torch.equal((r.topk_indices >= 0).sum(-1), present)
    assert r.num_nan_rows == logits.isnan().any(-1).sum() and r.num_tokens == 32
    torch.testing.assert_close(r.prob_sum.sum(), torch.tensor(32.0))
    (grad,) = torch.autograd.grad(r.topk_weights.sum() + r.sums.sum(), x)
    assert torch.isfinite(grad).all() and (grad[logits.isnan()] == 0).all()


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_negative_keys_under_group_limits(score_function, group_score):
    """Groups of two; every key is below 0, so that a dropped expert at 0 would win."""
    logits = torch.tensor([[-6.0, -5.0, -1.0, -2.0, -4.0, -3.0, -8.0, -7.0]])
    given = dict(score_function=score_function, group_score=group_score, num_groups=4)
    bias = torch.full((8,), -10.0)
    for expert_bias in (bias, None) if score_function == "identity" else (bias,):
        given["expert_bias"] = expert_bias
        r = F.topk_gating(logits, 2, group_topk=1, **given)
        assert r.topk_indices.tolist() == [[2, 3]]
        r = F.topk_gating(logits, 4, group_topk=2, **given)
        assert r.topk_indices.tolist() == [[2, 3, 5, 4]]
    # A group of which little is present is no worse than its experts: not 0 plus -1.
    logits = torch.tensor([[-1.0, -torch.inf, -3.0, -4.0]])
    r = F.topk_gating(logits, 2, score_function="identity", num_groups=2, group_topk=1)
    assert r.topk_indices.tolist() == [[0, -1]]
    nobody = logits[:, [1, 1, 2, 3]]  # in the first group: it is not kept
    r = F.topk_gating(nobody, 2, score_function="identity", num_groups=2, group_topk=1)
    assert r.topk_indices.tolist() == [[2, 3]]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("limits", [dict(), dict(expert_bias=torch.arange(8.0)), GROUPS])
def test_top_1_normalised(score_function, limits):
    for logits in (torch.randn(9, 8), 60 * torch.randn(9, 8)):
        x = logits.requires_grad_()
        given = dict(score_function=score_function, norm_topk_prob=True, **limits)
        r = F.topk_gating(x, 1, scaling_factor=2.5, **given)
        assert (r.topk_weights == 2.5).all()
        (grad,) = torch.autograd.grad(r.topk_weights.sum(), x)
        assert (grad == 0).all()


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_bias_with_every_score_function(score_function):
    logits = torch.randn(50, 8)
    unbiased = F.topk_gating(logits, 2, score_function=score_function).tokens_per_expert
    bias = torch.zeros(8)
    bias[unbiased.argmin()] = 20.0
    r = F.topk_gating(logits, 2, score_function=score_function, expert_bias=bias)
    assert (r.topk_indices[:, 0] == unbiased.argmin()).all()


@pytest.mark.parametrize(
    "score_function,norm",
    [(s, n) for s in SCORE_FUNCTIONS for n in (False, True) if not (s == "identity" and n)],
)
def test_bias_in_weights_never(score_function, norm):
    logits = torch.randn(20, 8)
    bias = torch.linspace(-2, 2, 8).requires_grad_()
    given = dict(score_function=score_function, norm_topk_prob=norm)
    r = F.topk_gating(logits.requires_grad_(), 3, expert_bias=bias, **given)
    free = F.topk_gating(logits, 3, **given)
    assert not torch.equal(r.topk_indices, free.topk_indices)
    scores = {
        "softmax": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
        "identity": lambda x: x,
    }[score_function](logits)
    weights = scores.gather(-1, r.topk_indices)
    if norm:
        weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(r.topk_weights, weights)
    torch.testing.assert_close(r.prob_sum, free.prob_sum)  # nor in the statistics
    torch.testing.assert_close(r.lse, free.lse)
    grads = torch.autograd.grad(r.topk_weights.square().sum(), (logits, bias), allow_unused=True)
    assert grads[1] is None and (grads[0] != 0).any()


@pytest.mark.parametrize("experts,top_k", [(8, 8), (64, 20), (512, 40), (2000, 9)])
def test_duplicates_never(experts, top_k):
    inf = torch.inf
    rows = [
        torch.zeros(experts),
        torch.full((experts,), 100.0),  # sigmoid and softmax saturate
        torch.linspace(80, 120, experts),
        torch.full((experts,), -200.0),  # all scores are 0 in float32
        torch.full((experts,), inf),
        torch.full((experts,), -inf),
        torch.where(torch.arange(experts) % 3 == 0, 1.0, -inf),
        torch.where(torch.arange(experts) == experts - 1, 0.0, -inf),
        torch.randint(0, 2, (experts,)).float(),
        torch.randn(experts).bfloat16().float(),
    ]
    logits = torch.stack(rows)
    for score_function in SCORE_FUNCTIONS if experts <= 64 else SCORE_FUNCTIONS[:2]:
        for limits in (dict(), dict(expert_bias=torch.zeros(experts)), dict(GROUPS, group_topk=3)):
            if "num_groups" in limits and 3 * experts // 4 < top_k:
                continue
            given = dict(score_function=score_function, **limits)
            r = F.topk_gating(logits, top_k, **given)
            sizes = torch.isfinite(logits) | (logits == inf)
            if "num_groups" not in limits:
                assert torch.equal((r.topk_indices >= 0).sum(-1), sizes.sum(-1).clamp(max=top_k))
            assert_sound(r, logits)
            assert r.topk_indices[0].tolist() == list(range(top_k))  # equal: the lowest indices
            assert r.topk_indices[3].tolist() == list(range(top_k))
            again = F.topk_gating(logits, top_k, **given, stats=False)
            assert torch.equal(again.topk_indices, r.topk_indices)


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("filling", [0.0, 50.0, torch.nan, torch.inf, -torch.inf])
def test_padding_is_never_counted(score_function, filling):
    real = torch.rand(20) < 0.6
    logits = torch.randn(20, 8)
    logits[~real] = filling
    ids = torch.arange(20) % 3
    given = dict(score_function=score_function, num_segments=3, **GROUPS)
    x = logits.clone().requires_grad_()
    r = F.topk_gating(x, 3, token_mask=real, segment_ids=ids, **given)
    alone = F.topk_gating(logits[real], 3, segment_ids=ids[real], **given)
    assert (r.topk_indices[~real] == -1).all() and (r.topk_weights[~real] == 0).all()
    assert (r.lse[~real] == 0).all()
    assert torch.equal(r.tokens_per_expert, alone.tokens_per_expert)
    torch.testing.assert_close(r.sums, alone.sums)  # P, load, tokens, z, entropy, NaN rows
    assert r.num_tokens.sum() == real.sum() and (r.num_nan_rows == 0).all()
    (grad,) = torch.autograd.grad(r.sums.square().sum() + r.topk_weights.sum(), x)
    assert (grad[~real] == 0).all() and torch.isfinite(grad).all() and (grad[real] != 0).any()


def test_full_softmax_is_in_prob_sum():
    """With K = 1, P of the chosen probabilities alone would be 0 for most experts."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 3)
    for given in (dict(), dict(norm_topk_prob=True), dict(num_groups=2, group_topk=1)):
        r = F.topk_gating(logits, 1, **given)
        torch.testing.assert_close(r.prob_sum, 3 * logits[0].softmax(-1))
    forced = F.topk_gating(logits, 1, forced_indices=torch.full((3, 1), 3))
    torch.testing.assert_close(forced.prob_sum, r.prob_sum)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_underflow_does_not_end_in_zero_over_zero(score_function):
    logits = torch.tensor([[0.0, -500.0, -501.0, -502.0], [-500.0, -501.0, -502.0, -503.0]])
    bias = torch.tensor([-100.0, 0.0, 0.0, 0.0])  # away from the expert whose score is not 0
    x = logits.clone().requires_grad_()
    r = F.topk_gating(x, 2, score_function=score_function, norm_topk_prob=True, expert_bias=bias)
    assert r.topk_indices.tolist() == [[1, 2], [1, 2]]
    ratio = 0.5 if score_function == "sqrtsoftplus" else 1.0
    expected = torch.tensor([0.0, -ratio]).softmax(-1).expand(2, 2)
    torch.testing.assert_close(r.topk_weights, expected)
    (grad,) = torch.autograd.grad(r.topk_weights[:, 0].sum(), x)
    slope = ratio * expected[0, 0] * expected[0, 1]
    torch.testing.assert_close(grad, torch.stack([torch.tensor([0.0, slope, -slope, 0.0])] * 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overflow_of_exp(dtype):
    logits = torch.tensor([[1000.0, 999.0, -1000.0], [90.0, 90.0, 90.0]]).to(dtype)
    r = F.topk_gating(logits, 1)
    expected = logits.double().logsumexp(-1)
    torch.testing.assert_close(r.lse.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(F.z_loss(r).double(), expected.square().mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("experts,top_k", [(2305, 36), (4099, 300)])
def test_many_experts(experts, top_k):
    logits = torch.stack([torch.randperm(experts).float() / 100 for _ in range(2)])
    bias = torch.zeros(experts)
    for given in (dict(), dict(score_function="identity", expert_bias=bias)):
        r = F.topk_gating(logits, top_k, **given)
        assert torch.equal(r.topk_indices, logits.argsort(descending=True)[:, :top_k])


def test_replay_of_a_choice():
    """Noise that differs between forward and recomputation: the choice does not."""
    logits = torch.randn(30, 16)
    given = dict(score_function="sigmoid", norm_topk_prob=True, scaling_factor=2.5)
    first = F.topk_gating(logits, 4, noise=torch.randn(30, 16), **given)
    again = F.topk_gating(logits, 4, noise=torch.randn(30, 16), **given)
    assert not torch.equal(again.topk_indices, first.topk_indices)
    x = logits.clone().requires_grad_()
    replay = F.topk_gating(x, 4, forced_indices=first.topk_indices, **given)
    assert torch.equal(replay.topk_indices, first.topk_indices)
    assert torch.equal(replay.tokens_per_expert, first.tokens_per_expert)
    scores = logits.sigmoid().gather(-1, first.topk_indices)
    torch.testing.assert_close(replay.topk_weights, 2.5 * scores / scores.sum(-1, keepdim=True))
    (grad,) = torch.autograd.grad(replay.topk_weights[:, 0].sum(), x)
    assert ((grad != 0).sum(-1) == 4).all()

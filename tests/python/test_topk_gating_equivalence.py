# SPDX-License-Identifier: Apache-2.0
"""topk_gating against routers and balance statistics as their papers state them.

Each formula stands here in plain PyTorch as its source has it, loops over experts and groups
included, and knows nothing of the reference. E, K and groups are those of the models.
"""

import math

import pytest
import torch
from helpers import tolerance

import equipoise.functional as F

pytestmark = pytest.mark.usefixtures("backend")


# ---- routers: logits -> (weights, indices), [T, K] each, best expert first ----------------------


def mixtral(logits):
    """Softmax over the top-2 logits (Jiang 2024, arXiv:2401.04088, section 2.1)."""
    top = logits.topk(2)
    return torch.exp(top.values) / torch.exp(top.values).sum(-1, keepdim=True), top.indices


def qwen3(logits):
    """128 experts, 8 of them by softmax, their probabilities divided by their sum (Yang 2025,
    arXiv:2505.09388).
    """
    top = logits.softmax(-1).topk(8)
    return top.values / top.values.sum(-1, keepdim=True), top.indices


def deepseek_v2(logits):
    """160 experts on 8 devices: the 3 devices with the best expert, 6 experts on them by softmax,
    whose weights are their probabilities, scaled by 16 (DeepSeek-AI 2024, arXiv:2405.04434,
    equations 20 to 22 and section 2.2.2).
    """
    scores = logits.softmax(-1)
    limited = torch.zeros_like(scores)
    for t, row in enumerate(scores):
        devices = [row[20 * d : 20 * (d + 1)].max().item() for d in range(8)]
        for d in sorted(range(8), key=lambda d: -devices[d])[:3]:
            limited[t, 20 * d : 20 * (d + 1)] = row[20 * d : 20 * (d + 1)].detach()
    indices = limited.topk(6).indices
    return 16 * scores.gather(-1, indices), indices


def deepseek_v3(logits, bias):
    """256 experts on 8 nodes: sigmoid scores; scores plus bias choose the 4 nodes with the largest
    sum of their best two, then 8 experts on them; the weights are the scores over their sum, scaled
    by 2.5 (DeepSeek-AI 2024, arXiv:2412.19437, equations 12 to 16 and section 2.1.2).
    """
    scores = 1 / (1 + torch.exp(-logits))
    biased = scores.detach() + bias
    limited = torch.full_like(biased, -math.inf)
    for t, row in enumerate(biased):
        nodes = [sum(sorted(row[32 * n : 32 * (n + 1)].tolist())[-2:]) for n in range(8)]
        for n in sorted(range(8), key=lambda n: -nodes[n])[:4]:
            limited[t, 32 * n : 32 * (n + 1)] = row[32 * n : 32 * (n + 1)]
    indices = limited.topk(8).indices
    chosen = scores.gather(-1, indices)
    return 2.5 * chosen / chosen.sum(-1, keepdim=True), indices


def switch(logits):
    """The most probable expert, weighted by its probability (Fedus 2021, arXiv:2101.03961, 2.1)."""
    probability, index = logits.softmax(-1).max(-1, keepdim=True)
    return probability, index


def softmax_then_topk(logits):
    """Megatron with pre-softmax: probabilities, and the best of them as they are (He 2024,
    arXiv:2410.07524).
    """
    top = logits.softmax(-1).topk(6)
    return top.values, top.indices


def topk_then_softmax(logits):
    """Megatron without pre-softmax: the best logits, and their softmax (arXiv:2410.07524)."""
    top = logits.topk(6)
    return top.values.softmax(-1), top.indices


def llama_4(logits):
    """The expert with the largest logit, weighted by the sigmoid of that logit (Llama 4, 2025; its
    public model description, there is no paper).
    """
    value, index = logits.max(-1, keepdim=True)
    return torch.sigmoid(value), index


BIAS = torch.linspace(-0.3, 0.3, 256)[torch.randperm(256, generator=torch.manual_seed(7))]
GROUPS_V2 = dict(num_groups=8, group_topk=3, group_score="max")
GROUPS_V3 = dict(num_groups=8, group_topk=4, group_score="top2_sum")
ROUTERS = {
    mixtral: (8, dict(top_k=2, norm_topk_prob=True)),
    qwen3: (128, dict(top_k=8, norm_topk_prob=True)),
    deepseek_v2: (160, dict(top_k=6, scaling_factor=16.0, **GROUPS_V2)),
    deepseek_v3: (
        256,
        dict(
            top_k=8,
            score_function="sigmoid",
            norm_topk_prob=True,
            scaling_factor=2.5,
            expert_bias=BIAS,
            **GROUPS_V3,
        ),
    ),
    switch: (64, dict(top_k=1)),
    softmax_then_topk: (64, dict(top_k=6)),
    topk_then_softmax: (64, dict(top_k=6, norm_topk_prob=True)),
    llama_4: (16, dict(top_k=1, score_function="sigmoid")),
}


def random_logits(experts, dtype, tokens=24):
    logits = torch.randn(tokens, experts, generator=torch.manual_seed(experts), dtype=torch.float64)
    return (1.5 * logits).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)
def test_router(router, dtype):
    experts, options = ROUTERS[router]
    logits = random_logits(experts, dtype)
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    r = F.topk_gating(x, **options)
    bias = [options["expert_bias"].to(dtype)] if "expert_bias" in options else []
    weights, indices = router(y, *bias)
    torch.testing.assert_close(r.topk_weights, weights, **tolerance(dtype))
    assert torch.equal(r.topk_indices, indices)
    probe = torch.randn_like(weights)
    (got,) = torch.autograd.grad(r.topk_weights, x, probe)
    (want,) = torch.autograd.grad(weights, y, probe)
    torch.testing.assert_close(got, want, **tolerance(dtype))
    lean = F.topk_gating(logits, **options, stats=False)
    assert torch.equal(lean.topk_indices, indices)


# ---- statistics: what balance losses are made of ------------------------------------------------


def mean_probability(logits, indices):
    """P, the mean of the full softmax over the tokens (arXiv:2101.03961, equation 6)."""
    return (logits.exp() / logits.exp().sum(-1, keepdim=True)).mean(0)


def switch_loss(logits, indices):
    """E sum_e f_e P_e, f the fraction of tokens whose best is e (arXiv:2101.03961, equation 4)."""
    tokens, experts = logits.shape
    fractions = logits.new_tensor([(indices == e).sum().item() / tokens for e in range(experts)])
    return experts * (fractions * mean_probability(logits, indices)).sum()


def z_loss(logits, indices):
    """mean(log(sum(exp x))^2) (Zoph 2022, arXiv:2202.08906, equation 5)."""
    return logits.exp().sum(-1).log().square().mean()


def token_entropy(logits, indices):
    """The mean over the tokens of -sum p log p."""
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1).mean()


def sequence_loss(logits, indices, length=8):
    """DeepSeek-V3's sequence-wise balance loss, alpha = 1, the mean over the sequences: f is
    E / (K T) times the count, P the mean of the sigmoid scores over their sum (arXiv:2412.19437,
    equations 17 to 20).
    """
    experts, top_k = logits.size(-1), indices.size(-1)
    losses = []
    for x, chosen in zip(logits.split(length), indices.split(length), strict=True):
        scores = x.sigmoid()
        probability = (scores / scores.sum(-1, keepdim=True)).mean(0)
        count = torch.bincount(chosen.flatten(), minlength=experts).to(x.dtype)
        losses.append((experts / (top_k * length) * count * probability).sum())
    return torch.stack(losses).mean()


def mean_lse_squared(r):
    return r.sums[..., 2 * r.num_experts + 1] / r.num_tokens


def mean_entropy(r):
    return r.sums[..., 2 * r.num_experts + 2] / r.num_tokens


def loss_of_segments(r):
    frequency = r.load.detach() / (r.top_k * r.num_tokens.unsqueeze(-1))
    probability = r.prob_sum / r.num_tokens.unsqueeze(-1)
    return r.num_experts * (frequency * probability).sum(-1).mean()


SEGMENTS = dict(segment_ids=torch.arange(24).div(8, rounding_mode="floor"), num_segments=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "formula,statistic,options",
    [
        (mean_probability, lambda r: r.prob_sum / r.num_tokens, dict(top_k=2)),
        (switch_loss, F.switch_loss, dict(top_k=1)),
        (z_loss, F.z_loss, dict(top_k=2)),
        (z_loss, mean_lse_squared, dict(top_k=2, score_function="sigmoid", norm_topk_prob=True)),
        (token_entropy, mean_entropy, dict(top_k=2)),
        (sequence_loss, loss_of_segments, dict(top_k=4, score_function="sigmoid", **SEGMENTS)),
    ],
)
def test_statistic(formula, statistic, options, dtype):
    x, y = (random_logits(16, dtype).requires_grad_() for _ in range(2))
    r = F.topk_gating(x, **options)
    got, want = statistic(r), formula(y, y.detach().topk(options["top_k"]).indices)
    torch.testing.assert_close(got, want, **tolerance(dtype))
    probe = torch.randn_like(want)
    (got,) = torch.autograd.grad(got, x, probe)
    (want,) = torch.autograd.grad(want, y, probe)
    torch.testing.assert_close(got, want, **tolerance(dtype))

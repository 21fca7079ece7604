# SPDX-License-Identifier: Apache-2.0
"""How evenly the experts are loaded: every figure that the field reports, from the counts alone.

With counts C_e, mean m and shares f_e = C_e / sum C:

    cv = std(C) / m                    imbalance_ratio = max(C) / m
    max_vio = (max(C) - m) / m         min_vio = (m - min(C)) / m
    entropy = -sum f log f (nats)      perplexity = exp(entropy), the number of experts in effect
    kl_to_uniform = log E - entropy    gini = sum_i (2 i - E - 1) C_i / (E sum C), C ascending

MaxVio is Wang 2024's (arXiv:2408.15664): relative, not in tokens.
"""

import math

import torch
from torch import Tensor


def load_metrics(tokens_per_expert: Tensor, unbiased: bool = False) -> dict[str, Tensor]:
    """Load figures of one layer, or of several layers side by side (never of their sum).

    Args:
        tokens_per_expert: [E] or [..., E] counts, int64 as `topk_gating` gives them (or floating).
        unbiased: divide the variance in `cv` by E - 1 instead of E.

    Returns:
        Float64 tensors of shape [] or [...], on the device of the counts; nothing waits for it:

        - `cv`, `imbalance_ratio`, `max_vio`, `max_vio_tokens` (max - mean, in tokens), `min_vio`
        - `gini`, `entropy`, `perplexity`, `kl_to_uniform`
        - `expert_utilization_rate`: share of the experts with at least 10 % of a fair share
        - `expert_usage_rate`: share of the experts with any token
        - `dead_experts`: experts without a token (int64)
        - `top1_share`: share of the fullest expert

        Without a single token there is no load to speak of, and the ratios are NaN.

    Raises:
        ValueError: no experts dimension, or an empty one.

    Example:
        >>> counts = torch.tensor([1, 2, 261, 266, 6, 253, 229, 6])
        >>> for name, value in load_metrics(counts).items():
        ...     print(f"{name:<24}{value:8.3f}")
        cv                         0.974
        imbalance_ratio            2.078
        max_vio                    1.078
        max_vio_tokens           138.000
        min_vio                    0.992
        gini                       0.502
        entropy                    1.458
        perplexity                 4.298
        kl_to_uniform              0.621
        expert_utilization_rate    0.500
        expert_usage_rate          1.000
        dead_experts               0.000
        top1_share                 0.260
        >>> print(f"{load_metrics(counts, unbiased=True)['cv']:.3f}")
        1.041
    """
    if tokens_per_expert.dim() == 0 or tokens_per_expert.shape[-1] == 0:
        raise ValueError(
            "load_metrics: tokens_per_expert must have shape [..., E] with E >= 1, "
            f"got {list(tokens_per_expert.shape)}"
        )
    num_experts = tokens_per_expert.shape[-1]
    counts = tokens_per_expert.to(torch.float64)
    total = counts.sum(-1)
    mean = total / num_experts
    largest, smallest = counts.amax(-1), counts.amin(-1)
    share = counts / total.unsqueeze(-1)
    used = (10 * num_experts * counts >= total.unsqueeze(-1)) & (counts > 0)
    entropy = torch.special.entr(share).sum(-1)
    rank = torch.arange(1, num_experts + 1, dtype=torch.float64, device=counts.device)
    rank_weight = 2 * rank - num_experts - 1
    return {
        "cv": counts.std(-1, correction=1 if unbiased else 0) / mean,
        "imbalance_ratio": largest / mean,
        "max_vio": (largest - mean) / mean,
        "max_vio_tokens": largest - mean,
        "min_vio": (mean - smallest) / mean,
        "gini": (rank_weight * counts.sort(-1).values).sum(-1) / (num_experts * total),
        "entropy": entropy,
        "perplexity": entropy.exp(),
        "kl_to_uniform": math.log(num_experts) - entropy,
        "expert_utilization_rate": used.double().mean(-1),
        "expert_usage_rate": (counts > 0).double().mean(-1),
        "dead_experts": (counts == 0).sum(-1),
        "top1_share": largest / total,
    }

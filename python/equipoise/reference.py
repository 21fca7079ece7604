# SPDX-License-Identifier: Apache-2.0
"""The plain PyTorch meaning of every op: what tests, documentation and benchmarks hold the ops to.

Nothing here is fast and everything here is short. Each function takes and returns what the op of
the same name in ``torch.ops.equipoise`` takes and returns (shapes: T tokens, E experts, K = top_k,
H features), is differentiable by plain autograd to any order, and computes in float32 for half
types and in float64 for float64.
"""

import torch
from torch import Tensor

__all__ = ["balance_loss", "expert_bincount", "moe_permute", "moe_unpermute", "topk_gating"]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk_gating(
    logits: Tensor,
    top_k: int,
    norm_topk_prob: bool = False,
    scaling_factor: float = 1.0,
    expert_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Softmax scores, top-k, counts and sums; see ``equipoise.functional.topk_gating``.

    >>> out = topk_gating(torch.tensor([[0.0, 2.0, 1.0]]), 2)
    >>> out[1].tolist(), [round(w, 3) for w in out[0].flatten().tolist()]
    ([[1, 2]], [0.665, 0.245])
    """
    num_experts = logits.size(-1)
    dtype = _compute_dtype(logits.dtype)
    x = logits.to(dtype)
    nan_rows = x.isnan().any(-1)
    absent = x.isnan() | (x == -torch.inf)
    weight = x.new_ones(x.shape[:-1]) if token_mask is None else token_mask.to(dtype)
    nan_rows = nan_rows & (weight > 0)
    weight = weight.masked_fill(
        absent.all(-1), 0
    )  # a row without a present expert counts as masked
    counts_here = weight > 0
    # A masked row gets finite numbers, so that no gradient of it is NaN; it enters nothing.
    absent_here = absent & counts_here.unsqueeze(-1)
    x = x.masked_fill(absent, 0).clamp(max=1e18).masked_fill(absent_here, -torch.inf)
    log_p = x.log_softmax(-1)
    p = log_p.exp()
    lse = x.logsumexp(-1).masked_fill(~counts_here, 0)
    entropy = -(p * log_p.masked_fill(absent_here, 0)).sum(-1)

    # Selection: key, then logit, then lowest index. Two stable sorts, the less important key first.
    key = x if expert_bias is None else p + expert_bias.to(dtype)
    key = key.detach().masked_fill(absent, -torch.inf)
    order = x.detach().sort(dim=-1, descending=True, stable=True).indices
    by_key = key.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    indices = order.gather(-1, by_key)[..., :top_k]
    empty = absent.gather(-1, indices) | ~counts_here.unsqueeze(-1)
    if norm_topk_prob:
        chosen = x.gather(-1, indices).masked_fill(empty, -1e30)
        weights = scaling_factor * chosen.softmax(-1)
    else:
        weights = scaling_factor * p.gather(-1, indices)
    weights = weights.masked_fill(empty, 0)

    chosen_map = torch.nn.functional.one_hot(indices, num_experts) * ~empty.unsqueeze(-1)
    chosen_map = chosen_map.sum(-2).reshape(-1, num_experts)
    w = weight.reshape(-1)
    sums = torch.cat(
        [
            w @ p.reshape(-1, num_experts),
            w @ chosen_map.to(dtype),
            torch.stack(
                [
                    w.sum(),
                    (w * lse.reshape(-1).square()).sum(),
                    (w * entropy.reshape(-1)).sum(),
                    nan_rows.sum().to(dtype),
                    w.new_zeros(()),
                ]
            ),
        ]
    )
    return weights, indices.masked_fill(empty, -1), chosen_map.sum(0), lse, sums


def expert_bincount(
    indices: Tensor,
    num_experts: int,
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Counts of each expert, by the one-hot tensor; see ``equipoise.functional.expert_bincount``.

    >>> expert_bincount(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
    [1, 0, 2]
    """
    valid = indices >= 0
    if token_mask is not None:
        valid = valid & token_mask.unsqueeze(-1)
    one_hot = torch.nn.functional.one_hot(indices.clamp(min=0), num_experts) * valid.unsqueeze(-1)
    one_hot = one_hot.reshape(-1, num_experts)
    if weights is None:
        return one_hot.sum(0)
    dtype = _compute_dtype(weights.dtype)
    return weights.reshape(-1).to(dtype) @ one_hot.to(dtype)


def moe_permute(
    x: Tensor, topk_indices: Tensor, num_experts: int, topk_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of each expert together, in token order; see ``equipoise.functional.moe_permute``.

    >>> moe_permute(torch.tensor([[1.0], [2.0]]), torch.tensor([[1], [0]]), 2)[0].tolist()
    [[2.0], [1.0]]
    """
    top_k = topk_indices.size(1)
    slots = topk_indices.flatten()
    counts = expert_bincount(topk_indices, num_experts)
    # Empty slots sort behind every expert.
    order = torch.where(slots >= 0, slots, num_experts).sort(stable=True).indices
    filled = slots[order] >= 0
    permuted = x[order // top_k] * filled.unsqueeze(1)
    if topk_weights is None:
        weights = x.new_empty(0, dtype=_compute_dtype(x.dtype))
    else:
        weights = topk_weights.flatten()[order] * filled
    row_id_map = torch.empty_like(slots)
    row_id_map[order] = torch.arange(len(slots), device=slots.device)
    row_id_map = row_id_map.masked_fill(slots < 0, -1).view_as(topk_indices)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return permuted, weights, row_id_map, counts, offsets, counts.clone(), counts.new_zeros(())


def moe_unpermute(
    permuted: Tensor, row_id_map: Tensor, topk_weights: Tensor | None = None
) -> Tensor:
    """Each token's rows added up with its weights; see ``equipoise.functional.moe_unpermute``.

    >>> moe_unpermute(torch.tensor([[2.0], [1.0]]), torch.tensor([[1], [0]])).tolist()
    [[1.0], [2.0]]
    """
    dtype = _compute_dtype(permuted.dtype)
    padded = torch.cat([permuted, permuted.new_zeros(1, permuted.size(1))]).to(dtype)
    rows = padded[row_id_map]  # -1 is the row of zeros
    if topk_weights is not None:
        rows = rows * topk_weights.to(dtype).unsqueeze(-1)
    return rows.sum(1).to(permuted.dtype)


def balance_loss(
    sums: Tensor, coefficients: Tensor, losses: list[str], top_k: int
) -> tuple[Tensor, Tensor]:
    """Total and unscaled values of balance losses; see ``equipoise.functional.balance_loss``.

    >>> sums = torch.tensor([1.5, 0.5, 2.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0])  # two tokens, expert 0
    >>> balance_loss(sums, torch.tensor([0.01]), ["switch"], 1)[1].tolist()
    [1.5]
    """
    num_experts = (sums.numel() - 5) // 2
    prob_sum, load, tail = sums.split([num_experts, num_experts, 5])
    num_tokens = tail[0].detach()
    inverse = torch.where(num_tokens > 0, 1 / num_tokens.clamp(min=1e-30), 0)
    frequency = load.detach() * inverse / top_k
    value = {"z": tail[1] * inverse, "switch": num_experts * (frequency * prob_sum * inverse).sum()}
    if top_k == num_experts:
        value["switch"] = sums.new_zeros(())
    values = torch.stack([value[name] for name in losses])
    return (values * coefficients.to(values.dtype)).sum(), values

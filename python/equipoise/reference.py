# SPDX-License-Identifier: Apache-2.0
"""The plain PyTorch meaning of every op: what tests, documentation and benchmarks hold the ops to.

Nothing here is fast and everything here is short. Each function takes and returns what the op of
the same name in ``torch.ops.equipoise`` takes and returns (shapes: T tokens, E experts, K = top_k,
H features), is differentiable by plain autograd to any order, and computes in float32 for half
types and in float64 for float64.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "balance_loss",
    "dispatch_layout",
    "expert_bincount",
    "expert_choice",
    "load_metrics",
    "moe_align_block_size",
    "moe_permute",
    "moe_unpermute",
    "sinkhorn",
    "sort_chunks_by_index",
    "topk_gating",
]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk_gating(
    logits: Tensor,
    top_k: int,
    score_function: str = "softmax",
    norm_topk_prob: bool = False,
    scaling_factor: float = 1.0,
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    group_topk: int | None = None,
    group_score: str = "top2_sum",
    token_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    noise: Tensor | None = None,
    forced_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores, top-k, counts and sums; see ``equipoise.functional.topk_gating``.

    >>> out = topk_gating(torch.tensor([[0.0, 2.0, 1.0]]), 2)
    >>> out[1].tolist(), [round(w, 3) for w in out[0].flatten().tolist()]
    ([[1, 2]], [0.665, 0.245])

    Two groups of two, of which the better pair is kept, though the other has the best expert:

    >>> x = torch.tensor([[2.0, -4.0, 1.0, 0.5]])
    >>> out = topk_gating(x, 2, "sigmoid", num_groups=2, group_topk=1)
    >>> out[1].tolist(), [round(w, 3) for w in out[0].flatten().tolist()]
    ([[2, 3]], [0.731, 0.622])
    """
    num_experts = logits.size(-1)
    dtype = _compute_dtype(logits.dtype)
    x = logits.to(dtype) if noise is None else logits.to(dtype) + noise.to(dtype)
    nan = x.isnan()
    absent = nan | (x == -torch.inf)
    weight = x.new_ones(x.shape[:-1]) if token_mask is None else token_mask.to(dtype)
    nan_rows = nan.any(-1) & (weight > 0)
    weight = weight.masked_fill(absent.all(-1), 0)  # no expert is present: counts as masked
    masked = ~(weight > 0).unsqueeze(-1)
    # A masked row gets finite numbers, so that no gradient of it is NaN; it enters nothing.
    left_out = absent & ~masked
    x = x.masked_fill(absent, 0).clamp(max=1e18)
    y = _log_score(x, score_function).masked_fill(left_out, -torch.inf)
    x = x.masked_fill(left_out, -torch.inf)
    log_p = y.log_softmax(-1)
    p = log_p.exp()
    lse = x.logsumexp(-1).masked_fill(masked.squeeze(-1), 0)
    entropy = -(p * log_p.masked_fill(left_out, 0)).sum(-1)
    score = {"softmax": p, "identity": x}.get(score_function, y.exp())

    if forced_indices is None:
        limited = group_topk is not None and group_topk < num_groups
        # Without a bias and groups the logits themselves: saturated scores make no ties.
        key = score if expert_bias is not None or limited else x
        if expert_bias is not None:
            key = key + expert_bias.to(dtype)
        # The key of a present expert is finite or +inf: only absent experts have -inf.
        key = key.detach().nan_to_num(nan=torch.finfo(dtype).min, posinf=torch.inf)
        key = key.masked_fill(absent, -torch.inf)
        if limited:
            key = _keep_best_groups(key, num_groups, group_topk, group_score)
        # By key, then logit, then lowest index: stable sorts, the less important first.
        order = x.detach().sort(dim=-1, descending=True, stable=True).indices
        by_key = key.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
        indices = order.gather(-1, by_key)[..., :top_k]
        empty = key.gather(-1, indices) == -torch.inf
    else:
        indices = forced_indices.clamp(min=0)
        empty = absent.gather(-1, indices) | (forced_indices < 0)
    empty = empty | masked

    if norm_topk_prob:
        beside_others = empty & ~empty.all(-1, keepdim=True)
        chosen = y.gather(-1, indices).masked_fill(empty, 0).masked_fill(beside_others, -torch.inf)
        weights = scaling_factor * chosen.softmax(-1)
    else:
        weights = scaling_factor * score.gather(-1, indices).masked_fill(empty, 0)
    weights = weights.masked_fill(empty, 0)

    chosen_map = torch.nn.functional.one_hot(indices, num_experts) * ~empty.unsqueeze(-1)
    chosen_map = chosen_map.sum(-2).reshape(-1, num_experts)
    if segment_ids is None:
        of_segment = chosen_map.new_ones(1, len(chosen_map))
    else:
        of_segment = torch.nn.functional.one_hot(segment_ids.reshape(-1), num_segments).t()
    counts = of_segment @ chosen_map
    of_segment = of_segment.to(dtype)
    per_token = torch.stack([torch.ones_like(lse), lse.square(), entropy], -1).reshape(-1, 3)
    weighted = torch.cat([p.reshape(-1, num_experts), chosen_map.to(dtype), per_token], -1)
    nan_rows = of_segment @ nan_rows.reshape(-1, 1).to(dtype)
    invalid = torch.zeros_like(nan_rows)
    sums = torch.cat([(of_segment * weight.reshape(-1)) @ weighted, nan_rows, invalid], -1)
    if segment_ids is None:
        counts, sums = counts.squeeze(0), sums.squeeze(0)
    return weights, indices.masked_fill(empty, -1), counts, lse, sums


def _log_score(x: Tensor, score_function: str) -> Tensor:
    """The logarithm y of the scores of finite logits; p is the softmax of y."""
    if score_function == "sigmoid":
        return torch.nn.functional.logsigmoid(x)
    if score_function == "sqrtsoftplus":
        softplus = torch.nn.functional.softplus(x.clamp(min=-40), threshold=40)
        return torch.where(x < -40, x, softplus.log()) / 2  # softplus(x) is exp(x) down there
    return x  # softmax and identity


def _keep_best_groups(key: Tensor, num_groups: int, group_topk: int, group_score: str) -> Tensor:
    """-inf for the experts (neighbours make a group) of all but the best groups of each row."""
    keys = key.unflatten(-1, (num_groups, -1))
    best = keys.topk(min(2 if group_score == "top2_sum" else 1, keys.size(-1))).values
    score = best.masked_fill(best == -torch.inf, 0).sum(-1).clamp(min=torch.finfo(key.dtype).min)
    score = score.masked_fill(best[..., 0] == -torch.inf, -torch.inf)  # nobody is present
    kept = score.sort(dim=-1, descending=True, stable=True).indices[..., :group_topk]
    dropped = torch.ones_like(score, dtype=torch.bool).scatter(-1, kept, False)
    return keys.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(-2)


def expert_bincount(
    indices: Tensor,
    num_experts: int,
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
) -> Tensor:
    """Counts of each expert, by the one-hot tensor; see ``equipoise.functional.expert_bincount``.

    The counts alone: all indices and segments are taken to be good.

    >>> expert_bincount(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
    [1, 0, 2]
    """
    valid = indices >= 0
    if token_mask is not None:
        valid = valid & token_mask.unsqueeze(-1)
    one_hot = torch.nn.functional.one_hot(indices.clamp(min=0), num_experts) * valid.unsqueeze(-1)
    if weights is not None:
        dtype = _compute_dtype(weights.dtype)
        one_hot = weights.to(dtype).unsqueeze(-1) * one_hot.to(dtype)
    of_token = one_hot.sum(-2).reshape(-1, num_experts)
    if segment_ids is None:
        return of_token.sum(0)
    of_segment = torch.nn.functional.one_hot(segment_ids.reshape(-1), num_segments).t()
    return of_segment.to(of_token.dtype) @ of_token


def _left_out(logits: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Finite logits [T, E] in the compute type; [T, E] absent experts; [T, 1] masked tokens."""
    x = logits.reshape(-1, logits.size(-1)).to(_compute_dtype(logits.dtype))
    absent = x.isnan() | (x == -torch.inf)
    masked = absent.all(-1, keepdim=True)
    if token_mask is not None:
        masked = masked | ~(token_mask > 0).reshape(-1, 1)
    return x.masked_fill(absent, 0).clamp(max=1e18), absent, masked


def sinkhorn(logits: Tensor, num_iters: int = 8, token_mask: Tensor | None = None) -> Tensor:
    """Alternate scaling of rows and columns; see ``equipoise.functional.sinkhorn``.

    >>> sinkhorn(torch.zeros(2, 4))[0].tolist()  # 1 / (T E)
    [0.125, 0.125, 0.125, 0.125]
    """
    x, absent, masked = _left_out(logits.detach(), token_mask)
    num_tokens, num_experts = (~masked).sum(), x.size(1)
    x = x.masked_fill(absent, -torch.inf).masked_fill(masked, 0)
    plan = (x - x.amax(1, keepdim=True)).exp().masked_fill(absent | masked, 0)
    for _ in range(num_iters):
        for dim, target in ((1, 1 / num_tokens), (0, 1 / num_experts)):
            sums = plan.sum(dim, keepdim=True)
            plan = torch.where(sums > 0, target * (plan / sums), 0)
    return plan.view_as(logits)


def expert_choice(
    logits: Tensor, capacity: int, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every expert's best tokens, one after the other; see ``equipoise.functional.expert_choice``.

    >>> expert_choice(torch.tensor([[0.0], [1.0], [2.0]]), 2)[0].tolist()  # p is 1 everywhere
    [[0, 1]]
    """
    x, absent, masked = _left_out(logits, token_mask)
    p = x.masked_fill(absent & ~masked, -torch.inf).softmax(1)
    capacity = min(capacity, len(p))
    indices = torch.full((p.size(1), capacity), -1)
    for expert, of_expert in enumerate(p.T.tolist()):
        tokens = [t for t in range(len(p)) if not (absent | masked)[t, expert]]
        tokens.sort(key=lambda token: -of_expert[token])  # stable
        tokens = tokens[:capacity]
        indices[expert, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    padded = torch.cat([p.T, p.new_zeros(p.size(1), 1)], 1)  # -1 is the column of zeros
    return indices, padded.gather(1, indices % (len(p) + 1))


def moe_permute(
    x: Tensor,
    topk_indices: Tensor | None,
    num_experts: int,
    topk_weights: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    routing_map: Tensor | None = None,
    capacity: int | None = None,
    drop_policy: str = "position",
    pad_to_capacity: bool = False,
    align: int = 1,
    seed: int | None = None,
    output_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of each expert together, in token order; see ``equipoise.functional.moe_permute``.

    >>> moe_permute(torch.tensor([[1.0], [2.0]]), torch.tensor([[1], [0]]), 2)[0].tolist()
    [[2.0], [1.0]]
    """
    if routing_map is not None:
        topk_indices = torch.where(routing_map, torch.arange(num_experts), -1)
    top_k = topk_indices.size(1)
    slots = topk_indices.flatten()
    counts = expert_bincount(topk_indices, num_experts)
    if pad_to_capacity:
        num_rows = num_experts * capacity
    elif output_rows is not None:
        num_rows = output_rows
    else:
        most = len(slots) + num_experts * (align - 1)
        num_rows = (most + align - 1) // align * align
    row_id_map, offsets, kept = torch.full_like(slots, -1), [0], []
    for e in range(num_experts):
        mine = (slots == e).nonzero().flatten()
        if capacity is not None and len(mine) > capacity:
            if drop_policy == "probs":
                key = topk_weights.flatten()[mine].detach().double()
                key = key.nan_to_num(nan=-torch.inf)
                best = key.sort(descending=True, stable=True).indices
            elif drop_policy == "random":
                keys = [_random_key(seed, slot // top_k, e, num_experts) for slot in mine.tolist()]
                best = torch.tensor(sorted(range(len(keys)), key=lambda i: -keys[i]))
            else:
                best = torch.arange(len(mine))
            mine = mine[best[:capacity].sort().values]
        begin = min(offsets[-1], num_rows)
        room = capacity if pad_to_capacity else -(-len(mine) // align) * align
        mine = mine[: num_rows - begin]
        row_id_map[mine] = begin + torch.arange(len(mine))
        kept.append(len(mine))
        offsets.append(min(begin + room, num_rows))
    filled = row_id_map >= 0
    rows = row_id_map[filled]
    permuted = x.new_zeros(num_rows, x.size(1))
    permuted = permuted.index_put((rows,), x[filled.nonzero().flatten() // top_k])
    if topk_weights is None:
        weights = x.new_empty(0, dtype=_compute_dtype(x.dtype))
    else:
        weights = topk_weights.new_zeros(num_rows)
        weights = weights.index_put((rows,), topk_weights.flatten()[filled])
    kept = torch.tensor(kept)
    within = counts if capacity is None else counts.clamp(max=capacity)
    return (
        permuted,
        weights,
        row_id_map.view_as(topk_indices),
        counts,
        torch.tensor(offsets),
        kept,
        (within - kept).sum(),
        counts.new_zeros(()),
    )


def _random_key(seed: int, token: int, expert: int, num_experts: int) -> int:
    """splitmix64: 64 bits that look random, of (seed, token, expert) alone."""
    mask = 2**64 - 1
    z = (seed + (token * num_experts + expert + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


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


def sort_chunks_by_index(
    x: Tensor, split_sizes: Tensor, order: Tensor, probs: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks in another order; see ``equipoise.functional.sort_chunks_by_index``.

    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> sort_chunks_by_index(x, torch.tensor([1, 2]), torch.tensor([1, 0]))[0].tolist()
    [[2.0], [3.0], [1.0]]
    """
    rows = torch.arange(x.size(0), device=x.device)
    chunks = rows.split(split_sizes.tolist())
    source = torch.cat([rows[:0], *(chunks[i] for i in order.tolist())])
    row_id_map = torch.empty_like(rows)
    row_id_map[source] = rows
    no_probs = x.new_empty(0, dtype=_compute_dtype(x.dtype))
    return x[source], no_probs if probs is None else probs[source], row_id_map.unsqueeze(1)


def moe_align_block_size(
    topk_indices: Tensor, block_size: int, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots in blocks of one expert; see ``equipoise.functional.moe_align_block_size``.

    >>> moe_align_block_size(torch.tensor([[1], [0], [1]]), 2, 2)[0].tolist()
    [1, 3, 0, 2, 3, 3]
    """
    slots = topk_indices.flatten()
    padding, most = len(slots), len(slots) + num_experts * (block_size - 1)
    blocks = min(len(slots), -(-most // block_size))
    ids, experts = [], []
    for expert in range(num_experts):
        of_expert = (slots == expert).nonzero().flatten().tolist()
        padded = -(-len(of_expert) // block_size)
        ids += of_expert + [padding] * (padded * block_size - len(of_expert))
        experts += [expert] * padded
    size = len(ids)
    ids += [padding] * (blocks * block_size - size)
    experts += [-1] * (blocks - len(experts))
    return tuple(slots.new_tensor(v, dtype=torch.int32) for v in (ids, experts, [size]))


def load_metrics(tokens_per_expert: Tensor, unbiased: bool = False) -> Tensor:
    """[13, ...] float64, in the order of ``metrics.LOAD_METRICS``."""
    experts = tokens_per_expert.shape[-1]
    counts = tokens_per_expert.to(torch.float64)
    total = counts.sum(-1)
    mean = total / experts
    largest, smallest = counts.amax(-1), counts.amin(-1)
    entropy = torch.special.entr(counts / total.unsqueeze(-1)).sum(-1)
    rank = torch.arange(1, experts + 1, dtype=torch.float64, device=counts.device)
    used = (10 * experts * counts >= total.unsqueeze(-1)) & (counts > 0)
    return torch.stack(
        [
            counts.std(-1, correction=1 if unbiased else 0) / mean,
            largest / mean,
            (largest - mean) / mean,
            largest - mean,
            (mean - smallest) / mean,
            ((2 * rank - experts - 1) * counts.sort(-1).values).sum(-1) / (experts * total),
            entropy,
            entropy.exp(),
            math.log(experts) - entropy,
            used.double().mean(-1),
            (counts > 0).double().mean(-1),
            (counts == 0).double().sum(-1),
            largest / total,
        ]
    )


def dispatch_layout(
    topk_indices: Tensor, num_ranks: int, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens are sent to; see ``equipoise.functional.dispatch_layout``.

    >>> dispatch_layout(torch.tensor([[0, 1], [3, -1]]), 2, 4)[2].tolist()
    [[True, False], [False, True]]
    """
    rank = topk_indices.div(num_experts // num_ranks, rounding_mode="floor")
    in_rank = (rank.unsqueeze(-1) == torch.arange(num_ranks, device=rank.device)).any(1)
    per_expert = expert_bincount(topk_indices, num_experts)
    return in_rank.sum(0, dtype=torch.int32), per_expert.int(), in_rank


def balance_loss(
    sums: Tensor,
    coefficients: Tensor,
    losses: list[str],
    top_k: int,
    gate_sums: Tensor | None = None,
    expert_weights: Tensor | None = None,
    num_devices: int = 1,
    unbiased: bool = False,
    normalize: str = "none",
) -> tuple[Tensor, Tensor]:
    """Total and unscaled values of balance losses; see ``equipoise.functional.balance_loss``.

    Each row of ``sums`` is a segment. A loss on P is the mean over the segments that have tokens,
    z and token_entropy are means over all tokens, and ``gate_sums`` are of all segments.

    >>> sums = torch.tensor([1.5, 0.5, 2.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0])  # two tokens, expert 0
    >>> balance_loss(sums, torch.tensor([0.01]), ["switch"], 1)[1].tolist()
    [1.5]
    """
    num_experts = (sums.size(-1) - 5) // 2
    rows = [row for row in sums.reshape(-1, sums.size(-1)) if row[2 * num_experts] > 0]
    num_tokens = sum((row[2 * num_experts].detach() for row in rows), sums.new_zeros(()))
    values = []
    for name in losses:
        value = sums.sum() * 0
        if name in ("z", "token_entropy"):
            tail = 1 if name == "z" else 2
            for row in rows:
                value = value + row[2 * num_experts + tail] / num_tokens
        elif num_experts == 1 or top_k == num_experts:
            pass
        elif name == "importance":
            value = gate_sums.var(correction=int(unbiased)) / gate_sums.mean().square()
        else:
            for row in rows:
                loss = _loss_of_segment(
                    name,
                    row,
                    1 if normalize == "hf" else top_k,
                    expert_weights,
                    num_devices,
                    unbiased,
                )
                value = value + loss / len(rows)
        values.append(value)
    values = torch.stack(values)
    return (values * coefficients.to(values.dtype)).sum(), values


def _loss_of_segment(
    name: str,
    row: Tensor,
    top_k: int,
    expert_weights: Tensor | None,
    num_devices: int,
    unbiased: bool,
) -> Tensor:
    num_experts = (row.numel() - 5) // 2
    prob_sum, load, tail = row.split([num_experts, num_experts, 5])
    num_tokens = tail[0].detach()
    p = prob_sum / num_tokens
    share = num_experts * load.detach() / (top_k * num_tokens)  # E f_e
    log_p = (num_experts * p).clamp(min=torch.finfo(p.dtype).tiny).log()  # of E P
    match name:
        case "switch":
            return (share * p * (1 if expert_weights is None else expert_weights)).sum()
        case "device":
            return (share.view(num_devices, -1).mean(1) * p.view(num_devices, -1).sum(1)).sum()
        case "importance_of_probs":
            return prob_sum.var(correction=int(unbiased)) / prob_sum.mean().square()
        case "uniform_kl":
            return -log_p.mean()
        case "entropy":
            return (p * log_p).sum()
        case "variance":
            return p.var()
        case "mutual_information":
            return tail[2] / num_tokens + (p * log_p).sum() - math.log(num_experts)
    raise ValueError(f"no such loss: {name}")

# SPDX-License-Identifier: Apache-2.0
"""Functions over the ops, with named results.

Shapes: T tokens, E experts, K = top_k, H features, N rows of the permuted buffer.

Everything works on CPU and CUDA, for float64, float32, bfloat16 and float16, under
``torch.compile``, ``torch.export`` and autocast, and is differentiable twice. Bad arguments raise
``RuntimeError`` with a message that names the op, the argument, what was wanted and what came.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from . import ops

__all__ = [
    "AlignedBlocks",
    "DispatchLayout",
    "LossReport",
    "PermuteResult",
    "RoutingResult",
    "SortedChunks",
    "balance_loss",
    "dispatch_layout",
    "expert_bincount",
    "expert_capacity",
    "expert_frequency",
    "moe_align_block_size",
    "moe_permute",
    "moe_unpermute",
    "segment_ids_from_cu_seqlens",
    "sort_chunks_by_index",
    "switch_loss",
    "topk_gating",
    "z_loss",
]

# Scalars behind the two [E] parts of RoutingResult.sums; csrc/ops/routing_sums.h has the layout.
_SUMS_TAIL = 5


class RoutingResult(NamedTuple):
    """What ``topk_gating`` returns. Float results are float32 (float64 for float64 logits)."""

    topk_weights: Tensor
    """[..., K] weights of the chosen experts; differentiable."""
    topk_indices: Tensor
    """[..., K] int64, by descending score; -1 where no expert was chosen."""
    tokens_per_expert: Tensor
    """[E] int64 counts of the chosen slots; [S, E] with segments."""
    lse: Tensor | None
    """[...] logsumexp of each row, 0 for a masked one; differentiable; None without stats."""
    sums: Tensor | None
    """[2 E + 5] sums over the tokens, parts named by the properties below; [S, 2 E + 5] with
    segments; None without stats."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.tokens_per_expert.size(-1)

    @property
    def top_k(self) -> int:
        """K."""
        return self.topk_indices.size(-1)

    @property
    def prob_sum(self) -> Tensor:
        """[E] or [S, E] sum over the tokens of p times the token's weight; differentiable."""
        return self._stats()[..., : self.num_experts]

    @property
    def load(self) -> Tensor:
        """[E] or [S, E] weights of the tokens that chose an expert (the counts, for a mask)."""
        return self._stats()[..., self.num_experts : 2 * self.num_experts]

    @property
    def num_tokens(self) -> Tensor:
        """Scalar or [S], the sum of the token weights."""
        return self._stats()[..., -_SUMS_TAIL]

    @property
    def num_nan_rows(self) -> Tensor:
        """Scalar, how many unmasked rows had a NaN logit."""
        return self._stats()[..., -_SUMS_TAIL + 3].sum()

    @property
    def num_invalid(self) -> Tensor:
        """Scalar, bad values met on CUDA, where they cannot raise.

        These are token weights that are negative or NaN, segment ids and forced indices out of
        range, and experts forced twice.
        """
        return self._stats()[..., -_SUMS_TAIL + 4].sum()

    def _stats(self) -> Tensor:
        if self.sums is None:
            raise RuntimeError("RoutingResult has no statistics: topk_gating got stats=False")
        return self.sums


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
    stats: bool = True,
) -> RoutingResult:
    """Weights, experts, counts and the sums of every balance loss, in one read of the logits.

    With x = ``logits`` (+ ``noise``), the score s of an expert is

    - ``softmax``: ``softmax(x)``
    - ``sigmoid``: ``1 / (1 + exp(-x))``
    - ``sqrtsoftplus``: ``sqrt(log(1 + exp(x)))``
    - ``identity``: x itself

    and p, of which ``prob_sum`` and the entropy are made, is ``s / sum(s)`` (identity: softmax(x)).
    The ``top_k`` experts with the largest ``s + expert_bias`` in the best ``group_topk`` groups are
    chosen (ties to the larger logit, then to the lowest index); their weights are
    ``scaling_factor * s``, divided by the sum of the chosen s with ``norm_topk_prob``. Softmax,
    then top-k, then renormalising equals top-k, then softmax, so ``norm_topk_prob=True`` is both.
    With ``top_k=1`` it makes the weight ``scaling_factor`` and the gate gradient zero.

    Args:
        logits: [..., E]. NaN and -inf are absent experts: never chosen, p = 0. +inf counts as 1e18.
        top_k: K, from 1 to E.
        score_function: "softmax", "sigmoid", "sqrtsoftplus" or "identity".
        norm_topk_prob: divide the K weights by their sum (not for identity).
        scaling_factor: multiplies the K weights.
        expert_bias: [E] float32, added for the selection only (loss-free balancing). No gradient.
        num_groups: the experts are dealt to groups in equal contiguous runs.
        group_topk: how many groups of each token are kept; needed with ``num_groups > 1``.
        group_score: of a group, from ``s + expert_bias`` of its experts: "max" (DeepSeek-V2) or
            "top2_sum", the sum of the best two (DeepSeek-V3).
        token_mask: [...] bool, True = real token, or float weights >= 0 that scale a token's part
            in the sums. A masked token gets indices -1 and weights 0 and is counted nowhere. No
            gradient.
        segment_ids: [...] int64 in [0, S): counts and sums are kept for each segment (sequence,
            document, domain) by itself. Fastest where neighbours share a segment.
        num_segments: S.
        noise: [..., E] of the logits' dtype, already scaled; part of the logits in every respect.
            Differentiable.
        forced_indices: [..., K] int64 in [-1, E), taken in place of the selection (router replay);
            the weights are computed from the logits. An absent expert becomes -1.
        stats: compute ``lse`` and ``sums`` as well; False for inference.

    Returns:
        RoutingResult.

    Sources: Shazeer 2017 (arXiv:1701.06538), Fedus 2021 (arXiv:2101.03961), Wang 2024
    (arXiv:2408.15664); groups: DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437).

    >>> logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]])
    >>> r = topk_gating(logits, top_k=2, norm_topk_prob=True)
    >>> r.topk_indices.tolist(), r.tokens_per_expert.tolist()
    ([[1, 2], [0, 1]], [1, 2, 1])
    >>> [round(w, 3) for w in r.topk_weights[0].tolist()]
    [0.731, 0.269]

    Two groups of two experts, of which the better one is kept:

    >>> logits = torch.tensor([[2.0, -4.0, 1.0, 0.5]])
    >>> r = topk_gating(logits, 1, "sigmoid", num_groups=2, group_topk=1, norm_topk_prob=True)
    >>> r.topk_indices.tolist()  # 0.731 + 0.622 > 0.881 + 0.018
    [[2]]
    """
    return RoutingResult(
        *ops.topk_gating(
            logits,
            top_k,
            score_function,
            norm_topk_prob,
            scaling_factor,
            expert_bias,
            num_groups,
            group_topk,
            group_score,
            token_mask,
            segment_ids,
            num_segments,
            noise,
            forced_indices,
            stats,
        )
    )


def segment_ids_from_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The segment of each token of packed sequences, for ``topk_gating(segment_ids=)``.

    Args:
        cu_seqlens: [S + 1] int, where each sequence begins: ascending from 0 to ``num_tokens``.
        num_tokens: T.

    Returns:
        [T] int64.

    >>> segment_ids_from_cu_seqlens(torch.tensor([0, 3, 3, 5]), 5).tolist()
    [0, 0, 0, 2, 2]
    """
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.bucketize(tokens, cu_seqlens[1:].long(), right=True)


def expert_bincount(
    indices: Tensor,
    num_experts: int,
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
) -> Tensor:
    """How many slots, or how much weight, each expert got, in O(E) memory and without a host sync.

    Args:
        indices: [..., K] int64; -1 is skipped. Others outside [0, E) raise on the CPU; on CUDA,
            where they cannot, they are skipped, and ``ops.expert_bincount``, which returns the pair
            (counts, num_invalid), counts them.
        num_experts: E.
        weights: [..., K] float; the result is then their sum per expert, and differentiable.
        token_mask: [...] bool, True = real token. What a masked token holds is not looked at.
        segment_ids: [...] int64 in [0, S): the counts are kept for each segment (sequence,
            document, domain) by itself. Bad ones as bad indices: their token is skipped.
        num_segments: S.

    Returns:
        [E] int64, or float32 (float64 for float64 weights); [S, E] with segments.

    >>> expert_bincount(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
    [1, 0, 2]
    >>> segment_ids = torch.tensor([1, 0])
    >>> expert_bincount(
    ...     torch.tensor([[0, 2], [2, -1]]), 3, segment_ids=segment_ids, num_segments=2
    ... ).tolist()
    [[0, 0, 1], [1, 0, 1]]
    """
    if weights is None and token_mask is None and segment_ids is None and num_segments is None:
        # To pass them on takes time that a call with few tokens notices.
        return ops.expert_bincount(indices, num_experts)[0]
    return ops.expert_bincount(
        indices, num_experts, weights, token_mask, segment_ids, num_segments
    )[0]


def expert_frequency(
    indices: Tensor,
    num_experts: int,
    token_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
) -> Tensor:
    """The share of the selections that each expert got: 1 / E at balance.

    ``expert_bincount`` divided by its sum, and 0 where nothing was selected. Takes the arguments of
    ``expert_bincount``, and raises as it does.

    Returns:
        [E] float32, which add up to 1; with segments [S, E], each row by itself.

    >>> expert_frequency(torch.tensor([[0, 2], [2, -1], [2, -1]]), 3).tolist()
    [0.25, 0.0, 0.75]
    """
    counts = expert_bincount(
        indices,
        num_experts,
        token_mask=token_mask,
        segment_ids=segment_ids,
        num_segments=num_segments,
    )
    return counts.float() / counts.sum(-1, keepdim=True).clamp(min=1)


class PermuteResult(NamedTuple):
    """What ``moe_permute`` returns.

    Rows without a slot are zero: those behind ``expert_offsets[E]``, and those that fill up the
    room of an expert.
    """

    permuted: Tensor
    """[N, H] rows, those of each expert together, in token order; differentiable."""
    permuted_weights: Tensor
    """[N] the weight of each row; empty where no weights were given; differentiable."""
    row_id_map: Tensor
    """[T, K] ([T, E] for a routing_map) int64, the row that holds slot (t, k), -1 if none does."""
    tokens_per_expert: Tensor
    """[E] int64, before any drop: the counts that losses are made of."""
    expert_offsets: Tensor
    """[E + 1] int64; expert e has room from row ``expert_offsets[e]`` to ``expert_offsets[e+1]``,
    of which the first ``kept_per_expert[e]`` rows are filled."""
    kept_per_expert: Tensor
    """[E] int64, ``tokens_per_expert`` after any drop."""
    overflow: Tensor
    """Scalar int64, rows that did not fit into ``output_rows`` (CUDA; the CPU raises)."""
    num_invalid: Tensor
    """Scalar int64, indices outside [-1, E), which act as -1 (CUDA; the CPU raises)."""

    @property
    def dropped_per_expert(self) -> Tensor:
        """[E] int64, the slots of each expert that have no row."""
        return self.tokens_per_expert - self.kept_per_expert


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
    out: Tensor | None = None,
) -> PermuteResult:
    """Copies each token's row to each of its experts: one expert's rows together, in token order.

    Args:
        x: [T, H], float64, float32, bfloat16, float16, or a type of 8 bits (float8, int8, uint8),
            whose rows are moved as they are and have no gradient.
        topk_indices: [T, K] int64 in [-1, E); -1 is left out. None with a ``routing_map``.
        num_experts: E.
        topk_weights: [T, K] ([T, E] for a ``routing_map``) float, permuted along.
        tokens_per_expert: [E] int64 counts of the slots, from ``topk_gating``: saves counting them
            again on one thread of the CPU, where they are compared.
        routing_map: [T, E] bool in place of ``topk_indices``, which experts each token goes to.
        capacity: how many slots an expert keeps, see ``expert_capacity``; None drops none. The
            others get row -1: ``moe_unpermute`` adds nothing for them.
        drop_policy: who stays: "position" (the first tokens), "probs" (the largest
            ``topk_weights``; ties to the lower token) or "random" (a function of ``seed``, token
            and expert alone).
        pad_to_capacity: every expert has room for ``capacity`` rows: the layout [E * capacity, H].
        align: the room of each expert is a multiple of this.
        seed: of "random".
        output_rows: N. Without it N = T K, plus E (align - 1) rounded up to a multiple of
            ``align``, which always suffices.
        out: [N, H], dtype of ``x``, contiguous: takes the rows in place of a new tensor, whose
            memory the system would have to provide anew for each large result. No gradient then.

    Returns:
        PermuteResult. Its sizes depend on shapes and options alone: nothing waits for the device.

    >>> x, topk_indices = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1], [0], [1]])
    >>> p = moe_permute(x, topk_indices, num_experts=2)
    >>> p.permuted.flatten().tolist(), p.expert_offsets.tolist(), p.row_id_map.flatten().tolist()
    ([2.0, 1.0, 3.0], [0, 1, 3], [1, 0, 2])

    Expert 1 keeps the better one of its two:

    >>> weights = torch.tensor([[0.6], [0.9], [0.7]])
    >>> p = moe_permute(x, topk_indices, 2, weights, capacity=1, drop_policy="probs", align=2)
    >>> p.permuted.flatten().tolist(), p.expert_offsets.tolist(), p.dropped_per_expert.tolist()
    ([2.0, 0.0, 3.0, 0.0, 0.0, 0.0], [0, 2, 4], [0, 1])
    """
    arguments = (
        x,
        topk_indices,
        num_experts,
        topk_weights,
        tokens_per_expert,
        routing_map,
        capacity,
        drop_policy,
        pad_to_capacity,
        align,
        seed,
        output_rows,
    )
    if out is None:
        return PermuteResult(*ops.moe_permute(*arguments))
    return PermuteResult(out, *ops.moe_permute_out(*arguments, out=out))


def expert_capacity(
    num_tokens: int, top_k: int, num_experts: int, capacity_factor: float, min_capacity: int = 0
) -> int:
    """The capacity of an expert: ceil(capacity_factor T K / E), from min_capacity to T.

    GShard (arXiv:2006.16668), Switch (arXiv:2101.03961).

    Args:
        num_tokens: T.
        top_k: K.
        num_experts: E.
        capacity_factor: >= 0; at 1 there is room for as many slots as there are, none to spare.
        min_capacity: >= 0.

    Returns:
        How many slots each expert keeps, for ``moe_permute(capacity=)``.

    Raises:
        ValueError: an argument out of range.

    >>> expert_capacity(num_tokens=4096, top_k=2, num_experts=64, capacity_factor=1.25)
    160
    """
    for name, value, least in (
        ("num_tokens", num_tokens, 0),
        ("top_k", top_k, 0),
        ("num_experts", num_experts, 1),
        ("capacity_factor", capacity_factor, 0),
        ("min_capacity", min_capacity, 0),
    ):
        if not value >= least:
            raise ValueError(f"expert_capacity: {name} must be at least {least}, got {value}")
    # What is an integer but for rounding stays that integer.
    wanted = math.ceil(capacity_factor * (num_tokens * top_k / num_experts) - 1e-9)
    return min(num_tokens, max(min_capacity, wanted))


def moe_unpermute(
    permuted: Tensor, row_id_map: Tensor, topk_weights: Tensor | None = None
) -> Tensor:
    """Adds each token's rows up again, weighted.

    ``out[t] = sum_k topk_weights[t, k] * permuted[row_id_map[t, k]]``. The sum runs in slot order
    in float32 (float64 for float64) and is rounded once.

    Args:
        permuted: [N, H].
        row_id_map: [T, K] int64 in [-1, N) from ``moe_permute``; no row may stand in it twice.
        topk_weights: [T, K] float32 (float64 for float64 rows) or the dtype of ``permuted``; None
            means 1.

    Returns:
        [T, H], dtype of ``permuted``.

    >>> permuted, row_id_map = torch.tensor([[2.0], [1.0], [3.0]]), torch.tensor([[1], [0], [2]])
    >>> moe_unpermute(permuted, row_id_map).flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    return ops.moe_unpermute(permuted, row_id_map, topk_weights)


class SortedChunks(NamedTuple):
    """What ``sort_chunks_by_index`` returns."""

    sorted: Tensor
    """[N, H] the rows of ``x``, chunks in their new order; differentiable."""
    sorted_probs: Tensor
    """[N] the probability of each row; empty where none were given; differentiable."""
    row_id_map: Tensor
    """[N, 1] int64, the row of ``sorted`` that holds row n of ``x``; ``moe_unpermute`` with it
    brings the rows back."""


def sort_chunks_by_index(
    x: Tensor, split_sizes: Tensor, order: Tensor, probs: Tensor | None = None
) -> SortedChunks:
    """Cuts the rows into chunks of neighbours and puts the chunks into another order.

    After an all-to-all the rows lie rank by rank and, within each, expert by expert: with
    ``order = arange(R * E).view(R, E).t().flatten()`` each expert's rows come together.
    (``moe_sort_chunks_by_index`` and ``moe_sort_chunks_by_index_with_probs`` of TransformerEngine.)

    Args:
        x: [N, H], of a float type or of 8 bits.
        split_sizes: [C] int64 or int32, how many rows each chunk has, on the device of ``x``.
        order: [C] int64 or int32, a permutation of 0 .. C - 1: which chunk comes first, second, ...
        probs: [N] float, moved along.

    Returns:
        SortedChunks. Its sizes depend on N alone, so nothing waits for the device.

    Sizes that are negative or do not add up to N, and an order that is no permutation, raise on the
    CPU. On CUDA a negative size is 0; rows that then have no chunk, or one that ``order`` does not
    name exactly once, get -1 in the map and are dropped; rows of ``sorted`` left over are zero.

    >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    >>> s = sort_chunks_by_index(x, torch.tensor([1, 2, 1]), torch.tensor([2, 0, 1]))
    >>> s.sorted.flatten().tolist(), s.row_id_map.flatten().tolist()
    ([4.0, 1.0, 2.0, 3.0], [1, 2, 3, 0])
    """
    return SortedChunks(*ops.sort_chunks_by_index(x, split_sizes, order, probs))


class AlignedBlocks(NamedTuple):
    """What ``moe_align_block_size`` returns, as vLLM's fused expert kernels take it."""

    sorted_token_ids: Tensor
    """[M] int32, the flat numbers t K + k of the slots, expert by expert; T K is padding."""
    expert_ids: Tensor
    """[M / block_size] int32, the expert of each block; -1 where there is none."""
    num_tokens_post_padded: Tensor
    """[1] int32, how much of ``sorted_token_ids`` belongs to experts."""


def moe_align_block_size(topk_indices: Tensor, block_size: int, num_experts: int) -> AlignedBlocks:
    """Groups the slots by expert, each expert padded to whole blocks, without moving any rows.

    The contract of vLLM's function of the same name, results in int32 included; the slots of an
    expert come in token order, which vLLM does not promise. M is the most that any routing
    can need: T K + E (block_size - 1) rounded up to whole blocks, at most T K block_size. No
    gradient.

    Args:
        topk_indices: [T, K] int64; -1 is left out. Others outside [0, E) raise on the CPU and are
            left out on CUDA.
        block_size: rows of a tile of the matrix product.
        num_experts: E.

    Returns:
        AlignedBlocks. Its sizes depend on shapes alone, so nothing waits for the device.

    Expert 0 has slots 1 and 2, expert 2 has slots 0, 3 and 5; slot 4 is empty:

    >>> topk_indices = torch.tensor([[2, 0], [0, 2], [-1, 2]])
    >>> blocks = moe_align_block_size(topk_indices, block_size=2, num_experts=3)
    >>> blocks.sorted_token_ids.tolist()
    [1, 2, 0, 3, 5, 6, 6, 6, 6, 6]
    >>> blocks.expert_ids.tolist(), blocks.num_tokens_post_padded.tolist()
    ([0, 2, 2, -1, -1], [6])
    """
    return AlignedBlocks(*ops.moe_align_block_size(topk_indices, block_size, num_experts))


class DispatchLayout(NamedTuple):
    """What ``dispatch_layout`` returns, as DeepEP's ``dispatch`` takes it."""

    num_tokens_per_rank: Tensor
    """[R] int32, tokens with at least one expert of the rank."""
    num_tokens_per_expert: Tensor
    """[E] int32, slots that chose the expert."""
    is_token_in_rank: Tensor
    """[T, R] bool, whether the token has an expert of the rank."""


def dispatch_layout(topk_indices: Tensor, num_ranks: int, num_experts: int) -> DispatchLayout:
    """Which ranks each token is sent to, and how many tokens ranks and experts get.

    The contract of ``Buffer.get_dispatch_layout`` of DeepEP: the experts are dealt to the ranks in
    equal contiguous runs, a token counts once for a rank, however many of its slots go there, and
    the counts are int32 (those of the other functions here are int64). No gradient.

    Args:
        topk_indices: [T, K] int64 with T K < 2^31; -1 is skipped. Others outside [0, E) raise on
            the CPU and are skipped on CUDA.
        num_ranks: R, a divisor of E.
        num_experts: E.

    Returns:
        DispatchLayout. Its sizes depend on shapes alone, so nothing waits for the device.

    Four experts on two ranks; both slots of the first token go to the first of them:

    >>> topk_indices = torch.tensor([[0, 1], [1, 3], [3, -1]])
    >>> layout = dispatch_layout(topk_indices, num_ranks=2, num_experts=4)
    >>> layout.num_tokens_per_rank.tolist(), layout.num_tokens_per_expert.tolist()
    ([2, 2], [1, 2, 0, 2])
    >>> layout.is_token_in_rank.tolist()
    [[True, False], [True, True], [False, True]]
    """
    return DispatchLayout(*ops.dispatch_layout(topk_indices, num_ranks, num_experts))


class LossReport(NamedTuple):
    """What ``balance_loss`` returns."""

    total: Tensor
    """Scalar, the sum of the scaled losses; differentiable."""
    unscaled: dict[str, Tensor]
    """The value of each loss, 1.0 for ``switch`` at balance; differentiable."""
    scaled: dict[str, Tensor]
    """The same times its coefficient."""


def balance_loss(routing: RoutingResult, losses: Mapping[str, float | Tensor]) -> LossReport:
    """A weighted set of balance losses from the sums of ``topk_gating``; [T, E] is not touched.

    With f = load / (K W), P = prob_sum / W and W = num_tokens:

    - ``switch``: ``E sum(f P)``, f detached, 1 at balance (Fedus 2021, arXiv:2101.03961)
    - ``z``: ``mean(lse^2)`` (ST-MoE, arXiv:2202.08906)

    With K = E every expert gets every token: ``switch`` is then left out (value 0), with one
    warning. Segments are added up first.

    Args:
        routing: from ``topk_gating`` with ``stats=True``.
        losses: name -> coefficient >= 0, a float or (for schedules under ``torch.compile``) a
            scalar tensor.

    Returns:
        LossReport; float32, or float64 for float64 logits.

    >>> r = topk_gating(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), top_k=1)
    >>> report = balance_loss(r, {"switch": 0.01, "z": 0.001})
    >>> round(report.unscaled["switch"].item(), 3), round(report.total.item(), 5)
    (1.762, 0.02214)
    """
    return _balance_loss(routing, losses, guard_dense=True)


def switch_loss(routing: RoutingResult) -> Tensor:
    """The unscaled Switch loss, a scalar: 1 at balance. Computed even where K = E.

    >>> round(switch_loss(topk_gating(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), top_k=1)).item(), 3)
    1.0
    """
    return _balance_loss(routing, {"switch": 1.0}, guard_dense=False).total


def z_loss(routing: RoutingResult) -> Tensor:
    """The unscaled router z-loss, a scalar: the mean of lse^2.

    >>> round(z_loss(topk_gating(torch.zeros(3, 4), top_k=1)).item(), 3)  # log(4)^2
    1.922
    """
    return _balance_loss(routing, {"z": 1.0}, guard_dense=False).total


# A saved export names the types of its results; without these lines it could not.
for _result in (
    RoutingResult,
    PermuteResult,
    SortedChunks,
    AlignedBlocks,
    DispatchLayout,
    LossReport,
):
    _register_namedtuple(_result, serialized_type_name=f"equipoise.{_result.__name__}")


def _balance_loss(
    routing: RoutingResult, losses: Mapping[str, float | Tensor], guard_dense: bool
) -> LossReport:
    names = list(losses)
    sums = routing._stats()
    if sums.dim() == 2:  # of segments
        sums = sums.sum(0)
    for name, value in losses.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"balance_loss: the coefficient of '{name}' must be >= 0, got {value}")
    # Filled on the device: a copy from the host would wait for it.
    coefficients = torch.stack(
        [
            value.detach().to(torch.float32)
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.float32, device=sums.device)
            for value in losses.values()
        ]
    )
    total, values = ops.balance_loss(
        sums, coefficients, names, routing.top_k, guard_dense=guard_dense
    )
    unscaled = dict(zip(names, values.unbind(), strict=True))
    scaled = dict(zip(names, (values * coefficients).unbind(), strict=True))
    return LossReport(total, unscaled, scaled)

# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of tokens to their experts and back."""

import math
from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from .. import ops


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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
    >>> topk_indices = torch.tensor([[0, 1], [1, 3], [3, -1]])
    >>> layout = dispatch_layout(topk_indices, num_ranks=2, num_experts=4)
    >>> layout.num_tokens_per_rank.tolist(), layout.num_tokens_per_expert.tolist()
    ([2, 2], [1, 2, 0, 2])
    >>> layout.is_token_in_rank.tolist()
    [[True, False], [True, True], [False, True]]
    """
    return DispatchLayout(*ops.dispatch_layout(topk_indices, num_ranks, num_experts))


# A saved export names the types of its results; without these lines it could not.
_register_namedtuple(PermuteResult, serialized_type_name="equipoise.PermuteResult")
_register_namedtuple(SortedChunks, serialized_type_name="equipoise.SortedChunks")
_register_namedtuple(AlignedBlocks, serialized_type_name="equipoise.AlignedBlocks")
_register_namedtuple(DispatchLayout, serialized_type_name="equipoise.DispatchLayout")

# SPDX-License-Identifier: Apache-2.0
"""Choosing experts, and counting what was chosen."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from .. import ops

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


def concatenate_routings(routings: Sequence[RoutingResult]) -> RoutingResult:
    """The routing of several batches of one layer, as if their tokens had come together.

    With it the balance loss over accumulated micro-batches is exact: keep the routing of each
    micro-batch, form the loss after the last forward.

    Args:
        routings: of the same E and K; those with segments, of the same segments.

    Returns:
        RoutingResult with the leading dimensions flattened.

    >>> parts = [topk_gating(logits, top_k=1) for logits in torch.eye(2).unsqueeze(1)]
    >>> concatenate_routings(parts).tokens_per_expert.tolist()
    [1, 1]
    """
    with_stats = all(r.sums is not None for r in routings)
    return RoutingResult(
        torch.cat([r.topk_weights.reshape(-1, r.top_k) for r in routings]),
        torch.cat([r.topk_indices.reshape(-1, r.top_k) for r in routings]),
        torch.stack([r.tokens_per_expert for r in routings]).sum(0),
        torch.cat([r.lse.reshape(-1) for r in routings]) if with_stats else None,
        torch.stack([r.sums for r in routings]).sum(0) if with_stats else None,
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


def sinkhorn(logits: Tensor, num_iters: int = 8, token_mask: Tensor | None = None) -> Tensor:
    """The balanced assignment: every token gives the same, every expert takes the same.

    ``exp(x - rowmax(x))``, scaled by turns to row sums 1/T and to column sums 1/E. With more
    iterations both hold more closely; the columns are scaled last, so they hold exactly.

    Args:
        logits: [..., E]. NaN and -inf are absent experts, with 0 in the plan; +inf counts as 1e18.
        num_iters: at least 1.
        token_mask: [...] bool, True = real token, or float weights, of which only > 0 counts. The
            row of a masked token is 0, and T is the number of the others.

    Returns:
        [..., E] float32 (float64 for float64 logits). Without a gradient: the plan chooses, it does
        not weigh.

    Sources: Sinkhorn 1964; for routing BASE layers (arXiv:2103.16716) and Megatron-LM.

    Both tokens prefer expert 0, but one has to go to the other expert:

    >>> plan = sinkhorn(torch.tensor([[2.0, 0.0], [2.0, 1.0]]), num_iters=20)
    >>> [[round(p, 3) for p in row] for row in plan.tolist()]
    [[0.311, 0.189], [0.189, 0.311]]
    """
    return ops.sinkhorn(logits, num_iters, token_mask)


class ExpertChoiceResult(NamedTuple):
    """What ``expert_choice`` returns; C is the capacity, or T where that is smaller."""

    token_indices: Tensor
    """[E, C] int64 in [0, T), by descending p; -1 where no token is left."""
    token_weights: Tensor
    """[E, C] float32 (float64 for float64 logits), p of these tokens, 0 beside -1;
    differentiable."""


def expert_choice(
    logits: Tensor, capacity: int, token_mask: Tensor | None = None
) -> ExpertChoiceResult:
    """Every expert takes the ``capacity`` tokens with the largest ``p = softmax(logits)``.

    The softmax runs over the experts; ties go to the lower token. All experts work on the same
    number of tokens, and a token is used by none, one or several of them.

    Args:
        logits: [..., E], whose leading dimensions are T tokens. NaN and -inf are absent experts:
            such an expert never takes the token. +inf counts as 1e18.
        capacity: tokens per expert, at least 0.
        token_mask: [...] bool, True = real token, or float weights, of which only > 0 counts. A
            masked token is never taken.

    Returns:
        ExpertChoiceResult.

    Source: Zhou 2022 (arXiv:2202.09368).

    >>> r = expert_choice(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), capacity=2)
    >>> r.token_indices.tolist()
    [[0, 1], [2, 1]]
    >>> [[round(w, 3) for w in row] for row in r.token_weights.tolist()]
    [[0.881, 0.731], [0.5, 0.269]]
    """
    return ExpertChoiceResult(*ops.expert_choice(logits, capacity, token_mask))


# A saved export names the types of its results; without these lines it could not.
_register_namedtuple(RoutingResult, serialized_type_name="equipoise.RoutingResult")
_register_namedtuple(ExpertChoiceResult, serialized_type_name="equipoise.ExpertChoiceResult")

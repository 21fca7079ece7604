# SPDX-License-Identifier: Apache-2.0
"""Functions over the ops, with named results.

Shapes: T tokens, E experts, K = top_k, H features, N rows of the permuted buffer.

Everything works on CPU and CUDA, for float64, float32, bfloat16 and float16, under
``torch.compile``, ``torch.export`` and autocast, and is differentiable twice. Bad arguments raise
``RuntimeError`` with a message that names the op, the argument, what was wanted and what came.
"""

from .losses import LossReport, balance_loss, switch_loss, z_loss
from .permutation import (
    AlignedBlocks,
    DispatchLayout,
    PermuteResult,
    SortedChunks,
    dispatch_layout,
    expert_capacity,
    moe_align_block_size,
    moe_permute,
    moe_unpermute,
    sort_chunks_by_index,
)
from .routing import (
    RoutingResult,
    expert_bincount,
    expert_frequency,
    segment_ids_from_cu_seqlens,
    topk_gating,
)

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

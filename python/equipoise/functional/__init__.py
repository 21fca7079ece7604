# SPDX-License-Identifier: Apache-2.0
"""Functions over the ops, with named results.

Shapes: T tokens, E experts, K = top_k, H features, N rows of the permuted buffer.

Everything works on CPU and CUDA, for float64, float32, bfloat16 and float16, under
``torch.compile``, ``torch.export`` and autocast, and is differentiable twice. Bad arguments raise
``RuntimeError`` with a message that names the op, the argument, what was wanted and what came.
"""

from .losses import (
    BALANCE_LOSSES,
    LossReport,
    TrainingLoss,
    balance_loss,
    balance_loss_from_logits,
    communication_loss,
    device_loss,
    entropy_loss,
    importance_loss,
    infonce,
    load_loss,
    mine,
    mixture_nll,
    mutual_information_loss,
    router_l2_loss,
    similarity_correlation,
    switch_loss,
    token_entropy_loss,
    training_loss,
    uniform_kl_loss,
    variance_loss,
    z_loss,
)
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
    concatenate_routings,
    expert_bincount,
    expert_frequency,
    segment_ids_from_cu_seqlens,
    topk_gating,
)

__all__ = [
    "BALANCE_LOSSES",
    "AlignedBlocks",
    "DispatchLayout",
    "LossReport",
    "PermuteResult",
    "RoutingResult",
    "SortedChunks",
    "TrainingLoss",
    "balance_loss",
    "balance_loss_from_logits",
    "communication_loss",
    "concatenate_routings",
    "device_loss",
    "dispatch_layout",
    "entropy_loss",
    "expert_bincount",
    "expert_capacity",
    "expert_frequency",
    "importance_loss",
    "infonce",
    "load_loss",
    "mine",
    "mixture_nll",
    "moe_align_block_size",
    "moe_permute",
    "moe_unpermute",
    "mutual_information_loss",
    "router_l2_loss",
    "segment_ids_from_cu_seqlens",
    "similarity_correlation",
    "sort_chunks_by_index",
    "switch_loss",
    "token_entropy_loss",
    "topk_gating",
    "training_loss",
    "uniform_kl_loss",
    "variance_loss",
    "z_loss",
]

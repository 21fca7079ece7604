# SPDX-License-Identifier: Apache-2.0
"""The registered operators: ``torch.ops.equipoise.X``, which is what compiled graphs contain.

Every name in ``__all__`` is one op; ``equipoise.functional`` has the doors with defaults and named
results. Ops whose name ends in ``_backward`` are the gradients of the others.

>>> sorted(__all__)[0]
'balance_loss'
"""

import torch

from . import _C  # noqa: F401  (loading the library registers the ops)

_OPS = torch.ops.equipoise

balance_loss = _OPS.balance_loss.default
balance_loss_backward = _OPS.balance_loss_backward.default
communication_loss = _OPS.communication_loss.default
dispatch_layout = _OPS.dispatch_layout.default
expert_bincount = _OPS.expert_bincount.default
expert_bincount_backward = _OPS.expert_bincount_backward.default
expert_choice = _OPS.expert_choice.default
hierarchical_loss = _OPS.hierarchical_loss.default
infonce = _OPS.infonce.default
load_loss = _OPS.load_loss.default
load_metrics = _OPS.load_metrics.default
mine = _OPS.mine.default
mixture_nll = _OPS.mixture_nll.default
moe_align_block_size = _OPS.moe_align_block_size.default
moe_permute = _OPS.moe_permute.default
moe_permute_out = _OPS.moe_permute_out.default
moe_unpermute = _OPS.moe_unpermute.default
moe_unpermute_backward = _OPS.moe_unpermute_backward.default
router_l2_loss = _OPS.router_l2_loss.default
similarity_correlation = _OPS.similarity_correlation.default
sinkhorn = _OPS.sinkhorn.default
sort_chunks_by_index = _OPS.sort_chunks_by_index.default
topk_gating = _OPS.topk_gating.default
topk_gating_backward = _OPS.topk_gating_backward.default

__all__ = [
    "balance_loss",
    "balance_loss_backward",
    "communication_loss",
    "dispatch_layout",
    "expert_bincount",
    "expert_bincount_backward",
    "expert_choice",
    "hierarchical_loss",
    "infonce",
    "load_loss",
    "load_metrics",
    "mine",
    "mixture_nll",
    "moe_align_block_size",
    "moe_permute",
    "moe_permute_out",
    "moe_unpermute",
    "moe_unpermute_backward",
    "router_l2_loss",
    "similarity_correlation",
    "sinkhorn",
    "sort_chunks_by_index",
    "topk_gating",
    "topk_gating_backward",
]

# SPDX-License-Identifier: Apache-2.0
"""Balance over more than one forward pass: over ranks, and over accumulated micro-batches.

A balance loss is a function of sums over tokens, so the loss of the global batch is the same
function of the sums over all ranks (Qiu 2025, arXiv:2501.11873). Value and gradient are exact, for
one all-reduce of 2 E + 5 numbers in the forward and none in the backward.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .functional.routing import RoutingResult

__all__ = ["RunningSums", "all_reduce_sum", "sum_over_ranks"]


def all_reduce_sum(tensor: Tensor, group: "dist.ProcessGroup | None" = None) -> None:
    """Adds up `tensor` over the ranks of `group` (default: all), in place.

    Raises:
        ValueError: this rank is not in `group`.
        RuntimeError: the others did not answer: a rank has died, or is later than the timeout of
            the process group.
    """
    if dist.get_world_size(group) < 1:
        raise ValueError("equipoise.distributed: group must have this rank as a member, it has not")
    try:
        dist.all_reduce(tensor, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            "equipoise.distributed: adding up the counts over the ranks failed: a rank has died "
            f"or is later than the timeout of the process group ({error})"
        ) from error


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group, scale: int) -> Tensor:
        ctx.scale = scale
        total = tensor.clone()
        all_reduce_sum(total, group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None, None


def sum_over_ranks(
    tensor: Tensor, group: "dist.ProcessGroup | None" = None, gradients: str = "mean"
) -> Tensor:
    """The sum of `tensor` over the ranks, with the gradient of a loss that every rank computes.

    Every rank computes the same loss L of the sum. What it may count as its own gradient is dL by
    its own part; DistributedDataParallel then takes the mean over R ranks, so the gradient is
    multiplied by R here.

    Args:
        tensor: the same shape on all ranks, for example `RoutingResult.sums`.
        group: the ranks; default all. Without an initialised process group there is one.
        gradients: what is done with the gradients of the parameters afterwards: "mean" over the
            ranks (DistributedDataParallel) or "sum".

    Raises:
        ValueError: `gradients` is neither, or this rank is not in `group`.
        RuntimeError: a rank has died or is later than the timeout.
    """
    if gradients not in ("mean", "sum"):
        raise ValueError(f"sum_over_ranks: gradients must be 'mean' or 'sum', got {gradients!r}")
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return tensor
    return _SumOverRanks.apply(
        tensor, group, dist.get_world_size(group) if gradients == "mean" else 1
    )


class RunningSums:
    """The balance of several micro-batches where the loss of each is needed at once: approximate.

    Exact is to keep the routings of all micro-batches and to form one loss after the last forward
    (`functional.concatenate_routings`). Where every micro-batch has its own backward, this keeps
    the sums so far: the loss of a micro-batch is that of all tokens since the last `reset()`, and
    its gradient reaches the tokens of this micro-batch only; those of earlier ones have had theirs
    at a time when the later were not yet known. The importance of gates is of the micro-batch.

    Example:
        >>> import torch, equipoise.functional as F
        >>> running = RunningSums()
        >>> for logits in torch.eye(2).unsqueeze(1):  # two micro-batches of a token each
        ...     routing = running.add(F.topk_gating(logits * 9, top_k=1))
        ...     print(round(F.switch_loss(routing).item(), 3))
        2.0
        1.0
        >>> running.reset()  # after the optimizer step
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, routing: RoutingResult) -> RoutingResult:
        """`routing` with the sums of all since `reset()`; its counts stay those of the micro-batch.

        Call it once per micro-batch and outside of activation checkpointing.
        """
        sums = routing._stats()
        if self._sums is not None:
            sums = self._sums + sums
        self._sums = sums.detach()
        return routing._replace(sums=sums)

    def reset(self) -> None:
        """Forgets the sums: to be called after each optimizer step."""
        self._sums = None

# SPDX-License-Identifier: Apache-2.0
"""Balancing without a loss: a bias per expert that steers the selection and nothing else.

Once per optimizer step, with C_e the tokens that expert e got during the step,

    b_e <- b_e + u sign(mean(C) - C_e)

(Wang 2024, arXiv:2408.15664). An expert that got too little is chosen a little more often from then
on; the weights of the chosen experts come from the scores without the bias, so no gradient is bent.
The steps are so small (1e-3) that bfloat16 would lose them: the bias stays float32 whatever the
model is cast to.
"""

import torch
from torch import Tensor, nn


def _recomputing() -> bool:
    """Whether this is the second forward of `torch.utils.checkpoint(..., use_reentrant=False)`.

    That forward runs inside a backward pass and catches its saved tensors with hooks. The reentrant
    kind has none, and needs none: its first forward runs without gradients and is not counted.
    """
    if torch.compiler.is_compiling():
        return False
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class LossFreeBalancer(nn.Module):
    """Loss-free balancing: hand it to a router, call `update()` after each optimizer step.

    The router adds `expert_bias` to the scores for the selection and records its counts by itself.
    The bias is in the `state_dict`; the counts of a step that is under way are not.

    Args:
        num_experts: E.
        bias_update_rate: u >= 0, what one update adds or takes.
        mode: `"sign"`, the rule above.
        center: take the mean off the bias after each update. Selection does not change; the bias
            cannot drift.

    Attributes:
        expert_bias: [E] float32 buffer, added to the scores for the selection.
        tokens_per_expert: [E] int64, counted since the last update.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> balancer = LossFreeBalancer(4, bias_update_rate=0.25)
        >>> balancer.record(torch.tensor([9, 5, 5, 1]))
        >>> balancer.update()
        >>> balancer.expert_bias
        tensor([-0.2500,  0.0000,  0.0000,  0.2500])
    """

    expert_bias: Tensor
    tokens_per_expert: Tensor

    def __init__(
        self,
        num_experts: int,
        bias_update_rate: float = 1e-3,
        mode: str = "sign",
        center: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"LossFreeBalancer: num_experts must be at least 1, got {num_experts}")
        if bias_update_rate < 0:
            raise ValueError(
                f"LossFreeBalancer: bias_update_rate must not be negative, got {bias_update_rate}"
            )
        if mode != "sign":
            raise ValueError(f"LossFreeBalancer: mode must be 'sign', got {mode!r}")
        self.num_experts = num_experts
        self.bias_update_rate = bias_update_rate
        self.mode = mode
        self.center = center
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", bias)
        # No buffer: DistributedDataParallel would overwrite it with the counts of rank 0.
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)

    def reset_parameters(self) -> None:
        """Zeroes the bias and the counts."""
        self.expert_bias.zero_()
        self.tokens_per_expert.zero_()

    def record(self, tokens_per_expert: Tensor) -> None:
        """Adds the counts of one forward pass; several may come before an update.

        Nothing is recorded in `eval()` mode, under `no_grad`, or when activation checkpointing runs
        a forward pass for the second time: only tokens that are learnt from count, and each once.

        Args:
            tokens_per_expert: [E] int64, as in `RoutingResult`.
        """
        if self.training and torch.is_grad_enabled() and not _recomputing():
            self.tokens_per_expert.add_(tokens_per_expert)

    @torch.no_grad()
    def update(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """One step of the bias, in place; the counts start again from zero.

        Args:
            group: a process group over which the counts are summed first, so that every rank makes
                the same step.
        """
        counts = self.tokens_per_expert
        if group is not None:
            torch.distributed.all_reduce(counts, group=group)
        # Integers compare exactly: sign(sum - E C_e) is sign(mean - C_e) without rounding the mean.
        step = torch.sign(counts.sum() - self.num_experts * counts)
        self.expert_bias.add_(step, alpha=self.bias_update_rate)
        if self.center:
            self.expert_bias.sub_(self.expert_bias.mean())
        counts.zero_()

    def _apply(self, fn, recurse: bool = True):  # .to(), .bfloat16(), .cuda(), ...
        bias = self.expert_bias
        super()._apply(fn, recurse)
        self.tokens_per_expert = fn(self.tokens_per_expert)
        if self.expert_bias.dtype != torch.float32:  # take the value of before the rounding
            self.expert_bias = bias.to(device=self.expert_bias.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, bias_update_rate={self.bias_update_rate}, "
            f"mode={self.mode!r}, center={self.center}"
        )

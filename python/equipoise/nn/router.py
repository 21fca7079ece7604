# SPDX-License-Identifier: Apache-2.0
"""The router: one linear map from a token to a logit per expert, then `topk_gating`.

    logits = x W^T (+ b),    result = topk_gating(logits, top_k, ...)

The matmul runs in float32 (float64 for float64) whatever the model runs in: in bfloat16 about one
token in thirty goes to another expert (Fedus 2021, "selective precision").
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .. import functional as F
from ..balancers import LossFreeBalancer


class TopKRouter(nn.Module):
    """Chooses `top_k` of `num_experts` experts for each token.

    Args:
        d_model: width of a token.
        num_experts: E.
        top_k: K, from 1 to E.
        score_function: how logits become scores, see `functional.topk_gating`.
        norm_topk_prob: divide the K weights by their sum.
        scaling_factor: multiplies the K weights.
        bias: add a learnt bias to the logits.
        balancer: its `expert_bias` is added to the scores for the selection, and it is told the
            counts of every training step. One balancer per router.

    Parameters:
        weight: [E, d_model], normal with standard deviation 0.02.
        bias: [E], zero; only with `bias=True`.

    Raises:
        ValueError: `d_model` below 1, `top_k` outside [1, E], or a balancer for another number of
            experts.

    Example:
        >>> router = TopKRouter(d_model=8, num_experts=4, top_k=2, norm_topk_prob=True)
        >>> result = router(torch.randn(5, 3, 8))
        >>> result.topk_indices.shape, int(result.tokens_per_expert.sum())
        (torch.Size([5, 3, 2]), 30)
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        score_function: str = "softmax",
        norm_topk_prob: bool = False,
        scaling_factor: float = 1.0,
        bias: bool = False,
        balancer: LossFreeBalancer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"TopKRouter: d_model must be at least 1, got {d_model}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"TopKRouter: top_k must be between 1 and num_experts = {num_experts}, got {top_k}"
            )
        if balancer is not None and balancer.num_experts != num_experts:
            raise ValueError(
                f"TopKRouter: balancer must be for num_experts = {num_experts} experts, "
                f"got one for {balancer.num_experts}"
            )
        self.d_model = d_model
        self.num_experts = num_experts
        self.top_k = top_k
        self.score_function = score_function
        self.norm_topk_prob = norm_topk_prob
        self.scaling_factor = scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        )
        self.balancer = balancer
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, and sets the balancer back to zero."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.balancer is not None:
            self.balancer.reset_parameters()

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> F.RoutingResult:
        """Routes the tokens.

        Args:
            x: [..., d_model] floating.
            token_mask: [...] bool, True = real token, or floating weights >= 0.

        Returns:
            RoutingResult: `topk_weights`, `topk_indices` [..., K] and the sums for the losses.

        Raises:
            RuntimeError: x of another width or not floating, or a bad mask.
        """
        logits = self.logits(x)
        result = F.topk_gating(
            logits,
            self.top_k,
            score_function=self.score_function,
            norm_topk_prob=self.norm_topk_prob,
            scaling_factor=self.scaling_factor,
            expert_bias=None if self.balancer is None else self.balancer.expert_bias,
            token_mask=token_mask,
        )
        if self.balancer is not None:
            self.balancer.record(result.tokens_per_expert)
        return result

    def logits(self, x: Tensor) -> Tensor:
        """[..., E] logits of the tokens `x` [..., d_model]; float32, or float64 for float64."""
        if x.dim() < 1 or x.shape[-1] != self.d_model:
            raise RuntimeError(
                f"TopKRouter: x must have shape [..., d_model] = [..., {self.d_model}], "
                f"got {list(x.shape)}"
            )
        if not x.is_floating_point():
            raise RuntimeError(f"TopKRouter: x must be floating, got {x.dtype}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        device_type = x.device.type
        has_autocast = torch.amp.is_autocast_available(device_type)  # the meta device has none
        with torch.autocast(device_type, enabled=False) if has_autocast else nullcontext():
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"score_function={self.score_function!r}, norm_topk_prob={self.norm_topk_prob}, "
            f"scaling_factor={self.scaling_factor}, bias={self.bias is not None}"
        )

# SPDX-License-Identifier: Apache-2.0
"""The router: one linear map from a token to a logit per expert, then `topk_gating`.

    logits = x W^T (+ b),    result = topk_gating(logits, top_k, ...)

`router_base` has the logits, `router_variants` and `sequential_router` have the routers that choose
in another way.
"""

import torch
from torch import Tensor, nn

from .. import functional as F
from .router_base import Router

_SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
    "identity": lambda logits: logits,
}


class TopKRouter(Router):
    """Chooses `top_k` of `num_experts` experts for each token.

    Args:
        d_model: width of a token.
        num_experts: E.
        top_k: K, from 1 to E.
        score_function: how logits become scores, see `functional.topk_gating`.
        norm_topk_prob: divide the K weights by their sum.
        scaling_factor: multiplies the K weights.
        bias: add a learnt bias to the logits.
        balancer: a module whose `expert_bias` is added to the scores for the selection, and whose
            `record` is told the counts of every training step (and the scores, if it has
            `needs_scores`). One balancer per router.
        num_groups, group_topk, group_score: of the selection, see `functional.topk_gating`.
        router_dtype: of the matmul and of all that follows, float32 or float64; of float64 tokens
            always float64.
        jitter_eps: in training x is multiplied by U(1 - eps, 1 + eps), on its way to the router
            only (Fedus 2021).
        expert_dropout: in training each expert is left out of a forward pass with this
            probability: its logits are -inf. At least `top_k` experts stay. With groups, those
            that are kept may then have fewer than K experts; the missing slots hold -1.
        routing: "learned", or for benchmarks "random" (every token draws K different experts) or
            "balanced" (the experts are dealt to the real tokens in turn). The weights come from
            the logits all the same.
        temperature: divides the logits. It is a float32 buffer that a schedule may write in place,
            which compiles nothing anew; None: there is no such buffer.
        init_std: standard deviation of `weight` at the start. Small: all experts begin alike.
        active_experts: a module with a buffer `active_experts` [E] bool, whose `record` is told the
            counts as that of `balancer` (`DynamicExperts`). The logits of the others are -inf.

    Parameters:
        weight: [E, d_model], normal with standard deviation `init_std`.
        bias: [E], zero; only with `bias=True`.

    Attributes:
        temperature: scalar float32 buffer, not in the `state_dict`; or None.

    Raises:
        ValueError: an argument out of its range, or a balancer for another number of experts.

    Example:
        >>> router = TopKRouter(d_model=8, num_experts=4, top_k=2, norm_topk_prob=True)
        >>> result = router(torch.randn(5, 3, 8))
        >>> result.topk_indices.shape, int(result.tokens_per_expert.sum())
        (torch.Size([5, 3, 2]), 30)

        For a benchmark, the same load for all:

        >>> router = TopKRouter(d_model=8, num_experts=4, top_k=2, routing="balanced")
        >>> router(torch.randn(6, 8)).tokens_per_expert
        tensor([3, 3, 3, 3])
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
        balancer: nn.Module | None = None,
        *,
        num_groups: int = 1,
        group_topk: int | None = None,
        group_score: str = "top2_sum",
        router_dtype: torch.dtype = torch.float32,
        jitter_eps: float = 0.0,
        expert_dropout: float = 0.0,
        routing: str = "learned",
        temperature: float | None = None,
        init_std: float = 0.02,
        active_experts: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            num_experts,
            top_k,
            bias,
            router_dtype=router_dtype,
            jitter_eps=jitter_eps,
            temperature=temperature,
            init_std=init_std,
            device=device,
            dtype=dtype,
        )
        self._require(
            0 <= expert_dropout < 1, f"expert_dropout must be in [0, 1), got {expert_dropout}"
        )
        self._require(
            routing in ("learned", "random", "balanced"),
            f"routing must be 'learned', 'random' or 'balanced', got {routing!r}",
        )
        if balancer is not None:
            self._require(
                balancer.num_experts == num_experts,
                f"balancer must be for num_experts = {num_experts} experts, "
                f"got one for {balancer.num_experts}",
            )
        if active_experts is not None:
            shape = list(active_experts.active_experts.shape)
            self._require(
                shape == [num_experts],
                f"active_experts must have a buffer of shape [E] = [{num_experts}], got {shape}",
            )
            least = getattr(active_experts, "min_experts", top_k)
            self._require(
                least >= top_k,
                f"active_experts must keep at least top_k = {top_k} experts, got {least}",
            )
        self.score_function = score_function
        self.norm_topk_prob = norm_topk_prob
        self.scaling_factor = scaling_factor
        self.num_groups = num_groups
        self.group_topk = group_topk
        self.group_score = group_score
        self.expert_dropout = expert_dropout
        self.routing = routing
        self.balancer = balancer
        self.active_experts = active_experts
        try:  # the checks of the op, before any forward pass
            self._gating(torch.empty(0, num_experts, device="meta"))
        except RuntimeError as error:
            message = str(error).splitlines()[0].removeprefix("topk_gating: ")
            raise ValueError(f"{type(self).__name__}: {message}") from None

    def reset_parameters(self) -> None:
        """Draws the parameters anew, and sets balancer and active experts back."""
        super().reset_parameters()
        for module in (self.balancer, self.active_experts):
            if module is not None:
                module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        num_segments: int | None = None,
        forced_indices: Tensor | None = None,
    ) -> F.RoutingResult:
        """Routes the tokens.

        Args:
            x: [..., d_model] floating.
            token_mask: [...] bool, True = real token, or floating weights >= 0.
            segment_ids: [...] int64 in [0, S): counts and sums are kept for each segment by itself.
            num_segments: S.
            forced_indices: [..., K] int64, taken in place of the selection (router replay).

        Returns:
            RoutingResult: `topk_weights`, `topk_indices` [..., K] and the sums for the losses.

        Raises:
            RuntimeError: x of another width or not floating, or another bad argument.
        """
        logits, absent = self._present(self.logits(x))
        return self._route(logits, absent, token_mask, segment_ids, num_segments, forced_indices)

    def _route(
        self,
        logits: Tensor,
        absent: Tensor | None,
        token_mask: Tensor | None,
        segment_ids: Tensor | None,
        num_segments: int | None,
        forced_indices: Tensor | None,
        noise: Tensor | None = None,
    ) -> F.RoutingResult:
        if forced_indices is None:
            forced_indices = self._choose(logits, absent, token_mask)
        bias = None if self.balancer is None else self.balancer.expert_bias
        result = self._gating(
            logits,
            expert_bias=bias,
            token_mask=token_mask,
            segment_ids=segment_ids,
            num_segments=num_segments,
            noise=noise,
            forced_indices=forced_indices,
        )
        counts = result.tokens_per_expert
        if segment_ids is not None:
            counts = counts.sum(0)
        if self.active_experts is not None:
            self.active_experts.record(counts)
        if self.balancer is None:
            pass
        elif getattr(self.balancer, "needs_scores", False):
            scores = logits.detach() if noise is None else (logits + noise).detach()
            absent = ~(scores > -torch.inf)
            if token_mask is not None:
                absent = absent | ~(token_mask > 0).unsqueeze(-1)
            scores = _SCORES[self.score_function](scores).masked_fill(absent, -torch.inf)
            self.balancer.record(counts, scores)
        else:
            self.balancer.record(counts)
        return result

    def _gating(self, logits: Tensor, **inputs) -> F.RoutingResult:
        return F.topk_gating(
            logits,
            self.top_k,
            score_function=self.score_function,
            norm_topk_prob=self.norm_topk_prob,
            scaling_factor=self.scaling_factor,
            num_groups=self.num_groups,
            group_topk=self.group_topk,
            group_score=self.group_score,
            **inputs,
        )

    def _present(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits with -inf for absent experts, and [E] bool, who is absent; None: nobody is."""
        absent = None
        if self.active_experts is not None:
            absent = ~self.active_experts.active_experts
        if self.training and self.expert_dropout > 0:
            draw = torch.rand(self.num_experts, device=self.weight.device)
            if absent is not None:
                draw = draw.masked_fill(absent, -1)
            dropped = draw < self.expert_dropout
            dropped = dropped.scatter(0, draw.topk(self.top_k).indices, False)
            absent = dropped if absent is None else absent | dropped
        return (logits if absent is None else logits.masked_fill(absent, -torch.inf)), absent

    def _choose(
        self, logits: Tensor, absent: Tensor | None, token_mask: Tensor | None
    ) -> Tensor | None:
        """[..., K] experts, where it is not the scores that choose them."""
        if self.routing == "random":
            draw = torch.rand_like(logits).masked_fill(~(logits > -torch.inf), -1)
            return draw.topk(self.top_k, dim=-1).indices
        if self.routing == "balanced":
            self._check_per_token("token_mask", token_mask, logits.shape[:-1])
            if token_mask is None:
                turn = torch.arange(logits.numel() // self.num_experts, device=logits.device)
            else:  # a masked token takes no turn
                turn = (token_mask > 0).flatten().long().cumsum(0) - 1
            slot = torch.arange(self.top_k, device=logits.device)
            slot = turn.unsqueeze(1) * self.top_k + slot
            if absent is None:
                experts = slot % self.num_experts
            else:  # the others first
                order = absent.long().argsort(stable=True)
                experts = order[slot % (~absent).sum().clamp_min(self.top_k)]
            return experts.view(*logits.shape[:-1], self.top_k)
        return None

    def extra_repr(self) -> str:
        text = (
            f"{super().extra_repr()}, score_function={self.score_function!r}, "
            f"norm_topk_prob={self.norm_topk_prob}, scaling_factor={self.scaling_factor}"
        )
        if self.num_groups > 1:
            text += f", num_groups={self.num_groups}, group_topk={self.group_topk}"
            text += f", group_score={self.group_score!r}"
        if self.expert_dropout > 0:
            text += f", expert_dropout={self.expert_dropout}"
        if self.routing != "learned":
            text += f", routing={self.routing!r}"
        return text


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all equipoise routers in `model`, for a learning rate of their own.

    Args:
        model: any module; also a router itself.

    Returns:
        Each parameter once, in the order of `model.modules()`.

    Raises:
        ValueError: there is no router in `model`.

    >>> from equipoise.nn import MoELayer
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), MoELayer(8, 16, num_experts=4, top_k=2))
    >>> of_routers = router_parameters(model)
    >>> [tuple(parameter.shape) for parameter in of_routers]
    [(4, 8)]
    >>> ids = {id(parameter) for parameter in of_routers}
    >>> others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    >>> optimizer = torch.optim.AdamW(
    ...     [{"params": others}, {"params": of_routers, "lr": 1e-4}], lr=1e-3
    ... )
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.001, 0.0001]
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        raise ValueError(
            "router_parameters: model must contain a router of equipoise.nn, "
            f"got a {type(model).__name__} without one"
        )
    parameters = {id(p): p for router in routers for p in router.parameters()}
    return list(parameters.values())

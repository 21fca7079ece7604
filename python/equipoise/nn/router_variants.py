# SPDX-License-Identifier: Apache-2.0
"""Routers that choose in another way than `TopKRouter`.

With noise, by a balanced plan, not at all, or the other way round: experts that choose tokens.
"""

import torch
from torch import Tensor, nn

from .. import functional as F
from .router import TopKRouter
from .router_base import Router


class NoisyTopKRouter(TopKRouter):
    """Noisy top-k gating: learnt noise on the logits in training (Shazeer 2017, equation 4).

        H = x W^T + e * sigma,   sigma = softplus(x W_noise^T) + noise_epsilon,   e ~ N(0, 1)

    Selection, weights and sums are all of H; the gradient reaches W and W_noise. `load_loss` is
    the loss that goes with it. The temperature, if any, divides x W^T, not the noise.

    Args:
        d_model, num_experts, top_k: see `TopKRouter`.
        noise_epsilon: the least standard deviation, above 0.
        generator: draws the noise, for a seed of its own; on the device of the tokens. None:
            torch's default generator, which `torch.compile` and activation checkpointing need:
            they neither trace another one nor replay it.
        options: the keywords of `TopKRouter`.

    Parameters:
        weight: [E, d_model], normal with standard deviation `init_std`.
        noise_weight: [E, d_model], zero: sigma is log(2) + noise_epsilon at the start.

    Attributes:
        clean_logits, noisy_logits, noise_stddev: [..., E] of the last forward pass in training,
            with their gradients; -inf for an absent expert; None before it, and in a copy of the
            module.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> router = NoisyTopKRouter(8, num_experts=4, top_k=2)
        >>> result = router(torch.randn(5, 8))
        >>> round(router.noise_stddev[0, 0].item(), 3)
        0.703
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        noise_epsilon: float = 1e-2,
        generator: torch.Generator | None = None,
        **options,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        self._require(noise_epsilon > 0, f"noise_epsilon must be above 0, got {noise_epsilon}")
        self.noise_epsilon = noise_epsilon
        self.generator = generator
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))
        self._forget()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.noise_weight)
        self._forget()

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        num_segments: int | None = None,
        forced_indices: Tensor | None = None,
    ) -> F.RoutingResult:
        """Routes the tokens, without noise in `eval()` mode; see `TopKRouter.forward`."""
        inputs = self._inputs(x)
        logits, absent = self._present(self._logits_of(inputs))
        noise = None
        if self.training:
            stddev = self._linear(inputs, self.noise_weight)
            stddev = nn.functional.softplus(stddev) + self.noise_epsilon
            noise = stddev * self._normal_like(logits)
            self.clean_logits, self.noisy_logits = logits, logits + noise
            self.noise_stddev, self._token_mask = stddev, token_mask
        return self._route(
            logits, absent, token_mask, segment_ids, num_segments, forced_indices, noise
        )

    def load_loss(self) -> Tensor:
        """The load loss of the last forward pass in training, `functional.load_loss`, unscaled.

        Raises:
            RuntimeError: there was none.
        """
        if self.clean_logits is None:
            raise RuntimeError(
                f"{type(self).__name__}: load_loss() needs a forward pass in training mode before "
                "it, got none"
            )
        return F.load_loss(
            self.clean_logits, self.noisy_logits, self.noise_stddev, self.top_k, self._token_mask
        )

    def _normal_like(self, logits: Tensor) -> Tensor:
        if self.generator is None:  # a call that can be traced
            return torch.randn_like(logits)
        return torch.randn(
            logits.shape, generator=self.generator, dtype=logits.dtype, device=logits.device
        )

    def _forget(self) -> None:
        self.clean_logits = self.noisy_logits = self.noise_stddev = self._token_mask = None

    def __getstate__(
        self,
    ) -> dict:  # results that belong to a graph can be neither copied nor saved
        names = ("clean_logits", "noisy_logits", "noise_stddev", "_token_mask")
        return self.__dict__ | dict.fromkeys(names)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, noise_epsilon={self.noise_epsilon}"


class SinkhornRouter(TopKRouter):
    """Balanced by construction: in training the experts come from `functional.sinkhorn`.

    Each token takes the `top_k` experts with the largest part in a plan that gives every expert the
    same; the weights come from the plain scores, with their gradient. In `eval()` mode there are no
    other tokens to share with, so the `top_k` largest scores choose, as in Megatron-LM.

    Args:
        d_model, num_experts, top_k: see `TopKRouter`.
        num_iters: of the scaling, at least 1.
        options: the keywords of `TopKRouter`, except those of the selection (`balancer`,
            `num_groups`, `routing`), which the plan would ignore.

    Raises:
        ValueError: an argument out of its range, or an option of the selection.

    Example:
        >>> router = SinkhornRouter(8, num_experts=4, top_k=1)
        >>> _ = torch.nn.init.normal_(router.weight)
        >>> x = torch.randn(1000, 8) + 1  # all much alike
        >>> bool(router(x).tokens_per_expert.max() < 400)
        True
    """

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, num_iters: int = 8, **options
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        self._require(num_iters >= 1, f"num_iters must be at least 1, got {num_iters}")
        self._require(self.balancer is None, "balancer must be None: the plan is balanced already")
        self._require(
            self.num_groups == 1, f"num_groups must be 1: the plan has none, got {self.num_groups}"
        )
        self._require(self.routing == "learned", f"routing must be 'learned', got {self.routing!r}")
        self.num_iters = num_iters

    def _choose(
        self, logits: Tensor, absent: Tensor | None, token_mask: Tensor | None
    ) -> Tensor | None:
        if not self.training:
            return None
        plan = F.sinkhorn(logits, self.num_iters, token_mask)
        plan = plan.masked_fill(~(logits > -torch.inf), -torch.inf)  # not just 0, by underflow
        return F.topk_gating(plan, self.top_k, "identity", stats=False).topk_indices

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_iters={self.num_iters}"


class DenseRouter(TopKRouter):
    """Sends every token to every expert, weighted by its scores.

    There is no load to balance: `functional.balance_loss` leaves out all losses but z and
    token_entropy, and says so once.

    Args:
        d_model, num_experts: see `TopKRouter`.
        top_k: None or `num_experts`.
        options: the keywords of `TopKRouter`.

    Raises:
        ValueError: another `top_k`, or an argument out of its range.

    Example:
        >>> result = DenseRouter(8, num_experts=4)(torch.randn(5, 8))
        >>> result.topk_weights.shape, result.tokens_per_expert
        (torch.Size([5, 4]), tensor([5, 5, 5, 5]))
    """

    def __init__(self, d_model: int, num_experts: int, top_k: int | None = None, **options) -> None:
        if top_k is not None and top_k != num_experts:
            raise ValueError(
                f"DenseRouter: top_k must be None or num_experts = {num_experts}, got {top_k}"
            )
        super().__init__(d_model, num_experts, num_experts, **options)


class ExpertChoiceRouter(Router):
    """Every expert chooses its tokens, all the same number: an even load by construction.

    Each of the E experts takes the C tokens with the largest softmax over the experts, with

        C = ceil(top_k T / E), at most T

    so that a token has `top_k` experts on average, but may have none or many. `MoELayer` takes the
    result as it is. A token is chosen in competition with the other tokens of the batch, those that
    follow it too: not for models that generate token by token. Source: Zhou 2022
    (arXiv:2202.09368).

    Args:
        d_model, num_experts, top_k, bias, router_dtype, jitter_eps, temperature, init_std: see
            `TopKRouter`.

    Parameters:
        weight, bias: see `TopKRouter`.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> router = ExpertChoiceRouter(8, num_experts=4, top_k=2)
        >>> router(torch.randn(5, 3, 8)).token_indices.shape  # ceil(2 * 15 / 4)
        torch.Size([4, 8])
    """

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> F.ExpertChoiceResult:
        """Lets the experts choose.

        Args:
            x: [..., d_model] floating; the leading dimensions are T tokens.
            token_mask: [...] bool, True = real token, or floating weights, of which only > 0
                counts. C is that of all T tokens, so that it does not depend on data.

        Returns:
            ExpertChoiceResult: `token_indices`, `token_weights` [E, C].

        Raises:
            RuntimeError: x of another width or not floating, or a bad mask.
        """
        logits = self.logits(x)
        num_tokens = logits.numel() // self.num_experts
        capacity = -(-self.top_k * num_tokens // self.num_experts)  # expert_choice clamps it to T
        return F.expert_choice(logits, capacity, token_mask)

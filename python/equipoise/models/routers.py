# SPDX-License-Identifier: Apache-2.0
"""The routers of a model, and what a forward pass of one of them says.

There are three kinds:

- equipoise: modules of `equipoise.nn`; they return a RoutingResult (or an ExpertChoiceResult)
- router: modules `*TopKRouter`, `*TopkRouter` or `*MoEGate`. In transformers 5 they return (logits
  [T, E], weights [T, K], indices [T, K]); in transformers 4 and DeepSeek's own code indices and
  weights, but no logits: these are computed again
- block: the MoE block of transformers 4, with a Linear named `gate`. It returns (hidden, logits);
  whom the tokens chose follows from the logits
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..functional.losses import are_probabilities
from ..nn.router_base import Router, without_autocast

_ROUTER_CLASS = re.compile(r"(Top[kK]Router|MoEGate)$")
# Those that choose the largest of softmax(logits); others of this name choose otherwise.
_BLOCK_CLASS = re.compile(
    r"^(Mixtral|MiniMax|Qwen2Moe|Qwen3Moe|Qwen3Next|Qwen3VLMoeText|Olmoe|FlexOlmo)SparseMoeBlock$"
)


@dataclass(frozen=True)
class RouterSite:
    """A router and its place in the model."""

    name: str
    """As in `model.named_modules()`."""
    module: nn.Module
    kind: str
    """"equipoise", "router" or "block"."""

    @property
    def weight(self) -> Tensor | None:
        """[E, d_model], of which the logits are made; None where it is kept in another way."""
        module = self.module.gate if self.kind == "block" else self.module
        return getattr(module, "weight", None)

    @property
    def num_experts(self) -> int:
        """E."""
        for name in ("num_experts", "n_routed_experts"):
            if isinstance(getattr(self.module, name, None), int):
                return getattr(self.module, name)
        return self.weight.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.module.top_k

    @property
    def score_function(self) -> str:
        """Of which p is made. Routers with a bias for the selection have sigmoid scores."""
        if self.kind == "equipoise":
            return getattr(self.module, "score_function", "softmax")
        default = "sigmoid" if hasattr(self.module, "e_score_correction_bias") else "softmax"
        return getattr(self.module, "scoring_func", default)

    @property
    def expert_bias(self) -> Tensor | None:
        """[E], added to the scores for the selection."""
        if self.kind == "equipoise":
            balancer = getattr(self.module, "balancer", None)
            return getattr(balancer, "expert_bias", None)
        return getattr(self.module, "e_score_correction_bias", None)

    def routing(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        output: Any,
        token_mask: Callable[[Tensor], Tensor | None],
    ) -> F.RoutingResult | F.ExpertChoiceResult:
        """What a forward pass decided, without gradient and without waiting for the device.

        Args:
            args: of the forward pass, as a forward hook gets them.
            kwargs: the same.
            output: the same.
            token_mask: from logits [T, E] to the mask [T] or None. For Hugging Face's routers:
                those of equipoise know theirs.
        """
        if self.kind == "equipoise":
            return type(output)(*(None if t is None else t.detach() for t in output))
        logits, weights, indices = self.read(args, kwargs, output)
        result = F.topk_gating(
            self._true_logits(logits),
            self.top_k if indices is None else indices.shape[-1],
            self.score_function,
            norm_topk_prob=getattr(self.module, "norm_topk_prob", True),
            token_mask=token_mask(logits),
            forced_indices=indices,
        )
        if weights is None:
            return result
        chosen = result.topk_indices >= 0
        return result._replace(topk_weights=torch.where(chosen, weights, 0).float())

    def read(
        self, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What one of Hugging Face's routers gives out, without gradient.

        Returns:
            Logits [T, E], which may be probabilities; weights and indices [T, K], or None.
        """
        if not isinstance(output, tuple) or len(output) < 2:
            raise self._unreadable(output)
        if self.kind == "block":
            logits = output[1]
            return logits.detach().reshape(-1, logits.shape[-1]), None, None
        tensors = [t.detach() for t in output if isinstance(t, Tensor) and t.dim() >= 2]
        floats = [t for t in tensors if t.is_floating_point()]
        indices = [t for t in tensors if t.dtype in (torch.int64, torch.int32)]
        if not indices or not floats:
            raise self._unreadable(output)
        chosen = indices[0].reshape(-1, indices[0].shape[-1]).long()
        if len(floats) > 1:
            logits, weights = floats[:2]
        else:
            hidden = args[0] if args else kwargs["hidden_states"]
            logits, weights = self._logits_of(hidden.detach()), floats[0]
        weights = weights.reshape(-1, weights.shape[-1])
        if weights.shape != chosen.shape:  # of all experts
            weights = None
        return logits.reshape(-1, logits.shape[-1]), weights, chosen

    def _logits_of(self, hidden: Tensor) -> Tensor:
        """As the routers do that do not give them out: in float32."""
        with without_autocast(hidden):
            bias = getattr(self.module, "bias", None)
            return nn.functional.linear(
                hidden.reshape(-1, hidden.shape[-1]).float(),
                self.module.weight.detach().float(),
                None if bias is None else bias.detach().float(),
            )

    def _true_logits(self, logits: Tensor) -> Tensor:
        """Of probabilities given out as logits, their logarithm: softmax makes them of it again."""
        if logits.shape[-1] < 2:
            return logits
        log = logits.clamp(min=torch.finfo(logits.dtype).tiny).log()
        return torch.where(are_probabilities(logits), log, logits)

    def _unreadable(self, output: Any) -> ValueError:
        got = type(output).__name__
        if isinstance(output, tuple):
            got = f"({', '.join(type(part).__name__ for part in output)})"
        return ValueError(
            f"watch: the {type(self.module).__name__} '{self.name}' must return (logits, weights, "
            f"indices), (indices, weights) or, as a block, (hidden, logits); got {got}"
        )


def find_routers(function: str, model: nn.Module) -> list[RouterSite]:
    """The routers of `model`, in the order of `model.named_modules()`.

    Args:
        function: the name of the public function, for the message.
        model: any module; also a router itself.

    Raises:
        ValueError: not a module, or one without routers.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    sites = []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is not None:
            sites.append(RouterSite(name, module, kind))
    if not sites:
        raise ValueError(
            f"{function}: model must contain a router, got a {type(model).__name__} without one. "
            "Looked for: routers of equipoise.nn; modules whose class is named *TopKRouter, "
            "*TopkRouter or *MoEGate, with an attribute top_k (transformers 5; DeepSeek-V3 also in "
            "transformers 4); MoE blocks of transformers 4 (MixtralSparseMoeBlock, "
            "Qwen2MoeSparseMoeBlock, Qwen3MoeSparseMoeBlock, OlmoeSparseMoeBlock and their like) "
            "whose gate is a Linear"
        )
    return sites


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, Router):
        return "equipoise"
    name = type(module).__name__
    if _ROUTER_CLASS.search(name) and isinstance(getattr(module, "top_k", None), int):
        return "router"
    if _BLOCK_CLASS.match(name) and isinstance(getattr(module, "gate", None), nn.Linear):
        return "block"
    return None

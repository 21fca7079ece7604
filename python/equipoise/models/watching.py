# SPDX-License-Identifier: Apache-2.0
"""Looking at the routing of a model while it runs, by forward hooks."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .routers import RouterSite, find_routers


def watch(model: nn.Module, token_mask: Tensor | None = None) -> "Watch":
    """Counts and losses of every MoE layer of a model, without changing it.

    The hooks are there inside the `with` statement only, and wait for the device nowhere. What
    they gather stays readable afterwards. Padding is left out: by the `attention_mask` that the
    forward pass of `model` gets, or by `token_mask`. The routers of equipoise have their own
    `token_mask`, and their results are taken as they are. A forward pass that runs again for
    activation checkpointing is counted once. Where a router gives out probabilities as its
    logits, as those of the first transformers 5 did, the losses are of the true logits.

    Not for compiled models: what is compiled runs without hooks. Watch them before they are
    compiled.

    Args:
        model: with routers of `equipoise.nn`, or Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3
            or their like of Hugging Face transformers 4 or 5.
        token_mask: [B, S] or [T] bool, True = real token, or float weights >= 0, of every forward
            pass from now on; `Watch.token_mask` may be set anew before each.

    Returns:
        Watch, a context manager.

    Raises:
        ValueError: no router in `model`; a `token_mask` for routers of equipoise; during a forward
            pass, a mask that does not fit its tokens.

    Example:
        >>> from equipoise.nn import MoELayer
        >>> layer = MoELayer(d_model=8, d_hidden=16, num_experts=4, top_k=2)
        >>> with torch.no_grad():  # every token the same
        ...     with watch(layer) as w:
        ...         _ = layer(torch.ones(5, 8))
        >>> sorted(w.tokens_per_expert.tolist()[0])
        [0, 0, 5, 5]
        >>> w.layers
        ['router']
    """
    return Watch(model, token_mask)


class Watch:
    """What `watch` gives; see there.

    Attributes:
        layers: the names of the L routers, as in `model.named_modules()`.
        token_mask: of the forward passes to come, or None.
    """

    def __init__(self, model: nn.Module, token_mask: Tensor | None = None) -> None:
        self._model = model
        self._sites = find_routers("watch", model)
        if token_mask is not None:
            for site in self._sites:
                if site.kind == "equipoise":
                    raise ValueError(
                        "watch: token_mask must be None for routers of equipoise, which take it "
                        f"themselves in their forward pass, got one for '{site.name}'"
                    )
        self.token_mask = token_mask
        self._attention_mask: Any = None
        self._mask_place: int | None = None  # among the positional arguments
        self._handles: list = []
        self.reset()

    @property
    def layers(self) -> list[str]:
        return [site.name for site in self._sites]

    def reset(self) -> None:
        """Forgets what was gathered."""
        self._counts: list[Tensor | None] = [None] * len(self._sites)
        self._sums: list[Tensor | None] = [None] * len(self._sites)
        self._routings: list[Any] = [None] * len(self._sites)

    def __enter__(self) -> "Watch":
        if self._handles:
            raise RuntimeError("watch: this Watch is in use already; make another one")
        parameters = list(inspect.signature(self._model.forward).parameters)
        named = "attention_mask" in parameters
        self._mask_place = parameters.index("attention_mask") if named else None
        hook = self._model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        self._handles.append(hook)
        hook = self._model.register_forward_hook(self._after_model, always_call=True)
        self._handles.append(hook)
        for layer, site in enumerate(self._sites):
            self._handles.append(
                # First, so that what other hooks do to the output is not seen.
                site.module.register_forward_hook(
                    self._router_hook(layer, site), prepend=True, with_kwargs=True
                )
            )
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._attention_mask = None

    @property
    def tokens_per_expert(self) -> Tensor:
        """[L, E] int64 counts since the beginning (or `reset`); zero for a layer that has not run.

        Raises:
            RuntimeError: no forward pass yet.
            ValueError: the layers have different numbers of experts.
        """
        seen = self._seen()
        sizes = {count.numel() for count in self._counts if count is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"watch: the layers have different numbers of experts, {sorted(sizes)}: watch them "
                "apart, as parts of the model"
            )
        like = self._counts[seen[0]]
        return torch.stack(
            [
                torch.zeros_like(like) if count is None else count.to(like.device)
                for count in self._counts
            ]
        )

    @property
    def routings(self) -> list[F.RoutingResult | F.ExpertChoiceResult]:
        """The routing of each layer in its last forward pass, without gradient.

        For metrics, and for the losses that need more than sums.

        Raises:
            RuntimeError: a layer has not run yet.
        """
        missing = [site.name for site, r in zip(self._sites, self._routings, strict=True) if not r]
        if missing:
            raise RuntimeError(
                f"watch: the routings of all layers need a forward pass of each, none came from "
                f"{', '.join(missing)}"
            )
        return list(self._routings)

    def losses(
        self,
        losses: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("switch", "z"),
        normalize: str = "none",
    ) -> dict[str, Tensor]:
        """The exact value of balance losses in each layer, over all tokens since the beginning.

        Those of `functional.balance_loss`, unscaled and without gradient. Never over layers put
        together, as Hugging Face's loss is: there imbalances cancel.

        Args:
            losses: names, or name -> options, as in `functional.balance_loss`. `importance` is of
                the probabilities (`{"of": "probs"}`): that of the gates needs more than sums; for
                the last forward pass there are `routings`.
            normalize: "hf" gives Hugging Face's number of one layer, K at balance for `switch`.

        Returns:
            name -> [L]; NaN for a layer that has not run.

        Raises:
            RuntimeError: no forward pass yet.
            ValueError: a loss that cannot be made of sums; an ExpertChoiceRouter, which has none.

        Example:
            >>> from equipoise.nn import TopKRouter
            >>> router = TopKRouter(2, num_experts=2, top_k=1)
            >>> _ = torch.nn.init.eye_(router.weight)
            >>> with watch(router) as w:
            ...     _ = router(torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
            ...     _ = router(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
            >>> round(w.losses(["switch"])["switch"].item(), 3)  # f 3/4, 1/4; P 0.690, 0.310
            1.19
        """
        if not isinstance(losses, Mapping):
            losses = {name: {} for name in losses}
        losses = {name: {"coeff": 1.0, **options} for name, options in losses.items()}
        if losses.get("importance", {"of": "probs"}).get("of") != "probs":
            raise ValueError(
                'watch: losses can take importance only as {"importance": {"of": "probs"}}; that '
                "of the gates comes from functional.balance_loss of a routing in `routings`"
            )
        values = [[] for _ in losses]
        like = self._counts[self._seen()[0]]
        for layer, site in enumerate(self._sites):
            if self._counts[layer] is None:
                nan = torch.full((), torch.nan, device=like.device)
                for column in values:
                    column.append(nan)
                continue
            if self._sums[layer] is None:
                raise ValueError(
                    "watch: losses need routers in which tokens choose experts, got the "
                    f"{type(site.module).__name__} '{site.name}'"
                )
            report = F.balance_loss(self._gathered(layer), losses, normalize)
            for column, value in zip(values, report.unscaled.values(), strict=True):
                column.append(value.to(like.device))
        return {name: torch.stack(column) for name, column in zip(losses, values, strict=True)}

    def concatenated_loss(self) -> Tensor:
        """The Switch loss of all layers put together, as Hugging Face forms it: K at balance.

        Layers that lean to different experts look balanced in it. To compare with
        `losses(["switch"], normalize="hf")`.

        Raises:
            RuntimeError, ValueError: as `losses`, and layers with different numbers of experts.
        """
        counts = self.tokens_per_expert.sum(0)
        parts = [self._gathered(layer) for layer in self._seen()]
        sums = torch.stack([part.sums.to(counts.device) for part in parts]).sum(0)
        together = parts[0]._replace(tokens_per_expert=counts, sums=sums)
        return F.balance_loss(together, {"switch": 1.0}, "hf").total

    def _gathered(self, layer: int) -> F.RoutingResult:
        """All tokens of a layer, as far as sums go."""
        last = self._routings[layer]
        empty = last.topk_indices.new_empty(0, last.top_k)
        return F.RoutingResult(
            empty.double(), empty, self._counts[layer], empty.new_empty(0), self._sums[layer]
        )

    def _seen(self) -> list[int]:
        seen = [layer for layer, count in enumerate(self._counts) if count is not None]
        if not seen:
            raise RuntimeError(
                "watch: no forward pass has been seen: run the model inside the with statement "
                "(and not compiled: what is compiled runs without hooks)"
            )
        return seen

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._attention_mask = kwargs.get("attention_mask")
        if self._mask_place is not None and self._mask_place < len(args):
            self._attention_mask = args[self._mask_place]

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._attention_mask = None  # not for a pass of an inner module by itself

    def _router_hook(self, layer: int, site: RouterSite):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if torch.compiler.is_compiling():
                return
            # A forward pass inside a backward pass is a recomputed one. The first one is counted,
            # with gradients or without (the reentrant kind of checkpointing).
            if torch._C._current_graph_task_id() != -1:
                return
            with torch.no_grad():
                self._record(layer, site.routing(args, kwargs, output, self._mask))

        return hook

    def _record(self, layer: int, routing: F.RoutingResult | F.ExpertChoiceResult) -> None:
        sums = None
        if isinstance(routing, F.ExpertChoiceResult):
            counts = (routing.token_indices >= 0).sum(1)
        else:
            counts = routing.tokens_per_expert.reshape(-1, routing.num_experts).sum(0)
            if routing.sums is not None:
                sums = routing.sums.reshape(-1, routing.sums.shape[-1]).sum(0).double()
        # Not in place: what was made under inference_mode could not be changed outside of it.
        before = self._counts[layer]
        self._counts[layer] = counts if before is None else before + counts
        before = self._sums[layer]
        self._sums[layer] = sums if before is None or sums is None else before + sums
        self._routings[layer] = routing

    def _mask(self, logits: Tensor) -> Tensor | None:
        """[T] of the tokens of these logits [T, E]."""
        num_tokens = logits.shape[0]
        mask = self.token_mask
        if mask is None:
            mask = self._attention_mask
            if mask is None:
                return None
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    "watch: attention_mask must be a tensor of shape [B, S] to tell which tokens "
                    f"are real, got {got}; give watch a token_mask"
                )
            if num_tokens % mask.shape[0] == 0:  # with a cache it is of the past tokens as well
                mask = mask[:, max(mask.shape[1] - num_tokens // mask.shape[0], 0) :]
            mask = mask > 0
        if mask.numel() != num_tokens:
            raise ValueError(
                f"watch: token_mask must have a value for each of the {num_tokens} tokens that the "
                f"routers see, got shape {list(mask.shape)}"
            )
        return mask.reshape(-1).to(logits.device, non_blocking=True)

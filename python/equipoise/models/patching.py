# SPDX-License-Identifier: Apache-2.0
"""The routing of Hugging Face's models by the ops of equipoise.

transformers 5: the routers choose by `topk_gating`, the experts get their tokens by `moe_permute`
and give them back by `moe_unpermute`, around the same grouped GEMMs. transformers 4: the same
around a loop over the experts that waits for the device once, for the counts, instead of for each
expert.

Only methods of the instances are replaced: parameters, hooks and `state_dict` stay what they are.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..nn.moe import _grouped_linear

_FAMILIES = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe")
_NO_ATTRIBUTE = "no attribute of the instance"


def patch(model: nn.Module) -> nn.Module:
    """Routes by equipoise's ops from now on, with equal outputs and gradients.

    For Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and DeepSeek-V3 of transformers 4 and 5. Equal means to
    rounding, wherever no two experts tie for the last place. With half types the outputs of a
    token's experts are added up in float32. DeepSeek-V3 of transformers 4 takes dropped groups
    for scores of 0, and so prefers their experts to those of a negative biased score; here, as in
    transformers 5, they are never chosen.

    What is patched already stays as it is. A module whose experts are split over devices, or run by
    another implementation than transformers' own ("eager", "grouped_mm", "batched_mm"), keeps them,
    and only its router is patched.

    Args:
        model: changed in place.

    Returns:
        `model`. `unpatch` takes it back, `measure_patch` tells what it is worth.

    Raises:
        ValueError: nothing to patch in `model`; methods that accelerate has wrapped.
    """
    changes = []
    for name, module in model.named_modules():
        replacement = _replacement(module)
        if replacement is None or _is_patched(module):
            continue
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"patch: '{name}' must not have hooks of accelerate, which wraps its forward: "
                "remove them with accelerate.hooks.remove_hook_from_submodules, patch, and add "
                "them again"
            )
        changes.append((module, *replacement))
    if not changes and not any(_is_patched(module) for module in model.modules()):
        raise ValueError(
            "patch: model must have modules of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or "
            f"DeepSeek-V3 of Hugging Face transformers, got a {type(model).__name__} without any"
        )
    for module, attribute, function in changes:
        before = module.__dict__.get(attribute, _NO_ATTRIBUTE)
        module._equipoise_patch = attribute, before
        # Not a closure: copies of the model get their own, and it can be pickled.
        setattr(module, attribute, functools.partial(function, module))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Takes `patch` back.

    Args:
        model: changed in place.

    Returns:
        `model`.

    Raises:
        ValueError: nothing in `model` is patched.
    """
    patched = [module for module in model.modules() if _is_patched(module)]
    if not patched:
        raise ValueError(
            f"unpatch: model must have been patched, got a {type(model).__name__} that is not"
        )
    for module in patched:
        attribute, before = module.__dict__.pop("_equipoise_patch")
        if before == _NO_ATTRIBUTE:
            delattr(module, attribute)
        else:
            setattr(module, attribute, before)
    return model


@dataclass(frozen=True)
class PatchTiming:
    """What `measure_patch` gives: medians in milliseconds."""

    original_ms: float
    patched_ms: float
    repeats: int
    backward: bool

    @property
    def speedup(self) -> float:
        """How many times as fast the patched model is."""
        return self.original_ms / self.patched_ms

    def __str__(self) -> str:
        what = "forward and backward passes" if self.backward else "forward passes"
        return (
            f"original {self.original_ms:.3f} ms, patched {self.patched_ms:.3f} ms: "
            f"{self.speedup:.2f} times as fast (medians of {self.repeats} {what})"
        )


def measure_patch(
    model: nn.Module, batch: Mapping[str, Any], repeats: int = 10, backward: bool = False
) -> PatchTiming:
    """The time of the model with `patch` and without, by turns, here and on this batch.

    The model is left as it was, patched or not, its gradients too.

    Args:
        model: see `patch`.
        batch: keyword arguments of a forward pass.
        repeats: at least 1; one more of each comes first and is not timed.
        backward: from the `loss` of the output, which needs `labels` in the batch. Without it
            there are no gradients.

    Returns:
        PatchTiming.

    Raises:
        ValueError: see `patch`; `repeats` below 1; no loss where `backward` needs one.
    """
    if repeats < 1:
        raise ValueError(f"measure_patch: repeats must be at least 1, got {repeats}")
    was_patched = any(_is_patched(module) for module in model.modules())
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    times: tuple[list[float], list[float]] = ([], [])
    patch(model)
    try:
        for _ in range(repeats + 1):
            unpatch(model)
            times[0].append(_time(model, batch, backward))
            patch(model)
            times[1].append(_time(model, batch, backward))
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        if not was_patched:
            unpatch(patch(model))  # wherever it was interrupted
        else:
            patch(model)
    original, patched = (1e3 * statistics.median(series[1:]) for series in times)
    return PatchTiming(original, patched, repeats, backward)


def _time(model: nn.Module, batch: Mapping[str, Any], backward: bool) -> float:
    devices = {p.device for p in model.parameters() if p.is_cuda}
    model.zero_grad()
    for device in devices:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        output = model(**batch)
        if backward:
            loss = getattr(output, "loss", None)
            if loss is None:
                raise ValueError("measure_patch: backward needs labels in batch, got no loss")
            loss.backward()
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _is_patched(module: nn.Module) -> bool:
    return "_equipoise_patch" in module.__dict__


def _replacement(module: nn.Module) -> tuple[str, Callable] | None:
    """Which method of a module is replaced by what."""
    name = type(module).__name__
    if name in [f"{family}TopKRouter" for family in _FAMILIES]:
        return "forward", _softmax_router
    if name == "DeepseekV3TopkRouter":
        return "forward", _deepseek_router
    if name in [f"{family}Experts" for family in (*_FAMILIES, "DeepseekV3")]:
        implementation = getattr(module.config, "_experts_implementation", None)
        own = implementation in (None, "eager", "grouped_mm", "batched_mm")
        return ("forward", _experts) if own and not module._is_expert_parallel else None
    # transformers 4
    if name in [f"{family}SparseMoeBlock" for family in _FAMILIES]:
        return ("forward", _block) if isinstance(module.gate, nn.Linear) else None
    if name == "DeepseekV3MoE":
        return ("moe", _expert_loop) if hasattr(module, "moe") else None
    return None


def _softmax_router(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    normalised = getattr(self, "norm_topk_prob", True)  # Mixtral always does
    routing = F.topk_gating(logits, self.top_k, norm_topk_prob=normalised, stats=False)
    weights = routing.topk_weights
    if hasattr(self, "norm_topk_prob"):  # all but Mixtral, which leaves them in float32
        weights = weights.to(logits.dtype)
    return logits, weights, routing.topk_indices


def _deepseek_router(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, ...]:
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = nn.functional.linear(hidden_states.float(), self.weight.float())
    version_4 = hasattr(self, "get_topk_indices")
    num_groups = self.n_group if version_4 else self.num_group
    routing = F.topk_gating(
        logits,
        self.top_k,
        "sigmoid",
        norm_topk_prob=self.norm_topk_prob,
        scaling_factor=self.routed_scaling_factor,
        expert_bias=self.e_score_correction_bias.float(),
        num_groups=num_groups,
        group_topk=self.topk_group if num_groups > 1 else None,
        stats=False,
    )
    if version_4:
        return routing.topk_indices, routing.topk_weights
    return logits, routing.topk_weights, routing.topk_indices


def _experts(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    tokens = hidden_states.to(self.gate_up_proj.dtype)
    permuted = F.moe_permute(tokens, top_k_index, self.num_experts)
    both = _grouped_linear(permuted.permuted, self.gate_up_proj, permuted.expert_offsets)
    gate, up = both.chunk(2, dim=-1)
    out = _grouped_linear(self.act_fn(gate) * up, self.down_proj, permuted.expert_offsets)
    return _gathered(out, permuted, top_k_weights).to(hidden_states.dtype)


def _block(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    shape = hidden_states.shape
    jitter = getattr(self, "jitter_noise", 0)
    if self.training and jitter > 0:  # in place, as there: what reads it later sees it too
        hidden_states *= torch.empty_like(hidden_states).uniform_(1 - jitter, 1 + jitter)
    tokens = hidden_states.view(-1, shape[-1])
    logits = self.gate(tokens)
    normalised = getattr(self, "norm_topk_prob", True)
    routing = F.topk_gating(logits, self.top_k, norm_topk_prob=normalised, stats=False)
    out = _expert_loop(self, tokens, routing.topk_indices, routing.topk_weights.to(tokens.dtype))
    if hasattr(self, "shared_expert"):
        out = out + self.shared_expert_gate(tokens).sigmoid() * self.shared_expert(tokens)
    return out.reshape(shape), logits


def _expert_loop(
    self: nn.Module, hidden_states: Tensor, topk_indices: Tensor, topk_weights: Tensor
) -> Tensor:
    permuted = F.moe_permute(hidden_states, topk_indices, len(self.experts))
    counts = permuted.tokens_per_expert.tolist()
    *of_experts, nobodys = permuted.permuted.split(
        [*counts, permuted.permuted.shape[0] - sum(counts)]
    )
    # An expert without tokens gets no gradient at all, which is not the same as a gradient of 0:
    # the optimizer passes over it. OLMoE alone runs them all.
    run_all = type(self).__name__.startswith("Olmoe")
    parts = [
        expert(rows)
        for expert, rows in zip(self.experts, of_experts, strict=True)
        if run_all or len(rows)
    ]
    out = torch.cat([*parts, nobodys.to(parts[0].dtype)]) if parts else nobodys
    return _gathered(out, permuted, topk_weights).to(hidden_states.dtype)


def _gathered(out: Tensor, permuted: F.PermuteResult, weights: Tensor) -> Tensor:
    weights = weights.to(torch.float64 if out.dtype == torch.float64 else torch.float32)
    return F.moe_unpermute(out, permuted.row_id_map, weights)

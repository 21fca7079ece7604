# SPDX-License-Identifier: Apache-2.0
"""What the rules look at, gathered from what the caller has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..analyzer import RoutingAnalyzer, Row, _split, check_counts
from ..functional.losses import are_probabilities
from ..functional.routing import topk_gating
from ..metrics import router_metrics, switch_value


@dataclass
class Facts:
    """What the rules look at; None where it is not known. Tensors are float64 on the CPU."""

    counts: Tensor | None = None
    """[L, E]."""
    steps: Tensor | None = None
    """[steps, L, E] counts of single steps."""
    steps_seen: int | None = None
    """Of the analyzer."""
    prob_sum: Tensor | None = None
    """[L, E]."""
    router: dict[str, Tensor] = field(default_factory=dict)
    """router_metrics, [L] each."""
    aux_loss: Tensor | None = None
    """[L], or [1] for the mean of the layers."""
    reported_loss: Tensor | None = None
    """The same, but only what the caller said."""
    slots_per_token: float | None = None
    """K."""
    logits: list[Tensor] | None = None
    """[T, E] of the real tokens, per layer."""
    probabilities: list[int] = field(default_factory=list)
    """Layers whose logits look like probabilities."""
    nan_rows: list[int] | None = None
    """Tokens with NaN or +inf logits, per layer."""
    unmasked: Tensor | None = None
    """[L, E] counts with the padding."""
    unmasked_losses: Tensor | None = None
    """[2, L] Switch loss without and with the padding."""
    previous: Tensor | None = None
    dropped: Tensor | None = None
    """[L, E]."""
    slots: Tensor | None = None
    """[L] that the dropped ones are part of."""
    coeff: float | None = None
    main_norms: list[float] | None = None
    aux_norms: list[float] | None = None
    bias: list[Tensor] | None = None
    """[E] per layer, of its own type."""
    bias_history: Tensor | None = None
    """[steps, L, E]."""
    bias_update_rate: float | None = None
    micro_losses: Tensor | None = None
    global_loss: float | None = None
    expert_weights: list[Tensor] | None = None

    @property
    def num_layers(self) -> int:
        return 1 if self.counts is None else len(self.counts)

    def layer(self, index: int, of: Sequence | None = None) -> int | None:
        """How a finding names the layer: a single one has no number."""
        return index if (self.num_layers if of is None else len(of)) > 1 else None


# The arguments that are counts [E] or [L, E].
_COUNTS = (
    "tokens_per_expert",
    "previous_tokens_per_expert",
    "unmasked_tokens_per_expert",
    "dropped_per_expert",
)


@torch.no_grad()
def gather(last: int, **given: Any) -> Facts:
    """The facts in the arguments of `diagnose` that were given."""
    counts = {name: _table(name, given[name]) for name in _COUNTS if name in given}
    facts = Facts(
        counts=counts.get("tokens_per_expert"),
        previous=counts.get("previous_tokens_per_expert"),
        unmasked=counts.get("unmasked_tokens_per_expert"),
        dropped=counts.get("dropped_per_expert"),
        slots_per_token=given.get("top_k"),
        coeff=given.get("aux_loss_coeff"),
        bias_update_rate=given.get("bias_update_rate"),
    )
    if "analyzer" in given:
        for other in ("tokens_per_expert", "logits"):
            _require(other not in given, f"takes analyzer or {other}, not both")
        _from_analyzer(facts, given["analyzer"], last)
    if "logits" in given:
        _from_logits(facts, _list(given["logits"]), given.get("top_k"), given.get("token_mask"))
    for name, table in counts.items():
        _require(
            facts.counts is not None and table.shape == facts.counts.shape,
            f"{name} must have the shape of tokens_per_expert, "
            f"{None if facts.counts is None else list(facts.counts.shape)}, "
            f"got {list(table.shape)}",
        )
    if facts.slots is None and facts.counts is not None:
        facts.slots = facts.counts.sum(-1)
    if "aux_loss" in given:
        loss = torch.as_tensor(given["aux_loss"], dtype=torch.float64, device="cpu").reshape(-1)
        most = math.inf if facts.counts is None else facts.counts.shape[1]
        _require(
            len(loss) in (1, facts.num_layers) and bool(((loss > 0) & (loss <= most)).all()),
            f"aux_loss must be one number, or one for each of {facts.num_layers} layers, above 0 "
            f"and at most E = {most}, got {loss.tolist()}",
        )
        facts.aux_loss = facts.reported_loss = loss
    facts.main_norms, facts.aux_norms = (
        [torch.linalg.vector_norm(torch.as_tensor(g).double()).item() for g in _list(given[name])]
        if name in given
        else None
        for name in ("main_gradient", "aux_gradient")
    )
    _require(
        (facts.main_norms is None) == (facts.aux_norms is None)
        and len(facts.main_norms or []) == len(facts.aux_norms or []),
        "main_gradient and aux_gradient are given together, for the same layers",
    )
    if "bias_history" in given:
        history = given["bias_history"].detach()
        history = history.unsqueeze(1) if history.dim() == 2 else history
        _require(
            history.dim() == 3 and history.numel() > 0,
            f"bias_history must have shape [steps, E] or [steps, L, E], got {list(history.shape)}",
        )
        facts.bias_history = history.double().cpu()
        facts.bias = list(history[-1])
    if "expert_bias" in given:
        facts.bias = [
            b for bias in _list(given["expert_bias"]) for b in torch.atleast_2d(bias.detach())
        ]
    _require(
        ("micro_losses" in given) == ("global_loss" in given),
        "micro_losses and global_loss are given together",
    )
    if "micro_losses" in given:
        losses = torch.as_tensor(given["micro_losses"], dtype=torch.float64).reshape(-1)
        _require(len(losses) > 0, "micro_losses must have at least one value, got none")
        facts.micro_losses, facts.global_loss = losses, float(given["global_loss"])
    if "expert_weights" in given:
        facts.expert_weights = _list(given["expert_weights"])
    elif "model" in given:
        from ..nn import MoELayer

        layers = [m.w_in for m in given["model"].modules() if isinstance(m, MoELayer)]
        facts.expert_weights = layers or None
    return facts


def _from_analyzer(facts: Facts, analyzer: RoutingAnalyzer, last: int) -> None:
    facts.steps_seen = analyzer.num_updates
    if facts.steps_seen == 0:
        return
    facts.steps = analyzer.tokens_per_expert[-last:].double().cpu()
    row: Row = _split(analyzer._sum_of_last("diagnose", last).cpu(), analyzer.num_experts)
    facts.counts = row.tokens_per_expert
    _from_sums(facts, row.sums)
    if facts.prob_sum is not None and facts.slots_per_token is None:
        facts.slots_per_token = (facts.counts.sum() / facts.prob_sum.sum()).item()
    if bool((row.dropped_of > 0).all()):
        facts.dropped, facts.slots = row.dropped_per_expert, row.dropped_of.squeeze(-1)


def _from_logits(
    facts: Facts, logits: list[Tensor], top_k: int | None, token_mask: Tensor | None
) -> None:
    num_experts = logits[0].shape[-1] if logits and logits[0].dim() else 0
    _require(
        num_experts > 0 and all(x.dim() and x.shape[-1] == num_experts for x in logits),
        f"logits must have shape [..., E] in every layer, got {[list(x.shape) for x in logits]}",
    )
    _require(
        top_k is not None or facts.counts is not None,
        "logits needs top_k, or tokens_per_expert, beside it",
    )
    _require(
        top_k is None or 1 <= top_k <= num_experts,
        f"top_k must be from 1 to E = {num_experts}, got {top_k}",
    )
    _require(
        facts.counts is None or facts.counts.shape == (len(logits), num_experts),
        f"tokens_per_expert must have shape [L, E] = [{len(logits)}, {num_experts}] of logits, "
        f"got {None if facts.counts is None else list(facts.counts.shape)}",
    )
    rows = [x.detach().reshape(-1, num_experts) for x in logits]
    mask = None if token_mask is None else token_mask.detach().reshape(-1)
    for x in rows:
        _require(
            mask is None or len(mask) == len(x),
            f"token_mask must have one value for each of {len(x)} tokens, "
            f"got {0 if mask is None else len(mask)}",
        )
    facts.logits = [x if mask is None else x[mask > 0] for x in rows]
    facts.nan_rows = [int((x.isnan() | (x == math.inf)).any(-1).sum()) for x in facts.logits]
    for layer, x in enumerate(facts.logits):
        if num_experts > 1 and len(x) and bool(are_probabilities(x)):
            facts.probabilities.append(layer)
            rows[layer] = rows[layer].clamp(min=torch.finfo(x.dtype).tiny).log()
    given = facts.counts
    counts, sums = _route(rows, top_k, mask)
    facts.counts = counts if given is None else given
    if mask is not None and top_k is not None:
        padded_counts, padded_sums = _route(rows, top_k, None)
        facts.unmasked_losses = torch.stack(
            [
                switch_value(counts, sums[:, :num_experts]),
                switch_value(padded_counts, padded_sums[:, :num_experts]),
            ]
        )
        # Counts that the caller has made himself tell whether the padding was left out of them.
        if given is not None and given.equal(padded_counts) and not given.equal(counts):
            facts.counts, facts.unmasked = counts, padded_counts
    _from_sums(facts, sums)


def _route(
    logits: list[Tensor], top_k: int | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Counts [L, E] and sums [L, 2 E + 5]; without K the counts mean nothing."""
    routings = [topk_gating(x, top_k or 1, token_mask=token_mask) for x in logits]
    return (
        torch.stack([r.tokens_per_expert for r in routings]).double().cpu(),
        torch.stack([r.sums for r in routings]).double().cpu(),
    )


def _from_sums(facts: Facts, sums: Tensor) -> None:
    """[L, 2 E + 5] on the CPU; without statistics all 0."""
    num_experts = facts.counts.shape[-1]
    if not bool((sums[:, 2 * num_experts] > 0).all()):
        return
    facts.prob_sum = sums[:, :num_experts]
    facts.router = router_metrics(sums)
    facts.aux_loss = switch_value(facts.counts, facts.prob_sum)
    if facts.nan_rows is None:
        facts.nan_rows = facts.router["num_nan_rows"].long().tolist()


def _table(name: str, counts: Tensor) -> Tensor:
    """[L, E] float64 on the CPU."""
    _require(
        isinstance(counts, Tensor) and counts.dim() in (1, 2) and counts.numel() > 0,
        f"{name} must be a tensor of shape [E] or [L, E], "
        f"got {list(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__}",
    )
    counts = counts.detach().cpu()
    check_counts(f"diagnose: {name}", counts)
    return torch.atleast_2d(counts.double())


def _list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"diagnose: {message}")

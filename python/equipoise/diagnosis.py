# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a routing, by how much, and what to do about it.

A rule looks at facts, and is silent without them: `Diagnosis.checked` names the rules that had
what they need. All thresholds stand beside their rules. With counts C_e of mean m and CV^2 their
variance over m^2, the Switch loss `E sum(f P)` is `1 + eps CV^2` for probabilities that follow the
counts with strength eps, `P = u + eps (f - u)`: that is what the blind spot is measured by.

Few tokens are uneven by chance. A fair router's counts are close to Poisson's, so that CV^2 is
about 1 / m; what such a router would show as well is no finding.
"""

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .analyzer import RoutingAnalyzer, Row, _split, check_counts
from .functional.losses import look_like_probabilities
from .functional.routing import topk_gating
from .metrics import expert_similarity, load_metrics, router_metrics, switch_value

__all__ = ["Diagnosis", "Finding", "diagnose"]

_SEVERITIES = ("critical", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        rule: its name in kebab-case, for example "dead-experts".
        severity: "critical", "warning" or "note".
        message: one sentence with the numbers.
        evidence: the numbers, by name.
        remedy: what to do.
        confidence: how certain it is, in (0, 1].
        layer: the number of the layer, or None for the model as a whole.

    Raises:
        ValueError: another severity, or a confidence out of its range.

    Example:
        >>> Finding("dead-experts", "critical", "expert 3 has no token", {}, "a bias", 1.0).rule
        'dead-experts'
    """

    rule: str
    severity: str
    message: str
    evidence: dict[str, float | int | str | list] = field(default_factory=dict)
    remedy: str = ""
    confidence: float = 1.0
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.severity not in _SEVERITIES:
            raise ValueError(
                f"Finding: severity must be one of {', '.join(_SEVERITIES)}, got {self.severity!r}"
            )
        if not 0 < self.confidence <= 1:
            raise ValueError(f"Finding: confidence must be in (0, 1], got {self.confidence}")


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` has found.

    Args:
        findings: the gravest first; of the same severity causes before what they bring about.
        checked: the rules that had the data they need, whether they found something or not.

    Example:
        >>> print(diagnose(torch.tensor([40, 37, 44, 39])))
        no finding
        checked: never-updated, dead-experts, starved-experts, hot-experts
    """

    findings: list[Finding]
    checked: list[str]

    def __str__(self) -> str:
        lines = []
        for number, (finding, layers) in enumerate(self._grouped(), start=1):
            where = f", {layers}" if layers else ""
            lines += [
                f"{number}. {finding.severity}: {finding.rule}{where} "
                f"(confidence {finding.confidence:.2f})",
                f"   {finding.message}",
                f"   remedy: {finding.remedy}",
                "   evidence: "
                + ", ".join(f"{name} = {_show(value)}" for name, value in finding.evidence.items()),
            ]
        lines.append("checked: " + (", ".join(self.checked) or "nothing"))
        return "\n".join([*([] if self.findings else ["no finding"]), *lines])

    def to_json(self) -> str:
        """As a JSON object with `findings` and `checked`; `from_json` reads it."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Diagnosis":
        """What `to_json` has written.

        Raises:
            ValueError: it is something else.
        """
        try:
            record = json.loads(text)
            findings = [Finding(**finding) for finding in record["findings"]]
            return cls(findings, [str(rule) for rule in record["checked"]])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Diagnosis.from_json: text must be what to_json wrote, got {text[:80]!r} ({error})"
            ) from error

    def to_html(self) -> str:
        """As one `<section>` with its own style, for any page; it needs nothing else."""
        items = "".join(
            f'<li class="{finding.severity}"><h3>{html.escape(finding.rule)} '
            f"<small>{finding.severity}{', ' if layers else ''}{html.escape(layers)}, "
            f"confidence {finding.confidence:.2f}</small></h3>"
            f"<p>{html.escape(finding.message)}</p>"
            f"<p><b>Remedy:</b> {html.escape(finding.remedy)}</p>"
            "<table>"
            + "".join(
                f"<tr><th>{html.escape(name)}</th><td>{html.escape(_show(value))}</td></tr>"
                for name, value in finding.evidence.items()
            )
            + "</table></li>\n"
            for finding, layers in self._grouped()
        )
        body = f"<ol>\n{items}</ol>" if items else "<p>No finding.</p>"
        checked = html.escape(", ".join(self.checked) or "nothing")
        return (
            f'<section class="equipoise-diagnosis">\n{_STYLE}\n{body}\n'
            f"<p><small>Checked: {checked}</small></p>\n</section>\n"
        )

    def _grouped(self) -> list[tuple[Finding, str]]:
        """One finding of each rule and severity, the surest, and the layers where it holds."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.severity, finding.rule), []).append(finding)
        return [(group[0], _name_layers(group)) for group in groups.values()]


def diagnose(
    tokens_per_expert: Tensor | None = None,
    aux_loss: float | Tensor | Sequence[float] | None = None,
    logits: Tensor | Sequence[Tensor] | None = None,
    analyzer: RoutingAnalyzer | None = None,
    model: nn.Module | None = None,
    *,
    last: int = 100,
    top_k: int | None = None,
    token_mask: Tensor | None = None,
    previous_tokens_per_expert: Tensor | None = None,
    unmasked_tokens_per_expert: Tensor | None = None,
    dropped_per_expert: Tensor | None = None,
    aux_loss_coeff: float | None = None,
    main_gradient: float | Tensor | Sequence[float | Tensor] | None = None,
    aux_gradient: float | Tensor | Sequence[float | Tensor] | None = None,
    expert_bias: Tensor | Sequence[Tensor] | None = None,
    bias_history: Tensor | None = None,
    bias_update_rate: float | None = None,
    micro_losses: Tensor | Sequence[float] | None = None,
    global_loss: float | Tensor | None = None,
    expert_weights: Tensor | Sequence[Tensor] | None = None,
) -> Diagnosis:
    """Looks for what goes wrong with routers, in whatever is at hand.

    Give what you have: counts, logits, an analyzer, a model, or several of them. Every further
    argument lets more rules speak. It waits for the device.

    Args:
        tokens_per_expert: [E] or [L, E] integer counts, padding excluded.
        aux_loss: the Switch loss as it was reported, unscaled: 1 at balance. One number, then the
            mean over the layers, or one per layer.
        logits: [..., E] raw output of a router; of several layers a sequence of them.
        analyzer: has the counts and the statistics of its last steps.
        model: is looked through with `equipoise.models.audit`, and its `MoELayer`s for identical
            experts.
        last: how many of the analyzer's last steps are taken together.
        top_k: K; with `logits`, unless `tokens_per_expert` is there too. K = E is dense routing.
        token_mask: of the logits' tokens, True = real, of the shape [...] of `logits` or of as many
            elements.
        previous_tokens_per_expert: counts of an earlier step, which those of a later step do not
            equal.
        unmasked_tokens_per_expert: the same counts with the padding.
        dropped_per_expert: [E] or [L, E] slots that the experts had no room for.
        aux_loss_coeff: coefficient of the balance loss in force; 0 = off.
        main_gradient: gradient of the main loss at the router's weight, or its norm; of several
            layers a sequence.
        aux_gradient: the same of the balance loss, coefficient included.
        expert_bias: [E] selection bias, or [L, E], or one per layer.
        bias_history: [steps, E] or [steps, L, E] biases after successive updates.
        bias_update_rate: of the bias.
        micro_losses: unscaled Switch losses of micro-batches or ranks, one each.
        global_loss: the one of all of them together.
        expert_weights: [E, ...] parameters (or outputs for one input) of the experts; of several
            layers a sequence.

    Returns:
        Diagnosis.

    Raises:
        ValueError: nothing was given; arguments that contradict each other; shapes that do not fit.

    Example:
        >>> counts = torch.tensor([1, 2, 261, 266, 6, 253, 229, 6])
        >>> diagnosis = diagnose(counts, aux_loss=1.0122)
        >>> [finding.rule for finding in diagnosis.findings]
        ['blind-spot', 'starved-experts', 'hot-experts']
        >>> diagnosis.findings[0].evidence["loss_if_probabilities_followed"]
        1.94858
    """
    given = {name: value for name, value in locals().items() if value is not None}
    if set(given) <= {"last", "top_k", "token_mask", "aux_loss_coeff", "bias_update_rate"}:
        raise ValueError(
            "diagnose: needs something to look at: tokens_per_expert, logits, analyzer, model, or "
            f"one of the other arguments, got {', '.join(sorted(set(given) - {'last'})) or 'none'}"
        )
    facts = _gather(**given)
    findings, checked = [], []
    for rule, look in _RULES.items():
        found = look(facts)
        if found is not None:
            checked.append(rule)
            findings += found
    if model is not None:
        from .models import audit  # looks at this module, in its turn

        checked.append("audit")
        findings += audit(model).findings
    order = {rule: place for place, rule in enumerate(_RULES)}
    findings.sort(
        key=lambda f: (
            _SEVERITIES.index(f.severity),
            order.get(f.rule, -1),  # what an audit finds is a cause
            -f.confidence,
            -1 if f.layer is None else f.layer,
        )
    )
    return Diagnosis(findings, checked)


@dataclass
class _Facts:
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
    """[T, E] per layer."""
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
def _gather(last: int, **given: Any) -> _Facts:
    counts = {name: _table(name, given[name]) for name in _COUNTS if name in given}
    facts = _Facts(
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
        from .nn import MoELayer

        layers = [m.w_in for m in given["model"].modules() if isinstance(m, MoELayer)]
        facts.expert_weights = layers or None
    return facts


def _from_analyzer(facts: _Facts, analyzer: RoutingAnalyzer, last: int) -> None:
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
    facts: _Facts, logits: list[Tensor], top_k: int | None, token_mask: Tensor | None
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
    facts.logits = [x.detach().reshape(-1, num_experts) for x in logits]
    mask = None if token_mask is None else token_mask.detach().reshape(-1)
    for layer, x in enumerate(facts.logits):
        _require(
            mask is None or len(mask) == len(x),
            f"token_mask must have one value for each of {len(x)} tokens, "
            f"got {0 if mask is None else len(mask)}",
        )
        real = x if mask is None else x[mask > 0]
        if num_experts > 1 and look_like_probabilities(real):
            facts.probabilities.append(layer)
    counts, sums = _route(facts, top_k, mask)
    given = facts.counts
    facts.counts = counts if given is None else given
    if mask is not None and top_k is not None:
        padded_counts, padded_sums = _route(facts, top_k, None)
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
    real = [x if mask is None else x[mask > 0] for x in facts.logits]
    facts.nan_rows = [int((x.isnan() | (x == math.inf)).any(-1).sum()) for x in real]


def _route(facts: _Facts, top_k: int | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Counts [L, E] and sums [L, 2 E + 5] of the logits."""
    routings = [
        topk_gating(
            x.clamp(min=torch.finfo(x.dtype).tiny).log() if layer in facts.probabilities else x,
            top_k or 1,
            token_mask=mask,
        )
        for layer, x in enumerate(facts.logits)
    ]
    return tuple(
        torch.stack(parts).double().cpu()
        for parts in zip(*((r.tokens_per_expert, r.sums) for r in routings), strict=True)
    )


def _from_sums(facts: _Facts, sums: Tensor) -> None:
    """[L, 2 E + 5] on the CPU; without statistics all 0."""
    num_experts = facts.counts.shape[-1]
    if not bool((sums[:, 2 * num_experts] > 0).all()):
        return
    facts.prob_sum = sums[:, :num_experts]
    facts.router = router_metrics(sums)
    facts.aux_loss = switch_value(facts.counts, facts.prob_sum)
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


# ------------------------------------------------------------------------------------------ rules


def _never_updated(facts: _Facts) -> list[Finding] | None:
    if facts.steps_seen == 0:
        return [
            Finding(
                "never-updated",
                "critical",
                "the analyzer has not seen a single step: there are no data to judge.",
                {"steps": 0},
                "call analyze_routing_step (or update) with the routing of each step, and see "
                "whether a hook is on the modules that really run",
                1.0,
            )
        ]
    if facts.counts is None:
        return None
    found = []
    for layer, counts in enumerate(facts.counts):
        total = int(counts.sum())
        where = facts.layer(layer)
        if total == 0:
            found.append(
                Finding(
                    "never-updated",
                    "critical",
                    "no token was counted: every figure of the load would be 0 / 0.",
                    {"tokens": 0},
                    "see whether the layer runs, whether its counts are recorded, and whether the "
                    "mask leaves any token",
                    1.0,
                    where,
                )
            )
            continue
        same = 0
        if facts.previous is not None:
            same = 2 * int(counts.equal(facts.previous[layer]))
        elif facts.steps is not None and len(facts.steps) >= 3:
            recent = facts.steps[-3:, layer]
            same = 3 * int(bool((recent == recent[0]).all()))
        # Equal by chance: hardly, with so many tokens; equal by design: where all are equal.
        if same and total >= 32 * same and bool((counts != counts[0]).any()):
            found.append(
                Finding(
                    "never-updated",
                    "warning",
                    f"the last {same} counts are the same to the token.",
                    {"equal_counts": same, "tokens": total},
                    "see whether the counts are those of the current step: a stale tensor, a hook "
                    "that runs once, or one batch fed again and again to a frozen router",
                    0.8,
                    where,
                )
            )
    return found


def _nan_logits(facts: _Facts) -> list[Finding] | None:
    if facts.nan_rows is None:
        return None
    bad = [layer for layer, rows in enumerate(facts.nan_rows) if rows > 0]
    if not bad:
        return []
    rows = facts.nan_rows[bad[0]]
    first = f"layer {bad[0]} is the first" if len(facts.nan_rows) > 1 else "this layer"
    return [
        Finding(
            "nan-logits",
            "critical",
            f"NaN or infinite logits: {first}, with {rows} tokens.",
            {"tokens": rows, "layers": bad},
            "look at what goes into the first of these layers; then a float32 router, a z-loss on "
            "the logits, a smaller learning rate",
            1.0,
            facts.layer(bad[0]),
        )
    ]


def _probabilities_as_logits(facts: _Facts) -> list[Finding] | None:
    if facts.logits is None:
        return None
    found = []
    for layer in facts.probabilities:
        probs = facts.logits[layer].double()
        flat = switch_value(facts.counts[layer], probs.softmax(-1).sum(0).cpu()).item()
        true = facts.aux_loss[0 if len(facts.aux_loss) == 1 else layer].item()
        if facts.prob_sum is not None:
            true = switch_value(facts.counts[layer], facts.prob_sum[layer]).item()
        found.append(
            Finding(
                "probabilities-as-logits",
                "critical",
                f"the logits are probabilities (rows in [0, 1] that add up to 1): a second softmax "
                f"makes a loss of {flat:.3f} where it is {true:.3f}, with hardly a gradient.",
                {
                    "loss_of_double_softmax": _round(flat),
                    "loss": _round(true),
                    "farthest_row_sum": _round((probs.sum(-1) - 1).abs().max().item()),
                },
                "hand the raw output of the router to the loss, or say from_probabilities=True to "
                "balance_loss_from_logits",
                0.98,
                facts.layer(layer),
            )
        )
    return found


def _padding_counted(facts: _Facts) -> list[Finding] | None:
    found = []
    remedy = (
        "give token_mask (True = a real token) to the router or to topk_gating, so that padding is "
        "in no count and no loss"
    )
    if facts.unmasked is not None:
        cvs = (
            load_metrics(counts.long())["cv"].tolist() for counts in (facts.counts, facts.unmasked)
        )
        for layer, (masked, unmasked) in enumerate(zip(*cvs, strict=True)):
            if max(masked, unmasked) > max(2 * min(masked, unmasked), 0.25):
                found.append(
                    Finding(
                        "padding-counted",
                        "warning",
                        f"with the padding the counts have a CV of {unmasked:.3f}, without it "
                        f"{masked:.3f}.",
                        {"cv": _round(masked), "cv_with_padding": _round(unmasked)},
                        remedy,
                        0.9,
                        facts.layer(layer),
                    )
                )
    elif facts.unmasked_losses is not None and facts.reported_loss is not None:
        masked, unmasked = facts.unmasked_losses.mean(-1).tolist()
        reported = facts.reported_loss.mean().item()
        apart = abs(unmasked - masked)
        if apart > 0.02 and abs(reported - unmasked) < 0.1 * apart:
            found.append(
                Finding(
                    "padding-counted",
                    "warning",
                    f"the loss of {reported:.3f} is the one with padding ({unmasked:.3f}), not "
                    f"the one of real tokens ({masked:.3f}).",
                    {
                        "aux_loss": _round(reported),
                        "loss": _round(masked),
                        "loss_with_padding": _round(unmasked),
                    },
                    remedy,
                    0.9,
                )
            )
    else:
        return None
    return found


def _dense_routing(facts: _Facts) -> list[Finding] | None:
    with_loss = (facts.coeff or 0) > 0 or facts.reported_loss is not None
    if facts.slots_per_token is None or facts.counts is None:
        return None
    num_experts = facts.counts.shape[1]
    if not with_loss or num_experts < 2 or facts.slots_per_token < num_experts - 1e-6:
        return []
    return [
        Finding(
            "dense-routing",
            "warning",
            f"every token goes to all {num_experts} experts, and a balance loss is on: the counts "
            "are even whatever the router does, so the loss has nothing to balance.",
            {
                "top_k": num_experts,
                "num_experts": num_experts,
                **({} if facts.coeff is None else {"aux_loss_coeff": facts.coeff}),
            },
            "turn the balance loss off; against weights that collapse take token_entropy",
            0.95,
        )
    ]


def _bias_not_float32(facts: _Facts) -> list[Finding] | None:
    if facts.bias is None:
        return None
    found = []
    for layer, bias in enumerate(facts.bias):
        if bias.dtype in (torch.float32, torch.float64):
            continue
        rate = facts.bias_update_rate
        # A float has steps of eps times the power of two below it; half of one is rounded away.
        largest = max(bias.double().abs().max().item(), torch.finfo(bias.dtype).tiny)
        spacing = torch.finfo(bias.dtype).eps * 2 ** math.floor(math.log2(largest))
        lost = rate is not None and rate < spacing / 2
        name = str(bias.dtype).removeprefix("torch.")
        found.append(
            Finding(
                "bias-not-float32",
                "critical" if lost else "warning",
                f"the selection bias is {name}, whose next number after {largest:.3g} is "
                f"{spacing:.3g} away"
                + (f": an update of {rate:g} changes nothing." if lost else "."),
                {
                    "dtype": name,
                    "largest_bias": _round(largest),
                    "spacing": _round(spacing),
                    **({} if rate is None else {"bias_update_rate": rate}),
                },
                "keep expert_bias float32 whatever the model is cast to, as nn.LossFreeBalancer "
                "does",
                0.99,
                facts.layer(layer, facts.bias),
            )
        )
    return found


def _aux_loss_scaled(facts: _Facts) -> list[Finding] | None:
    if facts.reported_loss is None:
        return None
    return [
        Finding(
            "aux-loss-scaled",
            "note",
            f"a Switch loss of {loss:.4g} is too small to be the unscaled one, which is about 1 at "
            "balance.",
            {"aux_loss": _round(loss)},
            "report the loss before it is multiplied with its coefficient",
            0.8,
            facts.layer(layer, facts.reported_loss),
        )
        for layer, loss in enumerate(facts.reported_loss.tolist())
        if loss < _SCALED
    ]


def _blind_spot(facts: _Facts) -> list[Finding] | None:
    seen = _blindness(facts)
    if seen is None:
        return None
    found = []
    for layer, blind in seen.items():
        eps, loss, followed = blind["follows"], blind["loss"], blind["followed"]
        found.append(
            Finding(
                "blind-spot",
                "critical",
                f"the Switch loss is {loss:.4f}, near the 1 of balance, but the counts are not "
                f"balanced: it would be {followed:.3f} if the probabilities followed the counts. "
                f"They do with only {max(eps, 0):.4f} of that, being almost uniform (the largest "
                f"mean is {blind['largest']:.4f}, 1/E is {blind['uniform']:.4f}), so the loss "
                "cannot see the imbalance.",
                {
                    "aux_loss": _round(loss),
                    "loss_if_probabilities_followed": _round(followed),
                    "follows": _round(eps),
                    "largest_mean_probability": _round(blind["largest"]),
                    "uniform_probability": _round(blind["uniform"]),
                    "cv": _round(blind["cv"]),
                },
                "a loss-free bias (nn.LossFreeBalancer), which acts on the counts themselves; or "
                "noise with the load loss (nn.NoisyTopKRouter, F.load_loss); or make the "
                "probabilities differ: a larger initialisation of the router, a temperature below "
                "1. A larger coefficient does not help: it multiplies a gradient that is next to "
                "nothing.",
                0.97 if eps < 0.05 else 0.85,
                None if layer is None else facts.layer(layer),
            )
        )
    return found


def _layers_cancel(facts: _Facts) -> list[Finding] | None:
    if facts.counts is None or facts.num_layers < 2 or not bool((facts.counts.sum(-1) > 0).all()):
        return None
    cv = load_metrics(facts.counts.long())["cv"]
    joined = facts.counts.sum(0)
    joined_cv = load_metrics(joined.long())["cv"].item()
    mean_cv = cv.mean().item()
    if not any(_skewed(facts)) or mean_cv < 0.5 or joined_cv > 0.5 * mean_cv:
        return []
    apart, together = (switch_value(c, c).mean().item() for c in (facts.counts, joined))
    return [
        Finding(
            "layers-cancel",
            "warning",
            f"the layers are skewed (mean CV {mean_cv:.3f}) towards different experts: over all "
            f"layers together the CV is {joined_cv:.3f}, and a loss over concatenated layers is at "
            f"most {together:.3f} where the mean of the layers is {apart:.3f}.",
            {
                "mean_cv": _round(mean_cv),
                "cv_concatenated": _round(joined_cv),
                "loss_per_layer": _round(apart),
                "loss_concatenated": _round(together),
                "cv_per_layer": [_round(x) for x in cv.tolist()],
            },
            "compute the loss of each layer by itself and add them up (Hugging Face's "
            "load_balancing_loss_func concatenates them)",
            0.9,
        )
    ]


def _router_without_gradient(facts: _Facts) -> list[Finding] | None:
    if facts.main_norms is None:
        return None
    return [
        Finding(
            "router-without-gradient",
            "critical",
            "the main loss has no gradient at the router: it does not learn what is good for the "
            "task.",
            {"main_gradient": main, "aux_gradient": _round(aux)},
            "multiply the experts' outputs with the weights of the router, undetached; with "
            "top_k = 1 switch norm_topk_prob off, which makes that weight the constant 1",
            0.95,
            facts.layer(layer, facts.main_norms),
        )
        for layer, (main, aux) in enumerate(zip(facts.main_norms, facts.aux_norms, strict=True))
        if main == 0
    ]


def _loss_too_weak(facts: _Facts) -> list[Finding] | None:
    return _loss_strength(
        facts,
        "loss-too-weak",
        lambda ratio: ratio < _WEAK,
        # A weak loss is right where the loads are even, and no cure where it is blind.
        lambda layer: not _balanced(facts, layer) and layer not in (_blindness(facts) or {}),
    )


def _loss_too_strong(facts: _Facts) -> list[Finding] | None:
    return _loss_strength(facts, "loss-too-strong", lambda ratio: ratio > _STRONG, lambda _: True)


def _loss_strength(
    facts: _Facts,
    rule: str,
    is_off: Callable[[float], bool],
    matters: Callable[[int], bool],
) -> list[Finding] | None:
    if facts.main_norms is None:
        return None
    found = []
    for layer, (main, aux) in enumerate(zip(facts.main_norms, facts.aux_norms, strict=True)):
        if main == 0 or not is_off(aux / main) or not matters(layer):
            continue
        ratio = aux / main
        evidence = {
            "ratio": _round(ratio),
            "main_gradient": _round(main),
            "aux_gradient": _round(aux),
        }
        remedy = "raise the coefficient" if ratio < _AIM else "lower the coefficient"
        if aux > 0:
            factor = _AIM / ratio
            evidence["factor"] = _round(factor)
            remedy += f" by a factor of {factor:.3g}, for a ratio of {_AIM:.0%}"
            if facts.coeff:
                evidence["aux_loss_coeff"] = facts.coeff
                remedy += f": from {facts.coeff:g} to {facts.coeff * factor:.2g}"
        else:
            remedy = "see whether the balance loss is added to the loss at all (it has no gradient)"
        found.append(
            Finding(
                rule,
                "warning",
                f"at the router the balance loss has {ratio:.2%} of the gradient of the main loss.",
                evidence,
                remedy,
                0.8,
                facts.layer(layer, facts.main_norms),
            )
        )
    return found


def _micro_batch_scope(facts: _Facts) -> list[Finding] | None:
    if facts.micro_losses is None:
        return None
    micro, whole = facts.micro_losses.mean().item(), facts.global_loss
    if micro - whole < 0.1 or micro - 1 < 2 * (whole - 1):
        return []
    return [
        Finding(
            "micro-batch-scope",
            "warning",
            f"each micro-batch by itself has a Switch loss of {micro:.3f} in the mean, all of them "
            f"together {whole:.3f}: most of the loss punishes experts for knowing their domain.",
            {
                "mean_micro_loss": _round(micro),
                "global_loss": _round(whole),
                "micro_batches": len(facts.micro_losses),
            },
            'balance the global batch: F.switch_loss(scope="global"), and '
            "functional.concatenate_routings over accumulated micro-batches",
            0.85,
        )
    ]


def _bias_oscillates(facts: _Facts) -> list[Finding] | None:
    if facts.bias_history is None or len(facts.bias_history) < 8:
        return None
    found = []
    moves = facts.bias_history.diff(dim=0)
    back_and_forth = (moves[1:] * moves[:-1] < 0)[-6:].all(0)  # by chance 1 in 64
    for layer, swings in enumerate(back_and_forth):
        share = swings.double().mean().item()
        if share < 0.5 or _balanced(facts, layer):
            continue
        amplitude = moves[-1, layer][swings].abs().mean().item()
        found.append(
            Finding(
                "bias-oscillates",
                "warning",
                f"the bias of {share:.0%} of the experts goes back and forth with every update, by "
                f"{amplitude:.3g}: they are full and empty by turns.",
                {"share_of_experts": _round(share), "amplitude": _round(amplitude)},
                "a smaller bias_update_rate, small against the differences between scores; or "
                'mode="proportional" or "quantile"',
                0.85,
                facts.layer(layer, back_and_forth),
            )
        )
    return found


def _bias_drifts(facts: _Facts) -> list[Finding] | None:
    if facts.bias is None:
        return None
    found = []
    for layer, bias in enumerate(facts.bias):
        bias = bias.double().cpu()
        mean, spread = bias.mean().item(), bias.std(correction=0).item()
        if len(bias) > 1 and abs(mean) > 3 * spread:
            found.append(
                Finding(
                    "bias-drifts",
                    "note",
                    f"the bias has drifted as a whole: mean {mean:.3g}, spread {spread:.3g}. The "
                    "mean chooses no expert, but it costs precision.",
                    {"mean": _round(mean), "std": _round(spread)},
                    "nn.LossFreeBalancer(center=True)",
                    0.9,
                    facts.layer(layer, facts.bias),
                )
            )
    return found


def _dead_experts(facts: _Facts) -> list[Finding] | None:
    return _underused(facts, "dead-experts", "critical", lambda counts, mean: counts == 0, 0)


def _starved_experts(facts: _Facts) -> list[Finding] | None:
    return _underused(
        facts,
        "starved-experts",
        "warning",
        lambda counts, mean: (counts > 0) & (counts < _STARVED * mean),
        _STARVED,
    )


def _underused(
    facts: _Facts,
    rule: str,
    severity: str,
    which: Callable[[Tensor, float], Tensor],
    below: float,
) -> list[Finding] | None:
    if facts.counts is None:
        return None
    found = []
    for layer, counts in enumerate(facts.counts):
        total, mean = int(counts.sum()), counts.mean()
        experts = which(counts, mean.item()).nonzero().flatten().tolist()
        if total == 0 or not experts:
            continue
        at_most = max(math.ceil(below * mean.item()) - 1, 0)
        by_chance = _by_chance(
            facts.counts, torch.special.gammaincc(mean.new_tensor(at_most + 1), mean)
        )
        if by_chance > _CHANCE:
            continue
        has = "no token" if rule == "dead-experts" else "less than a tenth of a fair share"
        shown = ", ".join(str(expert) for expert in experts[:8])
        more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
        verb = "have" if len(experts) > 1 else "has"
        found.append(
            Finding(
                rule,
                severity,
                f"{len(experts)} of {len(counts)} experts {verb} {has} (of {total} slots, "
                f"{mean.item():.4g} each): {shown}{more}.",
                {
                    "experts": experts,
                    "tokens": [int(counts[expert]) for expert in experts],
                    "fair_share": _round(mean.item()),
                    "share_of_experts": _round(len(experts) / len(counts)),
                    "expected_by_chance": _round(by_chance),
                },
                _cure(facts, layer) + ", from the start; for experts that are lost noise "
                "(nn.NoisyTopKRouter), or take them out (nn.DynamicExperts)",
                _round(1 - by_chance),
                facts.layer(layer),
            )
        )
    return found


def _hot_experts(facts: _Facts) -> list[Finding] | None:
    if facts.counts is None:
        return None
    found = []
    figures = load_metrics(facts.counts.long())
    for layer, counts in enumerate(facts.counts):
        load = {name: value[layer].item() for name, value in figures.items()}
        if not load["max_vio"] >= 1:
            continue
        by_chance = _by_chance(facts.counts, torch.special.gammainc(counts.max(), counts.mean()))
        if by_chance > _CHANCE:
            continue
        names = ("max_vio", "max_vio_tokens", "imbalance_ratio", "cv", "gini", "entropy")
        names += ("perplexity", "kl_to_uniform")
        found.append(
            Finding(
                "hot-experts",
                "critical" if load["max_vio"] >= 3 else "warning",
                f"expert {int(counts.argmax())} has {load['imbalance_ratio']:.2f} times its fair "
                f"share (MaxVio {load['max_vio']:.3f}, {load['max_vio_tokens']:.0f} tokens above "
                f"the mean); the layer works as if it had {load['perplexity']:.2f} of "
                f"{len(counts)} experts.",
                {
                    "expert": int(counts.argmax()),
                    **{
                        name: _round(load[name]) for name in (*names, "perplexity", "kl_to_uniform")
                    },
                },
                _cure(facts, layer) + "; until then a capacity, so that no device waits for the "
                "fullest expert",
                0.95,
                facts.layer(layer),
            )
        )
    return found


def _dropped_tokens(facts: _Facts) -> list[Finding] | None:
    if facts.dropped is None:
        return None
    found = []
    for layer, (dropped, counts) in enumerate(zip(facts.dropped, facts.counts, strict=True)):
        slots = facts.slots[layer].item()
        rate = dropped.sum().item() / slots if slots else 0.0
        if rate <= 0.01:
            continue
        steps = counts.unsqueeze(0) if facts.steps is None else facts.steps[:, layer]
        factor = _capacity_factor(steps[steps.sum(-1) > 0], keep=0.99)
        found.append(
            Finding(
                "dropped-tokens",
                "critical" if rate > 0.1 else "warning",
                f"{rate:.1%} of the slots are dropped, most by expert {int(dropped.argmax())}; to "
                f"keep 99 % of them takes a capacity factor of {factor:.2f}.",
                {
                    "drop_rate": _round(rate),
                    "dropped_per_expert": [int(n) for n in dropped.tolist()],
                    "capacity_factor_for_99_percent": _round(factor),
                },
                "balance the load first; then a larger capacity_factor, or None: no token is "
                "dropped",
                0.95,
                facts.layer(layer),
            )
        )
    return found


def _identical_experts(facts: _Facts) -> list[Finding] | None:
    if facts.expert_weights is None:
        return None
    found = []
    for layer, weights in enumerate(facts.expert_weights):
        similarity = expert_similarity(weights).triu(diagonal=1).nan_to_num()
        pairs = (similarity > 0.95).nonzero()
        if len(pairs) == 0:
            continue
        largest = similarity.max().item()
        found.append(
            Finding(
                "identical-experts",
                "warning",
                f"{len(pairs)} pairs of experts are the same but for a factor (cosine up to "
                f"{largest:.4f}).",
                {"pairs": pairs[:10].tolist(), "num_pairs": len(pairs), "cosine": _round(largest)},
                "start the experts from different random numbers; of experts copied from one dense "
                "layer noise on the copies, and see whether they part in training",
                0.9,
                facts.layer(layer, facts.expert_weights),
            )
        )
    return found


def _over_balanced(facts: _Facts) -> list[Finding] | None:
    if not facts.router or facts.counts.shape[1] < 2:
        return None
    found = []
    most = math.log(facts.counts.shape[1])
    entropy = facts.router["token_entropy"].tolist()
    information = (-facts.router["mutual_information_loss"]).tolist()
    for layer, (nats, known) in enumerate(zip(entropy, information, strict=True)):
        if nats < 0.98 * most or known > 0.02 * most or not _balanced(facts, layer):
            continue
        found.append(
            Finding(
                "over-balanced",
                "warning",
                f"every token's probabilities are almost uniform (entropy {nats:.3f} of "
                f"{most:.3f} nats) and the same for all tokens (information {known:.4f} nats): no "
                "expert stands for anything.",
                {
                    "token_entropy": _round(nats),
                    "log_num_experts": _round(most),
                    "mutual_information": _round(known),
                },
                "a smaller coefficient of the balance loss, or balance over the global batch; in "
                "the first steps of a run it is as it should be",
                0.7,
                facts.layer(layer),
            )
        )
    return found


# In the order of cause and effect; the ranking keeps it within one severity.
_RULES: dict[str, Callable[[_Facts], list[Finding] | None]] = {
    "never-updated": _never_updated,
    "nan-logits": _nan_logits,
    "probabilities-as-logits": _probabilities_as_logits,
    "padding-counted": _padding_counted,
    "dense-routing": _dense_routing,
    "bias-not-float32": _bias_not_float32,
    "aux-loss-scaled": _aux_loss_scaled,
    "blind-spot": _blind_spot,
    "layers-cancel": _layers_cancel,
    "router-without-gradient": _router_without_gradient,
    "loss-too-weak": _loss_too_weak,
    "loss-too-strong": _loss_too_strong,
    "micro-batch-scope": _micro_batch_scope,
    "bias-oscillates": _bias_oscillates,
    "bias-drifts": _bias_drifts,
    "dead-experts": _dead_experts,
    "starved-experts": _starved_experts,
    "hot-experts": _hot_experts,
    "dropped-tokens": _dropped_tokens,
    "identical-experts": _identical_experts,
    "over-balanced": _over_balanced,
}

_STARVED = 0.1  # of a fair share
_CHANCE = 0.05  # experts of all that a fair router may show so
_SCALED = 0.5  # a Switch loss below this has been multiplied with something
_WEAK, _AIM, _STRONG = 0.01, 0.1, 0.3  # gradient of the balance loss over that of the main loss


def _by_chance(counts: Tensor, probability: Tensor) -> float:
    """How many experts a fair router shows so, of a probability of Poisson's distribution.

    With mean m it is at most k with the probability gammaincc(k + 1, m), at least k with
    gammainc(k, m).
    """
    return (probability * counts.numel()).item()


def _skewed(facts: _Facts) -> list[bool]:
    """Of each layer, whether its counts have a CV of 0.5 beyond what chance gives them."""
    excess, noise = _excess(facts.counts)
    return ((excess >= 0.25) & (excess > 4 * noise)).tolist()


def _balanced(facts: _Facts, layer: int) -> bool:
    """Whether the counts are there and the layer is not skewed."""
    return facts.counts is not None and layer < facts.num_layers and not _skewed(facts)[layer]


def _excess(counts: Tensor) -> tuple[Tensor, Tensor]:
    """CV^2 of [L, E] counts above the 1 / m of Poisson's, and the deviation of that by chance."""
    cv, mean = load_metrics(counts.long())["cv"], counts.mean(-1)
    return cv.square() - 1 / mean, math.sqrt(2 / max(counts.shape[-1] - 1, 1)) / mean


def _blindness(facts: _Facts) -> dict[int | None, dict[str, float]] | None:
    """The layers (None: their mean) whose loss does not see their counts, with the numbers."""
    if facts.aux_loss is None or facts.counts is None:
        return None
    skewed, uniform = _skewed(facts), 1 / facts.counts.shape[1]
    followed = switch_value(facts.counts, facts.counts)
    figures = load_metrics(facts.counts.long())
    if len(facts.aux_loss) < facts.num_layers:  # only the mean is known
        of_layers = {None: any(skewed)}
        followed = followed.nanmean().reshape(1)
        figures = {name: value.double().nanmean().reshape(1) for name, value in figures.items()}
    else:
        of_layers = dict(enumerate(skewed))
    blind = {}
    for place, (layer, is_skewed) in enumerate(of_layers.items()):
        loss, most = facts.aux_loss[place].item(), followed[place].item()
        follows = (loss - 1) / (most - 1) if most > 1 else math.nan
        if not is_skewed or loss < _SCALED or not follows < 0.1:
            continue
        if facts.prob_sum is not None and layer is not None:
            largest = (facts.prob_sum[layer] / facts.prob_sum[layer].sum()).max().item()
        else:
            largest = uniform * (1 + max(follows, 0) * figures["max_vio"][place].item())
        blind[layer] = {
            "follows": follows,
            "loss": loss,
            "followed": most,
            "largest": largest,
            "uniform": uniform,
            "cv": figures["cv"][place].item(),
        }
    return blind


def _cure(facts: _Facts, layer: int) -> str:
    blind = _blindness(facts) or {}
    if layer in blind or None in blind:
        return "a loss-free bias (the loss is blind here, see blind-spot)"
    return "a balance loss or a loss-free bias"


def _capacity_factor(counts: Tensor, keep: float) -> float:
    """The least factor with which each of [N, E] counts keeps that share of its slots."""
    num_experts = counts.shape[-1]
    ordered = counts.sort(-1).values
    rest = torch.arange(num_experts, 0, -1, dtype=counts.dtype)  # experts with at least so many
    below = ordered.cumsum(-1) - ordered
    wanted = keep * counts.sum(-1, keepdim=True)
    # With capacity c between two counts, below + rest c are kept.
    capacity = ((wanted - below) / rest).clamp_min(0)
    fits = capacity <= ordered
    first = capacity.gather(-1, fits.int().argmax(-1, keepdim=True))
    return (first.ceil() * num_experts / counts.sum(-1, keepdim=True)).max().item()


def _round(x: float) -> float:
    """Six digits: what evidence is read to."""
    return float(f"{x:.6g}")


def _show(value: float | int | str | list) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_show(x) for x in value[:12]) + (", ...]" if value[12:] else "]")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _name_layers(group: list[Finding]) -> str:
    layers = [finding.layer for finding in group if finding.layer is not None]
    if not layers:
        return ""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    others = ", ".join(str(layer) for layer in sorted(layers[1:])[:12])
    return f"layer {layers[0]}, also layers {others}" + (", ..." if len(layers) > 13 else "")


_STYLE = """<style>
.equipoise-diagnosis { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; }
.equipoise-diagnosis li { margin: 1rem 0; padding: .2rem 1rem; border-left: .4rem solid #999; }
.equipoise-diagnosis li.critical { border-left-color: #c1272d; border-left-style: double; }
.equipoise-diagnosis li.warning { border-left-color: #b36b00; }
.equipoise-diagnosis h3 { margin: 0; font-size: 1.1rem; }
.equipoise-diagnosis h3 small { font-weight: normal; color: #444; }
.equipoise-diagnosis th { text-align: left; font-weight: normal; padding-right: 1rem; color: #444; }
.equipoise-diagnosis td { font-family: monospace; overflow-wrap: anywhere; }
</style>"""

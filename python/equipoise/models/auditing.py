# SPDX-License-Identifier: Apache-2.0
"""Which balance losses a model trains with, and which it only seems to.

What Hugging Face's models do is read from their configuration, from the attributes of the module
that adds the loss (found by its `load_balancing_loss_func`), and from a look at what a router makes
of random tokens.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..balancers import Balancer
from ..diagnosis import Finding
from ..functional.losses import are_probabilities
from ..nn.losses import AdvancedLoadBalancingLoss, BalanceLoss, SwitchBalanceLoss
from .routers import RouterSite, find_routers
from .watching import watch

# The coefficient of the Switch loss, by architecture: Mixtral, Qwen, OLMoE and most; JetMoE; DBRX;
# DeepSeek-V2 and V3.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight", "aux_loss_alpha")
_PROBE_TOKENS = 1024
# Forward passes without an update that no accumulation of gradients explains.
_MANY_RECORDS = 1000
_SEVERITIES = ("critical", "warning", "note")


@dataclass(frozen=True)
class BalanceTerm:
    """Something that balances, or would."""

    name: str
    """The loss, as in `functional.balance_loss`; "expert_bias" for a bias of the selection."""
    coefficient: float | None
    """Of the loss; the update rate of a bias, None where it is not known."""
    source: str
    """Where it stands."""
    in_force: bool
    """Whether a training step applies it."""


@dataclass(frozen=True)
class Audit:
    """What `audit` gives: `str()` of it is a page to read.

    Attributes:
        model: the name of its class.
        routers: what routers there are.
        terms: the balance losses and biases.
        findings: what is off or wrong, the worst first.
    """

    model: str
    routers: list[str]
    terms: list[BalanceTerm]
    findings: list[Finding]

    def __str__(self) -> str:
        lines = [f"audit of {self.model}", "  routers"]
        lines += [f"    {line}" for line in self.routers]
        lines += ["  balance"]
        for term in self.terms:
            value = "" if term.coefficient is None else f" {term.coefficient:g}"
            state = "in force" if term.in_force else "off"
            lines += [f"    {state:<8}  {term.name}{value}  ({term.source})"]
        if not self.terms:
            lines += ["    nothing in the model itself; losses added outside of it are not seen"]
        lines += ["  findings"]
        for finding in self.findings:
            lines += [
                f"    {finding.severity}: {finding.rule}: {finding.message}",
                f"      {finding.remedy}",
            ]
        if not self.findings:
            lines += ["    none"]
        return "\n".join(lines)


def audit(model: nn.Module, batch: Mapping[str, Any] | None = None) -> Audit:
    """Which balance losses are in force, with which coefficients, and what is silently off.

    The rules, of which each names its remedy:

    - `aux-loss-off`: a coefficient is set, but without `output_router_logits` Hugging Face's models
      do not add the loss
    - `coefficient-ignored`: a coefficient is set, and no module of the model computes the loss
    - `coefficient-stale`: the configuration has been changed after the model had copied it
    - `concatenated-layers`: the loss is of all layers put together, where imbalances cancel
    - `hf-normalisation`: the loss is K at balance, 1 elsewhere
    - `probabilities-as-logits`: what the router gives out as logits are probabilities, of which
      the loss takes the softmax again
    - `padding-counted`: padding enters the loss (needs a `batch`)
    - `router-half-precision`: the logits are rounded to a half type, so that other experts win
    - `bias-not-float32`: a bias in a half type, in which small updates are lost
    - `expert-bias-not-updated`: a bias that nobody updates
    - `dense-routing`: a balance loss where every token goes to every expert

    Args:
        model: as for `watch`. What runs is one router of each class, on random tokens.
        batch: keyword arguments of a forward pass. With it the model runs once, without gradients
            and in `eval()` mode, and the findings on layers and padding have numbers.

    Returns:
        Audit. It waits for the device.

    Raises:
        ValueError: no router in `model`.

    Example:
        >>> from equipoise.nn import BalanceLoss, TopKRouter
        >>> model = torch.nn.Sequential(TopKRouter(8, 4, top_k=4), BalanceLoss({"switch": 0.01}))
        >>> result = audit(model)
        >>> print(result)
        audit of Sequential
          routers
            1 x TopKRouter: 4 experts, top_k 4, softmax
          balance
            off       switch 0.01  (BalanceLoss '1')
          findings
            warning: dense-routing: every token goes to all 4 experts in 1 of 1 layers, ...
              choose top_k below the number of experts, or drop the balance losses ...
    """
    sites = find_routers("audit", model)
    findings: list[Finding] = []
    dense = [site for site in sites if site.top_k == site.num_experts]
    terms = _own_terms(model, all_dense=len(dense) == len(sites))
    switch = _hugging_face_loss(model, batch or {}, findings)
    if switch is not None:
        terms.append(switch)
        if switch.in_force:
            _check_hugging_face_loss(model, sites, batch, findings)
    terms += _biases(sites, findings)
    _check_dense(sites, dense, terms, findings)
    _check_logits(sites, findings)
    if batch is not None and len(dense) < len(sites):
        _check_padding(model, sites, batch, findings)
    return Audit(
        type(model).__name__,
        _described(sites),
        terms,
        sorted(findings, key=lambda finding: _SEVERITIES.index(finding.severity)),
    )


def _described(sites: list[RouterSite]) -> list[str]:
    kinds: dict[str, int] = {}
    for site in sites:
        line = (
            f"{type(site.module).__name__}: {site.num_experts} experts, top_k {site.top_k}, "
            f"{site.score_function}"
        )
        kinds[line] = kinds.get(line, 0) + 1
    return [f"{count} x {line}" for line, count in kinds.items()]


def _own_terms(model: nn.Module, all_dense: bool) -> list[BalanceTerm]:
    """The losses of equipoise's modules."""
    terms = []
    for name, module in model.named_modules():
        if isinstance(module, BalanceLoss):
            coefficients = {n: c.item() for n, c in module.coefficients.items()}
        elif isinstance(module, SwitchBalanceLoss):
            coefficients = {"switch": module.coeff}
        elif isinstance(module, AdvancedLoadBalancingLoss):
            names = ("uniform", "entropy", "mi", "variance")
            coefficients = {n: getattr(module, f"lambda_{n}") for n in names}
        else:
            continue
        for loss, coefficient in coefficients.items():
            guarded = all_dense and not isinstance(module, AdvancedLoadBalancingLoss)
            works = not (guarded and loss not in ("z", "token_entropy"))
            source = f"{type(module).__name__} '{name}'"
            coefficient = round(coefficient, 8)  # of a float32
            terms.append(BalanceTerm(loss, coefficient, source, coefficient != 0 and works))
    return terms


def _hugging_face_loss(
    model: nn.Module, batch: Mapping[str, Any], findings: list[Finding]
) -> BalanceTerm | None:
    """The Switch loss of a model of transformers, if its configuration knows one."""
    config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    key = next((k for k in _COEFFICIENTS if getattr(config, k, None) is not None), None)
    head = next((m for m in model.modules() if _adds_loss(m)), None)
    if head is None:
        if key is None or not getattr(config, key) > 0:
            return None
        coefficient = getattr(config, key)
        findings.append(
            Finding(
                "coefficient-ignored",
                "warning",
                f"config.{key} is {coefficient:g}, but {type(model).__name__} computes no balance "
                "loss",
                {"coefficient": coefficient, "key": key},
                "add functional.balance_loss_from_logits of each layer to your loss; or balance "
                "by the bias of the selection, if there is one, and set the coefficient to 0",
                0.9,
            )
        )
        return BalanceTerm("switch", coefficient, f"config.{key}", False)

    attribute = next(k for k in _COEFFICIENTS if hasattr(head, k))
    coefficient = getattr(head, attribute) or 0.0
    configured = coefficient if key is None else getattr(config, key)
    if configured != coefficient:
        findings.append(
            Finding(
                "coefficient-stale",
                "warning",
                f"config.{key} is {configured:g}, but the model uses the {coefficient:g} that it "
                "had copied when it was made",
                {"coefficient": coefficient, "configured": configured, "key": key},
                f"set {type(head).__name__}.{attribute} of the model",
            )
        )
    given_out = batch.get("output_router_logits")
    if given_out is None:
        given_out = getattr(config, "output_router_logits", False)
    if coefficient > 0 and not given_out:
        findings.append(
            Finding(
                "aux-loss-off",
                "critical",
                f"the coefficient of the balance loss is {coefficient:g}, but output_router_logits "
                "is False: the loss is neither computed nor added",
                {"coefficient": coefficient},
                "set model.config.output_router_logits = True, or pass it to the forward pass",
            )
        )
    source = f"{type(head).__name__}.{attribute}, all layers together"
    return BalanceTerm("switch", coefficient, source, bool(coefficient > 0 and given_out))


def _adds_loss(module: nn.Module) -> bool:
    """Whether this is the module of transformers that adds the balance loss to the main loss."""
    return any(hasattr(module, key) for key in _COEFFICIENTS) and any(
        hasattr(sys.modules.get(kind.__module__), "load_balancing_loss_func")
        for kind in type(module).__mro__
    )


def _check_hugging_face_loss(
    model: nn.Module,
    sites: list[RouterSite],
    batch: Mapping[str, Any] | None,
    findings: list[Finding],
) -> None:
    top_k = sites[0].top_k
    if top_k > 1:
        findings.append(
            Finding(
                "hf-normalisation",
                "note",
                f"this balance loss is K = {top_k} at balance, where those of the papers, of "
                f"Megatron and of equipoise are 1: a coefficient c here is {top_k} c there",
                {"at_balance": top_k},
                f"divide the loss by {top_k} to compare it, and coefficients from elsewhere too",
            )
        )
    if len(sites) == 1 or top_k == sites[0].num_experts:  # K in all layers, and together
        return
    message = f"the balance loss is of all {len(sites)} layers put together, where layers that "
    message += "lean to different experts cancel"
    severity, evidence = "warning", {"layers": len(sites)}
    if batch is not None:
        with _looking(model), watch(model) as w:
            model(**batch)
        together = w.concatenated_loss().item()
        layers = w.losses(["switch"], normalize="hf")["switch"]
        mean, worst = layers.mean().item(), layers.max().item()
        evidence |= {"concatenated": together, "mean_of_layers": mean, "worst_layer": worst}
        message += f": {together:.3f} together, {mean:.3f} in the mean of the layers and "
        message += f"{worst:.3f} in the worst ({top_k} at balance)"
        if together - top_k > 0.8 * (mean - top_k):  # the layers lean to the same experts
            severity = "note"
    findings.append(
        Finding(
            "concatenated-layers",
            severity,
            message,
            evidence,
            "set the coefficient to 0 and add functional.balance_loss_from_logits of each of "
            "outputs.router_logits instead",
        )
    )


def _biases(sites: list[RouterSite], findings: list[Finding]) -> list[BalanceTerm]:
    """The biases of the selection, one term for each kind."""
    kinds: dict[str, list[RouterSite]] = {}
    for site in sites:
        if site.expert_bias is not None:
            owner = site.module.balancer if site.kind == "equipoise" else site.module
            kinds.setdefault(type(owner).__name__, []).append(site)
    terms = []
    for kind, members in kinds.items():
        half = [site for site in members if site.expert_bias.dtype.itemsize < 4]
        if half:
            dtype = half[0].expert_bias.dtype
            step = torch.finfo(dtype).eps
            findings.append(
                Finding(
                    "bias-not-float32",
                    "critical",
                    f"the bias of the selection is {dtype} in {len(half)} of {len(sites)} layers: "
                    f"at 1 its steps are {step:g}, and the usual update of 0.001 is lost",
                    {"dtype": str(dtype), "step_at_one": step, "layers": _names(half)},
                    "keep it in float32: cast the model without it, or set it anew afterwards",
                )
            )
        idle = _not_updated(members)
        if idle is not None:
            findings.append(idle)
        rate = None
        if members[0].kind == "equipoise":
            rate = getattr(members[0].module.balancer, "bias_update_rate", None)
        terms.append(
            BalanceTerm("expert_bias", rate, f"{kind} in {len(members)} layers", idle is None)
        )
    return terms


def _not_updated(members: list[RouterSite]) -> Finding | None:
    if members[0].kind != "equipoise":
        if any(bool(site.expert_bias.any()) for site in members):
            return None
        return Finding(
            "expert-bias-not-updated",
            "warning",
            f"e_score_correction_bias is 0 in all {len(members)} layers: transformers adds it to "
            "the scores, but nothing in it ever updates it",
            {"layers": _names(members)},
            "after each optimizer step give the counts of equipoise.watch to a LossFreeBalancer "
            "of each layer and copy its expert_bias; for inference load the weights",
            0.9,
        )
    waiting = {
        # Behind the counts of a balancer stands how many records they are of.
        site.name: int(site.module.balancer._sums["counts"][-1])
        for site in members
        if isinstance(site.module.balancer, Balancer)
    }
    late = {name: records for name, records in waiting.items() if records >= _MANY_RECORDS}
    if not late:
        return None
    return Finding(
        "expert-bias-not-updated",
        "warning",
        f"{len(late)} balancers have recorded up to {max(late.values())} forward passes since "
        "their last update()",
        {"layers": list(late), "records": list(late.values())},
        "call update() of each balancer once after each optimizer step",
        0.8,
    )


def _check_dense(
    sites: list[RouterSite],
    dense: list[RouterSite],
    terms: list[BalanceTerm],
    findings: list[Finding],
) -> None:
    losses = [
        term
        for term in terms
        if term.name not in ("expert_bias", "z", "token_entropy") and term.coefficient
    ]
    if dense and losses:
        findings.append(
            Finding(
                "dense-routing",
                "warning",
                f"every token goes to all {dense[0].num_experts} experts in {len(dense)} of "
                f"{len(sites)} layers, where the load is equal whatever the router does and "
                f"'{losses[0].name}' only flattens its probabilities",
                {"layers": _names(dense), "losses": [term.name for term in losses]},
                "choose top_k below the number of experts, or drop the balance losses and use "
                "token_entropy to keep the router from collapsing",
            )
        )


def _check_logits(sites: list[RouterSite], findings: list[Finding]) -> None:
    """Looks at what one router of each class and type makes of random tokens."""
    probed: dict[tuple, list[RouterSite]] = {}
    for site in sites:
        weight = site.weight
        if (
            site.kind != "equipoise"  # float32 logits by construction, and not given out
            and isinstance(weight, Tensor)
            and weight.dim() == 2
            and weight.is_floating_point()
            and not weight.is_meta
        ):
            probed.setdefault((type(site.module), weight.dtype, weight.device), []).append(site)
    probabilities, half, dtype, flips = [], [], None, 0.0
    for members in probed.values():
        logits, share = _probe(members[0])
        if logits.shape[-1] > 1 and bool(are_probabilities(logits)):
            probabilities += members
        elif logits.dtype.itemsize < 4:
            half, dtype, flips = half + members, logits.dtype, max(flips, share)
    if probabilities:
        name = type(probabilities[0].module).__name__
        findings.append(
            Finding(
                "probabilities-as-logits",
                "critical",
                f"{name} gives out probabilities as its logits in {len(probabilities)} of "
                f"{len(sites)} layers: a loss that takes their softmax is near its value at "
                "balance whatever the balance, and has next to no gradient",
                {"layers": _names(probabilities)},
                "take a version of transformers in which they are logits, or form the loss by "
                "functional.balance_loss_from_logits(..., from_probabilities=True)",
            )
        )
    if half:
        findings.append(
            Finding(
                "router-half-precision",
                "warning",
                f"the logits of {len(half)} of {len(sites)} layers are {dtype}: "
                f"{100 * flips:.1f} % of {_PROBE_TOKENS} random tokens choose other experts than "
                "in float32",
                {"dtype": str(dtype), "flipped": flips, "layers": _names(half)},
                "run the router in float32: equipoise.nn.TopKRouter does, or cast its input and "
                "its weight",
            )
        )


@torch.no_grad()
def _probe(site: RouterSite) -> tuple[Tensor, float]:
    """What the router gives out as logits, and the share of tokens with other experts in float32.

    By `forward` itself: no hooks run.
    """
    weight = site.weight
    shape = (_PROBE_TOKENS, weight.shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices=devices):  # jitter
        if site.kind == "block":
            some = x[None, :8].clone()
            logits = site.read((some,), {}, site.module.forward(some))[0]
            if not bool(are_probabilities(logits)):
                logits = site.module.gate.forward(x)
        else:
            logits = site.read((x,), {}, site.module.forward(x[None]))[0]
    if logits.shape[0] != x.shape[0]:
        return logits, 0.0
    exact = nn.functional.linear(x.float(), weight.float())
    chosen, best = (t.topk(site.top_k, -1).indices.sort(-1).values for t in (logits, exact))
    return logits, (chosen != best).any(-1).float().mean().item()


def _check_padding(
    model: nn.Module,
    sites: list[RouterSite],
    batch: Mapping[str, Any],
    findings: list[Finding],
) -> None:
    if any(site.kind == "equipoise" for site in sites):
        _check_own_padding(model, batch, findings)
        return
    ids = batch.get("input_ids")
    config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    pad = getattr(config, "pad_token_id", None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not isinstance(pad, int):
        return
    counted = batch.get("attention_mask")
    counted = torch.ones_like(ids) if counted is None else counted
    if counted.shape != ids.shape:
        return
    padding = _ends(ids == pad) & (counted > 0)
    if not bool(padding.any()):
        return
    with _looking(model), watch(model) as w, watch(model, (counted > 0) & ~padding) as real:
        model(**batch)
    with_padding = w.losses(["switch"])["switch"].mean().item()
    without = real.losses(["switch"])["switch"].mean().item()
    share = (padding.sum() / (counted > 0).sum()).item()
    findings.append(
        Finding(
            "padding-counted",
            "warning",
            f"{100 * share:.1f} % of the tokens are padding by config.pad_token_id = {pad} that "
            f"attention_mask does not mask: the Switch loss is {with_padding:.3f} with it and "
            f"{without:.3f} without, in the mean of the layers (1 at balance)",
            {"share": share, "switch": with_padding, "switch_without_padding": without},
            "pass the attention_mask of the tokenizer to the forward pass",
            0.9,
        )
    )


def _check_own_padding(model: nn.Module, batch: Mapping[str, Any], findings: list[Finding]) -> None:
    """Routers of equipoise: whether they have been told of the mask that the model got."""
    mask = batch.get("token_mask", batch.get("attention_mask"))
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((mask > 0).all()):
        return
    with _looking(model), watch(model) as w:
        model(**batch)
    real = (mask > 0).sum()
    counts = {
        name: (routing.tokens_per_expert.sum() / routing.top_k).item()
        for name, routing in zip(w.layers, w.routings, strict=True)
        if hasattr(routing, "tokens_per_expert")
        and routing.topk_indices[..., 0].numel() == mask.numel()
    }
    told_nothing = [name for name, count in counts.items() if count > real]
    if told_nothing:
        findings.append(
            Finding(
                "padding-counted",
                "warning",
                f"{len(told_nothing)} routers count {counts[told_nothing[0]]:.0f} tokens, of which "
                f"the mask of the batch leaves {int(real)}",
                {"layers": told_nothing, "real_tokens": int(real)},
                "pass the mask on to the router as token_mask",
            )
        )


def _ends(padding: Tensor) -> Tensor:
    """[B, S] bool: the runs of at least two at the beginning or the end of a row."""
    leading = padding.long().cumprod(1)
    trailing = padding.long().flip(1).cumprod(1).flip(1)
    runs = [(run * (run.sum(1, keepdim=True) > 1)).bool() for run in (leading, trailing)]
    return runs[0] | runs[1]


@contextmanager
def _looking(model: nn.Module) -> Iterator[None]:
    """In `eval()` mode and without gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _names(sites: list[RouterSite]) -> list[str]:
    return [site.name for site in sites]

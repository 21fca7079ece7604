# SPDX-License-Identifier: Apache-2.0
"""Balance losses.

Those that are functions of the sums of ``topk_gating`` read a few numbers per expert; their work on
[T, E] is a term in the one backward of the gating. Every function returns the unscaled value, which
for a loss that compares f and P is 1 at balance, for the others 0; ``balance_loss`` applies the
coefficients. All are of one layer: to add up the sums of several layers would let them cancel.

Notation: f_e = load_e / (K W), P_e = prob_sum_e / W, W = num_tokens; f and W are constants for the
gradient.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from .. import distributed, ops
from .routing import RoutingResult, expert_bincount, topk_gating


class LossReport(NamedTuple):
    """What ``balance_loss`` returns."""

    total: Tensor
    """Scalar, the sum of the scaled losses; differentiable."""
    unscaled: dict[str, Tensor]
    """The value of each loss, 1.0 for ``switch`` at balance; differentiable."""
    scaled: dict[str, Tensor]
    """The same times its coefficient, to be reported: without gradient."""
    coefficients: dict[str, Tensor]
    """The coefficient of each loss."""


class TrainingLoss(NamedTuple):
    """The terms of a training or validation loss, apart and together."""

    total: Tensor
    """Scalar to call ``backward()`` on: ``nll + balance + entropy``."""
    nll: Tensor
    """The main loss alone: what training and validation may be compared by."""
    balance: Tensor
    """The scaled balance losses but ``token_entropy``; without gradient."""
    entropy: Tensor
    """The scaled ``token_entropy``; without gradient."""


#: The losses of ``balance_loss``.
BALANCE_LOSSES = (
    "switch",
    "device",
    "importance",
    "z",
    "uniform_kl",
    "entropy",
    "variance",
    "mutual_information",
    "token_entropy",
)

# What a loss may be given beside its coefficient.
_OPTIONS = {
    "switch": {"scope", "group", "expert_weights", "target_shares"},
    "device": {"scope", "group", "num_devices"},
    "importance": {"scope", "group", "of", "unbiased", "token_weights"},
    "z": {"scope", "group"},
    "token_entropy": {"scope", "group"},
}
_SCOPES = ("batch", "sequence", "global")


def balance_loss(
    routing: RoutingResult,
    losses: Mapping[str, "float | Tensor | Mapping[str, Any]"],
    normalize: str = "none",
) -> LossReport:
    """A weighted set of balance losses from the sums of ``topk_gating``; [T, E] is not touched.

    - ``switch``: ``E sum(f P)``, 1 at balance (Fedus 2021, arXiv:2101.03961). Options
      ``expert_weights`` [E], penalties v of the experts: ``E sum(v f P)``; or ``target_shares`` [E]
      t, shares of the load other than equal ones: ``sum(f P / t)``, 1 where f = P = t.
    - ``device``: ``sum(f'_i P'_i)``, 1 at balance: f'_i the mean of E f_e over the experts of
      device i, P'_i the sum of their P_e (DeepSeek-V2, arXiv:2405.04434). Option ``num_devices``.
    - ``importance``: ``Var(G) / mean(G)^2``, G_e the sum of the weights with which tokens chose e,
      or with option ``of="probs"`` the prob_sum (Shazeer 2017, arXiv:1701.06538). Options
      ``unbiased`` (variance over E - 1), ``token_weights`` [...] (for G, where ``topk_gating`` had
      any).
    - ``z``: ``mean(lse^2)`` (ST-MoE, arXiv:2202.08906)
    - ``uniform_kl``: ``KL(uniform || P)``
    - ``entropy``: ``log E - H(P)``
    - ``variance``: ``Var(P)`` over E - 1
    - ``mutual_information``: ``mean(H_t) - H(P)``, from 0 down to -log E (RAILS, arXiv:2407.15462)
    - ``token_entropy``: ``mean(H_t)``, also for dense routing

    Option ``scope`` of each: ``"batch"`` adds up the segments first; ``"sequence"`` is the mean
    over the segments that have tokens of the loss of each (DeepSeek-V3, arXiv:2412.19437), where
    means over tokens (z, token_entropy) and the importance of gates stay what they are;
    ``"global"`` is of the tokens of all ranks of the process group ``group`` (default: all), see
    ``distributed.global_routing`` (Qiu 2025, arXiv:2501.11873).

    W = 0 and E = 1 give 0 with zero gradient. With K = E every expert gets every token: all but z
    and token_entropy are then left out (value 0), with one warning.

    Args:
        routing: from ``topk_gating`` with ``stats=True``.
        losses: name -> coefficient >= 0 (token_entropy: any), a float or (for schedules under
            ``torch.compile``) a scalar tensor; or a mapping with ``coeff`` and the options above.
        normalize: "hf" multiplies switch and device by K: Hugging Face's number, K at balance.

    Returns:
        LossReport; float32, or float64 for float64 logits.

    Raises:
        ValueError: an unknown loss, option or scope; a negative coefficient.
        RuntimeError: a routing without statistics; shapes that do not fit.

    >>> r = topk_gating(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), top_k=1)
    >>> report = balance_loss(r, {"switch": 0.01, "z": 0.001})
    >>> round(report.unscaled["switch"].item(), 3), round(report.total.item(), 5)
    (1.762, 0.02214)
    >>> report = balance_loss(r, {"importance": {"coeff": 0.1, "of": "probs"}})
    >>> round(report.unscaled["importance"].item(), 3)  # tanh(1)^2
    0.58
    """
    return _balance_loss(routing, losses, normalize, guard_dense=True)


def balance_loss_from_logits(
    logits: Tensor,
    top_k: int,
    losses: Mapping[str, "float | Tensor | Mapping[str, Any]"],
    token_mask: Tensor | None = None,
    normalize: str = "none",
    from_probabilities: bool = False,
) -> LossReport:
    """``balance_loss`` for those who only have router logits (``output_router_logits``).

    Args:
        logits: [..., E] of one layer.
        top_k: K, from 1 to E.
        losses: see ``balance_loss``.
        token_mask: [...] bool, True = real token, or float weights >= 0.
        normalize: see ``balance_loss``. ``{"switch": 1.0}`` with "hf" is the number of Hugging
            Face's ``load_balancing_loss_func`` for one layer.
        from_probabilities: ``logits`` holds probabilities, rows that add up to 1. Taken for logits
            they give a loss near 1 and next to no gradient, whatever the balance; on the CPU rows
            in [0, 1] that add up to 1 give a warning when they come as logits.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    >>> report = balance_loss_from_logits(logits, 1, {"switch": 1.0})
    >>> round(report.total.item(), 3)
    1.762
    >>> report = balance_loss_from_logits(
    ...     logits.softmax(-1), 1, {"switch": 1.0}, from_probabilities=True
    ... )
    >>> round(report.total.item(), 3)
    1.762
    """
    if from_probabilities:
        logits = logits.clamp(min=torch.finfo(logits.dtype).tiny).log()
    else:
        _warn_of_probabilities(logits)
    if not _needs_choices(losses) and 1 <= top_k < logits.shape[-1]:
        top_k = 1  # whom the tokens choose does not matter, and the best one is found soonest
    return balance_loss(topk_gating(logits, top_k, token_mask=token_mask), losses, normalize)


def switch_loss(
    routing: RoutingResult,
    scope: str = "batch",
    group: "torch.distributed.ProcessGroup | None" = None,
    expert_weights: Tensor | None = None,
    target_shares: Tensor | None = None,
) -> Tensor:
    """The Switch loss, a scalar: 1 at balance. Computed even where K = E. See ``balance_loss``.

    >>> round(switch_loss(topk_gating(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), top_k=1)).item(), 3)
    1.0
    """
    return _value(
        routing,
        "switch",
        scope=scope,
        group=group,
        expert_weights=expert_weights,
        target_shares=target_shares,
    )


def device_loss(routing: RoutingResult, num_devices: int) -> Tensor:
    """The loss between devices that share the experts in equal contiguous runs: 1 at balance.

    >>> r = topk_gating(torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]), top_k=1)
    >>> round(device_loss(r, 2).item(), 3)  # all tokens to device 0, which has 0.807 of P
    1.615
    """
    return _value(routing, "device", num_devices=num_devices)


def importance_loss(
    routing: RoutingResult,
    of: str = "gates",
    unbiased: bool = False,
    token_weights: Tensor | None = None,
) -> Tensor:
    """The squared coefficient of variation of the experts' importance: 0 at balance.

    Of ``of="gates"``, the sums of ``topk_weights`` (Shazeer 2017), or of ``"probs"``, prob_sum.

    >>> r = topk_gating(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), top_k=1)
    >>> importance_loss(r).item(), round(importance_loss(r, of="probs").item(), 3)
    (1.0, 0.58)
    """
    return _value(routing, "importance", of=of, unbiased=unbiased, token_weights=token_weights)


def z_loss(routing: RoutingResult) -> Tensor:
    """The router z-loss, a scalar: the mean of lse^2.

    >>> round(z_loss(topk_gating(torch.zeros(3, 4), top_k=1)).item(), 3)  # log(4)^2
    1.922
    """
    return _value(routing, "z")


def uniform_kl_loss(routing: RoutingResult) -> Tensor:
    """The divergence ``KL(uniform || P) = -mean(log(E P))``: 0 at balance.

    >>> r = topk_gating(torch.tensor([[0.6, 0.3, 0.1]]).log(), top_k=1)
    >>> round(uniform_kl_loss(r).item(), 4)
    0.2405
    """
    return _value(routing, "uniform_kl")


def entropy_loss(routing: RoutingResult) -> Tensor:
    """What the entropy of P lacks, ``log E - H(P) = sum(P log(E P))``: 0 at balance.

    >>> r = topk_gating(torch.tensor([[0.6, 0.3, 0.1]]).log(), top_k=1)
    >>> round(entropy_loss(r).item(), 4)
    0.2007
    """
    return _value(routing, "entropy")


def variance_loss(routing: RoutingResult) -> Tensor:
    """The variance of P, over E - 1: 0 at balance.

    >>> r = topk_gating(torch.tensor([[0.6, 0.3, 0.1]]).log(), top_k=1)
    >>> round(variance_loss(r).item(), 4)
    0.0633
    """
    return _value(routing, "variance")


def mutual_information_loss(routing: RoutingResult) -> Tensor:
    """Minus the information between token and expert: ``mean(H_t) - H(P)``.

    0 where all tokens are treated alike, -log E where each goes to one expert and the experts are
    evenly used (RAILS, arXiv:2407.15462).

    >>> r = topk_gating(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), top_k=1)
    >>> round(mutual_information_loss(r).item(), 3)  # log(2) = 0.693
    -0.692
    """
    return _value(routing, "mutual_information")


def token_entropy_loss(routing: RoutingResult) -> Tensor:
    """The mean entropy of a token's probabilities: 0 for decided tokens, log E for undecided ones.

    >>> round(token_entropy_loss(topk_gating(torch.zeros(3, 4), top_k=1)).item(), 3)  # log(4)
    1.386
    """
    return _value(routing, "token_entropy")


def training_loss(nll: Tensor, reports: LossReport | Sequence[LossReport]) -> TrainingLoss:
    """The main loss and the balance losses of all layers, apart and together.

    What is optimised is ``total``. To compare training with validation take ``nll``: the others
    depend on coefficients, and on whether the balance losses were computed at all.

    Args:
        nll: scalar, the main loss.
        reports: of ``balance_loss``, one per layer.

    >>> r = topk_gating(torch.zeros(3, 4), top_k=1)
    >>> report = balance_loss(r, {"switch": 0.01, "token_entropy": -0.1})
    >>> loss = training_loss(torch.tensor(2.0), [report, report])
    >>> [round(term.item(), 3) for term in loss]
    [1.743, 2.0, 0.02, -0.277]
    """
    if isinstance(reports, LossReport):
        reports = [reports]
    zero = nll.new_zeros(())
    balance = sum((r.total for r in reports), zero)
    entropy = sum((r.scaled["token_entropy"] for r in reports if "token_entropy" in r.scaled), zero)
    return TrainingLoss(nll + balance, nll, (balance - entropy).detach(), entropy)


def load_loss(
    clean_logits: Tensor,
    noisy_logits: Tensor,
    noise_stddev: Tensor,
    top_k: int,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The squared coefficient of variation of the experts' expected load: 0 at balance.

    The load of an expert is the sum over the tokens of the probability that it would be among the
    ``top_k`` if its own noise were drawn again:

        L_e = sum_t w_t Phi((clean_te - threshold_te) / stddev_te)

    with the threshold that it has to pass: the K-th largest noisy logit among the others. Smooth,
    so that the load itself has a gradient (Shazeer 2017, arXiv:1701.06538, appendix A). With K = E
    it is 0.

    Args:
        clean_logits: [..., E], without the noise.
        noisy_logits: [..., E], with it.
        noise_stddev: [..., E] > 0, its standard deviation.
        top_k: K, from 1 to E.
        token_mask: [...] bool, True = real token, or float weights >= 0.

    Returns:
        Scalar, float32 (float64 for float64 logits); differentiable in all three.

    >>> clean = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    >>> round(load_loss(clean, clean, torch.ones(2, 2), top_k=1).item(), 3)  # loads 1.954, 0.046
    0.911
    """
    return ops.load_loss(clean_logits, noisy_logits, noise_stddev, top_k, token_mask)


def communication_loss(
    routing: RoutingResult,
    num_devices: int,
    max_devices: int,
    token_weights: Tensor | None = None,
) -> Tensor:
    """The loss between devices by the tokens sent to them: 1 at balance.

    ``sum(f''_i P'_i)`` with f''_i = D / (M W) times the tokens that are sent to device i, each
    counted once however many of its experts are there, and P'_i the sum of P over its experts
    (DeepSeek-V2, arXiv:2405.04434).

    Args:
        routing: from ``topk_gating`` with ``stats=True``.
        num_devices: D; the experts are dealt to devices in equal contiguous runs.
        max_devices: M, the most devices a token may reach, from 1 to D.
        token_weights: [...] float, where ``topk_gating`` had any.

    >>> r = topk_gating(torch.tensor([[2.0, 1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 1.0]]), top_k=2)
    >>> round(communication_loss(r, num_devices=2, max_devices=2).item(), 3)
    0.882
    """
    return ops.communication_loss(
        routing._stats(), routing.topk_indices, num_devices, max_devices, token_weights
    )


def hierarchical_loss(routing: RoutingResult, num_groups: int) -> Tensor:
    """Balance between groups of experts and within them: 1 at balance.

    The mean of two losses: between the groups, ``G sum(F_i P_i)`` with F_i and P_i the sums of f
    and P over group i; within them, the mean over the used groups of the Switch loss among their
    experts, ``(E / G) sum((f_e / F_i) (P_e / P_i))``.

    Args:
        routing: from ``topk_gating`` with ``stats=True``.
        num_groups: G, equal contiguous runs of experts (nodes, devices).

    >>> r = topk_gating(torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]), top_k=1)
    >>> round(hierarchical_loss(r, 2).item(), 3)  # between 1.615, within the used group 1
    1.307
    """
    return ops.hierarchical_loss(routing._stats(), routing.top_k, num_groups)


def router_l2_loss(logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """The mean square of the logits, which keeps them small.

    Args:
        logits: [..., E]; absent experts (-inf) count as 0.
        token_mask: [...] bool, True = real token, or float weights >= 0.

    >>> router_l2_loss(torch.tensor([[1.0, 3.0]])).item()
    5.0
    """
    return ops.router_l2_loss(logits, token_mask)


def similarity_correlation(inputs: Tensor, gates: Tensor) -> Tensor:
    """Whether similar inputs get similar gates: ``mean_ij cos(x_i, x_j) cos(g_i, g_j)``.

    By the identity ``sum_ij (u_i u_j)(v_i v_j) = |U^T V|^2`` with rows of length 1, in O(B D N)
    time and O(D N) memory: the [B, B] matrices of similarities are never made.

    Args:
        inputs: [B, D].
        gates: [B, N].

    Returns:
        Scalar, float32 (float64 for float64 inputs), from 0 (unrelated) to 1; differentiable.

    >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> gates = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    >>> round(similarity_correlation(inputs, gates).item(), 3)
    0.5
    """
    return ops.similarity_correlation(inputs, gates)


def mixture_nll(gate_logits: Tensor, log_probs: Tensor) -> Tensor:
    """The negative log-likelihood of a mixture: ``-mean(logsumexp_k(log g_k + log p_k))``.

    Args:
        gate_logits: [..., K], of which g = softmax.
        log_probs: [..., K], what each component gives the target.

    >>> mixture_nll(torch.zeros(1, 2), torch.tensor([[0.5, 0.25]]).log()).exp().item()  # 1 / 0.375
    2.6666...
    """
    return ops.mixture_nll(gate_logits, log_probs)


def infonce(scores: Tensor) -> Tensor:
    """A lower bound on the information I(x; g) from the scores of all pairs: InfoNCE.

    ``log B + mean_i(scores_ii - logsumexp_j(scores_ij))``, at most log B (van den Oord 2018,
    arXiv:1807.03748). To raise the information, add its negative to the loss; ``nn.InfoNCE`` has a
    critic that makes the scores.

    Args:
        scores: [B, B], of input i with gates j.

    >>> infonce(torch.zeros(4, 4)).item()  # the critic knows nothing
    0.0
    """
    return ops.infonce(scores)


def mine(joint_scores: Tensor, marginal_scores: Tensor) -> Tensor:
    """A lower bound on the information I(x; g) by Donsker and Varadhan.

    ``mean(joint) - log(mean(exp(marginal)))`` (MINE, Belghazi 2018, arXiv:1801.04062). ``nn.MINE``
    has a critic that makes the scores.

    Args:
        joint_scores: [B], of inputs with their own gates.
        marginal_scores: [M], of inputs with the gates of others.

    >>> round(mine(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])).item(), 3)
    1.0
    """
    return ops.mine(joint_scores, marginal_scores)


# A saved export names the types of its results; without these lines it could not.
_register_namedtuple(LossReport, serialized_type_name="equipoise.LossReport")
_register_namedtuple(TrainingLoss, serialized_type_name="equipoise.TrainingLoss")


def _value(routing: RoutingResult, name: str, **options: Any) -> Tensor:
    """The unscaled value of one loss, whatever K is."""
    return _balance_loss(routing, {name: {"coeff": 1.0, **options}}, "none", False).total


def _balance_loss(
    routing: RoutingResult,
    losses: Mapping[str, "float | Tensor | Mapping[str, Any]"],
    normalize: str,
    guard_dense: bool,
) -> LossReport:
    by_scope: dict[tuple, dict[str, dict[str, Any]]] = {}
    for name, value in losses.items():
        options = dict(value) if isinstance(value, Mapping) else {"coeff": value}
        check_loss(name, options)
        scope = options.pop("scope", "batch"), options.pop("group", None)
        by_scope.setdefault(scope, {})[name] = options
    reports = [
        _of_scope(routing, scope, group, scoped, normalize, guard_dense)
        for (scope, group), scoped in by_scope.items()
    ]
    if len(reports) == 1:
        return reports[0]
    if not reports:
        raise ValueError("balance_loss: losses must name at least one loss, got none")
    merged = [{k: v for report in reports for k, v in report[i].items()} for i in (1, 2, 3)]
    return LossReport(sum(report.total for report in reports), *merged)


def check_loss(name: str, options: dict[str, Any]) -> None:
    """Refuses options that a loss of `balance_loss` does not take; the op knows the names."""
    if "coeff" not in options:
        raise ValueError(f"balance_loss: '{name}' needs a 'coeff', got {options}")
    coefficient = options["coeff"]
    if name != "token_entropy" and not isinstance(coefficient, Tensor) and not coefficient >= 0:
        raise ValueError(
            f"balance_loss: the coefficient of '{name}' must be >= 0, got {coefficient}"
        )
    allowed = _OPTIONS.get(name, {"scope", "group"})
    for option in options:
        if option != "coeff" and option not in allowed:
            raise ValueError(
                f"balance_loss: '{name}' takes coeff, {', '.join(sorted(allowed))}; got '{option}'"
            )
    scope = options.get("scope", "batch")
    if scope not in _SCOPES:
        raise ValueError(f"balance_loss: scope must be among {_SCOPES}, got {scope!r}")
    of = options.get("of", "gates")
    if of not in ("gates", "probs"):
        raise ValueError(f"balance_loss: of must be 'gates' or 'probs', got {of!r}")


def _of_scope(
    routing: RoutingResult,
    scope: str,
    group: "torch.distributed.ProcessGroup | None",
    losses: dict[str, dict[str, Any]],
    normalize: str,
    guard_dense: bool,
) -> LossReport:
    sums = routing._stats()
    if sums.dim() == 2 and scope != "sequence":
        sums = sums.sum(0)
    names, gate_sums = [], None
    for name, options in losses.items():
        gates = name == "importance" and options.get("of", "gates") == "gates"
        if gates:
            gate_sums = _gate_sums(routing, options.get("token_weights")).to(sums.dtype)
        names.append("importance_of_probs" if name == "importance" and not gates else name)
    if scope == "global":
        sums = distributed.sum_over_ranks(sums, group)
        gate_sums = None if gate_sums is None else distributed.sum_over_ranks(gate_sums, group)
    coefficients = _coefficients([options["coeff"] for options in losses.values()], sums.device)
    total, values = ops.balance_loss(
        sums,
        coefficients,
        names,
        routing.top_k,
        gate_sums,
        _expert_weights(losses.get("switch", {}), routing.num_experts, sums),
        losses.get("device", {}).get("num_devices", 1),
        losses.get("importance", {}).get("unbiased", False),
        normalize,
        guard_dense,
    )
    scaled = values.detach() * coefficients
    return LossReport(
        total,
        *(
            dict(zip(losses, parts.unbind(), strict=True))
            for parts in (values, scaled, coefficients)
        ),
    )


def _coefficients(values: list["float | Tensor"], device: torch.device) -> Tensor:
    if device.type == "cpu" and not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=torch.float32)
    # Filled on the device: a copy from the host would wait for it.
    return torch.stack(
        [
            value.detach().to(torch.float32)
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.float32, device=device)
            for value in values
        ]
    )


def _gate_sums(routing: RoutingResult, token_weights: Tensor | None) -> Tensor:
    weights = routing.topk_weights
    if token_weights is not None:
        weights = weights * token_weights.unsqueeze(-1)
    return expert_bincount(routing.topk_indices, routing.num_experts, weights)


def _expert_weights(switch: dict[str, Any], num_experts: int, sums: Tensor) -> Tensor | None:
    weights, shares = switch.get("expert_weights"), switch.get("target_shares")
    if weights is not None and shares is not None:
        raise ValueError("balance_loss: 'switch' takes expert_weights or target_shares, not both")
    if shares is not None:
        weights = 1 / (num_experts * shares)
    return None if weights is None else weights.detach().to(sums.dtype)


def _needs_choices(losses: Mapping[str, "float | Tensor | Mapping[str, Any]"]) -> bool:
    """Whether one of the losses is made of the chosen experts, not of probabilities alone."""
    importance = losses.get("importance")
    of_gates = importance is not None and (
        not isinstance(importance, Mapping) or importance.get("of", "gates") == "gates"
    )
    return of_gates or "switch" in losses or "device" in losses


def are_probabilities(rows: Tensor) -> Tensor:
    """Scalar bool: whether each row of [..., E] is >= 0 and adds up to 1; waits for nothing."""
    sums = rows.sum(-1, dtype=torch.float32)
    return (rows >= 0).all() & ((sums - 1).abs() < 1e-2).all()


def _warn_of_probabilities(logits: Tensor) -> None:
    """A look at a few rows, where it costs next to nothing: on the CPU and outside of a graph."""
    if torch.compiler.is_compiling() or logits.device.type != "cpu" or logits.shape[-1] < 2:
        return
    rows = logits.detach().reshape(-1, logits.shape[-1])[:16]
    if len(rows) and bool(are_probabilities(rows)):
        warnings.warn(
            "balance_loss_from_logits: logits look like probabilities (rows in [0, 1] that add up "
            "to 1), of which the loss would be near 1 whatever the balance; if they are, pass "
            "from_probabilities=True",
            stacklevel=3,
        )

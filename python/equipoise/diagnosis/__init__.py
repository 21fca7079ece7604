# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a routing, by how much, and what to do about it.

A rule looks at facts, and is silent without them: `Diagnosis.checked` names the rules that had
what they need. In the order of cause and effect:

    never-updated            no step, no token, or the same counts again and again
    nan-logits               NaN or +inf logits of a real token
    probabilities-as-logits  rows in [0, 1] that add up to 1
    padding-counted          CV with and without padding differ by a factor of 2, or the caller's
                             counts or loss are those with padding
    dense-routing            K = E, and a balance loss is on
    bias-not-float32         a selection bias in half precision
    aux-loss-scaled          a Switch loss below 0.5
    blind-spot               skewed counts, of which the loss sees less than a tenth
    layers-cancel            CV of the sum of the layers below half the mean CV of the layers
    router-without-gradient  no gradient of the main loss
    loss-too-weak, -strong   gradient of the balance loss below 1 %, above 30 % of the main one's
    micro-batch-scope        micro-batches twice as far from 1 as all of them together
    bias-oscillates          back and forth in the last 6 updates, half of the experts
    bias-drifts              mean above 3 standard deviations
    dead-experts             no token
    starved-experts          less than 10 % of a fair share
    hot-experts              twice a fair share or more
    dropped-tokens           more than 1 % of the slots
    identical-experts        cosine above 0.95
    over-balanced            token entropy above 98 % of log E, information below 2 % of it

Skewed is a CV above 0.5. With counts C_e of mean m and CV^2 their variance over m^2, the Switch
loss `E sum(f P)` is `1 + eps CV^2` for probabilities that follow the counts with strength eps,
`P = u + eps (f - u)`: that is what the blind spot is measured by.

Few tokens are uneven by chance. A fair router's counts are close to Poisson's, so that CV^2 is
about 1 / m; what such a router would show as well is no finding.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..analyzer import RoutingAnalyzer
from .facts import gather
from .findings import SEVERITIES, Diagnosis, Finding
from .rules import RULES

__all__ = ["Diagnosis", "Finding", "diagnose"]


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
        aux_loss: the Switch loss as it was reported, unscaled: 1 at balance (Hugging Face's is
            divided by K for that). One number, then the mean over the layers, or one per layer.
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
        >>> import torch
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
    facts = gather(**given)
    findings, checked = [], []
    for rule, look in RULES.items():
        found = look(facts)
        if found is not None:
            checked.append(rule)
            findings += found
    if model is not None:
        from ..models import audit  # looks at this module, in its turn

        checked.append("audit")
        findings += audit(model).findings
    order = {rule: place for place, rule in enumerate(RULES)}
    findings.sort(
        key=lambda f: (
            SEVERITIES.index(f.severity),
            order.get(f.rule, -1),  # what an audit finds is a cause
            -f.confidence,
            -1 if f.layer is None else f.layer,
        )
    )
    return Diagnosis(findings, checked)

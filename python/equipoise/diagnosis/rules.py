# SPDX-License-Identifier: Apache-2.0
"""The rules: each looks at facts and says what it has found, or None without the facts it needs.

All thresholds stand beside their rules.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..metrics import expert_similarity, load_metrics, switch_value
from .facts import Facts
from .findings import Finding


def _never_updated(facts: Facts) -> list[Finding] | None:
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


def _nan_logits(facts: Facts) -> list[Finding] | None:
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


def _probabilities_as_logits(facts: Facts) -> list[Finding] | None:
    if facts.logits is None:
        return None
    found = []
    for layer in facts.probabilities:
        probs, counts = facts.logits[layer].double().cpu(), facts.counts[layer]
        true, flat = (switch_value(counts, p.sum(0)).item() for p in (probs, probs.softmax(-1)))
        found.append(
            Finding(
                "probabilities-as-logits",
                "critical",
                f"the logits are probabilities (rows in [0, 1] that add up to 1): a second softmax "
                f"makes a loss of {flat:.3f} where it is {true:.3f}, with hardly a gradient.",
                {
                    "loss_of_double_softmax": round_to_six(flat),
                    "loss": round_to_six(true),
                    "farthest_row_sum": round_to_six((probs.sum(-1) - 1).abs().max().item()),
                },
                "hand the raw output of the router to the loss, or say from_probabilities=True to "
                "balance_loss_from_logits",
                0.98,
                facts.layer(layer),
            )
        )
    return found


def _padding_counted(facts: Facts) -> list[Finding] | None:
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
                        {"cv": round_to_six(masked), "cv_with_padding": round_to_six(unmasked)},
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
                        "aux_loss": round_to_six(reported),
                        "loss": round_to_six(masked),
                        "loss_with_padding": round_to_six(unmasked),
                    },
                    remedy,
                    0.9,
                )
            )
    else:
        return None
    return found


def _dense_routing(facts: Facts) -> list[Finding] | None:
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


def _bias_not_float32(facts: Facts) -> list[Finding] | None:
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
                    "largest_bias": round_to_six(largest),
                    "spacing": round_to_six(spacing),
                    **({} if rate is None else {"bias_update_rate": rate}),
                },
                "keep expert_bias float32 whatever the model is cast to, as nn.LossFreeBalancer "
                "does",
                0.99,
                facts.layer(layer, facts.bias),
            )
        )
    return found


def _aux_loss_scaled(facts: Facts) -> list[Finding] | None:
    if facts.reported_loss is None:
        return None
    return [
        Finding(
            "aux-loss-scaled",
            "note",
            f"a Switch loss of {loss:.4g} is too small to be the unscaled one, which is about 1 at "
            "balance.",
            {"aux_loss": round_to_six(loss)},
            "report the loss before it is multiplied with its coefficient",
            0.8,
            facts.layer(layer, facts.reported_loss),
        )
        for layer, loss in enumerate(facts.reported_loss.tolist())
        if loss < _SCALED
    ]


def _blind_spot(facts: Facts) -> list[Finding] | None:
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
                    "aux_loss": round_to_six(loss),
                    "loss_if_probabilities_followed": round_to_six(followed),
                    "follows": round_to_six(eps),
                    "largest_mean_probability": round_to_six(blind["largest"]),
                    "uniform_probability": round_to_six(blind["uniform"]),
                    "cv": round_to_six(blind["cv"]),
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


def _layers_cancel(facts: Facts) -> list[Finding] | None:
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
                "mean_cv": round_to_six(mean_cv),
                "cv_concatenated": round_to_six(joined_cv),
                "loss_per_layer": round_to_six(apart),
                "loss_concatenated": round_to_six(together),
                "cv_per_layer": [round_to_six(x) for x in cv.tolist()],
            },
            "compute the loss of each layer by itself and add them up (Hugging Face's "
            "load_balancing_loss_func concatenates them)",
            0.9,
        )
    ]


def _router_without_gradient(facts: Facts) -> list[Finding] | None:
    if facts.main_norms is None:
        return None
    return [
        Finding(
            "router-without-gradient",
            "critical",
            "the main loss has no gradient at the router: it does not learn what is good for the "
            "task.",
            {"main_gradient": main, "aux_gradient": round_to_six(aux)},
            "multiply the experts' outputs with the weights of the router, undetached; with "
            "top_k = 1 switch norm_topk_prob off, which makes that weight the constant 1",
            0.95,
            facts.layer(layer, facts.main_norms),
        )
        for layer, (main, aux) in enumerate(zip(facts.main_norms, facts.aux_norms, strict=True))
        if main == 0
    ]


def _loss_too_weak(facts: Facts) -> list[Finding] | None:
    return _loss_strength(
        facts,
        "loss-too-weak",
        lambda ratio: ratio < _WEAK,
        # A weak loss is right where the loads are even, and no cure where it is blind.
        lambda layer: not _balanced(facts, layer) and layer not in (_blindness(facts) or {}),
    )


def _loss_too_strong(facts: Facts) -> list[Finding] | None:
    return _loss_strength(facts, "loss-too-strong", lambda ratio: ratio > _STRONG, lambda _: True)


def _loss_strength(
    facts: Facts,
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
            "ratio": round_to_six(ratio),
            "main_gradient": round_to_six(main),
            "aux_gradient": round_to_six(aux),
        }
        remedy = "raise the coefficient" if ratio < _AIM else "lower the coefficient"
        if aux > 0:
            factor = _AIM / ratio
            evidence["factor"] = round_to_six(factor)
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


def _micro_batch_scope(facts: Facts) -> list[Finding] | None:
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
                "mean_micro_loss": round_to_six(micro),
                "global_loss": round_to_six(whole),
                "micro_batches": len(facts.micro_losses),
            },
            'balance the global batch: F.switch_loss(scope="global"), and '
            "functional.concatenate_routings over accumulated micro-batches",
            0.85,
        )
    ]


def _bias_oscillates(facts: Facts) -> list[Finding] | None:
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
                {"share_of_experts": round_to_six(share), "amplitude": round_to_six(amplitude)},
                "a smaller bias_update_rate, small against the differences between scores; or "
                'mode="proportional" or "quantile"',
                0.85,
                facts.layer(layer, back_and_forth),
            )
        )
    return found


def _bias_drifts(facts: Facts) -> list[Finding] | None:
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
                    {"mean": round_to_six(mean), "std": round_to_six(spread)},
                    "nn.LossFreeBalancer(center=True)",
                    0.9,
                    facts.layer(layer, facts.bias),
                )
            )
    return found


def _dead_experts(facts: Facts) -> list[Finding] | None:
    return _underused(facts, "dead-experts", "critical", lambda counts, mean: counts == 0, 0)


def _starved_experts(facts: Facts) -> list[Finding] | None:
    return _underused(
        facts,
        "starved-experts",
        "warning",
        lambda counts, mean: (counts > 0) & (counts < _STARVED * mean),
        _STARVED,
    )


def _underused(
    facts: Facts,
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
                    "fair_share": round_to_six(mean.item()),
                    "share_of_experts": round_to_six(len(experts) / len(counts)),
                    "expected_by_chance": round_to_six(by_chance),
                },
                _cure(facts, layer) + ", from the start; for experts that are lost noise "
                "(nn.NoisyTopKRouter), or take them out (nn.DynamicExperts)",
                round_to_six(1 - by_chance),
                facts.layer(layer),
            )
        )
    return found


def _hot_experts(facts: Facts) -> list[Finding] | None:
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
                        name: round_to_six(load[name])
                        for name in (*names, "perplexity", "kl_to_uniform")
                    },
                },
                _cure(facts, layer) + "; until then a capacity, so that no device waits for the "
                "fullest expert",
                0.95,
                facts.layer(layer),
            )
        )
    return found


def _dropped_tokens(facts: Facts) -> list[Finding] | None:
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
                    "drop_rate": round_to_six(rate),
                    "dropped_per_expert": [int(n) for n in dropped.tolist()],
                    "capacity_factor_for_99_percent": round_to_six(factor),
                },
                "balance the load first; then a larger capacity_factor, or None: no token is "
                "dropped",
                0.95,
                facts.layer(layer),
            )
        )
    return found


def _identical_experts(facts: Facts) -> list[Finding] | None:
    if facts.expert_weights is None:
        return None
    found = []
    for layer, weights in enumerate(facts.expert_weights):
        # A part of them tells as well whether they are the same: experts are large.
        numbers = weights.detach().flatten(1)
        numbers = numbers[:, :: math.ceil(numbers.shape[1] / 2**16)]
        similarity = expert_similarity(numbers).triu(diagonal=1).nan_to_num()
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
                {
                    "pairs": pairs[:10].tolist(),
                    "num_pairs": len(pairs),
                    "cosine": round_to_six(largest),
                },
                "start the experts from different random numbers; of experts copied from one dense "
                "layer noise on the copies, and see whether they part in training",
                0.9,
                facts.layer(layer, facts.expert_weights),
            )
        )
    return found


def _over_balanced(facts: Facts) -> list[Finding] | None:
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
                    "token_entropy": round_to_six(nats),
                    "log_num_experts": round_to_six(most),
                    "mutual_information": round_to_six(known),
                },
                "a smaller coefficient of the balance loss, or balance over the global batch; in "
                "the first steps of a run it is as it should be",
                0.7,
                facts.layer(layer),
            )
        )
    return found


# In the order of cause and effect; the ranking keeps it within one severity.
RULES: dict[str, Callable[[Facts], list[Finding] | None]] = {
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


def _skewed(facts: Facts) -> list[bool]:
    """Of each layer, whether its counts have a CV of 0.5 beyond what chance gives them."""
    excess, noise = _excess(facts.counts)
    return ((excess >= 0.25) & (excess > 4 * noise)).tolist()


def _balanced(facts: Facts, layer: int) -> bool:
    """Whether the counts are there and the layer is not skewed."""
    return facts.counts is not None and layer < facts.num_layers and not _skewed(facts)[layer]


def _excess(counts: Tensor) -> tuple[Tensor, Tensor]:
    """CV^2 of [L, E] counts above the 1 / m of Poisson's, and the deviation of that by chance."""
    cv, mean = load_metrics(counts.long())["cv"], counts.mean(-1)
    return cv.square() - 1 / mean, math.sqrt(2 / max(counts.shape[-1] - 1, 1)) / mean


def _blindness(facts: Facts) -> dict[int | None, dict[str, float]] | None:
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


def _cure(facts: Facts, layer: int) -> str:
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


def round_to_six(x: float) -> float:
    """Six digits: what evidence is read to."""
    return float(f"{x:.6g}")

# SPDX-License-Identifier: Apache-2.0
"""diagnose: the golden case, every rule where it fires and where it must not, and bad input."""

import html.parser
import json
import math
import re
import sys
import types

import pytest
import torch

import equipoise.functional as F
from equipoise import RoutingAnalyzer, diagnose, nn
from equipoise.diagnosis import Diagnosis, Finding
from equipoise.diagnosis.rules import RULES

GOLDEN = torch.tensor([1, 2, 261, 266, 6, 253, 229, 6])
EVEN = torch.tensor([131, 120, 135, 126, 129, 122, 133, 128])  # as a fair router has them
HOT = torch.tensor([500, 80, 76, 70, 72, 75, 77, 74])
EXPERTS = 8


def healthy_logits(tokens=2048, seed=0):
    """Decided, and even over the tokens."""
    return 2 * torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))


def blind_logits(tokens=2048):
    """Almost uniform, but four experts always win by a hair."""
    logits = 1e-2 * healthy_logits(tokens)
    logits[:, [2, 3, 5, 6]] += 0.05
    return logits


def collapsed_layers(same):
    """Four layers, each of which uses two of eight experts: all the same ones, or each others."""
    logits = []
    for layer in range(4):
        x = healthy_logits(seed=layer)
        x[:, [0, 1] if same else [2 * layer, 2 * layer + 1]] += 12
        logits.append(x)
    return logits


def padded():
    """Half of the tokens are padding, all alike."""
    logits = healthy_logits()
    mask = torch.arange(len(logits)) % 2 == 0
    logits[~mask] = torch.tensor([4.0, 3.0, 0, 0, 0, 0, 0, 0])
    return logits, mask


def padded_counts(use_mask):
    logits, mask = padded()
    return F.topk_gating(logits, 2, token_mask=mask if use_mask else None).tokens_per_expert


def padded_loss(use_mask):
    logits, mask = padded()
    return F.switch_loss(F.topk_gating(logits, 2, token_mask=mask if use_mask else None))


def padded_arguments():
    logits, mask = padded()
    return {"logits": logits, "token_mask": mask, "top_k": 2}


def analyzer_of(*steps, **options):
    analyzer = RoutingAnalyzer(EXPERTS, **options)
    for step in steps:
        analyzer.update(step)
    return analyzer


def with_drops(capacity, **options):
    r = F.topk_gating(healthy_logits() + torch.arange(EXPERTS) / 4, 2)
    permuted = F.moe_permute(torch.zeros(2048, 1), r.topk_indices, EXPERTS, capacity=capacity)
    analyzer = RoutingAnalyzer(EXPERTS)
    analyzer.update(r, permuted)
    return analyzer


def with_nan(value, layer=1):
    layers = [healthy_logits(seed=seed) for seed in range(3)]
    for bad in range(layer, 3):
        layers[bad][7, 3] = value
    return layers


def swinging_bias(period, steps=12):
    """[steps, E]: every expert goes up and down with that period."""
    ups = (torch.arange(steps) // (period // 2)) % 2
    return 0.01 * (ups[:, None] * torch.tensor([1.0, -1.0] * 4))


def random_walk(steps=20):
    """[steps, E]: every expert turns around now and then."""
    return 0.01 * torch.randn(steps, EXPERTS, generator=torch.Generator().manual_seed(0)).cumsum(0)


def alike(num_alike):
    weights = torch.randn(EXPERTS, 16, 32)
    weights[:num_alike] = weights[0] * torch.linspace(1, 2, num_alike)[:, None, None]
    return weights


def dense_analyzer():
    return analyzer_of(F.topk_gating(healthy_logits(), EXPERTS))


# rule: (arguments that it fires on, arguments that it has all it needs in and must be silent on)
CASES = {
    "never-updated": [
        (lambda: {"analyzer": RoutingAnalyzer(EXPERTS)}, lambda: {"analyzer": analyzer_of(EVEN)}),
        (lambda: {"tokens_per_expert": 0 * EVEN}, lambda: {"tokens_per_expert": EVEN}),
        (
            lambda: {"tokens_per_expert": EVEN, "previous_tokens_per_expert": EVEN},
            lambda: {"tokens_per_expert": EVEN, "previous_tokens_per_expert": EVEN.flip(0)},
        ),
        (
            lambda: {"analyzer": analyzer_of(EVEN.flip(0), EVEN, EVEN, EVEN)},
            lambda: {"analyzer": analyzer_of(EVEN, EVEN, EVEN, EVEN.flip(0))},
        ),
        (  # even by design, and so few that they are equal by chance
            lambda: {"analyzer": analyzer_of(HOT, HOT, HOT)},
            lambda: {"analyzer": analyzer_of(*[torch.full((EXPERTS,), 128)] * 3)},
        ),
    ],
    "nan-logits": [
        (
            lambda: {"logits": with_nan(math.nan), "top_k": 2},
            lambda: {"logits": with_nan(-math.inf), "top_k": 2},  # an absent expert
        ),
        (
            lambda: {"logits": with_nan(math.inf), "top_k": 2},
            lambda: {"logits": with_nan(9.0), "top_k": 2},
        ),
        (
            lambda: {"analyzer": analyzer_of(F.topk_gating(with_nan(math.nan)[2], 2))},
            lambda: {"analyzer": analyzer_of(F.topk_gating(with_nan(0.0)[2], 2))},
        ),
    ],
    "probabilities-as-logits": [
        (
            lambda: {"logits": healthy_logits().softmax(-1), "top_k": 2},
            lambda: {"logits": healthy_logits(), "top_k": 2},
        ),
        (
            lambda: {"logits": healthy_logits().softmax(-1).bfloat16(), "top_k": 2},
            lambda: {"logits": healthy_logits().sigmoid(), "top_k": 2},
        ),
    ],
    "padding-counted": [
        (
            lambda: {
                "tokens_per_expert": padded_counts(True),
                "unmasked_tokens_per_expert": padded_counts(False),
            },
            lambda: {
                "tokens_per_expert": EVEN,
                "unmasked_tokens_per_expert": 2 * EVEN,
            },
        ),
        (
            lambda: {"tokens_per_expert": HOT, "unmasked_tokens_per_expert": HOT + 500},
            lambda: {"tokens_per_expert": HOT, "unmasked_tokens_per_expert": HOT + 50},
        ),
        (
            lambda: {"tokens_per_expert": padded_counts(False), **padded_arguments()},
            lambda: {
                "tokens_per_expert": padded_counts(True),
                "aux_loss": padded_loss(True),
                **padded_arguments(),
            },
        ),
        (
            lambda: {"aux_loss": padded_loss(False), **padded_arguments()},
            lambda: {"aux_loss": padded_loss(True), **padded_arguments()},
        ),
    ],
    "dense-routing": [
        (
            lambda: {"tokens_per_expert": 0 * EVEN + 99, "top_k": 8, "aux_loss_coeff": 0.01},
            lambda: {"tokens_per_expert": 0 * EVEN + 99, "top_k": 8, "aux_loss_coeff": 0.0},
        ),
        (
            lambda: {"analyzer": dense_analyzer(), "aux_loss": 1.0},
            lambda: {"analyzer": dense_analyzer()},
        ),
        (
            lambda: {"logits": healthy_logits(), "top_k": 8, "aux_loss": 1.0},
            lambda: {"logits": healthy_logits(), "top_k": 7, "aux_loss": 1.0},
        ),
    ],
    "bias-not-float32": [
        (
            lambda: {"expert_bias": torch.linspace(-1, 1, 8).bfloat16()},
            lambda: {"expert_bias": torch.linspace(-1, 1, 8)},
        ),
        (
            lambda: {"expert_bias": torch.zeros(3, 8).half(), "bias_update_rate": 1e-3},
            lambda: {"expert_bias": torch.linspace(-1, 1, 8).double(), "bias_update_rate": 1e-3},
        ),
    ],
    "aux-loss-scaled": [
        (
            lambda: {"tokens_per_expert": GOLDEN, "aux_loss": 0.010122},
            lambda: {"tokens_per_expert": EVEN, "aux_loss": 0.98},
        ),
    ],
    "blind-spot": [
        (
            lambda: {"tokens_per_expert": GOLDEN, "aux_loss": 1.0122},
            lambda: {"tokens_per_expert": EVEN, "aux_loss": 1.0122},
        ),
        (
            lambda: {"logits": blind_logits(), "top_k": 2},
            lambda: {"logits": 100 * blind_logits(), "top_k": 2},  # now the loss sees it
        ),
        (
            lambda: {"analyzer": analyzer_of(F.topk_gating(blind_logits(), 2))},
            lambda: {"analyzer": analyzer_of(F.topk_gating(healthy_logits(), 2))},
        ),
        (  # the mean of two layers
            lambda: {"tokens_per_expert": torch.stack([GOLDEN, GOLDEN]), "aux_loss": 1.0122},
            lambda: {"tokens_per_expert": torch.stack([GOLDEN, GOLDEN]), "aux_loss": 1.9},
        ),
        (  # so few tokens that a fair router does the same
            lambda: {"tokens_per_expert": 4 * GOLDEN, "aux_loss": [1.0122]},
            lambda: {"tokens_per_expert": torch.tensor([0, 2, 1, 0, 1]), "aux_loss": 1.01},
        ),
    ],
    "layers-cancel": [
        (
            lambda: {"logits": collapsed_layers(same=False), "top_k": 2},
            lambda: {"logits": collapsed_layers(same=True), "top_k": 2},
        ),
        (
            lambda: {"tokens_per_expert": torch.stack([GOLDEN, 267 - GOLDEN])},
            lambda: {"tokens_per_expert": torch.stack([EVEN, EVEN.flip(0)])},
        ),
    ],
    "router-without-gradient": [
        (
            lambda: {"main_gradient": torch.zeros(8, 4), "aux_gradient": torch.ones(8, 4)},
            lambda: {"main_gradient": torch.ones(8, 4), "aux_gradient": 0.1 * torch.ones(8, 4)},
        ),
    ],
    "loss-too-weak": [
        (
            lambda: {"main_gradient": 1.0, "aux_gradient": 0.005, "aux_loss_coeff": 0.01},
            lambda: {"main_gradient": 1.0, "aux_gradient": 0.02, "aux_loss_coeff": 0.01},
        ),
        (
            lambda: {"main_gradient": 1.0, "aux_gradient": 0.0, "tokens_per_expert": HOT},
            lambda: {"main_gradient": 1.0, "aux_gradient": 0.0, "tokens_per_expert": EVEN},
        ),
        (  # a blind loss is not cured by a larger coefficient
            lambda: {"main_gradient": 1, "aux_gradient": 1e-4, "tokens_per_expert": GOLDEN},
            lambda: {
                "main_gradient": 1,
                "aux_gradient": 1e-4,
                "tokens_per_expert": GOLDEN,
                "aux_loss": 1.0122,
            },
        ),
    ],
    "loss-too-strong": [
        (
            lambda: {"main_gradient": [1.0, 1.0], "aux_gradient": [0.1, 0.5]},
            lambda: {"main_gradient": [1.0, 1.0], "aux_gradient": [0.1, 0.2]},
        ),
    ],
    "micro-batch-scope": [
        (
            lambda: {"micro_losses": [2.4, 2.6, 2.5], "global_loss": 1.1},
            lambda: {"micro_losses": [1.15, 1.1, 1.12], "global_loss": 1.1},
        ),
        (
            lambda: {"micro_losses": torch.tensor([1.4]), "global_loss": torch.tensor(1.1)},
            lambda: {"micro_losses": torch.tensor([1.06]), "global_loss": torch.tensor(1.01)},
        ),
        (
            lambda: {"micro_losses": [1.6, 1.6], "global_loss": 1.25},
            lambda: {"micro_losses": [1.4, 1.4], "global_loss": 1.25},
        ),
    ],
    "bias-oscillates": [
        (
            lambda: {"bias_history": swinging_bias(2), "tokens_per_expert": HOT},
            lambda: {"bias_history": swinging_bias(4), "tokens_per_expert": HOT},
        ),
        (
            lambda: {"bias_history": swinging_bias(2)},
            lambda: {"bias_history": swinging_bias(2), "tokens_per_expert": EVEN},
        ),
        (
            lambda: {"bias_history": swinging_bias(2), "tokens_per_expert": GOLDEN},
            lambda: {"bias_history": random_walk(), "tokens_per_expert": GOLDEN},
        ),
    ],
    "bias-drifts": [
        (
            lambda: {"expert_bias": 1 + 0.01 * torch.linspace(-1, 1, 8)},
            lambda: {"expert_bias": 0.01 + torch.linspace(-1, 1, 8)},
        ),
        (
            lambda: {"expert_bias": torch.full((8,), 0.5)},
            lambda: {"expert_bias": torch.zeros(8)},
        ),
    ],
    "dead-experts": [
        (
            lambda: {"tokens_per_expert": torch.tensor([[9, 9], [40, 0]])},
            lambda: {"tokens_per_expert": torch.tensor([[9, 9], [4, 0]])},  # by chance
        ),
        (
            lambda: {"analyzer": analyzer_of(F.topk_gating(collapsed_layers(True)[0] * 9, 1))},
            lambda: {"analyzer": analyzer_of(F.topk_gating(healthy_logits(), 1))},
        ),
    ],
    "starved-experts": [
        (
            lambda: {"tokens_per_expert": GOLDEN},
            lambda: {"tokens_per_expert": torch.tensor([14, 20, 261, 266, 26, 253, 229, 26])},
        ),
        (
            lambda: {"tokens_per_expert": torch.tensor([4, 50, 50, 60])},
            lambda: {"tokens_per_expert": torch.tensor([5, 50, 50, 60])},
        ),
    ],
    "hot-experts": [
        (lambda: {"tokens_per_expert": HOT}, lambda: {"tokens_per_expert": HOT.clamp_max(140)}),
        (
            lambda: {"tokens_per_expert": 10 * torch.tensor([6, 1, 1, 1])},
            lambda: {"tokens_per_expert": torch.tensor([6, 1, 1, 1])},  # by chance
        ),
    ],
    "dropped-tokens": [
        (
            lambda: {
                "tokens_per_expert": HOT,
                "dropped_per_expert": (HOT - 160).clamp_min(0),
            },
            lambda: {
                "tokens_per_expert": HOT,
                "dropped_per_expert": (HOT - 490).clamp_min(0),
            },
        ),
        (lambda: {"analyzer": with_drops(500)}, lambda: {"analyzer": with_drops(2048)}),
    ],
    "identical-experts": [
        (
            lambda: {"expert_weights": [alike(1), alike(3)]},
            lambda: {"expert_weights": [alike(1), -alike(1)]},
        ),
    ],
    "over-balanced": [
        (
            lambda: {"logits": 0.05 * healthy_logits(), "top_k": 2},
            lambda: {"logits": healthy_logits(), "top_k": 2},
        ),
        (  # flat as well, but the counts are skewed: that is the blind spot
            lambda: {"analyzer": analyzer_of(F.topk_gating(0.05 * healthy_logits(), 2))},
            lambda: {"analyzer": analyzer_of(F.topk_gating(blind_logits(), 2))},
        ),
    ],
}


def test_every_rule_has_its_cases():
    assert list(CASES) == list(RULES)


@pytest.mark.parametrize(
    ("rule", "case"), [(rule, n) for rule, cases in CASES.items() for n in range(len(cases))]
)
def test_rule(rule, case):
    fires, silent = CASES[rule][case]
    diagnosis = diagnose(**fires())
    found = [finding for finding in diagnosis.findings if finding.rule == rule]
    assert found and rule in diagnosis.checked
    for finding in found:
        assert finding.evidence and finding.remedy and finding.message.endswith(".")
    assert Diagnosis.from_json(diagnosis.to_json()) == diagnosis
    diagnosis = diagnose(**silent())
    assert rule in diagnosis.checked, "the rule did not have what it needs"
    assert rule not in [finding.rule for finding in diagnosis.findings]


def test_golden_case():
    diagnosis = diagnose(GOLDEN, aux_loss=1.0122)
    assert [f.rule for f in diagnosis.findings] == ["blind-spot", "starved-experts", "hot-experts"]
    blind, starved, hot = diagnosis.findings
    assert blind.severity == "critical" and blind.layer is None and blind.confidence > 0.9
    assert "1.949" in blind.message and "1.0122" in blind.message
    assert round(blind.evidence["loss_if_probabilities_followed"], 3) == 1.949
    assert round(blind.evidence["follows"], 4) == 0.0129
    assert round(blind.evidence["largest_mean_probability"], 4) == 0.1267
    assert blind.remedy.startswith("a loss-free bias (nn.LossFreeBalancer)")
    assert "A larger coefficient does not help" in blind.remedy
    for finding in (starved, hot):
        assert "balance loss or" not in finding.remedy  # which is blind here
    assert starved.evidence["experts"] == [0, 1, 4, 7]
    assert starved.evidence["tokens"] == [1, 2, 6, 6]
    want = {"max_vio": 1.078, "max_vio_tokens": 138, "imbalance_ratio": 2.078, "cv": 0.974}
    want |= {"gini": 0.502, "entropy": 1.458, "perplexity": 4.298, "kl_to_uniform": 0.621}
    assert {name: round(hot.evidence[name], 3) for name in want} == want


def test_the_numbers_of_the_blind_spot_are_those_of_the_probabilities():
    logits = blind_logits()
    (blind, *_) = diagnose(logits=logits, top_k=2).findings
    r = F.topk_gating(logits, 2)
    assert blind.evidence["aux_loss"] == pytest.approx(F.switch_loss(r).item(), rel=1e-5)
    largest = logits.softmax(-1).mean(0).max().item()
    assert blind.evidence["largest_mean_probability"] == pytest.approx(largest, rel=1e-5)
    f = r.tokens_per_expert / r.tokens_per_expert.sum()
    followed = EXPERTS * f.square().sum().item()
    assert blind.evidence["loss_if_probabilities_followed"] == pytest.approx(followed, rel=1e-5)


def test_a_healthy_router_has_no_finding():
    layers = [healthy_logits(seed=seed) for seed in range(3)]
    routings = [F.topk_gating(x, 2) for x in layers]
    counts = torch.stack([r.tokens_per_expert for r in routings])
    losses = [F.switch_loss(r).item() for r in routings]
    analyzer = RoutingAnalyzer(EXPERTS, 3)
    for seed in range(4):
        step = [F.topk_gating(healthy_logits(seed=10 * seed + layer), 2) for layer in range(3)]
        permuted = [F.moe_permute(torch.zeros(2048, 1), r.topk_indices, EXPERTS) for r in step]
        analyzer.update(step, permuted)
    everything = {
        "aux_loss": losses,
        "aux_loss_coeff": 0.01,
        "main_gradient": [1.0, 2.0, 3.0],
        "aux_gradient": [0.1, 0.1, 0.1],
        "expert_bias": 0.01 * torch.randn(3, EXPERTS),
        "bias_history": 0.001 * torch.randn(20, 3, EXPERTS).cumsum(0),
        "bias_update_rate": 0.001,
        "micro_losses": losses,
        "global_loss": sum(losses) / 3,
        "expert_weights": [torch.randn(EXPERTS, 64) for _ in range(3)],
    }
    for given in (
        {"tokens_per_expert": counts, "logits": layers, "top_k": 2},
        {
            "tokens_per_expert": counts,
            "previous_tokens_per_expert": counts.flip(1),
            "unmasked_tokens_per_expert": 2 * counts,
            "dropped_per_expert": 0 * counts,
        },
        {"analyzer": analyzer},
    ):
        diagnosis = diagnose(**given, **everything)
        assert diagnosis.findings == [], str(diagnosis)
    assert str(diagnosis).startswith("no finding\nchecked: never-updated, nan-logits")
    for rule in RULES:
        if rule not in ("probabilities-as-logits", "padding-counted"):  # want logits, a mask
            assert rule in diagnosis.checked


def test_a_fair_router_with_few_tokens_has_no_finding():
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 4, 16, 64, 256):
        for num_experts in (2, 8, 64, 256):
            logits = 2 * torch.randn(tokens, num_experts, generator=generator)
            routing = F.topk_gating(logits, 1)
            found = diagnose(routing.tokens_per_expert, logits=logits).findings
            assert found == [], (tokens, num_experts, found)
    for num_experts in (2, 8):
        counts = torch.stack(
            [
                torch.randint(num_experts, (4,), generator=generator).bincount(
                    minlength=num_experts
                )
                for _ in range(16)
            ]
        )
        assert diagnose(counts).findings == []


def test_one_expert_and_two():
    assert diagnose(torch.tensor([50]), aux_loss=1.0).findings == []
    assert diagnose(logits=torch.ones(9, 1), top_k=1).findings == []
    found = diagnose(torch.tensor([1000, 0]), aux_loss=2.0).findings
    assert [f.rule for f in found] == ["dead-experts", "hot-experts"]


def test_the_gravest_comes_first_then_its_cause():
    found = diagnose(GOLDEN, aux_loss=1.0122, expert_bias=torch.linspace(-1, 1, 8).half()).findings
    assert [f.rule for f in found[:3]] == ["blind-spot", "bias-not-float32", "starved-experts"]


def test_layers_are_named_and_grouped():
    counts = torch.stack([EVEN, GOLDEN, HOT, GOLDEN])
    diagnosis = diagnose(counts, aux_loss=[1.0, 1.02, 1.6, 1.01])
    assert [(f.rule, f.layer) for f in diagnosis.findings] == [
        ("blind-spot", 1),
        ("blind-spot", 3),
        ("starved-experts", 1),
        ("starved-experts", 3),
        ("hot-experts", 1),
        ("hot-experts", 2),
        ("hot-experts", 3),
    ]
    text = str(diagnosis)
    assert "1. critical: blind-spot, layer 1, also layers 3 (confidence" in text
    assert "4. " not in text


def test_layers_that_cancel_in_numbers():
    """The published case: four layers, each on a pair of its own; K at balance is 2 there."""
    counts = torch.zeros(4, 8, dtype=torch.int64)
    for layer in range(4):
        counts[layer, 2 * layer : 2 * layer + 2] = 512
    (finding,) = [f for f in diagnose(counts).findings if f.rule == "layers-cancel"]
    assert finding.evidence["loss_per_layer"] == 4 and finding.evidence["loss_concatenated"] == 1
    assert finding.evidence["cv_concatenated"] == 0


def test_double_softmax_in_numbers():
    logits = collapsed_layers(same=True)[0]
    (finding, *_) = diagnose(logits=logits.softmax(-1), top_k=2).findings
    routing = F.topk_gating(logits, 2)
    assert finding.rule == "probabilities-as-logits"
    assert finding.evidence["loss"] == pytest.approx(F.switch_loss(routing).item(), rel=1e-4)
    flat = F.switch_loss(F.topk_gating(logits.softmax(-1), 2)).item()
    assert finding.evidence["loss_of_double_softmax"] == pytest.approx(flat, rel=1e-4)
    assert finding.evidence["loss"] > 3 > 1.5 > flat


def test_probabilities_are_judged_as_such():
    """Taken for logits they would be almost uniform, which is the blind spot."""
    logits = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    logits[:, :2] += 12
    found = [f.rule for f in diagnose(logits=logits.softmax(-1), top_k=2).findings]
    assert found == ["probabilities-as-logits", "dead-experts", "hot-experts"]
    assert found[1:] == [f.rule for f in diagnose(logits=logits, top_k=2).findings]


def test_a_layer_without_tokens_beside_one_with_probabilities():
    layers = [healthy_logits(0), healthy_logits(64).softmax(-1)]
    found = diagnose(logits=layers, top_k=2).findings
    assert [(f.rule, f.layer) for f in found] == [
        ("never-updated", 0),
        ("probabilities-as-logits", 1),
    ]


def test_the_first_bad_layer_is_named():
    (finding,) = diagnose(logits=with_nan(math.nan, layer=1), top_k=2).findings
    assert finding.layer == 1 and finding.evidence == {"tokens": 1, "layers": [1, 2]}
    assert "layer 1 is the first" in finding.message


def test_masked_rows_may_hold_anything():
    logits, mask = healthy_logits(), torch.arange(2048) % 2 == 0
    logits[~mask] = math.nan
    assert diagnose(logits=logits, token_mask=mask, top_k=2).findings == []
    assert diagnose(logits=logits, top_k=2).findings[0].evidence["tokens"] == 1024


def test_bfloat16_bias_in_numbers():
    bias = torch.linspace(-1, 1, 8).bfloat16()
    (finding,) = diagnose(expert_bias=bias, bias_update_rate=1e-3).findings
    assert finding.severity == "critical"
    assert finding.evidence["spacing"] == 2**-7
    assert (bias[-1] + 1e-3).item() == 1.0  # that is what the finding says
    (finding,) = diagnose(expert_bias=bias, bias_update_rate=1e-2).findings
    assert finding.severity == "warning"


def test_capacity_factor_in_numbers():
    diagnosis = diagnose(HOT, dropped_per_expert=(HOT - 160).clamp_min(0))
    (finding,) = [f for f in diagnosis.findings if f.rule == "dropped-tokens"]
    assert finding.severity == "critical" and finding.evidence["drop_rate"] == 0.332031
    factor = finding.evidence["capacity_factor_for_99_percent"]
    capacity = round(factor * 1024 / 8)
    assert HOT.clamp_max(capacity).sum() >= 0.99 * 1024 > HOT.clamp_max(capacity - 1).sum()


def test_the_loss_strength_says_by_how_much():
    (weak,) = diagnose(main_gradient=1.0, aux_gradient=0.005, aux_loss_coeff=0.01).findings
    assert weak.evidence["ratio"] == 0.005 and weak.evidence["factor"] == 20
    assert "from 0.01 to 0.2" in weak.remedy and "raise" in weak.remedy
    (strong,) = diagnose(main_gradient=2 * torch.ones(4), aux_gradient=torch.ones(4)).findings
    assert strong.evidence["ratio"] == 0.5 and "lower the coefficient" in strong.remedy


def test_only_the_last_steps_of_an_analyzer_are_judged():
    steps = [torch.tensor([1000, 0, 0, 0, 0, 0, 0, 0])] * 3 + [EVEN, EVEN.flip(0)]
    assert diagnose(analyzer=analyzer_of(*steps), last=2).findings == []
    assert diagnose(analyzer=analyzer_of(*steps)).findings != []


def test_json():
    diagnosis = diagnose(torch.stack([GOLDEN, HOT]), aux_loss=[1.0122, 1.3])
    text = diagnosis.to_json()
    record = json.loads(text)
    assert record["findings"][0]["rule"] == "blind-spot" and record["findings"][0]["layer"] == 0
    assert Diagnosis.from_json(text) == diagnosis
    for bad in ("", "[]", "{}", '{"findings": [{}], "checked": []}', text.replace("critical", "x")):
        with pytest.raises(ValueError, match="Diagnosis.from_json: text must be"):
            Diagnosis.from_json(bad)


class Page(html.parser.HTMLParser):
    """Collects tags and text, and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html():
    text = diagnose(GOLDEN, aux_loss=1.0122).to_html()
    page = Page(text)
    assert page.tags[0] == "section" and page.tags.count("li") == 3
    assert "1.949" in page.text and "loss_if_probabilities_followed" in page.text
    assert not re.search(r"https?:|src=|href=|@import|url\(", text)
    evil = '<script>alert("x")</script>&'
    finding = Finding(evil, "note", evil, {evil: evil, "list": [evil]}, evil, 1.0)
    text = Diagnosis([finding], [evil]).to_html()
    assert "<script" not in text and Page(text).text.count(evil) == 7
    assert "No finding." in Page(diagnose(EVEN).to_html()).text


def test_model(monkeypatch):
    """The findings of the audit come in, and the experts of MoELayers are compared."""
    cause = Finding(
        "aux-loss-off", "critical", "It is off.", {"coefficient": 0.0}, "turn it on", 1.0
    )
    models = types.ModuleType("equipoise.models")
    models.audit = lambda model: types.SimpleNamespace(findings=[cause])
    monkeypatch.setitem(sys.modules, "equipoise.models", models)
    model = torch.nn.Sequential(nn.MoELayer(8, 16, 4, 2))
    diagnosis = diagnose(GOLDEN, 1.0122, model=model)
    assert [f.rule for f in diagnosis.findings][:2] == ["aux-loss-off", "blind-spot"]
    assert "identical-experts" in diagnosis.checked and diagnosis.checked[-1] == "audit"
    with torch.no_grad():
        model[0].w_in[1] = model[0].w_in[2]
    (first, second) = diagnose(model=model).findings
    assert (first, second.rule) == (cause, "identical-experts")
    assert second.evidence["pairs"] == [[1, 2]]


def test_nothing_is_changed_and_no_gradient_needed():
    logits = healthy_logits().requires_grad_()
    counts = GOLDEN.clone()
    diagnose(counts, logits=logits, aux_loss=F.switch_loss(F.topk_gating(logits, 2)))
    assert logits.grad is None and torch.equal(counts, GOLDEN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs something to look at: .*, got none"),
        (
            {"top_k": 2, "aux_loss_coeff": 0.1},
            "something to look at: .*, got aux_loss_coeff, top_k",
        ),
        (
            {"tokens_per_expert": EVEN.float()},
            "tokens_per_expert must hold integers .*, got torch.float32",
        ),
        ({"tokens_per_expert": -EVEN}, "tokens_per_expert must not be negative, got -135"),
        ({"tokens_per_expert": EVEN[0]}, r"must be a tensor of shape \[E\] or \[L, E\], got \[\]"),
        ({"tokens_per_expert": [1, 2]}, r"must be a tensor of shape \[E\] or \[L, E\], got list"),
        (
            {"tokens_per_expert": EVEN, "previous_tokens_per_expert": EVEN[:3]},
            r"previous_tokens_per_expert must have the shape of tokens_per_expert, \[1, 8\]",
        ),
        (
            {"dropped_per_expert": EVEN},
            "dropped_per_expert must have the shape of tokens_per_expert",
        ),
        ({"logits": torch.ones(3, 8)}, "logits needs top_k, or tokens_per_expert, beside it"),
        ({"logits": torch.ones(3, 8), "top_k": 9}, "top_k must be from 1 to E = 8, got 9"),
        ({"logits": torch.tensor(1.0), "top_k": 1}, r"logits must have shape \[..., E\]"),
        (
            {"logits": [torch.ones(3, 8), torch.ones(3, 4)], "top_k": 1},
            r"logits must have shape \[..., E\] in every layer, got \[\[3, 8\], \[3, 4\]\]",
        ),
        (
            {"logits": torch.ones(3, 8), "tokens_per_expert": EVEN[:4]},
            r"must have shape \[L, E\] = \[1, 8\] of logits, got \[1, 4\]",
        ),
        (
            {"logits": torch.ones(3, 8), "top_k": 1, "token_mask": torch.ones(4).bool()},
            "token_mask must have one value for each of 3 tokens, got 4",
        ),
        (
            {"analyzer": RoutingAnalyzer(8), "tokens_per_expert": EVEN},
            "takes analyzer or tokens_per_expert, not both",
        ),
        (
            {"analyzer": RoutingAnalyzer(8), "logits": torch.ones(3, 8)},
            "takes analyzer or logits, not both",
        ),
        ({"analyzer": analyzer_of(EVEN), "last": 0}, "last must be at least 1, got 0"),
        ({"tokens_per_expert": EVEN, "aux_loss": 0.0}, "aux_loss must be one number, .* above 0"),
        ({"tokens_per_expert": EVEN, "aux_loss": 8.1}, "at most E = 8, got"),
        ({"tokens_per_expert": EVEN, "aux_loss": math.nan}, "aux_loss must be one number"),
        ({"tokens_per_expert": EVEN, "aux_loss": [1.0, 1.0]}, "one for each of 1 layers"),
        ({"main_gradient": 1.0}, "main_gradient and aux_gradient are given together"),
        (
            {"main_gradient": [1.0, 2.0], "aux_gradient": 1.0},
            "given together, for the same layers",
        ),
        ({"micro_losses": [1.0]}, "micro_losses and global_loss are given together"),
        ({"micro_losses": [], "global_loss": 1.0}, "micro_losses must have at least one value"),
        ({"bias_history": torch.ones(3)}, r"bias_history must have shape \[steps, E\] or .* \[3\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnose(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"severity": "bad"}, "severity must be one of critical, warning, note, got 'bad'"),
        ({"confidence": 0.0}, r"confidence must be in \(0, 1\], got 0.0"),
        ({"confidence": 1.1}, r"confidence must be in \(0, 1\], got 1.1"),
    ],
)
def test_bad_findings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Finding(**{"rule": "a", "severity": "note", "message": "b", **arguments})

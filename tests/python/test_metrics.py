# SPDX-License-Identifier: Apache-2.0
"""Load metrics: a published case to its last printed digit, and the edges."""

import math

import pytest
import torch

from equipoise import metrics

GOLDEN = [1, 2, 261, 266, 6, 253, 229, 6]


def test_golden_case():
    got = metrics.load_metrics(torch.tensor(GOLDEN))
    want = {
        "cv": 0.974,
        "imbalance_ratio": 2.078,
        "max_vio": 1.078,
        "max_vio_tokens": 138,
        "min_vio": 0.992,
        "gini": 0.502,
        "entropy": 1.458,
        "perplexity": 4.298,
        "kl_to_uniform": 0.621,
        "expert_utilization_rate": 0.5,
        "expert_usage_rate": 1,
        "dead_experts": 0,
        "top1_share": 0.260,
    }
    assert {name: round(value.item(), 3) for name, value in got.items()} == want
    unbiased = metrics.load_metrics(torch.tensor(GOLDEN), unbiased=True)
    assert round(unbiased.pop("cv").item(), 3) == 1.041
    assert all(torch.equal(value, got[name]) for name, value in unbiased.items())


def test_layers_stay_apart():
    counts = torch.tensor([[8, 0, 0, 0], [2, 2, 2, 2], [4, 4, 0, 0]])
    got = metrics.load_metrics(counts)
    for layer, alone in enumerate(counts):
        for name, value in metrics.load_metrics(alone).items():
            torch.testing.assert_close(got[name][layer], value, equal_nan=False)
    assert got["dead_experts"].tolist() == [3, 0, 2]
    assert got["max_vio"].tolist() == [3, 0, 1]
    assert got["gini"].tolist() == [0.75, 0, 0.5]
    torch.testing.assert_close(got["perplexity"], torch.tensor([1, 4, 2], dtype=torch.float64))
    assert round(got["cv"][0].item(), 12) == round(math.sqrt(3), 12)


def test_a_tenth_of_a_fair_share_counts_as_used():
    got = metrics.load_metrics(torch.tensor([1, 0, 19, 20]))  # mean 10
    assert got["expert_utilization_rate"] == 0.75 and got["expert_usage_rate"] == 0.75
    got = metrics.load_metrics(torch.tensor([1, 0, 19, 24]))  # mean 11
    assert got["expert_utilization_rate"] == 0.5 and got["expert_usage_rate"] == 0.75


def test_no_tokens_is_no_perfect_balance():
    got = metrics.load_metrics(torch.zeros(4, dtype=torch.int64))
    for name in ("cv", "max_vio", "gini", "entropy", "perplexity", "kl_to_uniform", "top1_share"):
        assert got[name].isnan(), name
    assert got["dead_experts"] == 4 and got["expert_utilization_rate"] == 0


def test_one_expert():
    got = metrics.load_metrics(torch.tensor([5]))
    assert got["cv"] == got["max_vio"] == got["gini"] == got["entropy"] == 0
    assert got["perplexity"] == got["top1_share"] == 1


@pytest.mark.parametrize("counts", [torch.tensor(3), torch.zeros(2, 0)])
def test_bad_shapes(counts):
    with pytest.raises(ValueError, match="tokens_per_expert must have shape"):
        metrics.load_metrics(counts)

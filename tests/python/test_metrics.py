# SPDX-License-Identifier: Apache-2.0
"""Load metrics: a published case to its last printed digit, and the edges; information theory."""

import math

import numpy
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


def test_entropy_and_perplexity():
    p = torch.tensor([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.25, 0.25, 0]])
    assert metrics.entropy(p).tolist() == [2, 0, 1.5]
    torch.testing.assert_close(metrics.entropy(p, base=math.e), metrics.entropy(p) * math.log(2))
    torch.testing.assert_close(metrics.entropy(p, base=4), metrics.entropy(p) / 2)
    torch.testing.assert_close(metrics.perplexity(p), 2 ** metrics.entropy(p))
    assert metrics.entropy(p.half()).dtype == torch.float64
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: metrics.perplexity(x.softmax(-1)), logits)


def test_kl_divergence():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert metrics.kl_divergence(p, q, base=2) == 1
    torch.testing.assert_close(metrics.kl_divergence(p, q).item(), math.log(2))
    assert metrics.kl_divergence(q, p) == math.inf  # p says that the third cannot be
    assert metrics.kl_divergence(p, p) == 0
    shares = torch.tensor(GOLDEN) / sum(GOLDEN)
    uniform = torch.full((8,), 1 / 8)
    torch.testing.assert_close(
        metrics.kl_divergence(shares, uniform),
        metrics.load_metrics(torch.tensor(GOLDEN))["kl_to_uniform"],
        rtol=1e-6,
        atol=0,
    )
    rows = torch.rand(4, 3).double()
    rows /= rows.sum(-1, keepdim=True)
    want = torch.nn.functional.kl_div(q.double().log(), rows, reduction="none").sum(-1)
    torch.testing.assert_close(metrics.kl_divergence(rows, q), want)


def counted_information(x, y):
    """Nats, from the definition: sum p(x,y) log(p(x,y) / (p(x) p(y)))."""
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    n = len(pairs)
    p = {pair: pairs.count(pair) / n for pair in set(pairs)}
    px = {a: sum(v for (b, _), v in p.items() if a == b) for a, _ in p}
    py = {a: sum(v for (_, b), v in p.items() if a == b) for _, a in p}
    return sum(v * math.log(v / (px[a] * py[b])) for (a, b), v in p.items())


def test_mutual_information():
    x = torch.randint(-3, 4, (200,)) * 10**9
    y = (x > 0).long() + torch.randint(0, 2, (200,))
    for a, b in ((x, y), (y, x), (x, x), (x.double() / 3, y.int()), (x, torch.zeros(200))):
        got = metrics.mutual_information(a, b)
        assert got.item() == pytest.approx(counted_information(a, b), rel=1e-12, abs=1e-14)
        assert metrics.mutual_information(a, b, base=2) == got / math.log(2)
        assert metrics.mutual_information(a.reshape(10, 20), b.reshape(20, 10)) == got
    grid = torch.arange(36)  # independent; the three entropies round to a sum below 0
    assert 0 <= metrics.mutual_information(grid % 6, grid // 6) < 1e-14
    share = torch.unique(x, return_counts=True)[1] / 200
    assert metrics.mutual_information(x, x, base=2).item() == pytest.approx(
        metrics.entropy(share).item(), rel=1e-6
    )


def test_binned_mutual_information():
    x = torch.randn(500, dtype=torch.float64)
    y = x.square() + 0.3 * torch.randn(500, dtype=torch.float64)
    for bins in (1, 7, 20):
        joint, _, _ = numpy.histogram2d(x.numpy(), y.numpy(), bins=bins)
        p = joint / 500
        independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
        want = (p[p > 0] * numpy.log(p[p > 0] / independent[p > 0])).sum()
        got = metrics.binned_mutual_information(x, y, bins=bins).item()
        assert got == pytest.approx(want, rel=1e-9, abs=1e-14)
    assert metrics.binned_mutual_information(x, y) == metrics.binned_mutual_information(x, y, 20)
    assert metrics.binned_mutual_information(x, torch.full((500,), 7.0)) == 0  # constant


def test_gini():
    x = torch.tensor([[3.0, 1.0, 1.0, 3.0], [0.0, 0.0, 4.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    pairs = (x[:, :, None] - x[:, None, :]).abs().sum((1, 2)) / (2 * 4 * x.sum(1))
    torch.testing.assert_close(metrics.gini(x), pairs.double())
    assert metrics.gini(torch.zeros(3)).isnan()


def test_expert_specialization_strength():
    strength = metrics.expert_specialization_strength
    known = strength(torch.tensor([[5, 0, 0], [0, 2, 3]]))  # the expert gives the label away
    assert known.item() == pytest.approx(1, rel=1e-15)
    assert strength(torch.tensor([[4, 2], [8, 4]])).abs() < 1e-15
    counts = torch.tensor([[9, 1, 0], [2, 5, 3]])
    label = torch.arange(2).repeat_interleave(counts.sum(1))
    expert = torch.cat([torch.arange(3).repeat_interleave(row) for row in counts])
    want = metrics.mutual_information(label, expert, base=2)  # the labels have one bit
    torch.testing.assert_close(strength(counts), want)
    assert strength(torch.tensor([[3, 4]])).isnan() and strength(torch.zeros(2, 2)).isnan()
    undecided = torch.tensor([0.0, math.log(4), math.log(2)], dtype=torch.float64)
    got = strength(token_entropy=undecided, num_experts=4)
    torch.testing.assert_close(got, torch.tensor([1, 0, 0.5], dtype=torch.float64))


def test_information_compiles(compiled):
    """In one graph: what waits for the device, like torch.unique, would break it."""

    def figures(x, y, counts):
        p = counts / counts.sum()
        return (
            metrics.mutual_information(x, y),
            metrics.binned_mutual_information(x, y, bins=5),
            metrics.kl_divergence(p, p.flip(0)),
            metrics.perplexity(p),
            metrics.gini(counts),
            metrics.expert_specialization_strength(counts.reshape(2, 4)),
        )

    function = compiled(figures)
    for n in (50, 60):
        args = torch.randint(0, 5, (n,)), torch.randint(0, 3, (n,)), torch.arange(1, 9)
        torch.testing.assert_close(function(*args), figures(*args))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.entropy(torch.tensor(1.0)), "entropy: p must have shape"),
        (lambda: metrics.entropy(torch.ones(1), base=1), "entropy: base must be above 1, got 1"),
        (lambda: metrics.perplexity(torch.zeros(2, 0)), "perplexity: p must have shape"),
        (lambda: metrics.gini(torch.zeros(0)), "gini: x must have shape"),
        (lambda: metrics.kl_divergence(torch.ones(2), torch.ones(1)), "q must have as many values"),
        (
            lambda: metrics.mutual_information(torch.ones(2), torch.ones(3)),
            "mutual_information: x and y must have equally many labels, at least one, got 2 and 3",
        ),
        (
            lambda: metrics.binned_mutual_information(torch.ones(0), torch.ones(0)),
            "binned_mutual_information: x and y .* got 0 and 0",
        ),
        (
            lambda: metrics.binned_mutual_information(torch.ones(2), torch.ones(2), bins=0),
            "bins must be at least 1, got 0",
        ),
        (
            lambda: metrics.expert_specialization_strength(torch.ones(3)),
            r"counts_by_label must have shape \[labels, E\], both at least 1, got \[3\]",
        ),
        (lambda: metrics.expert_specialization_strength(), "takes counts_by_label, or"),
        (
            lambda: metrics.expert_specialization_strength(torch.ones(1, 1), num_experts=4),
            "takes counts_by_label, or",
        ),
        (
            lambda: metrics.expert_specialization_strength(token_entropy=torch.ones(1)),
            "token_entropy needs num_experts >= 1 beside it, got None",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()

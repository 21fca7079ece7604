# SPDX-License-Identifier: Apache-2.0
"""AdvancedLoadBalancingLoss, against sums written out by hand."""

import math

import pytest
import torch

from equipoise import nn

GATES = {  # over 8 components
    "uniform": torch.zeros(8, dtype=torch.float64).softmax(0),
    "biased": torch.tensor([3, 2, 1, 1, 0.5, 0.5, 0.2, 0.2], dtype=torch.float64).softmax(0),
    "collapsed": torch.tensor([10, 1] + [0.1] * 6, dtype=torch.float64).softmax(0),
}


def entropy(p):
    return -sum(value * math.log(value + 1e-8) for value in p)


def by_hand(gates, information=False):
    """Unscaled terms from rows of Python floats."""
    num_rows, n = len(gates), len(gates[0])
    mean = [sum(column) / num_rows for column in zip(*gates, strict=True)]
    average = sum(mean) / n
    return {
        "uniform": sum((math.log(1 / n) - math.log(p + 1e-8)) / n for p in mean),
        "entropy": math.log(n) - entropy(mean),
        "variance": sum((p - average) ** 2 for p in mean) / (n - 1),
        "mutual_info": sum(map(entropy, gates)) / num_rows - entropy(mean) if information else 0,
    }


def pairwise(x, g):
    """mean_ij cos(x_i, x_j) cos(g_i, g_j), with both B x B matrices."""
    x, g = (torch.nn.functional.normalize(rows, dim=1) for rows in (x, g))
    return ((x @ x.T) * (g @ g.T)).mean()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("uniform", [0.0, 0.0, 0.0]),
        # lse - mean logit - log 8 = 3.6546 - 1.05 - 2.0794; that of 1e-8 does not show
        ("biased", [0.5251, 0.5621, 0.0282]),
        # 10.0004 - 1.45 - 2.0794 = 6.471, less what 1e-8 beside 5e-5 makes
        ("collapsed", [6.4708, 2.0749, 0.1249]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_worked_numbers(name, want, dtype):
    """Every row has the same gates: their mean is one row's, and a row tells nothing."""
    gates = GATES[name].repeat(5, 1).to(dtype)
    loss = nn.AdvancedLoadBalancingLoss(8, 1.0, 1.0, 1.0, 1.0, mi="information")
    got = loss(gates)
    exact = by_hand(gates.tolist(), information=True)
    close = {"rel": 1e-12, "abs": 1e-14} if dtype == torch.float64 else {"rel": 2e-6, "abs": 1e-6}
    for term, value in exact.items():
        assert got[term].item() == pytest.approx(value, **close), term
        assert got[term].dtype == dtype
    assert [round(got[term].item(), 4) + 0.0 for term in list(exact)[:3]] == want
    assert abs(got["mutual_info"].item()) < 1e-5


def test_terms_are_scaled_and_summed():
    gates = torch.randn(6, 4, dtype=torch.float64).softmax(1)
    features = torch.randn(6, 3, dtype=torch.float64)
    loss = nn.AdvancedLoadBalancingLoss(4)
    want = by_hand(gates.tolist()) | {"mutual_info": pairwise(features, gates).item()}
    scale = {"uniform": 0.01, "entropy": 0.01, "variance": 0.01, "mutual_info": 0.005}
    got = loss(gates, features)
    assert list(got) == [*want, "total"]
    for term, value in want.items():
        assert got[term].item() == pytest.approx(scale[term] * value, rel=1e-12), term
    assert got["total"].item() == pytest.approx(sum(scale[t] * v for t, v in want.items()), 1e-12)
    without = loss(gates)
    assert without["mutual_info"] == 0
    assert without["total"].item() == pytest.approx((got["total"] - got["mutual_info"]).item())
    other = nn.AdvancedLoadBalancingLoss(4, 0.1, 0.2, 0.3, 0.4, mi="information")(gates, features)
    want = by_hand(gates.tolist(), information=True)
    scale = {"uniform": 0.1, "entropy": 0.2, "variance": 0.4, "mutual_info": 0.3}
    for term, value in want.items():
        assert other[term].item() == pytest.approx(scale[term] * value, rel=1e-12), term
    assert -math.log(4) < want["mutual_info"] < 0


def test_more_dimensions_are_components():
    gates = torch.randn(5, 6).softmax(1)
    features = torch.randn(5, 2, 3)
    loss = nn.AdvancedLoadBalancingLoss(6)
    flat, got = loss(gates, features.flatten(1)), loss(gates.reshape(5, 2, 3), features)
    assert all(torch.equal(got[term], flat[term]) for term in flat)


@pytest.mark.parametrize("mi", ["similarity", "information"])
def test_gradients(mi):
    loss = nn.AdvancedLoadBalancingLoss(3, 1.0, 1.0, 1.0, 1.0, mi=mi)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def terms(logits, features):
        return tuple(loss(logits.softmax(1), features).values())

    assert torch.autograd.gradcheck(terms, (logits, features))
    assert torch.autograd.gradgradcheck(terms, (logits, features))


@pytest.mark.parametrize(("rows", "components"), [(0, 4), (3, 1)])
def test_nothing_to_balance(rows, components):
    gates = torch.ones(rows, components, requires_grad=True)
    got = nn.AdvancedLoadBalancingLoss(components)(gates, torch.randn(rows, 2))
    assert all(value == 0 for value in got.values())
    got["total"].backward()
    assert gates.grad.shape == gates.shape and not gates.grad.any()


def test_half_weights_give_float32():
    gates = torch.randn(64, 8).softmax(1)
    features = torch.randn(64, 5)
    loss = nn.AdvancedLoadBalancingLoss(8)
    for dtype in (torch.bfloat16, torch.float16):
        got, want = (
            loss(gates.to(dtype), features.to(dtype)),
            loss(gates.to(dtype).float(), features),
        )
        for term in ("uniform", "entropy", "variance"):
            assert got[term].dtype == torch.float32 and torch.equal(got[term], want[term])
        torch.testing.assert_close(got["total"], want["total"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("mi", ["similarity", "information"])
def test_compiled(mi, compiled):
    loss = nn.AdvancedLoadBalancingLoss(4, mi=mi)
    function = compiled(lambda gates, features: loss(gates, features))
    for rows in (6, 9):
        gates, features = torch.randn(rows, 4).softmax(1), torch.randn(rows, 3)
        want = loss(gates, features)
        got = function(gates, features)
        assert all(torch.allclose(got[term], want[term]) for term in want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 0}, "num_components must be at least 1, got 0"),
        ({"lambda_uniform": -1.0}, "lambda_uniform must be finite and >= 0, got -1.0"),
        ({"lambda_entropy": math.nan}, "lambda_entropy must be finite and >= 0, got nan"),
        ({"lambda_mi": -1.0}, "lambda_mi must be finite"),
        ({"lambda_variance": math.inf}, "lambda_variance must be finite"),
        ({"mi": "none"}, "mi must be similarity or information, got 'none'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^AdvancedLoadBalancingLoss: {message}"):
        nn.AdvancedLoadBalancingLoss(**({"num_components": 4} | options))


@pytest.mark.parametrize(
    ("gates", "features", "message"),
    [
        (torch.ones(4), None, r"num_components = 4 values in a row, got \[4\]"),
        (torch.ones(2, 5), None, r"num_components = 4 values in a row, got \[2, 5\]"),
        (torch.ones(2, 4, dtype=torch.int64), None, "must be floating, got torch.int64"),
        (torch.ones(2, 4), torch.ones(3, 4), r"the 2 rows of gating_weights, got shape \[3, 4\]"),
    ],
)
def test_bad_inputs(gates, features, message):
    with pytest.raises(ValueError, match=f"^AdvancedLoadBalancingLoss: .*{message}"):
        nn.AdvancedLoadBalancingLoss(4)(gates, features)

# SPDX-License-Identifier: Apache-2.0
"""Schedules: their values, and that compiled code reads them without being compiled again."""

import math

import pytest
import torch

from equipoise import functional as F
from equipoise import metrics, schedules


def values(schedule, num_steps, step_metrics=None):
    """`value` before the first step and after each."""
    got = [schedule.value.item()]
    for _ in range(num_steps):
        schedule.step(step_metrics)
        got.append(schedule.value.item())
    return got


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        (schedules.Warmup(0.8, 4), [0, 0.2, 0.4, 0.6, 0.8, 0.8]),
        (schedules.Warmup(0.1, 2, start=0.5), [0.5, 0.3, 0.1, 0.1]),
        (
            schedules.Warmup(1.0, 4, "cosine"),
            [0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1, 1],
        ),
        (schedules.TemperatureAnnealing(8.0, 1.0, 3), [8, 4, 2, 1, 1]),
        (schedules.TemperatureAnnealing(1.0, 0.25, 3, "linear"), [1, 0.75, 0.5, 0.25, 0.25]),
        (schedules.TemperatureAnnealing(3.0, 1.0, 3, "cosine"), [3, 2.5, 1.5, 1, 1]),
        (
            schedules.Curriculum([(1, 0.1), (3, 0.5), (5, 0.3)]),
            [0.1, 0.1, 0.3, 0.5, 0.4, 0.3, 0.3],
        ),
        (
            schedules.Curriculum([(1, 0.1), (3, 0.5), (5, 0.3)], "step"),
            [0.1, 0.1, 0.1, 0.5, 0.5, 0.3, 0.3],
        ),
        (schedules.Curriculum([(2, 0.5)]), [0.5] * 5),
    ],
)
def test_values(schedule, want):
    value = schedule.value
    assert value.dtype == torch.float32 and value.dim() == 0
    assert values(schedule, len(want) - 1) == pytest.approx(want, rel=1e-6, abs=1e-7)
    assert schedule.value is value  # in place
    assert schedule.num_steps_done == len(want) - 1


def test_adaptive_rule():
    coeff = schedules.AdaptiveCoefficient(
        target=0.5, initial=0.04, rate=1.0, min_value=0.03, max_value=0.1
    )
    assert values(coeff, 2, {"cv": torch.tensor(0.6), "gini": 0}) == pytest.approx(
        [0.04, 0.08, 0.1]
    )
    assert values(coeff, 1, {"cv": math.nan})[1] == pytest.approx(0.1)
    assert values(coeff, 1, {"cv": 0.5})[1] == pytest.approx(0.1)
    assert values(coeff, 2, {"cv": 0.4}) == pytest.approx([0.1, 0.05, 0.03])


def test_adaptive_coefficient_does_not_wait_for_the_device():
    """The meta device has no values: asking for one is an error there."""
    coeff = schedules.AdaptiveCoefficient(device="meta")
    coeff.step({"cv": torch.ones((), device="meta")})
    coeff.step({"cv": 1.0})


def test_adaptive_coefficient_holds_its_target():
    """A router whose logits the loss flattens: its CV ends within a tenth of the target."""
    preferred = torch.linspace(2, -2, 8)
    weight = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    coeff = schedules.AdaptiveCoefficient(target=0.5, initial=1e-3, rate=0.1)
    history = []
    for _ in range(300):
        # The task pulls the logits to `preferred`, the balance loss to equal loads.
        routing = F.topk_gating(weight + torch.randn(1024, 8), 1)
        task = 0.01 * (weight - preferred).square().sum()
        (task + F.balance_loss(routing, {"switch": coeff.value}).total).backward()
        optimizer.step()
        optimizer.zero_grad()
        load = metrics.load_metrics(routing.tokens_per_expert)
        coeff.step(load)
        history.append(load["cv"].item())
    assert max(history[:50]) > 1
    assert sum(history[-50:]) / 50 == pytest.approx(0.5, rel=0.1)
    assert 2e-3 < coeff.value < 0.9  # neither bound has done it


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.Warmup(1.0, 9, "cosine"),
        lambda: schedules.TemperatureAnnealing(8.0, 1.0, 9),
        lambda: schedules.Curriculum([(2, 0.1), (8, 0.5)]),
        lambda: schedules.AdaptiveCoefficient(),
    ],
)
def test_state_dict(make, tmp_path):
    schedule, other = make(), make()
    values(schedule, 4, {"cv": 0.7})
    torch.save(schedule.state_dict(), tmp_path / "state")
    saved = values(schedule, 3, {"cv": 0.7})
    value = other.value
    other.load_state_dict(torch.load(tmp_path / "state"))
    assert other.value is value
    assert values(other, 3, {"cv": 0.7}) == saved
    assert other.num_steps_done == 7


def test_a_compiled_step_is_compiled_once():
    coeff = schedules.Warmup(1.0, 8, start=0.125)
    temperature = schedules.TemperatureAnnealing(8.0, 1.0, 8)

    def loss(logits):
        routing = F.topk_gating(logits / temperature.value, 2)
        return F.balance_loss(routing, {"switch": coeff.value}).total

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits = torch.randn(32, 8)
    seen = set()
    for step in range(5):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = compiled(logits)
        torch.testing.assert_close(got, loss(logits))
        seen.add(got.item())
        coeff.step()
        temperature.step()
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.Warmup(-1.0, 5), "Warmup: end must be finite and >= 0, got -1.0"),
        (lambda: schedules.Warmup(math.inf, 5), "Warmup: end must be finite"),
        (lambda: schedules.Warmup(1.0, 5, start=-1), "Warmup: start must be finite and >= 0"),
        (lambda: schedules.Warmup(1.0, 0), "Warmup: num_steps must be at least 1, got 0"),
        (lambda: schedules.Warmup(1.0, 5, "exponential"), "shape must be linear or cosine, got 'e"),
        (lambda: schedules.TemperatureAnnealing(0.0, 1.0, 5), "start must be finite and > 0"),
        (lambda: schedules.TemperatureAnnealing(1.0, 0.0, 5), "end must be finite and > 0, got 0"),
        (lambda: schedules.TemperatureAnnealing(1.0, 2.0, 0), "num_steps must be at least 1"),
        (lambda: schedules.TemperatureAnnealing(1.0, 2.0, 5, "x"), "cosine, exponential, linear"),
        (
            lambda: schedules.Curriculum([]),
            "milestones must be at ascending steps >= 0, got \\[\\]",
        ),
        (lambda: schedules.Curriculum([(3, 1.0), (3, 2.0)]), "must be at ascending steps"),
        (lambda: schedules.Curriculum([(-1, 1.0)]), "must be at ascending steps"),
        (lambda: schedules.Curriculum([(0, math.nan)]), "milestones must have finite values"),
        (
            lambda: schedules.Curriculum([(0, 1.0)], "cosine"),
            "must be linear or step, got 'cosine'",
        ),
        (lambda: schedules.AdaptiveCoefficient(math.nan), "target must be a number, got nan"),
        (lambda: schedules.AdaptiveCoefficient(rate=0.0), "rate must be finite and > 0, got 0.0"),
        (lambda: schedules.AdaptiveCoefficient(min_value=0.0), "min_value and max_value must be"),
        (lambda: schedules.AdaptiveCoefficient(initial=2.0), "between 1e-05 and 1.0, got 2.0"),
        (lambda: schedules.AdaptiveCoefficient().step(), "needs the metric 'cv', got None"),
        (lambda: schedules.AdaptiveCoefficient().step({"gini": 1.0}), "'cv', got \\['gini'\\]"),
        (
            lambda: schedules.AdaptiveCoefficient().step({"cv": torch.ones(2)}),
            "'cv' must be one number, got a tensor of shape \\[2\\]",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()

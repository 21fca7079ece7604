# SPDX-License-Identifier: Apache-2.0
"""Coefficients and temperatures that change from step to step.

Each schedule has its `value` as a scalar tensor that `step` changes in place: a compiled training
step reads it without being compiled again, which a Python float that changes would bring about.

    coeff = schedules.Warmup(1e-2, num_steps=1000)
    for batch in data:
        loss = ... + F.balance_loss(routing, {"switch": coeff.value}).total
        ...
        optimizer.step()
        coeff.step()

With n the steps done, of N, and the share `x = min(n / N, 1)`, a value goes from a to b by

    linear        a + (b - a) x
    cosine        a + (b - a) (1 - cos(pi x)) / 2, slow at both ends (Loshchilov 2017,
                  arXiv:1608.03983)
    exponential   a (b / a)^x, by the same factor in each step
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

_RAMPS = {
    "linear": lambda a, b, x: a + (b - a) * x,
    "cosine": lambda a, b, x: a + (b - a) * (1 - math.cos(math.pi * x)) / 2,
    "exponential": lambda a, b, x: a * (b / a) ** x,
}


def _ramp(start: float, end: float, num_steps: int, shape: str) -> Callable[[int], float]:
    return lambda step: _RAMPS[shape](start, end, min(step / num_steps, 1.0))


class Schedule:
    """A value for each step, from a function of their number; and what all schedules share.

    Call `step` once per optimizer step, outside of compiled code.

    Args:
        at: the value after so many steps, 0 at first.
        device: of `value`; that of the model, so that nothing has to wait for a copy.

    Attributes:
        value: float32 scalar, changed in place.
        num_steps_done: how often `step` was called.

    Example:
        >>> schedule = Schedule(lambda step: 1e-2 / (1 + step))
        >>> schedule.step()
        >>> schedule.value
        tensor(0.0050)
    """

    def __init__(
        self, at: Callable[[int], float], device: torch.device | str | None = None
    ) -> None:
        self._at = at
        self.value = torch.full((), at(0), dtype=torch.float32, device=device)
        self.num_steps_done = 0

    def step(self, metrics: Mapping[str, Tensor | float] | None = None) -> None:
        """Goes to the value of the next step.

        Args:
            metrics: figures of the step, as from `metrics.load_metrics`. A schedule of the number
                of steps does not read them, so that all kinds can be stepped alike.
        """
        self.num_steps_done += 1
        self.value.fill_(self._at(self.num_steps_done))

    def state_dict(self) -> dict[str, int | Tensor]:
        """`num_steps_done` and a copy of `value`."""
        return {"num_steps_done": self.num_steps_done, "value": self.value.clone()}

    def load_state_dict(self, state_dict: Mapping[str, int | Tensor]) -> None:
        """Goes on where `state_dict` was taken; `value` stays the same tensor."""
        self.num_steps_done = state_dict["num_steps_done"]
        self.value.copy_(state_dict["value"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_steps_done={self.num_steps_done}, value={self.value})"

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")


class Warmup(Schedule):
    """Grows a coefficient from `start` to `end` within `num_steps`, and stays there.

    A balance loss that is strong from the first step on makes the router uniform before it has
    learnt anything.

    Args:
        end: finite, >= 0.
        num_steps: N, at least 1.
        shape: `"linear"` or `"cosine"`.
        start: finite, >= 0.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> coeff = Warmup(1e-2, num_steps=4)
        >>> for _ in range(3):
        ...     coeff.step()
        >>> coeff.value
        tensor(0.0075)
    """

    def __init__(
        self,
        end: float,
        num_steps: int,
        shape: str = "linear",
        start: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("end", end), ("start", start)):
            self._require(0 <= value < math.inf, f"{name} must be finite and >= 0, got {value}")
        self._require(num_steps >= 1, f"num_steps must be at least 1, got {num_steps}")
        self._require(
            shape in ("linear", "cosine"), f"shape must be linear or cosine, got {shape!r}"
        )
        super().__init__(_ramp(start, end, num_steps, shape), device)


class TemperatureAnnealing(Schedule):
    """A temperature that goes from `start` to `end` within `num_steps`, and stays there.

    Divide the logits by `value`: a high temperature lets a router try its experts, a low one makes
    it choose.

    Args:
        start: finite, > 0.
        end: finite, > 0.
        num_steps: N, at least 1.
        shape: `"exponential"`, `"linear"` or `"cosine"`.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> temperature = TemperatureAnnealing(start=4.0, end=1.0, num_steps=4)
        >>> for _ in range(2):
        ...     temperature.step()
        >>> temperature.value
        tensor(2.)
    """

    def __init__(
        self,
        start: float,
        end: float,
        num_steps: int,
        shape: str = "exponential",
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("start", start), ("end", end)):
            self._require(0 < value < math.inf, f"{name} must be finite and > 0, got {value}")
        self._require(num_steps >= 1, f"num_steps must be at least 1, got {num_steps}")
        self._require(
            shape in _RAMPS, f"shape must be one of {', '.join(sorted(_RAMPS))}, got {shape!r}"
        )
        super().__init__(_ramp(start, end, num_steps, shape), device)


class Curriculum(Schedule):
    """Given values at given steps: `[(0, 0.1), (1000, 0.01)]`.

    Args:
        milestones: (step, value) pairs, at least one, by ascending step >= 0; finite values. Before
            the first step the first value holds, after the last the last.
        interpolation: in between, `"linear"`, or `"step"`: the value of the last milestone passed.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> coeff = Curriculum([(0, 0.25), (2, 0.75)])
        >>> coeff.step()
        >>> coeff.value
        tensor(0.5000)
    """

    def __init__(
        self,
        milestones: Sequence[tuple[int, float]],
        interpolation: str = "linear",
        device: torch.device | str | None = None,
    ) -> None:
        milestones = list(milestones)
        steps = [step for step, _ in milestones]
        self._require(
            len(steps) > 0 and steps[0] >= 0 and steps == sorted(set(steps)),
            f"milestones must be at ascending steps >= 0, got {milestones}",
        )
        self._require(
            all(math.isfinite(value) for _, value in milestones),
            f"milestones must have finite values, got {milestones}",
        )
        self._require(
            interpolation in ("linear", "step"),
            f"interpolation must be linear or step, got {interpolation!r}",
        )

        def at(step: int) -> float:
            passed = sum(milestone <= step for milestone in steps)
            if passed == 0 or passed == len(steps) or interpolation == "step":
                return milestones[max(passed - 1, 0)][1]
            (begin, start), (until, end) = milestones[passed - 1 : passed + 1]
            return _RAMPS["linear"](start, end, (step - begin) / (until - begin))

        super().__init__(at, device)


class AdaptiveCoefficient(Schedule):
    """Holds a figure of the load at a target: a coefficient that is as strong as is needed.

    One step multiplies the coefficient by `1 + rate` where the figure is above the target, and
    divides it by that where it is below. A figure that is NaN (no tokens) changes nothing. The
    comparison is made on the device of `value`: give the figures from there, and nothing waits.

    Args:
        target: for the figure, not NaN.
        metric: its name, as in `metrics.load_metrics`; one that is the better the smaller it is,
            like `cv`, `max_vio` or `gini`.
        initial: coefficient of before the first step.
        rate: > 0, how fast the coefficient changes: slower than the router follows it, or both
            swing about the target.
        min_value: > 0, or the coefficient could not grow again.
        max_value: at least `min_value`, finite.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> coeff = AdaptiveCoefficient(target=0.5, initial=0.01, rate=0.1)
        >>> coeff.step({"cv": 0.9})
        >>> coeff.value
        tensor(0.0110)
    """

    def __init__(
        self,
        target: float = 0.5,
        metric: str = "cv",
        initial: float = 1e-2,
        rate: float = 0.05,
        min_value: float = 1e-5,
        max_value: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        self._require(not math.isnan(target), f"target must be a number, got {target}")
        self._require(0 < rate < math.inf, f"rate must be finite and > 0, got {rate}")
        self._require(
            0 < min_value <= max_value < math.inf,
            f"min_value and max_value must be finite, > 0 and in this order, "
            f"got {min_value} and {max_value}",
        )
        self._require(
            min_value <= initial <= max_value,
            f"initial must be between {min_value} and {max_value}, got {initial}",
        )
        super().__init__(lambda step: initial, device)
        self.target = target
        self.metric = metric
        self.rate = rate
        self.min_value = min_value
        self.max_value = max_value

    @torch.no_grad()
    def step(self, metrics: Mapping[str, Tensor | float] | None = None) -> None:
        """Goes to the value of the next step.

        Args:
            metrics: has the figure under the name `metric`, a number or a scalar tensor.

        Raises:
            ValueError: it is missing, or has several values (of several layers: take one, or their
                mean).
        """
        known = list(metrics or {})
        self._require(
            self.metric in known, f"step needs the metric {self.metric!r}, got {known or metrics}"
        )
        figure = metrics[self.metric]
        if not isinstance(figure, Tensor):  # filled on the device: a copy from the host would wait
            figure = torch.full_like(self.value, figure)
        self._require(
            figure.dim() == 0,
            f"{self.metric!r} must be one number, got a tensor of shape {list(figure.shape)}",
        )
        self.num_steps_done += 1
        growth = 1.0 + self.rate
        factor = torch.where(
            figure > self.target, growth, torch.where(figure < self.target, 1 / growth, 1.0)
        )
        self.value.mul_(factor).clamp_(self.min_value, self.max_value)

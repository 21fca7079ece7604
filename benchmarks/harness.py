# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: comparing results, timing calls in turns, demands.

All calls of a row take turns in random order, one sample each per round, so that a ratio compares
samples taken close together; a time is the median of the rounds.
"""

import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

import equipoise

# Relative, by the dtype of a result; peers round to bfloat16 after each step.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
SAMPLE_SECONDS = 4e-3  # short calls are repeated until a sample lasts this long

Call = Callable[[], object]
Times = dict[str, list[float]]  # per contestant, one for each round


# ---- checks -------------------------------------------------------------------------------------
class Wrong(Exception):
    """A contestant computes something else."""


def compare(what: str, got: Tensor, want: Tensor, allowed: Tensor | float) -> None:
    if got.shape != want.shape:
        raise Wrong(f"{what}: shape {list(got.shape)}, not {list(want.shape)}")
    difference = (got.double() - want.double()).abs()
    if not bool((difference <= allowed).all()):
        raise Wrong(f"{what} off by up to {difference.max().item():.1e}")


# ---- timing -------------------------------------------------------------------------------------
def sample(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(
    calls: dict[str, Call], rounds: int, before: Callable[[str], object] | None = None
) -> Times:
    """`before` is run, untimed and with one more call after it, ahead of each sample."""
    before = before or (lambda name: None)
    repeats = {}
    for name, call in calls.items():
        before(name)
        sample(call, 3)  # warm up
        repeats[name] = max(1, round(SAMPLE_SECONDS / sample(call, 3)))
        sample(call, repeats[name])
    times = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in random.sample(list(calls), len(calls)):
                before(name)
                times[name].append(sample(calls[name], repeats[name]))
    finally:
        gc.enable()
    return times


def median_us(values: list[float]) -> float:
    return statistics.median(values) * 1e6


def ratio(times: Times, slow: str, fast: str) -> tuple[float, float]:
    """Of the medians; and the median of the rounds' ratios, less moved by a change of clock."""
    rounds = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    of_medians = statistics.median(times[slow]) / statistics.median(times[fast])
    return of_medians, statistics.median(rounds)


# ---- what is said around the tables -------------------------------------------------------------
def print_machine(rounds: int) -> None:
    print(
        f"equipoise {equipoise.__version__}, torch {torch.__version__}, {platform.machine()} with "
        f"{torch.backends.cpu.get_cpu_capability()}; microseconds per call, median of {rounds}"
    )
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"the machine is busy (load {load:.1f}): the figures will be off")


class Verdict(NamedTuple):
    what: str
    wanted: float
    measured: float | None
    detail: str
    at_most: bool = False

    def __str__(self) -> str:
        measured, met = "-", False
        if self.measured is not None:
            measured = f"{self.measured:.2f}"
            sign = -1 if self.at_most else 1
            met = sign * float(measured) >= sign * self.wanted
        verdict = "ok" if met else "SHORT"
        return (
            f"{self.what:<70} {self.wanted:>6} {measured:>8}  {verdict:<5}  {self.detail}".rstrip()
        )


def print_verdicts(verdicts: Iterable[Verdict]) -> None:
    print(f"\n{'demands':<70} {'wanted':>6} {'measured':>8}", *verdicts, sep="\n")

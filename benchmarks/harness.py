# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: comparing results, timing calls in turns, demands.

All calls of a row take turns in random order, one sample each per round, so that a ratio compares
samples taken close together; a time is the median of the rounds.
"""

import ctypes
import gc
import itertools
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import equipoise

# Relative, by the dtype of a result; peers round to bfloat16 after each step.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
SAMPLE_SECONDS = 4e-3  # short calls are repeated until a sample lasts this long

ON_LINUX = sys.platform == "linux"
FRESH = "fresh floor"
PEAKS_HEADER = f"{'tensors':>12} {'process':>12}"

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


def memory_floor(logits: Tensor, backward: bool) -> Call:
    """Reads the logits once; for a backward as well, twice, and writes as much once."""
    memory = logits.detach().view(torch.float32).flatten()  # bfloat16 as pairs
    if not backward:
        return lambda: torch.dot(memory, memory)
    target = torch.empty_like(memory)
    return lambda: (torch.dot(memory, memory), target.copy_(memory))


def median_us(values: list[float]) -> float:
    return statistics.median(values) * 1e6


def ratio(times: Times, slow: str, fast: str) -> tuple[float, float]:
    """Of the medians; and the median of the rounds' ratios, less moved by a change of clock."""
    rounds = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    of_medians = statistics.median(times[slow]) / statistics.median(times[fast])
    return of_medians, statistics.median(rounds)


# ---- one table ---------------------------------------------------------------------------------
class Contest:
    """Checks the contestants, times them in turns, prints, and keeps who failed."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.failed: set[str] = set()

    def run(
        self,
        title: str,
        floor: Call,
        calls: dict[str, Call],
        check: Callable[[object], None],
        fresh_floor: Call | None = None,
    ) -> Times:
        print(f"\n{title}")
        passed = {}
        for name, call in calls.items():
            try:
                check(call())
                passed[name] = call
            except Wrong as error:
                self.failed.add(name)
                print(f"  {name} wrong: {error}")
        floors = {"floor": floor} | ({FRESH: fresh_floor} if fresh_floor else {})
        times = measure(floors | passed, self.rounds)
        for name, values in times.items():
            line = f"  {name:<30} {median_us(values):>10.1f}"
            if "equipoise" in passed and name not in ("floor", FRESH, "equipoise"):
                line += f" {ratio(times, name, 'equipoise')[0]:>7.1f}x"
            print(line, flush=True)
        return times


# ---- peak memory --------------------------------------------------------------------------------
def tensor_peak(call: Call) -> int:
    """Bytes of the tensors that are there at once."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes between the lines
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    changes = [event.self_cpu_memory_usage for event in profile.events()]
    return max(itertools.accumulate(changes))


def process_peak(call: Call) -> int:
    """Bytes by which the process grows at most."""

    def high_water() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    growth = []
    for _ in range(5):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free already would not be seen to grow
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is there
        before = high_water()
        call()
        growth.append(high_water() - before)
    return max(growth)


def print_peaks(title: str, call: Call) -> tuple[int, int | None]:
    """Those of the tensors and (Linux only) of the process."""
    call()
    peaks = tensor_peak(call), process_peak(call) if ON_LINUX else None
    print(f"  {title:<48}", *("{:>12}".format("-" if p is None else p) for p in peaks))
    return peaks


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

# SPDX-License-Identifier: Apache-2.0
"""Gating on the CPU, side by side: what a router computes for one layer, forward and backward.

    gating.py                    a small grid with everybody who is installed, then the demands
    gating.py --demands          only the rows that the demands need, against eager, and one token
    gating.py --token            only one token through torch.ops
    gating.py --full             the whole grid, which takes hours
    gating.py --tokens 1 --sizes 8x2     that part of the grid; also --cases, --threads, --dtypes

Every contestant (contestants.py) is checked against float64 before it is timed (harness.py); who
fails is reported as wrong and not timed. `floor` is the time to read the logits once; for
forward+backward, to read them twice and to write as much once.
"""

import argparse
import itertools
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from contestants import CASES, CONTESTANTS, KEY_TOLERANCE, Cell, Gate, Routing, installed, make_cell
from harness import (
    TOLERANCE,
    Call,
    Times,
    Verdict,
    Wrong,
    compare,
    measure,
    median_us,
    memory_floor,
    print_machine,
    print_verdicts,
    ratio,
)
from torch import Tensor

from equipoise import reference

GRID = {
    "threads": [1, 2],
    "dtypes": ["float32", "bfloat16"],
    "tokens": [1, 16, 512, 4096, 16384],
    "sizes": [(8, 2), (64, 6), (128, 8), (256, 8), (384, 8)],
    "cases": list(CASES),
}
SMALL_GRID = {
    "threads": [1],
    "dtypes": ["float32"],
    "tokens": [16, 4096],
    "sizes": [(128, 8), (256, 8)],
    "cases": list(CASES),
}

PASSES = ("forward", "forward+backward")


class Row(NamedTuple):
    threads: int
    dtype: str
    case: str
    num_tokens: int
    num_experts: int
    top_k: int
    backward: bool = False


# ---- checks -------------------------------------------------------------------------------------
def differentiable(cell: Cell, routing: Routing) -> list[Tensor]:
    return [routing.topk_weights] + ([routing.prob_sum] if cell.case.stats else [])


def gradients(cell: Cell, routing: Routing) -> list[Tensor]:
    """For `differentiable`: of an expert, not of a slot, so that the order of slots is free."""
    pull = cell.pull
    if routing.topk_indices.dtype != torch.bool:
        pull = pull.gather(1, routing.topk_indices)
    out = [pull.to(routing.topk_weights.dtype)]
    return out + ([cell.pull_sum.to(routing.prob_sum.dtype)] if cell.case.stats else [])


def slots(key: Tensor, top_k: int, routing: Routing) -> tuple[Tensor, Tensor]:
    """Weights and indices [T, K], put in order of the key where the contestant promises none."""
    weights, indices = routing.topk_weights.detach(), routing.topk_indices
    dense = indices.dtype == torch.bool
    if dense:
        compare("experts per token", indices.sum(1), torch.full((len(key),), top_k), 0)
        compare("weights of experts not chosen", weights * ~indices, torch.zeros(key.shape), 0)
        indices = indices.nonzero()[:, 1].view(-1, top_k)
        weights = weights.gather(1, indices)
    if dense or not getattr(routing, "ordered", True):
        order = key.gather(1, indices).argsort(dim=1, descending=True)
        weights, indices = weights.gather(1, order), indices.gather(1, order)
    if bool((indices.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise Wrong("an expert is chosen twice")
    return weights, indices


def check(cell: Cell, gate: Gate) -> list[Tensor]:
    """Raises Wrong unless all is as in float64. Where keys tie, any of the tied experts is right.

    Returns the gradients with which to time the backward.
    """
    case, top_k = cell.case, cell.top_k
    options = case.options | ({"expert_bias": cell.bias.double()} if case.bias else {})
    exact = cell.logits.detach().double().requires_grad_()
    key = exact.detach().sigmoid() + cell.bias if case.bias else exact.detach()
    best = reference.topk_gating(exact.detach(), top_k, **options)[1]
    with torch.no_grad():
        plain = gate(cell.logits)  # may be other code than with a graph
    routing = gate(cell.logits)
    for result in (plain, routing):
        weights, indices = slots(key, top_k, result)
        compare("keys of the chosen", key.gather(1, indices), key.gather(1, best), KEY_TOLERANCE)
        exactly = reference.topk_gating(exact, top_k, **options, forced_indices=indices)
        want = Routing(exactly[0], indices, exactly[2], exactly[4][: key.shape[1]], exactly[3])
        allowed = TOLERANCE[weights.dtype] * want.topk_weights + 1e-7
        compare("weights", weights, want.topk_weights, allowed)
        if case.stats:
            prob_sum, lse = result.prob_sum, result.lse
            compare("counts", result.tokens_per_expert, want.tokens_per_expert, 0)
            compare("prob_sum", prob_sum, want.prob_sum, TOLERANCE[prob_sum.dtype] * want.prob_sum)
            compare("lse", lse, want.lse, TOLERANCE[lse.dtype] * (1 + want.lse.abs()))

    (want_grad,) = torch.autograd.grad(differentiable(cell, want), exact, gradients(cell, want))
    grads = gradients(cell, routing)
    (grad,) = torch.autograd.grad(differentiable(cell, routing), cell.logits, grads)
    scale = want_grad.abs().amax(dim=1, keepdim=True) + 1e-2 * want_grad.abs().max()
    compare("gradient", grad, want_grad, TOLERANCE[grad.dtype] * scale)
    return grads


# ---- timing -------------------------------------------------------------------------------------
def timed_calls(cell: Cell, gate: Gate, grads: list[Tensor]) -> tuple[Call, Call]:
    logits = cell.logits

    def forward() -> object:
        with torch.no_grad():
            return gate(logits)

    def forward_backward() -> object:
        return torch.autograd.grad(differentiable(cell, gate(logits)), logits, grads)

    return forward, forward_backward


# ---- tables -------------------------------------------------------------------------------------
class Table:
    """Measures rows, prints them, keeps the times."""

    def __init__(self, names: list[str], rounds: int, seed: int) -> None:
        self.names, self.rounds, self.seed = names, rounds, seed
        self.results: dict[Row, Times] = {}
        self.failed: set[str] = set()

    def run(self, rows: Iterable[Row]) -> None:
        print(
            f"\n{'threads':>7} {'dtype':>8} {'case':>12} {'T':>5} {'E':>3} {'K':>1} {'pass':>4}"
            f" {'floor':>8}" + "".join(f" {name:>9}{'':>7}" for name in self.names).rstrip()
        )
        # Rows that differ in the pass only share their inputs, checks and compilations.
        for _, group in itertools.groupby(rows, key=lambda row: row[:-1]):
            group = list(group)
            torch.set_num_threads(group[0].threads)
            cell, calls, verdicts = self.enter(group[0], self.names)
            for row in group:
                row_calls = {name: passes[row.backward] for name, passes in calls.items()}
                row_calls["floor"] = memory_floor(cell.logits, row.backward)
                self.results[row] = measure(row_calls, self.rounds)
                self.print_row(row, verdicts)

    def enter(
        self, row: Row, names: list[str]
    ) -> tuple[Cell, dict[str, tuple[Call, Call]], dict[str, str]]:
        """The inputs, what is timed of those who pass the check, and what is said of the others."""
        cell = make_cell(*row[1:6], self.seed)
        calls, verdicts = {}, {}
        for name in names:
            try:
                gate = CONTESTANTS[name](cell)
                if gate is not None:
                    calls[name] = timed_calls(cell, gate, check(cell, gate))
                continue
            except Wrong as error:
                verdicts[name], reason = "wrong", str(error)
            except Exception as error:  # a peer may refuse in any way
                verdicts[name], reason = "failed", f"{type(error).__name__}: {error}"
            self.failed.add(name)
            print(f"        {name} {verdicts[name]}: {reason.splitlines()[0][:160]}")
        return cell, calls, verdicts

    def print_row(self, row: Row, verdicts: dict[str, str]) -> None:
        times = self.results[row]
        line = (
            f"{row.threads:>7} {row.dtype:>8} {row.case:>12} {row.num_tokens:>5}"
            f" {row.num_experts:>3} {row.top_k:>1} {'f+b' if row.backward else 'f':>4}"
            f" {median_us(times['floor']):>8.1f}"
        )
        for name in self.names:
            line += (
                f" {median_us(times[name]):>9.1f}"
                if name in times
                else (f" {verdicts.get(name, '-'):>9}")
            )
            compared = name != "equipoise" and {name, "equipoise"} <= times.keys()
            line += f" {ratio(times, name, 'equipoise')[0]:>5.1f}x" if compared else " " * 7
        print(line.rstrip(), flush=True)


def grid_rows(grid: dict[str, list]) -> Iterator[Row]:
    for threads, dtype, name, tokens, size, backward in itertools.product(
        grid["threads"], grid["dtypes"], grid["cases"], grid["tokens"], grid["sizes"], (False, True)
    ):
        if CASES[name].sizes is None or size in CASES[name].sizes:
            yield Row(threads, dtype, name, tokens, *size, backward)


# ---- demands ------------------------------------------------------------------------------------
# case, (E, K), backward, at least this many times faster than eager at T=4096 on one thread
RATIOS = [
    ("weights", (8, 2), False, 10),
    ("weights", (64, 6), False, 10),
    ("weights", (128, 8), False, 12),
    ("weights", (128, 8), True, 8),
    ("weights", (256, 8), False, 16),
    ("weights", (384, 8), False, 16),
    ("stats", (128, 8), False, 8),
    ("stats", (128, 8), True, 6),
    ("stats", (256, 8), False, 10),
    ("stats", (384, 8), False, 10),
    ("sigmoid_bias", (256, 8), False, 13),
    ("deepseek_v3", (256, 8), False, 10),
]
SCALING = {512: 1.0, 16384: 1.7}  # tokens: two threads at least this many times faster than one
TOKEN = {  # microseconds for one token through torch.ops, at most
    "one token, stats=False": 3.0,
    "one token, stats=True": 4.5,
    "one token, stats=False, forward+backward": 22.0,
    "one token, stats=True, forward+backward": 22.0,
}


def against_eager(table: Table, dtypes: list[str]) -> Iterator[Verdict]:
    wanted = {
        Row(1, dtype, case, 4096, *size, backward): least
        for dtype in dtypes
        for case, size, backward, least in RATIOS
        if case != "deepseek_v3" or dtype == "float32"
    }
    table.run(wanted)
    for row, least in wanted.items():
        times = table.results[row]
        what = f"{row.case} ({row.num_experts}, {row.top_k}) {PASSES[row.backward]}, {row.dtype}"
        measured, detail = None, ""
        if {"eager", "equipoise"} <= times.keys():
            measured, by_rounds = ratio(times, "eager", "equipoise")
            token = median_us(times["equipoise"]) / row.num_tokens * 1e3
            detail = f"by rounds {by_rounds:.2f}; {token:.0f} ns a token"
        yield Verdict(f"{what}: times eager", least, measured, detail)


def scaling(table: Table, dtypes: list[str]) -> Iterator[Verdict]:
    """One and two threads take turns within each round."""
    for dtype, tokens, case in itertools.product(dtypes, SCALING, ("weights", "stats")):
        torch.set_num_threads(2)
        _, calls, _ = table.enter(Row(2, dtype, case, tokens, 128, 8), ["equipoise"])
        for backward in (False, True):
            what = f"{case} (128, 8) {PASSES[backward]}, {dtype}, T={tokens}: two threads"
            measured, detail = None, ""
            if calls:
                call = calls["equipoise"][backward]
                times = measure(
                    {"1": call, "2": call},
                    table.rounds,
                    before=lambda name, call=call: (torch.set_num_threads(int(name)), call()),
                )
                measured, by_rounds = ratio(times, "1", "2")
                one, two = (median_us(times[name]) for name in "12")
                detail = f"by rounds {by_rounds:.2f}; {one:.0f} and {two:.0f} us"
            yield Verdict(what, SCALING[tokens], measured, detail)


def token_calls(x: Tensor) -> dict[str, Call]:
    """Through torch.ops, beside calls that show what calling an op costs before any work."""
    op, topk, grad = torch.ops.equipoise.topk_gating, torch.ops.aten.topk, torch.autograd.grad
    plain, few, nothing = x.detach(), x.detach()[:, :8], x.detach()[:0]
    pull, pull_sums = torch.randn(1, 8), torch.randn(2 * x.shape[1] + 5)
    pull_topk = pull.to(x.dtype)
    return {
        "aten.aminmax of 8 numbers: two outputs": lambda: torch.ops.aten.aminmax(few, dim=1),
        "no token, stats=False": lambda: op(nothing, 8, norm_topk_prob=True, stats=False),
        "no token, stats=True": lambda: op(nothing, 8, norm_topk_prob=True),
        "one token, stats=False": lambda: op(plain, 8, norm_topk_prob=True, stats=False),
        "one token, stats=True": lambda: op(plain, 8, norm_topk_prob=True),
        "aten.topk, forward+backward": lambda: grad(topk(x, 8)[0], x, pull_topk),
        "one token, stats=False, forward+backward": lambda: grad(
            op(x, 8, norm_topk_prob=True, stats=False)[0], x, pull
        ),
        "one token, stats=True, forward+backward": lambda: grad(
            op(x, 8, norm_topk_prob=True)[::4], x, (pull, pull_sums)
        ),
    }


def one_token(table: Table, dtypes: list[str]) -> Iterator[Verdict]:
    torch.set_num_threads(1)
    for dtype in dtypes:
        cell, passed, _ = table.enter(Row(1, dtype, "stats", 1, 128, 8), ["equipoise"])
        try:
            times = measure(
                token_calls(cell.logits) if passed else {},
                table.rounds,
                before=lambda name: torch.set_grad_enabled("backward" in name),
            )
        finally:
            torch.set_grad_enabled(True)
        print(f"\none token through torch.ops, E=128 K=8 {dtype}, forward under no_grad")
        for name, values in times.items():
            print(f"  {name:<45} {median_us(values):>8.2f}")
        for name, most in TOKEN.items():
            measured = median_us(times[name]) if name in times else None
            yield Verdict(f"{name}, {dtype}: us", most, measured, "", at_most=True)


def parse_size(text: str) -> tuple[int, int]:
    num_experts, top_k = text.split("x")
    return int(num_experts), int(top_k)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21, help="samples per call (%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=GRID["dtypes"])
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--sizes", type=parse_size, nargs="+", metavar="ExK")
    parser.add_argument("--cases", nargs="+", choices=GRID["cases"])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), help="default: all")
    for flag in ("--demands", "--token", "--full"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    warnings.simplefilter("ignore")  # the peers'

    chosen = {name: values for name in GRID if (values := getattr(args, name))}
    only_grid = args.full or bool(chosen.keys() & {"tokens", "sizes", "cases"})
    everything = not (args.demands or args.token or only_grid)
    dtypes = chosen.get("dtypes", GRID["dtypes"])
    print_machine(args.rounds)
    grid = Table(args.contestants or installed(), args.rounds, args.seed)
    if only_grid or everything:
        grid.run(grid_rows((GRID if only_grid else SMALL_GRID) | chosen))
    # The demands are about equipoise and eager; who else is named is shown beside them.
    table = Table(args.contestants or ["equipoise", "eager"], args.rounds, args.seed)
    verdicts = []
    if args.demands or everything:
        verdicts += [*against_eager(table, dtypes), *scaling(table, dtypes)]
    if args.demands or args.token or everything:
        verdicts += one_token(table, dtypes)
    if verdicts:
        print_verdicts(verdicts)
    return int("equipoise" in grid.failed | table.failed)


if __name__ == "__main__":
    sys.exit(main())

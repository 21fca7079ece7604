# SPDX-License-Identifier: Apache-2.0
"""Checks the machine code of the CUDA kernels and the memory they move; writes docs/kernels.md.

make kernels runs ``report.py BUILD [--interpreter RUN] [--check]``. BUILD is a CMake tree, whose
flags are used. RUN starts a program on an interpreter of PTX; without it only the machine code is
looked at and nothing is written. With --check nothing is written either, and it is an error if
docs/kernels.md would change. Exit status 1 if a rule is broken: no spills, no local memory, 16-byte
access where it matters, no more registers than CEILINGS, barriers around tickets, at most
MOST_TRAFFIC times the least traffic, every kernel executed.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from machine_code import ARCHITECTURES, ROOT, Kernel, compiler, read
from traffic import EXPERTS, MINIMUM, SEGMENTS, SIZES, TOP_K, WIDTH, Interpreter

DOCUMENT = ROOT / "docs/kernels.md"
MOST_TRAFFIC = 1.15

# Kernels that must load and store 16 bytes at once: (load, store).
HOT = {
    "topk_gating_team_kernel": (True, False),  # it writes K numbers of a row
    "topk_gating_backward_team_kernel": (True, True),
    "moe_scatter_rows_kernel": (True, True),
    "moe_zero_rows_kernel": (False, True),
    "moe_gather_rows_kernel": (True, True),
    "moe_gather_rows_backward_kernel": (True, True),
}

# Kernels whose last block to arrive goes on with what the others wrote, and how many tickets they
# take: two where sums are added up in two steps.
TICKETS = {
    "balance_loss_kernel": 1,
    "topk_gating_team_kernel": 2,
    "topk_gating_block_kernel": 2,
    "expert_bincount_weighted_kernel": 2,
    "slot_sort_rank_kernel": 1,
}

# Registers of a thread. With 64 a multiprocessor holds 1024 threads, the most of sm_75 and half of
# what most others can; with 80 it holds 3 blocks of 256, with 128 it holds 2. Those that need more
# than 64 have the first of these steps that nvcc 13.0 stays within, or, in a kernel of few blocks,
# what it takes.
DEFAULT_CEILING = 64
CEILINGS = {
    "balance_loss_kernel": 144,  # float64, every loss inlined; one block per segment, mostly one
    "balance_loss_backward_kernel": 144,
    "expert_bincount_weighted_kernel": 80,  # a block is one warp
    "moe_gather_rows_kernel, 16 bytes": 80,  # 4 pieces on their way, 8 sums
    "topk_gating_team_kernel, E <= 256, general": 128,  # keys and loads as well; groups, segments
    "topk_gating_team_kernel, E > 256": 128,  # 16 experts a lane: logits, scores, sums
    "topk_gating_team_kernel, E > 256, general": 128,
    "topk_gating_block_kernel": 128,  # float64; asks for 2 blocks per multiprocessor
    "topk_gating_backward_team_kernel, E <= 256, general": 80,  # p and q, gradients of a segment
    "topk_gating_backward_team_kernel, E > 256": 128,
    "topk_gating_backward_team_kernel, E > 256, general": 128,
    "topk_gating_backward_block_kernel": 128,  # float64; asks for 1 block per multiprocessor
}


def group(kernel: Kernel) -> str:
    """The row of the table that an instance belongs to."""
    arguments = kernel.arguments.split(", ")
    if "Team<" in kernel.arguments:
        general = ", general" if arguments[-1] == "true" else ""
        more = "Team<32, 16>" in kernel.arguments
        return f"{kernel.name}, E {'>' if more else '<='} 256{general}"
    if kernel.name in HOT:
        return f"{kernel.name}, {'single values' if arguments[-1] == '1' else '16 bytes'}"
    return kernel.name


def faults_of(kernels: list[Kernel]) -> Iterable[str]:
    """What breaks the rules of machine code."""
    for k in kernels:
        where = f"{k.instance} on sm_{k.architecture}"
        for fault in k.faults:
            yield f"{where}: {fault}"
        if k.spilled or k.local:
            yield f"{where}: {k.spilled} bytes spilled, {k.local} bytes of local memory"
        ceiling = CEILINGS.get(group(k), DEFAULT_CEILING)
        if k.registers > ceiling:
            yield f"{where}: {k.registers} registers, more than {ceiling}"
        load, store = (False, False) if "single values" in group(k) else HOT.get(k.name, (0, 0))
        if load and k.load < 128:
            yield f"{where}: loads at most {k.load} bits at once"
        if store and k.store < 128:
            yield f"{where}: stores at most {k.store} bits at once"
        if k.tickets != TICKETS.get(k.name, 0):
            yield f"{where}: {k.tickets} tickets"
    names = {k.name for k in kernels}
    for name in sorted((HOT.keys() | TICKETS.keys()) - names):
        yield f"there is no {name}"


def table(head: list[str], rows: list[list]) -> str:
    """Markdown; the first column is text."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def resources(rows: dict[str, list[Kernel]]) -> str:
    """A table with the worst of each row: registers per architecture, the rest over all."""
    body = []
    for name, kernels in rows.items():
        of = [max(k.registers for k in kernels if k.architecture == a) for a in ARCHITECTURES]
        most = [max(getattr(k, what) for k in kernels) for what in ("shared", "spilled", "local")]
        least = [min(getattr(k, what) for k in kernels) or "" for what in ("load", "store")]
        body.append([name, *of, CEILINGS.get(group(kernels[0]), DEFAULT_CEILING), *most, *least])
    head = ["Kernel", *(f"sm_{a}" for a in ARCHITECTURES), "at most"]
    return table([*head, "shared", "spilled", "local", "load", "store"], body)


def rows_by(kernels: list[Kernel], key) -> dict[str, list[Kernel]]:
    rows: dict[str, list[Kernel]] = {}
    for k in kernels:
        rows.setdefault(key(k), []).append(k)
    return dict(sorted(rows.items()))


def machine_code_text(kernels: list[Kernel], nvcc: str) -> str:
    hot = [k for k in kernels if k.name in HOT and k.arguments.startswith("BFloat16")]
    hot = [k for k in hot if "single values" not in group(k)]
    return f"""## Machine code

From {nvcc}, that of sm_100 from the PTX for 9.0, as a driver would compile what a wheel holds.
Registers of a thread on each architecture, the most that is accepted, bytes of static
shared memory, bytes spilled, bytes of local memory (what is spilled and arrays that are indexed),
and bits of the widest load from and store to global memory. A row is the worst of all instances of
a kernel, in the last five columns of all architectures too.

{resources(rows_by(kernels, group))}
In these the last block to arrive goes on with what the others wrote:
{", ".join(f"`{name}`" for name in sorted(TICKETS))}.
On every path through their machine code a memory barrier of the whole device stands before each
ticket, after the last store, and behind it, before the next load.

The instances for bfloat16 that matter most. `Team<16, 8>` are 16 lanes with 8 experts each; then
(forward) whether there are statistics, and whether all that is optional is allowed for.

{resources(rows_by(hot, lambda k: k.instance))}"""


def traffic_text(interpreter: Interpreter, ptx_log: Path, faults: list[str]) -> str:
    rows = []
    for op, minimum in MINIMUM.items():
        for tokens in SIZES:
            least = minimum(tokens)
            kernels = interpreter.traffic(op, tokens)
            moved = sum(sectors for sectors, *_ in kernels.values())
            if moved > MOST_TRAFFIC * least or not kernels:
                faults.append(f"{op}, T = {tokens}: {moved} sectors, at least {least:.0f}")
            if op.startswith("topk_gating") and len(kernels) != 1:
                faults.append(f"{op}, T = {tokens}: {len(kernels)} launches, not one")
            head = [f"{moved / tokens:.2f}", f"{least / tokens:.2f}", f"{moved / least:.2f}"]
            rows.append([f"**{op}, T = {tokens}**", *head, "", ""])
            for name, (sectors, passes, ideal) in kernels.items():
                shared = [f"{passes / tokens:.2f}", f"{ideal / tokens:.2f}"] if ideal else ["", ""]
                rows.append([name, f"{sectors / tokens:.2f}", "", "", *shared])
    missed = interpreter.not_executed(ptx_log)
    faults += [f"{name} was not executed" for name in missed]
    head = ["Kernel", "sectors", "least", "ratio", "shared passes", "without conflicts"]
    return f"""
## Memory moved

Per token, E = {EXPERTS}, K = {TOP_K}, H = {WIDTH}, bfloat16; {SEGMENTS} segments, one after the
other. Sectors of 32 bytes of global memory, as the instructions of each warp touch them (no cache
is assumed). The least is inputs and outputs once, for the gating also one partial [E] of each block
(64 sectors at E = 128: its counts, and its sums written and read). A ratio above {MOST_TRAFFIC} is
an error, and so is more than one launch of the gating in either direction. Then passes of shared
memory, and how many there would be if no two lanes met in a bank.

{table(head, rows)}
## Not executed

Instances of kernels that the tests do not run (those marked `cuda`, on an interpreter of PTX):
{", ".join(f"`{name}`" for name in missed) or "none"}.
"""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=Path)
    parser.add_argument("--interpreter", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()

    kernels = read(options.build, int(os.environ.get("JOBS", "2")))
    faults = list(faults_of(kernels))
    if options.interpreter:
        nvcc = compiler(options.build)
        library = options.build / "ptx_80/libequipoise.so"
        ptx_log = options.build.parent / "ptx/80/launches"
        text = "# Kernels\n\nWritten by `make kernels`, which checks the limits named here.\n\n"
        text += machine_code_text(kernels, nvcc)
        text += traffic_text(Interpreter(options.interpreter, library), ptx_log, faults)
        old = DOCUMENT.read_text() if DOCUMENT.exists() else ""
        if not options.check:
            DOCUMENT.parent.mkdir(exist_ok=True)
            DOCUMENT.write_text(text)
        elif old != text and (nvcc in old or not old):
            faults.append("docs/kernels.md is not up to date: make kernels")
    for fault in faults:
        print(fault)
    most = max(kernels, key=lambda k: k.registers)
    print(
        f"kernels: {len(kernels)} instances on {len(ARCHITECTURES)} architectures, "
        f"{sum(k.spilled for k in kernels)} bytes spilled, at most {most.registers} registers "
        f"({most.instance}, sm_{most.architecture}); {len(faults)} faults"
    )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""How much memory the kernels move, counted by an interpreter of PTX while it runs them.

It counts, for each instruction of each warp, the 32-byte sectors of global memory that its lanes
touch (no cache is assumed), and the passes that its accesses to shared memory take on 32 banks.
Run as a program, on the interpreter, this file calls one op on one size.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from machine_code import ROOT, readable

SIZES = (512, 4096)
EXPERTS, TOP_K, WIDTH, SEGMENTS = 128, 8, 1024, 8  # bfloat16
SECTOR = 32


def minimum_of_gating(tokens: int) -> float:
    """Sectors of inputs, outputs and one partial [E] per block, which has 16 tokens at E = 128."""
    logits = tokens * EXPERTS * 2
    chosen = tokens * TOP_K * (4 + 8)
    lse = tokens * 4
    totals = EXPERTS * 8 + (2 * EXPERTS + 5) * 4
    # Each block adds its counts (8 bytes); its sums of p (4 bytes) are written and read once.
    partials = min(tokens // 16, 512) * EXPERTS * (8 + 4 + 4)
    return (logits + chosen + lse + totals + partials) / SECTOR


def minimum_with_segments(tokens: int) -> float:
    """The same with sums for each of some segments, one after the other."""
    totals = EXPERTS * 8 + (2 * EXPERTS + 5) * 4
    return minimum_of_gating(tokens) + (tokens * 8 + (SEGMENTS - 1) * totals) / SECTOR


def minimum_of_gradient(tokens: int) -> float:
    """Sectors of the gradients of weights, lse and sums, of other inputs and of the output."""
    logits = 2 * tokens * EXPERTS * 2
    chosen = tokens * TOP_K * (4 + 8)
    lse = 2 * tokens * 4
    return (logits + chosen + lse + (2 * EXPERTS + 5) * 4) / SECTOR


def minimum_of_permutation(tokens: int) -> float:
    """Sectors of inputs and outputs: a row is read once and written K times."""
    rows = tokens * (1 + TOP_K) * WIDTH * 2
    slots = tokens * TOP_K * (8 + 8)
    totals = (2 * EXPERTS + 1) * 8
    return (rows + slots + totals) / SECTOR


MINIMUM = {
    "topk_gating": minimum_of_gating,
    "topk_gating with segments": minimum_with_segments,
    "topk_gating_backward": minimum_of_gradient,
    "moe_permute": minimum_of_permutation,
}


class Interpreter:
    """`run` starts a program in place of a GPU; `library` is equipoise with PTX."""

    def __init__(self, run: Path, library: Path):
        self.run, self.library = run.resolve(), library.resolve()

    def stderr(self, *program: str, **settings: str) -> str:
        """What the interpreter says while it runs a Python program."""
        preload = 'LD_PRELOAD="$LD_PRELOAD:$EQUIPOISE_LIBRARY" exec "$@"'
        command = [str(self.run), "sh", "-c", preload, "sh", sys.executable, *program]
        settings |= {
            "EQUIPOISE_LIBRARY": str(self.library),
            "PTXRUN_CC": "80",
            "PTXRUN_STRICT": "1",
        }
        done = subprocess.run(
            command, env={**os.environ, **settings}, cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(program)} failed\n{done.stdout}{done.stderr[-4000:]}")
        return done.stderr

    def traffic(self, op: str, tokens: int) -> dict[str, tuple[int, int, int]]:
        """Per launch: sectors, passes of shared memory, passes without any bank conflict."""
        text = self.stderr(__file__, op, str(tokens), PTXRUN_STATS="1")
        pattern = r"\[ptxrun\] (\w+): .* sectors (\d+) .* shared passes (\d+) \(ideal (\d+)\)"
        launches = {}
        for name, *numbers in re.findall(pattern, text):
            assert readable(name)[0] not in launches, f"{op} launches {name} twice"
            launches[readable(name)[0]] = tuple(map(int, numbers))
        return launches

    def not_executed(self, log: Path) -> list[str]:
        """Instances of kernels in the library that no test marked `cuda` runs.

        `log` is what make test-ptx has left of its last run of them; an older one is not believed.
        """
        if log.exists() and log.stat().st_mtime > self.library.stat().st_mtime:
            text = log.read_text()
        else:
            tests = ["-m", "pytest", "-q", "-m", "cuda", "--capture=sys", "tests/python"]
            text = self.stderr(*tests, PTXRUN_VERBOSE="1")
        entries = re.findall(r"[.]entry (\w+)", self.library.read_text(errors="ignore"))
        launched = re.findall(r"^\[ptxrun\] (\w+)<<<", text, re.M)
        missed = set(map(readable, entries)) - set(map(readable, set(launched)))
        return sorted(" ".join(name).strip() for name in missed)


def main() -> None:
    """traffic.py OP TOKENS"""
    import torch

    import equipoise.functional as F
    from equipoise import ops

    maps = Path("/proc/self/maps").read_text()
    assert os.path.realpath(os.environ["EQUIPOISE_LIBRARY"]) in maps, "another library is loaded"
    op, tokens = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(0)
    logits = -torch.rand(tokens, EXPERTS).bfloat16()  # the same bits on every CPU, and few ties
    if op == "topk_gating":
        F.topk_gating(logits.cuda(), TOP_K)
        return
    if op == "topk_gating with segments":
        segments = torch.arange(SEGMENTS).repeat_interleave(tokens // SEGMENTS)
        F.topk_gating(logits.cuda(), TOP_K, segment_ids=segments.cuda(), num_segments=SEGMENTS)
        return
    r = F.topk_gating(logits, TOP_K)
    indices = r.topk_indices.cuda()
    if op == "topk_gating_backward":
        grads = (torch.ones_like(x).cuda() for x in (r.topk_weights, r.lse, r.sums))
        gate = "softmax", False, 1.0
        ops.topk_gating_backward(*grads, logits.cuda(), indices, r.lse.cuda(), *gate)
    else:
        F.moe_permute(torch.ones(tokens, WIDTH).bfloat16().cuda(), indices, EXPERTS)


if __name__ == "__main__":
    main()

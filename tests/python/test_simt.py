# SPDX-License-Identifier: Apache-2.0
"""The harness that runs the CUDA sources on the CPU: it must see what is wrong, and only that."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from simt import SIMT

import equipoise.functional as F

pytestmark = pytest.mark.skipif(SIMT is None, reason="libequipoise_simt.so is not built")

# The case of tests/simt/faults.cu, the kind of fault, and what else the report must say.
FAULTS = [
    (
        "reads_behind_the_end",
        "out of bounds",
        "thread 63 of block 1 .*4 bytes at 512 of the 512",
    ),
    ("writes_before_the_begin", "out of bounds", "thread 5 of block .*writes 4 bytes"),
    ("follows_null", "out of bounds", "thread 3 of block .*reads 4 bytes of no tensor"),
    ("loads_misaligned", "misaligned", "accesses 16 bytes"),
    ("leaves_the_shared_memory", "out of bounds", "thread 63 .*at 256 of the 256 bytes of dynamic"),
    ("reads_unwritten_shared_memory", "uninitialised shared memory", "thread 9 "),
    ("misses_syncthreads", "race", "that thread .* also"),
    ("misses_syncthreads_before_writing_again", "race", "thread 0 .*also reads|also writes"),
    ("misses_syncwarp", "race", "that thread .* also"),
    ("syncs_only_the_warp", "race", "that thread .* also"),
    ("mixes_atomic_and_plain", "race", "that thread .* also"),
    ("writes_what_another_block_writes", "race", "of another block"),
    ("takes_a_ticket_without_fence_before", "race", "thread 0 of another block"),
    ("takes_a_ticket_without_fence_behind", "race", "thread 0 of another block"),
    ("leaves_before_syncthreads", "divergent barrier", "left the kernel|leaves the kernel"),
    ("waits_at_different_syncthreads", "divergent barrier", "waits in another __syncthreads"),
    (
        "names_a_mask_without_itself",
        "lane outside its mask",
        "thread 1 .*lane 1 is not in",
    ),
    ("shuffles_from_outside_the_mask", "shuffle from absent lane", "lane (1[6-9]|2.|3.) is not in"),
    ("waits_for_a_lane_that_left", "absent lane", "lane 31 is"),
    ("meets_at_different_functions", "divergent warp", "waits at another function"),
    ("waits_for_a_warp_that_waits_for_the_block", "deadlock", "threads that will never come"),
    ("never_ends", "endless loop", "thread 2 of block 1"),
    ("has_no_blocks", "bad launch", "with 0 blocks"),
    ("has_too_many_blocks", "bad launch", "with 2147483648 blocks"),
    ("has_too_many_threads", "bad launch", "with 1056 threads"),
    ("has_too_much_shared_memory", "bad launch", "50176 bytes of shared memory"),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case,kind,detail", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_fault_is_reported(case, kind, detail, seed):
    """Under any schedule: with the kind, the thread, its block, the kernel and the line."""
    SIMT.seed(seed)
    report = SIMT.run_fault(case)
    assert report.startswith(f"simt: {kind}: ")
    if kind == "bad launch":
        assert "is_right_about_everything" in report
    else:
        kernel = "takes_a_ticket" if "ticket" in case else case
        assert kernel in report and re.search(
            r" of block \d+ in .* at (faults.cu|rows.cuh):\d+", report
        )
    assert re.search(detail, report), report


@pytest.mark.parametrize("case", ["is_right_about_everything", "takes_a_ticket_with_both_fences"])
def test_nothing_is_reported_of_a_right_kernel(case):
    for seed in range(20):
        SIMT.seed(seed)
        assert SIMT.run_fault(case) == ""


def test_a_launch_after_a_fault_is_as_if_there_was_none():
    SIMT.seed(3)
    assert SIMT.run_fault("misses_syncthreads") != ""
    assert SIMT.run_fault("is_right_about_everything") == ""


# ---- the ops on it -------------------------------------------------------------------------------


def gating(tokens, experts, dtype):
    logits = torch.randn(tokens, experts).to(dtype).requires_grad_()
    return lambda: F.topk_gating(logits, 4, norm_topk_prob=True), logits


def bincount():
    indices, weights = torch.randint(-1, 9, (1000, 4)), torch.rand(1000, 4, requires_grad=True)
    return lambda: F.expert_bincount(indices, 9, weights), weights


def permute(tokens):
    indices, weights = torch.randint(-1, 30, (tokens, 8)), torch.rand(tokens, 8)
    x = torch.randn(tokens, 16, requires_grad=True)
    return lambda: F.moe_permute(x, indices, 30, weights), x


def unpermute():
    row_id_map = torch.randperm(300 * 4).view(300, 4)
    permuted, weights = torch.randn(1200, 24, requires_grad=True), torch.rand(300, 4)
    weights.requires_grad_()
    return lambda: F.moe_unpermute(permuted, row_id_map, weights), weights


def sort_chunks():
    split_sizes, order, x = torch.randint(0, 3, (1100,)), torch.randperm(1100), torch.randn(2200, 8)
    x = x[: split_sizes.sum()].requires_grad_()
    return lambda: F.sort_chunks_by_index(x, split_sizes, order), x


def loss():
    routing = F.topk_gating(torch.randn(20, 6, requires_grad=True), 2)
    sums = routing.sums
    return lambda: F.balance_loss(routing, {"switch": 1.0, "z": 0.5}).total, sums


CASES = {  # an op's call, and the input whose gradient is asked for
    "topk_gating_by_teams": lambda: gating(150, 128, torch.bfloat16),
    "topk_gating_by_blocks": lambda: gating(20, 700, torch.float32),
    "expert_bincount": bincount,
    "moe_permute_in_one_block": lambda: permute(100),
    "moe_permute_in_three_steps": lambda: permute(1100),
    "moe_unpermute": unpermute,
    "sort_chunks_by_index": sort_chunks,
    "balance_loss": loss,
}


def run(case):
    """All that the op returns and the gradient; and how many kernels ran in either direction."""
    torch.manual_seed(0)
    call, wanted = CASES[case]()
    counts = [SIMT.launches()]
    outputs = call()
    counts.append(SIMT.launches())
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [*outputs]
    roots = [o for o in outputs if o.requires_grad]
    gradient = torch.autograd.grad(roots, wanted, [torch.randn_like(r) for r in roots])[0]
    counts.append(SIMT.launches())
    return [*outputs, gradient], counts[1] - counts[0], counts[2] - counts[1]


@pytest.mark.parametrize("case", CASES)
def test_kernels_run_in_both_directions(case, simt_ops):
    """A look-up by a fixed name would end at the other library's backward, and nobody would see."""
    _, forward, backward = run(case)
    assert forward > 0 and backward > 0


@pytest.mark.parametrize("case", CASES)
def test_same_bits_under_any_schedule(case, simt_ops):
    SIMT.seed(0)
    first, *_ = run(case)
    for seed in range(1, 11):
        SIMT.seed(seed)
        for a, b in zip(run(case)[0], first, strict=True):
            assert torch.equal(a, b)


def test_mutants_fit_the_sources():
    """What tests/simt/mutants.py breaks must stand in the sources, once."""
    root = Path(__file__).parents[2]
    for mutant in runpy.run_path(str(root / "tests/simt/mutants.py"))["MUTANTS"]:
        text = (root / "cuda" / mutant.file).read_text()
        assert text.count(mutant.old) == 1, (mutant.file, mutant.old)

# SPDX-License-Identifier: Apache-2.0
"""Breaks the CUDA sources in one place at a time and sees whether the tests of the ops notice.

make mutants runs ``python tests/simt/mutants.py BUILD_DIRECTORY [NUMBER ...]``: it builds
equipoise_simt in a tree of its own from a copy of ``cuda/``, runs the tests once on the copy as it
is, and then once for each mutant, or for those of the numbers. It ends with killed/total, and fails
unless all are killed.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Mutant:
    """In `file`, `old` (which stands there once) becomes `new`; `tests` must then fail."""

    what: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "tie order: the last lane of equal ones wins",
        "topk_gating.cu",
        "const bool wins = holds && (holders & lanes_below(lane)) == 0;",
        "const bool wins = holds && holders >> lane == 1;",
        "topk_gating",
    ),
    Mutant(
        "tie order: the last of a lane's equal items wins",
        "topk_gating.cu",
        ": logit[i] > best_logit;",
        ": logit[i] >= best_logit;",
        "topk_gating",
    ),
    Mutant(
        "dropped barrier: the chosen are read before they are written",
        "topk_gating.cu",
        "    __syncwarp();\n\n    if (kGeneral",
        "\n    if (kGeneral",
        "topk_gating",
    ),
    Mutant(
        "dropped barrier: counts are written out before they are complete",
        "topk_gating.cu",
        "  __syncthreads();  // `chosen` is done with, the counts are complete\n",
        "",
        "topk_gating",
    ),
    Mutant(
        "missing mask: a masked token takes part",
        "topk_gating.cuh",
        "return token_mask[token] ? 1 : 0;",
        "return 1;",
        "topk_gating",
    ),
    Mutant(
        "off by one at the tail: a load of 16 bytes goes past the row",
        "topk_gating.cuh",
        "if (aligned && kSize <= count) return",
        "if (aligned && kSize <= count + 1) return",
        "topk_gating",
    ),
    Mutant(
        "wrong stride: rows are taken to be contiguous",
        "topk_gating.cuh",
        "return logits + token * row_stride;",
        "return logits + token * experts;",
        "topk_gating",
    ),
    Mutant(
        "off by one at the tail: the gradient of one expert too many",
        "topk_gating_backward.cu",
        "if (i + j < count) to[i + j]",
        "if (i + j <= count) to[i + j]",
        "topk_gating",
    ),
    Mutant(
        "not initialised again: a row keeps the gate's gradient of the row before",
        "topk_gating_backward.cu",
        "    Piece<float>{}.store(from);\n",
        "",
        "topk_gating",
    ),
    Mutant(
        "dropped barrier: two threads write one element of the gradient",
        "topk_gating_backward.cu",
        "    __syncthreads();  // the chosen ones are written again\n",
        "",
        "topk_gating",
    ),
    Mutant(
        "one group too many is kept",
        "topk_gating.cu",
        "better < group_topk;",
        "better <= group_topk;",
        "topk_gating",
    ),
    Mutant(
        "a group's experts in the next lanes are left out of its score",
        "topk_gating.cu",
        "best = MergeBestTwo{}(best, continued[++lane]);",
        "++lane;",
        "topk_gating",
    ),
    Mutant(
        "not initialised again: a segment gets the counts of the one before",
        "topk_gating.cu",
        "for (int e = threadIdx.x; e < f.experts; e += kThreads) counts[e] = 0;\n#pragma",
        "\n#pragma",
        "topk_gating",
    ),
    Mutant(
        "sums of a segment that the first block does not meet are lost",
        "block.cuh",
        "      if (lane == 0) flags[0] = true;\n",
        "",
        "topk_gating",
    ),
    Mutant(
        "sums of a segment that no token has are not written",
        "block.cuh",
        "if (having == 0 && !last) continue;",
        "if (having == 0) continue;",
        "topk_gating",
    ),
    Mutant(
        "wrong segment: all tokens get the gradients of the first",
        "topk_gating_backward.cu",
        "keep(b.grad_of_segment(b.segment(token)), b.experts);",
        "keep(b.grad_of_segment(0), b.experts);",
        "topk_gating",
    ),
    Mutant(
        "missing fence before the ticket",
        "block.cuh",
        "  __threadfence();  // what this thread wrote is visible before the ticket is taken\n",
        "",
        "topk_gating",
    ),
    Mutant(
        "missing fence behind the ticket",
        "block.cuh",
        "  __threadfence();  // what the others wrote is read after the ticket was taken\n",
        "",
        "topk_gating",
    ),
    Mutant(
        "an inclusive prefix where an exclusive one belongs",
        "block.cuh",
        "  sum -= value;\n",
        "",
        "moe_permute",
    ),
    Mutant(
        "off by one at the tail: a place for a pair that is not there",
        "slot_sort.cu",
        "if (pair < end) sort.row_id_map",
        "if (pair <= end) sort.row_id_map",
        "moe_permute",
    ),
    Mutant(
        "dropped barrier: the next pairs get the ranks of these",
        "slot_sort.cu",
        "    __syncwarp();  // the next step reads the ranks that this one moved on\n",
        "",
        "moe_permute",
    ),
    Mutant(
        "a slot beyond the capacity gets a row of the next expert",
        "slot_sort.cu",
        "rank < sort.kept_per_expert[expert]",
        "rank <= sort.kept_per_expert[expert]",
        "moe_permute",
    ),
    Mutant(
        "of equal weights one too many stays",
        "slot_sort.cu",
        "tie && tie_rank < left",
        "tie && tie_rank <= left",
        "moe_permute",
    ),
    Mutant(
        "dropped barrier: the digit of the smallest key is read before it is found",
        "slot_sort.cu",
        "      __syncthreads();\n      least |=",
        "      least |=",
        "moe_permute",
    ),
    Mutant(
        "unwritten rows stay as they were",
        "moe_rows.cu",
        "!s.filled[first + lane]",
        "s.filled[first + lane]",
        "moe_permute",
    ),
    Mutant(
        "wrong stride: rows are taken to be contiguous",
        "moe_rows.cu",
        "rows + row * stride : nullptr",
        "rows + row * width : nullptr",
        "moe_unpermute",
    ),
    Mutant(
        "off by one at the tail: the first slot of the next token is added",
        "moe_rows.cu",
        "if (first + i >= end) continue;",
        "if (first + i > end) continue;",
        "moe_unpermute",
    ),
    Mutant(
        "off by one at the tail: many slots and the first one of the next token",
        "moe_rows.cu",
        "first + lane < end ? row_id_map",
        "first + lane <= end ? row_id_map",
        "moe_unpermute",
    ),
    Mutant(
        "rows of many slots are not marked as filled",
        "moe_rows.cu",
        "if (share.column == 0) s.filled",
        "if (share.column < 0) s.filled",
        "moe_unpermute",
    ),
    Mutant(
        "wrong token: its gradient goes to the rows of another one",
        "moe_rows.cu",
        "slot / b.slots.top_k * b.grad_stride",
        "slot % b.slots.top_k * b.grad_stride",
        "moe_unpermute",
    ),
    Mutant(
        "dropped lanes: a dot product without the upper half of a warp",
        "moe_rows.cu",
        "team_reduce<kWarpSize>(sum, Sum{})",
        "team_reduce<kWarpSize / 2>(sum, Sum{})",
        "moe_unpermute",
    ),
    Mutant(
        "wrong stride: a slot looks at the mask of another token",
        "expert_bincount.cu",
        "token_mask[slot / top_k]",
        "token_mask[slot % top_k]",
        "expert_bincount",
    ),
    Mutant(
        "race: every lane of equal bins adds their sum",
        "expert_bincount.cu",
        "if (bin >= 0 && (peers & lanes_below(lane)) == 0)",
        "if (bin >= 0)",
        "expert_bincount",
    ),
    Mutant(
        "padding of a block stays as it was",
        "moe_align_block_size.cu",
        "if (is_padding) b.sorted_token_ids[i]",
        "if (i >= size) b.sorted_token_ids[i]",
        "moe_align_block_size",
    ),
    Mutant(
        "a token counts for a rank once per slot",
        "dispatch_layout.cu",
        "    if (!is_first) continue;\n",
        "",
        "dispatch_layout",
    ),
    Mutant(
        "dropped barrier: bins are written out before they are complete",
        "dispatch_layout.cu",
        "  __syncthreads();\n  for (int e = threadIdx.x; e < l.experts;",
        "  for (int e = threadIdx.x; e < l.experts;",
        "dispatch_layout",
    ),
    Mutant(
        "dropped barrier: a row of counts is read before it is copied",
        "load_metrics.cu",
        "copy[e] = row[e];\n    __syncthreads();\n",
        "copy[e] = row[e];\n",
        "load_metrics",
    ),
    Mutant(
        "the Gini coefficient leaves out the last expert",
        "load_metrics.cu",
        "other < experts; ++other",
        "other < experts - 1; ++other",
        "load_metrics",
    ),
    Mutant(
        "off by one: the first row of a chunk moves with the chunk before it",
        "sort_chunks_by_index.cu",
        "c.begins[middle] <= row",
        "c.begins[middle] < row",
        "sort_chunks_by_index",
    ),
    Mutant(
        "a chunk that is named twice is placed twice",
        "sort_chunks_by_index.cu",
        "c.named[index] == 1",
        "c.named[index] >= 1",
        "sort_chunks_by_index",
    ),
    Mutant(
        "dropped barrier: the next loss comes to the same place with another thread",
        "balance_loss.cu",
        "f(i);\n    __syncthreads();",
        "f(i);",
        "balance_loss",
    ),
    Mutant(
        "dropped barrier: the values of a single block are read before they are seen",
        "balance_loss.cu",
        "  __syncthreads();  // with a single block its values are not yet seen by all\n",
        "",
        "balance_loss",
    ),
]


def test(library: Path, tests: list[str]) -> bool:
    """Whether the tests of these ops pass on the library."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-k",
        "simt and not compile and not export",
    ]
    command += [str(ROOT / f"tests/python/test_{name}.py") for name in tests]
    environment = dict(os.environ, EQUIPOISE_SIMT_LIBRARY=str(library))
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True).returncode == 0


def main() -> int:
    """Exit status 0 if the tests pass as the sources are, and fail on every mutant."""
    tree = Path(sys.argv[1]).resolve()
    torch_root = subprocess.run(
        [sys.executable, "-c", "import torch; print(*torch.__path__)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    shutil.rmtree(tree / "cuda", ignore_errors=True)
    shutil.copytree(ROOT / "cuda", tree / "cuda", copy_function=shutil.copy)  # as new files
    if not (tree / "csrc").exists():
        (tree / "csrc").symlink_to(ROOT / "csrc")
    configure = ["cmake", "-S", ROOT, "-B", tree / "build", "-DEQUIPOISE_CUDA=OFF"]
    configure += ["-DBUILD_TESTING=ON", f"-DTORCH_INSTALL_PREFIX={torch_root}"]
    configure += [f"-DEQUIPOISE_SIMT_KERNELS={tree / 'cuda'}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    build = ["cmake", "--build", tree / "build", "--target", "equipoise_simt"]
    library = tree / "build/tests/simt/libequipoise_simt.so"

    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    if not test(library, sorted({mutant.tests for mutant in MUTANTS})):
        print("the tests fail without a mutant")
        return 1
    chosen = [int(number) for number in sys.argv[2:]] or range(1, len(MUTANTS) + 1)
    killed = 0
    for number in chosen:
        mutant = MUTANTS[number - 1]
        start = time.monotonic()
        path = tree / "cuda" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            print(f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}")
            return 1
        path.write_text(text.replace(mutant.old, mutant.new))
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        survived = test(library, [mutant.tests])
        path.write_text(text)
        killed += not survived
        verdict = "SURVIVED" if survived else "killed"
        seconds = time.monotonic() - start
        print(f"{number:2} {verdict} {seconds:4.0f} s  {mutant.file}: {mutant.what}", flush=True)
    print(f"mutants killed: {killed}/{len(chosen)}")
    return killed < len(chosen)


if __name__ == "__main__":
    sys.exit(main())

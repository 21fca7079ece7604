# SPDX-License-Identifier: Apache-2.0
"""Counting, permuting and unpermuting on the CPU, side by side with eager PyTorch.

    permute.py                   all tables, then the demands
    permute.py --demands         only the rows that the demands need

Every contestant is checked before it is timed (harness.py); who fails is reported as wrong and not
timed. Eager PyTorch takes part in several forms, and a demand is about the fastest of them, except
`embedding_bag`: one fused kernel, made for something else, that an unpermutation can be dressed up
as; it is timed and named beside the demand. Results are allocated by each call, but for the rows
with out=. `floor` is the time to read and write the same bytes once, by torch's dot and fill, in
memory that is already there.

The memory of a result above 32 MB is new in each call, and the system clears it first. So the
tables of such results have a second floor, `fresh floor`: to allocate and fill as much, in huge
pages.

Peak memory of counting is shown twice: of the tensors, from torch's profiler, which is exact; and
of the process, from its high-water mark (Linux only), which has all of it but may miss 0.1 MB.
"""

import argparse
import ctypes
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import NamedTuple

import torch
from harness import (
    FRESH,
    ON_LINUX,
    PEAKS_HEADER,
    TOLERANCE,
    Call,
    Contest,
    Times,
    Verdict,
    compare,
    median_us,
    print_machine,
    print_peaks,
    print_verdicts,
    ratio,
)
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag, one_hot

import equipoise.functional as F
from equipoise import reference

NUM_EXPERTS, TOP_K, WIDTH = 128, 8, 1024  # of the tables with rows
GRID = {"threads": [1, 2], "dtypes": ["float32", "bfloat16"], "tokens": [1, 512, 4096]}
REUSED, ROUND_TRIP = "permute with out=", "forward+backward of both"
FUSED = "embedding_bag"
# At least so many times faster than the best eager form on one thread. A result of 4096 tokens is
# larger than what the C library reuses (32 MB), one of 512 is not.
WANTED = {
    ("permute", 4096): 4,
    (REUSED, 4096): 2,
    ("unpermute", 4096): 10,
    (ROUND_TRIP, 4096): 6,
    ("permute", 512): 1.4,
    ("unpermute", 512): 3.5,
}


def random_indices(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    return torch.rand(num_tokens, num_experts).topk(top_k).indices


# ---- demands -----------------------------------------------------------------------------------
def versus(times: Times, others: list[str]) -> tuple[float | None, str]:
    """How many times faster than the fastest of the others, and what to say beside it."""
    others = [name for name in others if name in times]
    by_time = sorted(others, key=lambda name: median_us(times[name]))
    usual = [name for name in by_time if FUSED not in name]
    if "equipoise" not in times or not usual:
        return None, ""
    measured, by_rounds = ratio(times, usual[0], "equipoise")
    detail = f"by rounds {by_rounds:.2f}; against {usual[0]}"
    for floor in ("floor", FRESH):
        if floor in times:
            detail += f"; {ratio(times, 'equipoise', floor)[0]:.1f} {floor}s"
    for name in [name for name in by_time if FUSED in name][:1]:
        detail += f"; {ratio(times, name, 'equipoise')[0]:.2f} against {name}"
    return measured, detail


# ---- permute, unpermute -------------------------------------------------------------------------
class Rows(NamedTuple):
    """The inputs of a row."""

    x: Tensor  # [T, H], requires grad
    topk_indices: Tensor  # [T, K]
    topk_weights: Tensor  # [T, K] float32, requires grad
    permuted: Tensor  # [N, H] something else than the rows of x
    pull: Tensor  # [T, H] gradient of the result of a round trip


def make_rows(dtype: str, num_tokens: int, seed: int) -> Rows:
    torch.manual_seed(seed)

    def rows(count: int) -> Tensor:
        return torch.randn(count, WIDTH).to(getattr(torch, dtype))

    return Rows(
        rows(num_tokens).requires_grad_(),
        random_indices(num_tokens, NUM_EXPERTS, TOP_K),
        torch.randn(num_tokens, TOP_K).softmax(-1).requires_grad_(),
        rows(num_tokens * TOP_K),
        rows(num_tokens),
    )


class Sorted:
    """What eager PyTorch makes of the indices: no counts, which is to its advantage."""

    def __init__(self, topk_indices: Tensor) -> None:
        self.shape = topk_indices.shape
        # Wider keys take longer to sort.
        self.order = topk_indices.flatten().to(torch.int16).argsort(stable=True)
        self.tokens = self.order // self.shape[1]

    @cached_property
    def row_id_map(self) -> Tensor:
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(len(inverse))
        return inverse.view(self.shape)


EAGER_PERMUTE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_select": lambda x, tokens: x.index_select(0, tokens),
    "indexing": lambda x, tokens: x[tokens],
    "embedding": lambda x, tokens: embedding(tokens, x),
}


def weigh(rows: Tensor, weights: Tensor) -> Tensor:
    """[T K, H] rows in slot order, summed per token."""
    return torch.bmm(weights.unsqueeze(1), rows.view(*weights.shape, -1)).squeeze(1)


def gather_sum(permuted: Tensor, slots: Sorted, weights: Tensor) -> Tensor:
    gathered = permuted.index_select(0, slots.row_id_map.flatten()).view(*weights.shape, -1)
    return (gathered * weights.unsqueeze(-1)).sum(1)


def gather_bmm(permuted: Tensor, slots: Sorted, weights: Tensor) -> Tensor:
    return weigh(permuted.index_select(0, slots.row_id_map.flatten()), weights)


def index_put_bmm(permuted: Tensor, slots: Sorted, weights: Tensor) -> Tensor:
    return weigh(torch.empty_like(permuted).index_put_((slots.order,), permuted), weights)


def index_add(permuted: Tensor, slots: Sorted, weights: Tensor) -> Tensor:
    weighted = permuted * weights.flatten()[slots.order].unsqueeze(1)
    return permuted.new_zeros(len(weights), WIDTH).index_add_(0, slots.tokens, weighted)


def bag(permuted: Tensor, slots: Sorted, weights: Tensor) -> Tensor:
    return embedding_bag(slots.row_id_map, permuted, mode="sum", per_sample_weights=weights)


EAGER_UNPERMUTE: dict[str, Callable[[Tensor, Sorted, Tensor], Tensor]] = {
    "gather, product, sum": gather_sum,
    "gather, bmm": gather_bmm,
    "index_put, bmm": index_put_bmm,
    "index_add": index_add,
    "embedding_bag": bag,
}
# Not all pairs: those of which one half wins or is what people write.
EAGER_ROUND_TRIPS = [
    ("index_select", "gather, bmm"),
    ("embedding", "gather, bmm"),
    ("index_select", "index_add"),
    ("index_select", "embedding_bag"),
    ("embedding", "embedding_bag"),
]


def fill_fresh_memory(like: Tensor) -> None:
    memory = torch.empty_like(like)
    page = 4096
    begin = -(-memory.data_ptr() // page) * page
    size = (memory.data_ptr() + memory.nbytes) // page * page - begin
    madv_hugepage = 14
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(begin), ctypes.c_size_t(size), ctypes.c_int(madv_hugepage)
    )
    memory.fill_(1)


def permute_calls(r: Rows) -> dict[str, Call]:
    def eager(form: Callable) -> Call:
        return lambda: form(r.x, Sorted(r.topk_indices).tokens)

    return {"equipoise": lambda: F.moe_permute(r.x, r.topk_indices, NUM_EXPERTS).permuted} | {
        name: eager(form) for name, form in EAGER_PERMUTE.items()
    }


def reused_calls(r: Rows) -> dict[str, Call]:
    out = torch.empty_like(r.permuted)

    def eager() -> Tensor:
        return torch.index_select(r.x, 0, Sorted(r.topk_indices).tokens, out=out)

    return {
        "equipoise": lambda: F.moe_permute(r.x, r.topk_indices, NUM_EXPERTS, out=out).permuted,
        "index_select": eager,
    }


def unpermute_calls(r: Rows) -> dict[str, Call]:
    slots = Sorted(r.topk_indices)  # left by the permutation, with its inverse
    row_id_map = slots.row_id_map

    def eager(form: Callable) -> Call:
        return lambda: form(r.permuted, slots, r.topk_weights.to(r.permuted.dtype))

    return {"equipoise": lambda: F.moe_unpermute(r.permuted, row_id_map, r.topk_weights)} | {
        name: eager(form) for name, form in EAGER_UNPERMUTE.items()
    }


def round_trip_calls(r: Rows) -> dict[str, Call]:
    def with_gradients(out: Tensor) -> tuple[Tensor, ...]:
        return out, *torch.autograd.grad(out, (r.x, r.topk_weights), r.pull)

    def equipoise() -> tuple[Tensor, ...]:
        p = F.moe_permute(r.x, r.topk_indices, NUM_EXPERTS)
        return with_gradients(F.moe_unpermute(p.permuted, p.row_id_map, r.topk_weights))

    def eager(permute: Callable, unpermute: Callable) -> Call:
        def call() -> tuple[Tensor, ...]:
            slots = Sorted(r.topk_indices)
            permuted = permute(r.x, slots.tokens)
            return with_gradients(unpermute(permuted, slots, r.topk_weights.to(r.x.dtype)))

        return call

    return {"equipoise": equipoise} | {
        f"{there}; {back}": eager(EAGER_PERMUTE[there], EAGER_UNPERMUTE[back])
        for there, back in EAGER_ROUND_TRIPS
    }


def check_permuted(r: Rows) -> Callable[[Tensor], None]:
    want = reference.moe_permute(r.x.detach(), r.topk_indices, NUM_EXPERTS)[0]
    return lambda got: compare("rows", got, want, 0)


def close(what: str, got: Tensor, want: Tensor, rows: Tensor) -> None:
    """As exact as the dtype of the rows lets eager be, which takes the weights in it too."""
    compare(what, got, want, TOLERANCE[rows.dtype] * want.abs().max())


def check_unpermuted(r: Rows) -> Callable[[Tensor], None]:
    slots = Sorted(r.topk_indices)
    want = reference.moe_unpermute(
        r.permuted.double(), slots.row_id_map, r.topk_weights.detach().double()
    )
    return lambda got: close("sums", got, want, r.x)


def check_round_trip(r: Rows) -> Callable[[tuple[Tensor, ...]], None]:
    x, weights = (leaf.detach().double().requires_grad_() for leaf in (r.x, r.topk_weights))
    permuted, _, row_id_map = reference.moe_permute(x, r.topk_indices, NUM_EXPERTS)[:3]
    out = reference.moe_unpermute(permuted, row_id_map, weights)
    want = (out.detach(), *torch.autograd.grad(out, (x, weights), r.pull.double()))

    def check(got: tuple[Tensor, ...]) -> None:
        for what, one, exact in zip(
            ("sums", "gradient of x", "gradient of the weights"), got, want, strict=True
        ):
            close(what, one, exact, r.x)

    return check


def floor_calls(r: Rows) -> dict[str, Call]:
    """Writes and reads [N, H] rows and [T, H] tokens as often as the op must."""
    rows, tokens = torch.zeros_like(r.permuted), torch.zeros_like(r.pull)

    def write(memory: Tensor) -> None:
        memory.fill_(1)

    def read(memory: Tensor) -> None:  # as two streams: one leaves the memory waiting
        torch.dot(*memory.view(torch.float32).flatten().chunk(2))

    def permute() -> None:
        read(tokens)
        write(rows)

    def unpermute() -> None:
        read(rows)
        write(tokens)

    def round_trip() -> None:
        for _ in range(2):  # the backward of each has the traffic of the other
            permute()
            unpermute()
        read(rows)  # for the gradient of the weights

    return {"permute": permute, REUSED: permute, "unpermute": unpermute, ROUND_TRIP: round_trip}


PARTS = {
    "permute": (permute_calls, check_permuted),
    REUSED: (reused_calls, check_permuted),
    "unpermute": (unpermute_calls, check_unpermuted),
    ROUND_TRIP: (round_trip_calls, check_round_trip),
}


def row_tables(contest: Contest, args: argparse.Namespace) -> Iterator[Verdict]:
    grid = GRID | ({"threads": [1], "tokens": [512, 4096]} if args.demands else {})
    for threads, tokens, dtype in itertools.product(grid["threads"], grid["tokens"], args.dtypes):
        torch.set_num_threads(threads)
        r = make_rows(dtype, tokens, args.seed)
        floors = floor_calls(r)
        for op, (make_calls, make_check) in PARTS.items():
            wanted = WANTED.get((op, tokens)) if threads == 1 else None
            if args.demands and wanted is None:
                continue
            what = f"{op}, {dtype}, T={tokens}"
            title = f"{what} E={NUM_EXPERTS} K={TOP_K} H={WIDTH}, threads: {threads}"
            with torch.set_grad_enabled(op == ROUND_TRIP):
                calls = make_calls(r)
                fresh = None
                if ON_LINUX and op == "permute" and r.permuted.nbytes >= 32 << 20:
                    fresh = partial(fill_fresh_memory, r.permuted)
                times = contest.run(title, floors[op], calls, make_check(r), fresh)
            if wanted is not None:
                measured, detail = versus(times, [name for name in calls if name != "equipoise"])
                yield Verdict(f"{what}: times the best eager", wanted, measured, detail)


# ---- counting -----------------------------------------------------------------------------------
class Count(NamedTuple):
    threads: int
    num_tokens: int
    num_experts: int
    wanted: dict[str, float]  # at least so many times faster


COUNTS = [
    Count(1, 1, 128, {"bincount": 1.0}),
    Count(1, 512, 128, {"bincount": 2.5}),
    Count(1, 4096, 128, {"bincount": 2.5}),
    Count(1, 16384, 128, {"bincount": 2.5}),
    Count(2, 16384, 128, {"bincount": 4.0}),
    Count(1, 16384, 256, {"bincount": 2.5, "one-hot sum": 1000}),
]


def count_calls(indices: Tensor, num_experts: int) -> dict[str, Call]:
    return {
        "equipoise": lambda: F.expert_bincount(indices, num_experts),
        "bincount": lambda: torch.bincount(indices.flatten(), minlength=num_experts),
        "one-hot sum": lambda: one_hot(indices.flatten(), num_experts).sum(0),
    }


def count_tables(contest: Contest, args: argparse.Namespace) -> Iterator[Verdict]:
    for row in COUNTS:
        torch.set_num_threads(row.threads)
        torch.manual_seed(args.seed)
        indices = random_indices(row.num_tokens, row.num_experts, TOP_K)
        want = reference.expert_bincount(indices, row.num_experts)
        memory = torch.ones(indices.numel(), dtype=torch.float64).chunk(2)  # as large as they are
        what = f"expert_bincount, T={row.num_tokens} K={TOP_K} E={row.num_experts}"
        times = contest.run(
            f"{what}, threads: {row.threads}",
            lambda memory=memory: torch.dot(*memory),
            count_calls(indices, row.num_experts),
            lambda got, want=want: compare("counts", got, want, 0),
        )
        for other, wanted in row.wanted.items():
            measured, detail = versus(times, [other])
            threads = ", two threads" if row.threads == 2 else ""
            yield Verdict(f"{what}{threads}: times {other}", wanted, measured, detail)


# ---- memory of counting -------------------------------------------------------------------------
def memory_table(args: argparse.Namespace) -> Iterator[Verdict]:
    """The well-known example (B=2, S=10, K=8, N=128) and a large layer."""
    torch.set_num_threads(1)
    print(f"\n{'peak memory of counting, bytes':<50} {PEAKS_HEADER}")
    for tokens, num_experts in ((20, 128), (16384, 256)):
        torch.manual_seed(args.seed)
        indices = random_indices(tokens, num_experts, TOP_K)
        what = f"T={tokens} K={TOP_K} E={num_experts}"
        peaks = {}
        for name, call in count_calls(indices, num_experts).items():
            peaks[name] = print_peaks(f"{what}, {name}", call)
    if ON_LINUX:  # of the large layer
        one_hot_peak, peak = (peaks[name][1] / 1e6 for name in ("one-hot sum", "equipoise"))
        detail = f"{one_hot_peak:.1f} MB one-hot"
        yield Verdict(f"expert_bincount, {what}: MB", 1.0, peak, detail, at_most=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21, help="samples per call (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=GRID["dtypes"], default=GRID["dtypes"])
    parser.add_argument("--demands", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)

    print_machine(args.rounds)
    contest = Contest(args.rounds)
    verdicts = [
        *count_tables(contest, args),
        *memory_table(args),
        *row_tables(contest, args),
    ]
    print_verdicts(verdicts)
    return int("equipoise" in contest.failed)


if __name__ == "__main__":
    sys.exit(main())

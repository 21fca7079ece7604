# SPDX-License-Identifier: Apache-2.0
"""sort_chunks_by_index against splitting and concatenating."""

import pytest
import torch
from helpers import FLOATS
from torch.autograd import gradcheck, gradgradcheck

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = pytest.mark.usefixtures("backend")


def sample_inputs(dtype=torch.float32):
    """(x, split_sizes, order, probs); some chunks are empty."""
    for chunks, longest, width in [(3, 3, 4), (1, 5, 3), (8, 2, 5), (40, 4, 17), (1500, 2, 16)]:
        split_sizes = torch.randint(0, longest + 1, (chunks,))
        split_sizes[-1] += chunks == 1
        order = torch.randperm(chunks)
        rows = int(split_sizes.sum())
        x = torch.randn(rows, width, dtype=torch.float64).to(dtype)
        yield x, split_sizes, order, None
        yield x, split_sizes, order, torch.rand(rows, dtype=torch.float64).to(dtype)


def small_inputs(dtype=torch.float32):
    return [inputs for inputs in sample_inputs(dtype) if inputs[0].numel() <= 200]


def check(*inputs):
    got = F.sort_chunks_by_index(*inputs)
    for name, a, b in zip(got._fields, got, reference.sort_chunks_by_index(*inputs), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    return got


@pytest.mark.parametrize("dtype", FLOATS)
def test_values(dtype):
    """Rows are only copied, so they are equal to the bit."""
    for inputs in sample_inputs(dtype):
        check(*inputs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_rows_of_8_bits(dtype):
    """Are moved as bytes; with probabilities, which may have a gradient."""
    split_sizes, order = torch.tensor([2, 0, 3]), torch.tensor([2, 1, 0])
    for width in (3, 16, 40):
        x = torch.randint(0, 256, (5, width), dtype=torch.uint8)
        probs = torch.rand(5, requires_grad=True)
        got = F.sort_chunks_by_index(x.view(dtype), split_sizes, order, probs)
        want = reference.sort_chunks_by_index(x, split_sizes, order, probs)
        assert got.sorted.dtype == dtype and torch.equal(got.sorted.view(torch.uint8), want[0])
        assert torch.equal(got.sorted_probs, want[1]) and not got.sorted.requires_grad
        assert torch.autograd.grad(got.sorted_probs.sum(), probs)[0].tolist() == [1] * 5
    x = torch.ones(5, 4).to(torch.float8_e5m2).requires_grad_()
    with pytest.raises(RuntimeError, match="x of 8 bits has no gradient"):
        F.sort_chunks_by_index(x, split_sizes, order)


def test_few_large_chunks():
    split_sizes = torch.tensor([700, 0, 1300, 1])
    check(torch.randn(2001, 8), split_sizes, torch.tensor([3, 2, 0, 1]), torch.rand(2001))


def test_undone_by_the_inverse_order_and_by_unpermute():
    for x, split_sizes, order, probs in sample_inputs():
        there = F.sort_chunks_by_index(x, split_sizes, order, probs)
        back = F.sort_chunks_by_index(
            there.sorted, split_sizes[order], order.argsort(), None if probs is None else probs
        )
        assert torch.equal(back.sorted, x)
        assert torch.equal(F.moe_unpermute(there.sorted, there.row_id_map), x)


def test_types_of_the_arguments():
    x, split_sizes, order = torch.randn(5, 4), torch.tensor([2, 3]), torch.tensor([1, 0])
    want = F.sort_chunks_by_index(x, split_sizes, order)
    for got in (
        F.sort_chunks_by_index(x, split_sizes.int(), order.int()),
        F.sort_chunks_by_index(x, split_sizes.int(), order),
    ):
        assert torch.equal(got.sorted, want.sorted)
        assert torch.equal(got.row_id_map, want.row_id_map)
    probs = torch.rand(5).double()
    assert F.sort_chunks_by_index(x.half(), split_sizes, order, probs).sorted_probs.dtype == (
        torch.float64
    )


def test_layouts():
    base = torch.randn(6, 10)
    split_sizes, order = torch.tensor([[2, 0], [1, 2], [3, 1]]).t()
    for x in (base[:, 2:7], base.t()[:6], base[:1].expand(6, 10), base[:, 3:4]):
        check(x, split_sizes, order, base[:, 0])
        check(x.contiguous(), split_sizes, order, base[0, :1].expand(6))


@pytest.mark.parametrize("rows,width,chunks", [(0, 3, 2), (0, 3, 0), (3, 0, 1)])
@pytest.mark.no_launch
def test_empty(rows, width, chunks):
    x = torch.empty(rows, width, requires_grad=True)
    s = check(x, torch.full((chunks,), rows), torch.arange(chunks), torch.ones(rows))
    s.sorted.sum().backward()
    assert x.grad.shape == x.shape


def test_gradients():
    for x, split_sizes, order, probs in small_inputs(torch.float64):
        leaves = [x.requires_grad_()] + ([] if probs is None else [probs.requires_grad_()])

        def sort(x, probs=None, split_sizes=split_sizes, order=order):
            return F.sort_chunks_by_index(x, split_sizes, order, probs)[: 1 + (probs is not None)]

        assert gradcheck(sort, leaves)
        assert gradgradcheck(sort, leaves)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_are_copies(dtype):
    for x, split_sizes, order, probs in sample_inputs(dtype):
        if probs is None:
            continue
        leaves = (x.requires_grad_(), probs.requires_grad_())
        got = F.sort_chunks_by_index(x, split_sizes, order, probs)[:2]
        want = reference.sort_chunks_by_index(x, split_sizes, order, probs)[:2]
        probes = [torch.randn_like(t) for t in got]
        for a, b in zip(
            torch.autograd.grad(got, leaves, probes),
            torch.autograd.grad(want, leaves, probes),
            strict=True,
        ):
            assert a.dtype == dtype and torch.equal(a, b)


def test_gradient_of_one_input_only():
    split_sizes, order = torch.tensor([1, 3]), torch.tensor([1, 0])
    for of_x, of_probs in ((True, False), (False, True), (True, True)):
        x, probs = torch.randn(4, 3), torch.rand(4)
        x.requires_grad_(of_x)
        probs.requires_grad_(of_probs)
        s = F.sort_chunks_by_index(x, split_sizes, order, probs)
        assert s.sorted.requires_grad == of_x and s.sorted_probs.requires_grad == of_probs
        assert not s.row_id_map.requires_grad
        scale = torch.arange(4.0)
        if of_probs:
            (s.sorted_probs * scale).sum().backward(retain_graph=True)
            assert probs.grad.tolist() == [3, 0, 1, 2] and x.grad is None
        if of_x:
            (s.sorted * scale.unsqueeze(1)).sum().backward()
            assert x.grad[:, 0].tolist() == [3, 0, 1, 2]


def test_bad_values(backend):
    """The CPU raises; CUDA drops rows. The first one is good, for comparison."""
    x, probs = torch.arange(1.0, 7).unsqueeze(1), torch.arange(1.0, 7)
    big = 2**62
    for split_sizes, order, want in [
        ([2, 1, 3], [2, 1, 0], [4, 5, 6, 3, 1, 2]),
        ([2, 1, 1], [2, 1, 0], [4, 3, 1, 2, 0, 0]),  # too few rows
        ([2, 3, 3], [2, 1, 0], [6, 0, 0, 3, 4, 5]),  # too many: those past N leave gaps
        ([2, -1, 4], [2, 1, 0], [3, 4, 5, 6, 1, 2]),
        ([2, 1, 3], [2, 3, 0], [4, 5, 6, 1, 2, 0]),  # a bad entry, so a chunk that is not named
        ([2, 1, 3], [2, -big, 1], [4, 5, 6, 3, 0, 0]),
        ([2, 1, 3], [0, 1, 0], [3, 0, 0, 0, 0, 0]),  # a chunk that is named twice
        ([big, big, big], [2, 1, 0], [0, 0, 0, 0, 0, 0]),
        ([big, big, big], [0, 1, 2], [1, 2, 3, 4, 5, 6]),
        ([-big, -big, 6], [0, 2, 1], [1, 2, 3, 4, 5, 6]),
        ([], [], [0, 0, 0, 0, 0, 0]),
    ]:
        good = split_sizes == [2, 1, 3] and order == [2, 1, 0]
        split_sizes, order = torch.tensor(split_sizes).long(), torch.tensor(order).long()
        if backend == "cpu" and not good:
            with pytest.raises(
                RuntimeError, match="sort_chunks_by_index: (split_sizes|order) must"
            ):
                F.sort_chunks_by_index(x, split_sizes, order, probs)
            continue
        s = F.sort_chunks_by_index(x, split_sizes, order, probs)
        assert s.sorted.flatten().tolist() == want and s.sorted_probs.tolist() == want
        rows = [want.index(i) if i in want else -1 for i in range(1, 7)]
        assert s.row_id_map.flatten().tolist() == rows


def test_opcheck():
    for x, split_sizes, order, probs in small_inputs():
        torch.library.opcheck(ops.sort_chunks_by_index, (x, split_sizes, order.int(), probs))
        x.requires_grad_()
        if probs is not None:
            probs.requires_grad_()
        torch.library.opcheck(ops.sort_chunks_by_index, (x, split_sizes, order, probs))
        if probs is not None:
            inputs = (x.detach(), split_sizes, order, probs)
            torch.library.opcheck(ops.sort_chunks_by_index, inputs)


def test_compile_and_export(compiled):
    def move(x, split_sizes, order, probs):
        s = F.sort_chunks_by_index(x * 2, split_sizes, order, probs)
        return (s.sorted * s.sorted_probs.unsqueeze(1)).square().sum() + s.row_id_map.sum()

    fast = compiled(move)
    for rows in (3, 6):
        x = torch.randn(rows, 4, requires_grad=True)
        probs = torch.rand(rows, requires_grad=True)
        inputs = (x, torch.tensor([1, rows - 1]), torch.tensor([1, 0]), probs)
        want = torch.autograd.grad(move(*inputs), (x, probs))
        got = torch.autograd.grad(fast(*inputs), (x, probs))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)

    class Sort(torch.nn.Module):
        def forward(self, x, split_sizes, order):
            return F.sort_chunks_by_index(x, split_sizes, order)

    rows, chunks = torch.export.Dim("rows", min=2), torch.export.Dim("chunks", min=2)
    inputs = (torch.randn(4, 3), torch.tensor([1, 3]), torch.tensor([1, 0]))
    exported = torch.export.export(
        Sort(), inputs, dynamic_shapes=({0: rows}, {0: chunks}, {0: chunks})
    )
    inputs = (torch.randn(7, 3), torch.tensor([1, 2, 4]), torch.tensor([1, 2, 0]))
    got = exported.module()(*inputs)
    assert isinstance(got, F.SortedChunks)
    for a, b in zip(got, Sort()(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    class Move(torch.nn.Module):
        def forward(self, x, split_sizes, order):
            s = F.sort_chunks_by_index(x, split_sizes, order)
            return F.moe_unpermute(s.sorted + 1, s.row_id_map)

    inputs = (torch.randn(4, 3), torch.tensor([1, 3]), torch.tensor([1, 0]))
    torch._dynamo.reset()
    want = Move()(*inputs)
    assert torch.equal(torch.compile(Move(), fullgraph=True)(*inputs), want)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(Move(), inputs), package_path=str(tmp_path / "move.pt2")
    )
    assert torch.equal(torch._inductor.aoti_load_package(package)(*inputs), want)


@pytest.mark.cpu_only("about threads of the CPU")
def test_same_bits_for_any_number_of_threads():
    split_sizes, order = torch.randint(0, 300, (60,)), torch.randperm(60)
    rows = int(split_sizes.sum())
    x, probs = torch.randn(rows, 8), torch.rand(rows)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            check(x, split_sizes, order, probs)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(x=torch.zeros(5)), r"x must have shape \[N, H\], got \[5\]"),
        (dict(x=torch.zeros(5, 2, dtype=torch.int32)), "x must be "),
        (dict(split_sizes=torch.tensor([2.0, 3.0])), "split_sizes must be Long or Int, got Float"),
        (dict(split_sizes=torch.tensor([[2, 3]])), r"split_sizes must have shape \[C\], got"),
        (dict(split_sizes=torch.tensor([6, -1])), "split_sizes must have the sum N = 5, got more"),
        (dict(split_sizes=torch.tensor([-1, 6])), "split_sizes must be at least 0, got -1"),
        (dict(split_sizes=torch.tensor([2, 2])), "split_sizes must have the sum N = 5, got 4"),
        (
            dict(split_sizes=torch.tensor([2**63 - 1, 2**63 - 1])),
            "split_sizes must have the sum N = 5, got more",
        ),
        (dict(order=torch.tensor([1.0, 0.0])), "order must be Long or Int, got Float"),
        (dict(order=torch.tensor([1, 0, 2])), r"order must have shape of split_sizes = \[2\], got"),
        (dict(order=torch.tensor([1, 2])), r"order must be in \[0, C = 2\), got 2"),
        (dict(order=torch.tensor([-1, 0])), r"order must be in \[0, C = 2\), got -1"),
        (dict(order=torch.tensor([1, 1])), "order must name each chunk once, got 1 twice"),
        (dict(probs=torch.ones(4)), r"probs must have shape \[N\] = \[5\], got \[4\]"),
        (dict(probs=torch.ones(5).long()), "probs must be float32"),
    ],
)
@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input(change, message):
    arguments = dict(
        x=torch.zeros(5, 2), split_sizes=torch.tensor([2, 3]), order=torch.tensor([1, 0])
    )
    with pytest.raises(RuntimeError, match=f"sort_chunks_by_index: {message}"):
        F.sort_chunks_by_index(**arguments | change)

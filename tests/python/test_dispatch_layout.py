# SPDX-License-Identifier: Apache-2.0
"""dispatch_layout against comparing each slot with each rank."""

import pytest
import torch

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = pytest.mark.usefixtures("backend")


def sample_inputs():
    """(topk_indices, num_ranks, num_experts)."""
    for tokens, top_k, ranks, experts in [
        (5, 2, 2, 4),
        (1, 1, 1, 1),
        (33, 8, 4, 40),
        (20, 3, 60, 300),
        (7, 40, 6, 6),
        (300, 6, 8, 256),
        (3, 2, 1, 5),
    ]:
        yield torch.randint(-1, experts, (tokens, top_k)), ranks, experts


def check(*inputs):
    got = F.dispatch_layout(*inputs)
    for name, a, b in zip(got._fields, got, reference.dispatch_layout(*inputs), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    return got


def test_values():
    for inputs in sample_inputs():
        check(*inputs)


def test_dtypes_are_those_of_deepep():
    layout = F.dispatch_layout(torch.tensor([[0, 1]]), 2, 2)
    assert [t.dtype for t in layout] == [torch.int32, torch.int32, torch.bool]


def test_a_token_counts_once_for_a_rank():
    """But each of its slots for its expert, the same expert twice included."""
    layout = check(torch.tensor([[0, 1, 1, -1], [5, 0, 4, 1]]), 3, 6)
    assert layout.num_tokens_per_rank.tolist() == [2, 0, 1]
    assert layout.num_tokens_per_expert.tolist() == [2, 3, 0, 0, 1, 1]


def test_many_blocks():
    """In the memory of a block, and with more experts and ranks than fit there."""
    check(torch.randint(-1, 30, (6000, 4)), 5, 30)
    check(torch.randint(-1, 8192, (500, 3)), 16, 8192)
    check(torch.randint(-1, 8192, (500, 3)), 8192, 8192)


def test_empty_slots_and_layouts():
    layout = check(torch.full((4, 3), -1), 2, 4)
    assert not layout.is_token_in_rank.any() and layout.num_tokens_per_expert.sum() == 0
    for view in (torch.randint(0, 6, (4, 10)).t(), torch.randint(0, 6, (1, 3)).expand(7, 3)):
        check(view, 3, 6)


@pytest.mark.parametrize("tokens,top_k", [(0, 2), (3, 0)])
@pytest.mark.no_launch
def test_empty(tokens, top_k):
    layout = check(torch.zeros(tokens, top_k, dtype=torch.long), 2, 4)
    assert layout.is_token_in_rank.shape == (tokens, 2)


def test_indices_of_gating():
    r = F.topk_gating(torch.randn(20, 12), 3, token_mask=torch.rand(20) < 0.7)
    layout = check(r.topk_indices, 4, 12)
    assert torch.equal(layout.num_tokens_per_expert.long(), r.tokens_per_expert)


def test_bad_indices(backend):
    """The CPU raises; CUDA skips them."""
    indices = torch.tensor([[4, -2, 0], [2**40, 3, -(2**62)]])
    if backend == "cpu":
        for index in indices.flatten()[[0, 1, 3, 5]]:
            with pytest.raises(RuntimeError, match=f"topk_indices must be in .*, got {index}"):
                F.dispatch_layout(index.view(1, 1), 2, 4)
        return
    layout = F.dispatch_layout(indices, 2, 4)
    assert layout.num_tokens_per_expert.tolist() == [1, 0, 0, 1]
    assert layout.is_token_in_rank.tolist() == [[True, False], [False, True]]


def test_opcheck():
    for inputs in sample_inputs():
        torch.library.opcheck(ops.dispatch_layout, inputs)


def test_compile_and_export(compiled):
    def send(indices):
        layout = F.dispatch_layout(indices, 3, 6)
        return layout, layout.is_token_in_rank.sum() + layout.num_tokens_per_rank

    fast = compiled(send)
    for tokens in (3, 5):
        indices = torch.randint(-1, 6, (tokens, 2))
        (got, got_sum), (want, want_sum) = fast(indices), send(indices)
        assert torch.equal(got_sum, want_sum)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)

    class Layout(torch.nn.Module):
        def forward(self, indices):
            return F.dispatch_layout(indices, 3, 6)

    exported = torch.export.export(
        Layout(),
        (torch.randint(-1, 6, (5, 2)),),
        dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},),
    )
    indices = torch.randint(-1, 6, (9, 2))
    got = exported.module()(indices)
    assert isinstance(got, F.DispatchLayout)
    for a, b in zip(got, Layout()(indices), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    class Layout(torch.nn.Module):
        def forward(self, indices):
            layout = F.dispatch_layout(indices, 3, 6)
            return layout.num_tokens_per_expert + 1, layout.is_token_in_rank.logical_not()

    indices = torch.randint(-1, 6, (5, 2))
    torch._dynamo.reset()
    want = Layout()(indices)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(Layout(), (indices,)), package_path=str(tmp_path / "layout.pt2")
    )
    for fast in (
        torch.compile(Layout(), fullgraph=True),
        torch._inductor.aoti_load_package(package),
    ):
        for a, b in zip(fast(indices), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.cpu_only("about threads of the CPU")
def test_same_bits_for_any_number_of_threads():
    indices = torch.randint(-1, 64, (30000, 6))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            check(indices, 16, 64)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            dict(topk_indices=torch.tensor([[4]])),
            r"topk_indices must be in \[-1, num_experts = 4\), got 4",
        ),
        (dict(topk_indices=torch.tensor([[-2]])), r"topk_indices must be in .*got -2"),
        (dict(topk_indices=torch.zeros(2, 2)), "topk_indices must be Long, got Float"),
        (dict(topk_indices=torch.tensor([1])), r"topk_indices must have shape \[T, K\], got \[1\]"),
        (dict(num_experts=0), "num_experts must be at least 1, got 0"),
        (dict(num_ranks=0), "num_ranks must be at least 1, got 0"),
        (dict(num_ranks=3), "num_ranks must divide num_experts = 4, got 3"),
        (dict(num_ranks=8), "num_ranks must divide num_experts = 4, got 8"),
        (
            dict(topk_indices=torch.zeros(1, 1, dtype=torch.long).expand(2**16, 2**15)),
            "topk_indices must have at most 2147483647 elements, got 2147483648",
        ),
    ],
)
@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input(change, message):
    arguments = dict(topk_indices=torch.tensor([[1], [0]]), num_ranks=2, num_experts=4) | change
    with pytest.raises(RuntimeError, match=f"dispatch_layout: {message}"):
        F.dispatch_layout(**arguments)

# SPDX-License-Identifier: Apache-2.0
"""moe_align_block_size against lists of the slots of each expert."""

import pytest
import torch

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = pytest.mark.usefixtures("backend")


def sample_inputs():
    """(topk_indices, block_size, num_experts); also fewer slots than experts."""
    for tokens, top_k, block_size, experts in [
        (5, 2, 4, 4),
        (1, 1, 1, 1),
        (33, 8, 16, 40),
        (20, 3, 64, 300),
        (7, 40, 3, 6),
        (3, 2, 1, 9),
        (3, 2, 8, 6),
    ]:
        yield torch.randint(-1, experts, (tokens, top_k)), block_size, experts


def check(*inputs):
    got = F.moe_align_block_size(*inputs)
    for name, a, b in zip(got._fields, got, reference.moe_align_block_size(*inputs), strict=True):
        assert a.dtype == b.dtype == torch.int32 and torch.equal(a, b), name
    return got


def test_values():
    for inputs in sample_inputs():
        check(*inputs)


def test_example_of_vllm():
    """The one of its documentation, whose experts are 1 to 4."""
    topk_indices = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])
    blocks = F.moe_align_block_size(topk_indices, 4, 5)
    in_use = [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert blocks.num_tokens_post_padded.tolist() == [16]
    assert blocks.sorted_token_ids.tolist() == in_use + [12] * 12  # 12 + 5 * 3, in whole blocks
    assert blocks.expert_ids.tolist() == [1, 2, 3, 4, -1, -1, -1]


def test_the_size_is_enough_for_any_routing():
    """One slot an expert needs the most blocks, all slots of one expert the fewest."""
    for slots, experts, block_size in [(6, 6, 4), (6, 4, 4), (4, 6, 4), (7, 3, 2), (9, 2, 5)]:
        spread = torch.arange(slots).remainder(experts).unsqueeze(1)
        for indices in (spread, torch.full((slots, 1), experts - 1)):
            blocks = check(indices, block_size, experts)
            most = -(-(slots + experts * (block_size - 1)) // block_size) * block_size
            assert len(blocks.sorted_token_ids) == min(most, slots * block_size)
        if slots <= experts:
            assert check(spread, block_size, experts).expert_ids.min() >= 0


def test_many_slots_and_experts():
    """As many as take the sort's other steps, with blocks that are full and that are not."""
    check(torch.randint(-1, 30, (3000, 4)), 16, 30)
    check(torch.randint(0, 4, (2100, 4)), 1, 4)
    check(torch.randint(-1, 8192, (300, 3)), 4, 8192)
    check(torch.randint(-1, 12033, (50, 3)), 2, 12033)


def test_agrees_with_permute():
    """The same order as the rows of moe_permute have."""
    x, indices = torch.randn(40, 3), torch.randint(-1, 6, (40, 2))
    blocks = F.moe_align_block_size(indices, 8, 6)
    permuted = F.moe_permute(x, indices, 6, align=8).permuted
    tokens = blocks.sorted_token_ids.long() // 2
    assert torch.equal(torch.cat([x, x.new_zeros(1, 3)])[tokens], permuted)


def test_empty_slots_and_layouts():
    blocks = check(torch.full((4, 3), -1), 4, 2)
    assert blocks.num_tokens_post_padded.item() == 0 and (blocks.expert_ids == -1).all()
    for view in (torch.randint(0, 6, (4, 10)).t(), torch.randint(0, 6, (1, 3)).expand(7, 3)):
        check(view, 4, 6)


@pytest.mark.parametrize("tokens,top_k", [(0, 2), (3, 0)])
@pytest.mark.no_launch
def test_empty(tokens, top_k):
    blocks = check(torch.zeros(tokens, top_k, dtype=torch.long), 4, 3)
    assert blocks.sorted_token_ids.numel() == 0


def test_bad_indices(backend):
    """The CPU raises; CUDA leaves them out."""
    indices = torch.tensor([[4, -2, 0], [2**40, 3, -(2**62)]])
    if backend == "cpu":
        for index in indices.flatten()[[0, 1, 3, 5]]:
            with pytest.raises(RuntimeError, match=f"topk_indices must be in .*, got {index}"):
                F.moe_align_block_size(index.view(1, 1), 2, 4)
        return
    blocks = F.moe_align_block_size(indices, 2, 4)
    assert blocks.sorted_token_ids[:4].tolist() == [2, 6, 4, 6]
    assert blocks.num_tokens_post_padded.tolist() == [4]


def test_opcheck():
    for inputs in sample_inputs():
        torch.library.opcheck(ops.moe_align_block_size, inputs)


def test_compile_and_export(compiled):
    def align(indices):
        blocks = F.moe_align_block_size(indices, 4, 6)
        return blocks, blocks.sorted_token_ids + 1, blocks.expert_ids.sum()

    fast = compiled(align)
    for tokens in (2, 3, 5):  # fewer slots than experts, as many, and more
        indices = torch.randint(-1, 6, (tokens, 2))
        (got, *got_more), (want, *want_more) = fast(indices), align(indices)
        for a, b in zip([*got, *got_more], [*want, *want_more], strict=True):
            assert torch.equal(a, b)

    class Align(torch.nn.Module):
        def forward(self, indices):
            return F.moe_align_block_size(indices, 4, 6)

    exported = torch.export.export(
        Align(),
        (torch.randint(-1, 6, (5, 2)),),
        dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},),
    )
    for tokens in (2, 9):
        indices = torch.randint(-1, 6, (tokens, 2))
        got = exported.module()(indices)
        assert isinstance(got, F.AlignedBlocks)
        for a, b in zip(got, Align()(indices), strict=True):
            assert torch.equal(a, b)


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    class Align(torch.nn.Module):
        def forward(self, indices):
            blocks = F.moe_align_block_size(indices, 4, 6)
            return blocks.sorted_token_ids + 1, blocks.num_tokens_post_padded * 2

    indices = torch.randint(-1, 6, (5, 2))
    torch._dynamo.reset()
    want = Align()(indices)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(Align(), (indices,)), package_path=str(tmp_path / "align.pt2")
    )
    for fast in (
        torch.compile(Align(), fullgraph=True),
        torch._inductor.aoti_load_package(package),
    ):
        for a, b in zip(fast(indices), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.cpu_only("about threads of the CPU")
def test_same_bits_for_any_number_of_threads():
    indices = torch.randint(-1, 64, (20000, 4))
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
        (dict(block_size=0), "block_size must be at least 1, got 0"),
        (
            dict(topk_indices=torch.zeros(1, 1, dtype=torch.long).expand(2**16, 2**15)),
            "topk_indices must need at most 2147483647 padded slots, got 2147483648 elements",
        ),
    ],
)
@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input(change, message):
    arguments = dict(topk_indices=torch.tensor([[1], [0]]), block_size=4, num_experts=4) | change
    with pytest.raises(RuntimeError, match=f"moe_align_block_size: {message}"):
        F.moe_align_block_size(**arguments)

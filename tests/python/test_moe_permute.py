# SPDX-License-Identifier: Apache-2.0
"""moe_permute against a stable sort and indexing."""

import pytest
import torch
from helpers import FLOATS
from torch.autograd import gradcheck, gradgradcheck

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = pytest.mark.usefixtures("backend")


def sample_inputs(dtype=torch.float32):
    """(x, topk_indices, num_experts, topk_weights)."""
    for tokens, top_k, experts, width in [
        (5, 2, 4, 3),
        (1, 1, 1, 1),
        (33, 8, 40, 17),
        (20, 3, 300, 64),
        (6, 4, 2, 5),
    ]:
        x = torch.randn(tokens, width, dtype=torch.float64).to(dtype)
        indices = torch.randint(-1, experts, (tokens, top_k))
        yield x, indices, experts, None
        yield x, indices, experts, torch.rand(tokens, top_k, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values(dtype):
    """Rows are only copied, so they are equal to the bit."""
    for x, indices, experts, weights in sample_inputs(dtype):
        got = F.moe_permute(x, indices, experts, weights)
        for name, a, b in zip(
            got._fields, got, reference.moe_permute(x, indices, experts, weights), strict=True
        ):
            assert a.dtype == b.dtype and torch.equal(a, b), name


def test_many_blocks_are_stable():
    x, indices = torch.arange(6000.0).unsqueeze(1), torch.randint(-1, 30, (6000, 4))
    got, want = F.moe_permute(x, indices, 30), reference.moe_permute(x, indices, 30)
    assert torch.equal(got.row_id_map, want[2]) and torch.equal(got.permuted, want[0])
    for e in range(30):
        rows = got.permuted[got.expert_offsets[e] : got.expert_offsets[e + 1]].flatten()
        assert (rows[1:] >= rows[:-1]).all()


def test_rows_behind_the_last_offset_are_zero():
    x = torch.ones(4, 3)
    indices = torch.tensor([[0, -1], [-1, -1], [1, 0], [-1, 1]])
    p = F.moe_permute(x, indices, 2, torch.ones(4, 2))
    assert p.permuted.shape == (8, 3) and p.expert_offsets.tolist() == [0, 2, 4]
    assert (p.permuted[4:] == 0).all() and (p.permuted_weights[4:] == 0).all()
    assert (p.row_id_map[indices < 0] == -1).all()


def test_large_rows_that_take_huge_pages():
    x, indices = torch.randn(600, 1024), torch.randint(0, 7, (600, 4))
    assert torch.equal(
        F.moe_permute(x, indices, 7).permuted, reference.moe_permute(x, indices, 7)[0]
    )


def test_counts_of_gating_are_accepted():
    r = F.topk_gating(torch.randn(9, 5), 2)
    p = F.moe_permute(torch.randn(9, 3), r.topk_indices, 5, r.topk_weights, r.tokens_per_expert)
    assert torch.equal(p.tokens_per_expert, r.tokens_per_expert)
    assert torch.equal(p.kept_per_expert, r.tokens_per_expert) and p.overflow.item() == 0


def test_layouts():
    base = torch.randn(6, 10)
    indices = torch.randint(0, 3, (2, 6)).t()
    for x in (base[:, 2:7], base.t()[:6], base[:1].expand(6, 10)):
        got = F.moe_permute(x, indices, 3)
        assert torch.equal(got.permuted, reference.moe_permute(x.contiguous(), indices, 3)[0])


@pytest.mark.parametrize("tokens,top_k,width", [(0, 2, 3), (3, 0, 3), (3, 2, 0)])
@pytest.mark.no_launch
def test_empty(tokens, top_k, width):
    x = torch.empty(tokens, width, requires_grad=True)
    p = F.moe_permute(x, torch.zeros(tokens, top_k, dtype=torch.long), 4, torch.ones(tokens, top_k))
    assert p.permuted.shape == (tokens * top_k, width)
    assert p.tokens_per_expert.sum() == tokens * top_k
    p.permuted.sum().backward()
    assert x.grad.shape == x.shape


def test_gradients():
    for x, indices, experts, weights in sample_inputs(torch.float64):
        if x.numel() > 400:
            continue
        inputs = (
            (x.requires_grad_(),)
            if weights is None
            else (x.requires_grad_(), weights.requires_grad_())
        )

        def permute(x, weights=None, indices=indices, experts=experts):
            return F.moe_permute(x, indices, experts, weights)[: 1 if weights is None else 2]

        assert gradcheck(permute, inputs)
        assert gradgradcheck(permute, inputs)


def test_gradient_of_one_output_only():
    x, weights = torch.randn(4, 3, requires_grad=True), torch.rand(4, 2, requires_grad=True)
    p = F.moe_permute(x, torch.randint(0, 3, (4, 2)), 3, weights)
    p.permuted_weights.sum().backward()
    assert x.grad is None and (weights.grad == 1).all()


def test_opcheck():
    for x, indices, experts, weights in sample_inputs():
        if x.numel() <= 400:
            torch.library.opcheck(ops.moe_permute, (x, indices, experts, weights))
            inputs = (
                x.requires_grad_(),
                indices,
                experts,
                None if weights is None else weights.requires_grad_(),
            )
            torch.library.opcheck(ops.moe_permute, inputs)


def test_compile_and_export(compiled):
    def move(x, indices, weights):
        p = F.moe_permute(x * 2, indices, 5, weights)
        return (
            F.moe_unpermute(p.permuted, p.row_id_map, weights).square().sum()
            + p.permuted_weights.sum()
        )

    fast = compiled(move)
    for tokens in (3, 6):
        x, indices = torch.randn(tokens, 4, requires_grad=True), torch.randint(-1, 5, (tokens, 2))
        weights = torch.rand(tokens, 2, requires_grad=True)
        want = torch.autograd.grad(move(x, indices, weights), (x, weights))
        got = torch.autograd.grad(fast(x, indices, weights), (x, weights))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)

    class Permute(torch.nn.Module):
        def forward(self, x, indices):
            return F.moe_permute(x, indices, 5)

    tokens = torch.export.Dim("tokens", min=2)
    inputs = (torch.randn(4, 3), torch.randint(0, 5, (4, 2)))
    exported = torch.export.export(Permute(), inputs, dynamic_shapes=({0: tokens}, {0: tokens}))
    inputs = (torch.randn(7, 3), torch.randint(0, 5, (7, 2)))
    for a, b in zip(exported.module()(*inputs), Permute()(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    class Move(torch.nn.Module):
        def forward(self, x, indices):
            p = F.moe_permute(x, indices, 5)
            return F.moe_unpermute(p.permuted, p.row_id_map) + 1

    inputs = (torch.randn(4, 3), torch.randint(0, 5, (4, 2)))
    torch._dynamo.reset()
    want = Move()(*inputs)
    torch.testing.assert_close(torch.compile(Move(), fullgraph=True)(*inputs), want)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(Move(), inputs), package_path=str(tmp_path / "move.pt2")
    )
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*inputs), want)


@pytest.mark.cpu_only("about threads of the CPU")
def test_same_bits_for_any_number_of_threads():
    x, indices = torch.randn(5000, 8), torch.randint(-1, 30, (5000, 6))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(F.moe_permute(x, indices, 30))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            dict(topk_indices=torch.tensor([[4], [0]])),
            r"topk_indices must be in \[-1, num_experts = 4\), got 4",
        ),
        (dict(topk_indices=torch.tensor([[-2], [0]])), r"topk_indices must be in .*got -2"),
        (dict(topk_indices=None), "topk_indices must be given"),
        (
            dict(topk_indices=torch.zeros(3, 1, dtype=torch.long)),
            r"topk_indices must have shape \[T, K\] with T = 2",
        ),
        (dict(topk_indices=torch.zeros(2, 1)), "topk_indices must be Long, got Float"),
        (dict(x=torch.zeros(2)), r"x must have shape \[T, H\]"),
        (dict(x=torch.zeros(2, 3, dtype=torch.int32)), "x must be float32"),
        (dict(num_experts=0), "num_experts must be at least 1"),
        (dict(topk_weights=torch.zeros(2, 2)), r"topk_weights must have shape \[T, K\]"),
        (
            dict(tokens_per_expert=torch.zeros(3, dtype=torch.long)),
            r"tokens_per_expert must have shape \[E\]",
        ),
        (
            dict(tokens_per_expert=torch.zeros(4, dtype=torch.long)),
            "tokens_per_expert must be the counts",
        ),
        (dict(align=8), "align must be 1"),
        (dict(capacity=3), "capacity is not accepted"),
    ],
)
@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input(change, message):
    arguments = (
        dict(x=torch.zeros(2, 3), topk_indices=torch.tensor([[1], [0]]), num_experts=4) | change
    )
    with pytest.raises(RuntimeError, match=f"moe_permute: {message}"):
        F.moe_permute(**arguments)

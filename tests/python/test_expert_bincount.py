# SPDX-License-Identifier: Apache-2.0
"""expert_bincount against the one-hot formulation."""

import pytest
import torch
from helpers import FLOATS, tolerance
from torch.autograd import gradcheck, gradgradcheck

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = pytest.mark.usefixtures("backend")


def sample_inputs(dtype=torch.float32):
    """(indices, num_experts, weights, token_mask)."""
    for tokens, top_k, experts in [(5, 2, 4), (1, 1, 1), (33, 8, 130), (7, 3, 8192)]:
        indices = torch.randint(-1, experts, (tokens, top_k))
        weights = torch.rand(tokens, top_k, dtype=torch.float64).to(dtype)
        mask = torch.rand(tokens) < 0.6
        yield indices, experts, None, None
        yield indices, experts, None, mask
        yield indices, experts, weights, None
        yield indices, experts, weights, mask


@pytest.mark.parametrize("dtype", FLOATS)
def test_values(dtype):
    for indices, experts, weights, mask in sample_inputs(dtype):
        got = F.expert_bincount(indices, experts, weights, mask)
        want = reference.expert_bincount(
            indices, experts, None if weights is None else weights.double(), mask
        )
        if weights is None:
            assert got.dtype == torch.int64 and torch.equal(got, want)
        else:
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            assert got.dtype == compute
            torch.testing.assert_close(got.double(), want, **tolerance(compute))


def test_many_blocks_equal_torch_bincount():
    indices = torch.randint(0, 100, (50000, 4))
    assert torch.equal(
        F.expert_bincount(indices, 100), torch.bincount(indices.flatten(), minlength=100)
    )


def test_shapes_and_layouts():
    indices = torch.randint(0, 6, (2, 3, 4, 2))
    assert torch.equal(
        F.expert_bincount(indices, 6), torch.bincount(indices.flatten(), minlength=6)
    )
    mask = torch.rand(2, 3, 4) < 0.5
    assert F.expert_bincount(indices, 6, token_mask=mask).sum() == 2 * mask.sum()
    view = torch.randint(0, 6, (4, 10)).t()
    assert torch.equal(F.expert_bincount(view, 6), torch.bincount(view.flatten(), minlength=6))
    assert F.expert_bincount(torch.empty(0, 2, dtype=torch.long), 3).tolist() == [0, 0, 0]


def test_gradients():
    for indices, experts, weights, mask in sample_inputs(torch.float64):
        if weights is not None and experts < 100:
            weights.requires_grad_()
            assert gradcheck(
                lambda w, i=indices, e=experts, m=mask: F.expert_bincount(i, e, w, m), (weights,)
            )
            assert gradgradcheck(
                lambda w, i=indices, e=experts, m=mask: F.expert_bincount(i, e, w, m), (weights,)
            )


def test_gradient_dtype_follows_the_weights():
    weights = torch.rand(4, 2).bfloat16().requires_grad_()
    F.expert_bincount(torch.randint(0, 3, (4, 2)), 3, weights).square().sum().backward()
    assert weights.grad.dtype == torch.bfloat16 and weights.grad.abs().sum() > 0


def test_opcheck():
    for indices, experts, weights, mask in sample_inputs():
        if experts < 100:
            torch.library.opcheck(ops.expert_bincount, (indices, experts, weights, mask))
            if weights is not None:
                weights = weights.clone().requires_grad_()
                torch.library.opcheck(ops.expert_bincount, (indices, experts, weights, mask))
    indices = torch.randint(-1, 4, (5, 2))
    for requires_grad in (False, True):
        grad = torch.randn(4, requires_grad=requires_grad)
        torch.library.opcheck(ops.expert_bincount_backward, (grad, indices, None, torch.float32))


def test_compile_and_export(compiled):
    def count(indices, weights):
        return F.expert_bincount(indices, 6), F.expert_bincount(indices, 6, weights).square().sum()

    fast = compiled(count)
    for tokens in (3, 5):
        indices, weights = (
            torch.randint(-1, 6, (tokens, 2)),
            torch.rand(tokens, 2, requires_grad=True),
        )
        other = weights.detach().clone().requires_grad_()
        (counts, total), (want_counts, want_total) = fast(indices, weights), count(indices, other)
        assert torch.equal(counts, want_counts)
        total.backward()
        want_total.backward()
        torch.testing.assert_close(weights.grad, other.grad)

    class Count(torch.nn.Module):
        def forward(self, indices):
            return F.expert_bincount(indices, 6)

    indices = torch.randint(-1, 6, (5, 2))
    exported = torch.export.export(
        Count(), (indices,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},)
    )
    other = torch.randint(-1, 6, (9, 2))
    assert torch.equal(exported.module()(other), F.expert_bincount(other, 6))


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    class Count(torch.nn.Module):
        def forward(self, indices):
            return F.expert_bincount(indices, 6) * 2

    indices = torch.randint(-1, 6, (5, 2))
    torch._dynamo.reset()
    want = Count()(indices)
    assert torch.equal(torch.compile(Count(), fullgraph=True)(indices), want)
    exported = torch.export.export(Count(), (indices,))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "count.pt2")
    )
    assert torch.equal(torch._inductor.aoti_load_package(package)(indices), want)


@pytest.mark.cpu_only("about threads of the CPU")
def test_same_bits_for_any_number_of_threads():
    indices, weights = torch.randint(0, 20, (60000, 2)), torch.rand(60000, 2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(F.expert_bincount(indices, 20, weights))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((torch.tensor([[4]]), 4), r"indices must be in \[-1, num_experts = 4\), got 4"),
        ((torch.tensor([[-2]]), 4), r"indices must be in \[-1, num_experts = 4\), got -2"),
        ((torch.zeros(2, 2), 4), "indices must be Long, got Float"),
        ((torch.zeros((), dtype=torch.long), 4), "indices must have shape"),
        ((torch.zeros(2, 2, dtype=torch.long), 0), "num_experts must be at least 1, got 0"),
        ((torch.zeros(2, 2, dtype=torch.long), 4, torch.zeros(2, 3)), "weights must have shape"),
        (
            (torch.zeros(2, 2, dtype=torch.long), 4, None, torch.ones(2)),
            "token_mask must be Bool, got Float",
        ),
        (
            (torch.zeros(2, 2, dtype=torch.long), 4, None, torch.ones(3).bool()),
            "token_mask must have shape",
        ),
    ],
)
@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input(arguments, message):
    with pytest.raises(RuntimeError, match=f"expert_bincount: {message}"):
        F.expert_bincount(*arguments)

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
    """(indices, num_experts, weights, token_mask, segment_ids, num_segments)."""
    for tokens, top_k, experts, segments in [
        (5, 2, 4, 3),
        (1, 1, 1, 1),
        (33, 8, 130, 4),
        (7, 3, 8192, 2),
    ]:
        indices = torch.randint(-1, experts, (tokens, top_k))
        weights = torch.rand(tokens, top_k, dtype=torch.float64).to(dtype)
        mask = torch.rand(tokens) < 0.6
        ids = torch.randint(0, segments, (tokens,))
        for token_mask in (None, mask):
            for of_segments in ((None, None), (ids, segments)):
                yield indices, experts, None, token_mask, *of_segments
                yield indices, experts, weights, token_mask, *of_segments


def many_slots(dtype=torch.float32):
    """Arguments of each kind that make several blocks and lanes of the CPU, with bad values where
    the mask hides them.
    """
    indices = torch.randint(-1, 20, (15001, 4))
    weights = torch.rand(15001, 4, dtype=torch.float64).to(dtype)
    mask = torch.rand(15001) < 0.7
    hidden = torch.where(mask.unsqueeze(1), indices, torch.randint(-9, 99, (15001, 4)))
    ids = torch.randint(0, 5, (15001,))
    hidden_ids = torch.where(mask, ids, torch.randint(-9, 99, (15001,)))
    for w in (None, weights):
        yield indices, 20, w
        yield hidden, 20, w, mask
        yield indices, 20, w, None, ids, 5
        yield hidden, 20, w, mask, hidden_ids, 5
        yield indices[:300], 20, w if w is None else w[:300], None, ids[:300] * 999, 5000


def with_good_values(indices, experts, weights=None, mask=None, ids=None, segments=None):
    """The same for the reference, which looks at what is masked, in float64."""
    if mask is not None:
        indices = indices.masked_fill(~mask.unsqueeze(-1), -1)
        ids = None if ids is None else ids.masked_fill(~mask, 0)
    weights = None if weights is None else weights.double()
    return indices, experts, weights, mask, ids, segments


@pytest.mark.parametrize("dtype", FLOATS)
def test_values(dtype):
    for arguments in sample_inputs(dtype):
        check_values(arguments)


@pytest.mark.cpu_only("many slots; the sizes of the CUDA kernels are in test_cuda.py")
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_of_several_blocks(dtype):
    for arguments in many_slots(dtype):
        check_values(arguments)
    check_values((torch.full((9001, 2), 6), 7))  # all in one bin
    check_values((torch.full((9001, 2), -1), 7))
    indices, weights = torch.randint(0, 8192, (20000, 7)), torch.rand(20000, 7).to(dtype)
    want = torch.bincount(indices.flatten(), minlength=8192)
    assert torch.equal(F.expert_bincount(indices, 8192), want)
    want = torch.bincount(indices.flatten(), weights.double().flatten(), minlength=8192)
    got = F.expert_bincount(indices, 8192, weights)
    torch.testing.assert_close(got.double(), want, **tolerance(got.dtype))


def check_values(arguments):
    got, num_invalid = ops.expert_bincount(*arguments)
    want = reference.expert_bincount(*with_good_values(*arguments))
    assert got.shape == want.shape
    if len(arguments) < 3 or arguments[2] is None:
        assert got.dtype == torch.int64 and torch.equal(got, want)
    else:
        compute = torch.float64 if arguments[2].dtype == torch.float64 else torch.float32
        assert got.dtype == compute
        torch.testing.assert_close(got.double(), want, **tolerance(compute))
    assert num_invalid.shape == () and num_invalid.dtype == torch.int64 and num_invalid == 0
    assert torch.equal(F.expert_bincount(*arguments), got)


def test_the_well_known_example():
    """B=2, S=10, K=8 of N=128: the sum of one_hot over [B, S, K] and over the tokens of each b."""
    indices = torch.rand(2, 10, 128).topk(8).indices
    one_hot = torch.nn.functional.one_hot(indices, 128)
    assert torch.equal(F.expert_bincount(indices, 128), one_hot.sum((0, 1, 2)))
    batch = torch.arange(2).unsqueeze(1).expand(2, 10)
    counts = F.expert_bincount(indices, 128, segment_ids=batch, num_segments=2)
    assert torch.equal(counts, one_hot.sum((1, 2)))
    frequency = F.expert_frequency(indices, 128)
    torch.testing.assert_close(frequency, one_hot.float().sum((0, 1, 2)) / (2 * 10 * 8))


def test_frequency():
    for indices, experts, weights, mask, ids, segments in sample_inputs():
        if weights is not None:
            continue
        counts = reference.expert_bincount(indices, experts, None, mask, ids, segments).double()
        total = counts.sum(-1, keepdim=True)
        want = torch.where(total > 0, counts / total, 0).float()
        got = F.expert_frequency(indices, experts, mask, ids, segments)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want)
    indices = torch.tensor([[0, 2], [2, -1], [-1, -1]])
    frequency = F.expert_frequency(indices, 3, segment_ids=torch.tensor([0, 0, 1]), num_segments=2)
    torch.testing.assert_close(frequency, torch.tensor([[1 / 3, 0, 2 / 3], [0, 0, 0]]))


def test_bad_values_raise_or_are_counted(backend):
    """Those of masked tokens do neither."""
    indices = torch.tensor([[0, 3], [-2, 2], [2**62, 1], [-1, -(2**63)], [1, 1], [7, -1]])
    mask = torch.tensor([True, True, True, True, True, False])
    ids = torch.tensor([0, 1, 1, 0, -1, 9])
    good = torch.where((indices >= 0) & (indices < 3), indices, -1)
    good_ids = torch.tensor([0, 1, 1, 0, 0, 0])
    for weights in (None, torch.rand(6, 2)):
        for arguments, good_arguments, invalid in [
            ((indices, 3, weights), (good, 3, weights), 5),
            ((indices, 3, weights, mask), (good, 3, weights, mask), 4),
            (
                (indices, 3, weights, mask, ids, 2),
                (good, 3, weights, mask & (ids >= 0), good_ids, 2),
                5,
            ),
            (
                (good, 3, weights, mask, ids, 2),
                (good, 3, weights, mask & (ids >= 0), good_ids, 2),
                1,
            ),
        ]:
            if backend == "cpu":
                with pytest.raises(
                    RuntimeError, match="expert_bincount: (indices|segment_ids) must"
                ):
                    ops.expert_bincount(*arguments)
                continue
            counts, num_invalid = ops.expert_bincount(*arguments)
            want = reference.expert_bincount(*good_arguments)
            torch.testing.assert_close(counts, want)
            assert num_invalid == invalid
            if weights is not None:
                weights.requires_grad_()
                got, want = (
                    torch.autograd.grad(ops.expert_bincount(*a)[0].square().sum(), weights)[0]
                    for a in (arguments, good_arguments)
                )
                torch.testing.assert_close(got, want)
                weights.requires_grad_(False)


@pytest.mark.cpu_only("raises on the CPU alone")
def test_bad_index_in_a_late_block_raises():
    for arguments in many_slots():
        indices, experts, *rest = arguments
        if len(rest) < 2:
            for bad in (-2, 20, -(2**63), 2**63 - 1):
                for token in (-1, 9000):  # the last is not counted together with others
                    broken = indices.clone()
                    broken[token, -1] = bad
                    with pytest.raises(RuntimeError, match=f"indices must be in .* got {bad}"):
                        F.expert_bincount(broken, experts, *rest)
    with pytest.raises(RuntimeError, match="indices must be in .* got 3"):  # whose weight is 0
        F.expert_bincount(torch.tensor([[3]]), 3, torch.zeros(1, 1))


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
    ids = torch.randint(0, 4, (4, 3, 2)).permute(2, 1, 0)
    assert torch.equal(
        F.expert_bincount(indices, 6, token_mask=mask, segment_ids=ids, num_segments=4),
        reference.expert_bincount(indices, 6, None, mask, ids, 4),
    )
    view = torch.randint(0, 6, (4, 10)).t()
    assert torch.equal(F.expert_bincount(view, 6), torch.bincount(view.flatten(), minlength=6))
    for empty in (torch.empty(0, 2, dtype=torch.long), torch.empty(2, 0, dtype=torch.long)):
        counts, num_invalid = ops.expert_bincount(empty, 3)
        assert counts.tolist() == [0, 0, 0] and num_invalid == 0
        ids = torch.zeros(len(empty), dtype=torch.long)
        assert (
            F.expert_bincount(empty, 3, segment_ids=ids, num_segments=2).tolist() == [[0] * 3] * 2
        )


def test_gradients():
    for indices, experts, weights, *rest in sample_inputs(torch.float64):
        if weights is not None and experts < 100:
            weights.requires_grad_()

            def weigh(w, i=indices, e=experts, rest=rest):
                return F.expert_bincount(i, e, w, *rest)

            assert gradcheck(weigh, (weights,))
            assert gradgradcheck(weigh, (weights,))


def test_gradient_dtype_follows_the_weights():
    weights = torch.rand(4, 2).bfloat16().requires_grad_()
    F.expert_bincount(torch.randint(0, 3, (4, 2)), 3, weights).square().sum().backward()
    assert weights.grad.dtype == torch.bfloat16 and weights.grad.abs().sum() > 0


def test_opcheck():
    for indices, experts, weights, *rest in sample_inputs():
        if experts < 100:
            torch.library.opcheck(ops.expert_bincount, (indices, experts, weights, *rest))
            if weights is not None:
                weights = weights.clone().requires_grad_()
                torch.library.opcheck(ops.expert_bincount, (indices, experts, weights, *rest))
    indices, ids = torch.randint(-1, 4, (5, 2)), torch.randint(0, 3, (5,))
    for requires_grad in (False, True):
        for sizes, segment_ids in (((4,), None), ((3, 4), ids)):
            grad = torch.randn(sizes, requires_grad=requires_grad)
            arguments = (grad, indices, None, torch.float32, segment_ids)
            torch.library.opcheck(ops.expert_bincount_backward, arguments)


def test_compile_and_export(compiled):
    def count(indices, weights):
        ids = indices[:, 0].clamp(min=0)
        of_segments = F.expert_bincount(indices, 6, weights, segment_ids=ids, num_segments=6)
        total = F.expert_bincount(indices, 6, weights).square().sum() + of_segments.square().sum()
        return F.expert_frequency(indices, 6), total

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
            return ops.expert_bincount(indices, 6)

    indices = torch.randint(-1, 6, (5, 2))
    exported = torch.export.export(
        Count(), (indices,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},)
    )
    other = torch.randint(-1, 6, (9, 2))
    for got, want in zip(exported.module()(other), ops.expert_bincount(other, 6), strict=True):
        assert torch.equal(got, want)


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    class Count(torch.nn.Module):
        def forward(self, indices):
            return F.expert_bincount(indices, 6) * 2, F.expert_frequency(indices, 6)

    indices = torch.randint(-1, 6, (5, 2))
    torch._dynamo.reset()
    want = Count()(indices)
    got = torch.compile(Count(), fullgraph=True)(indices)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    exported = torch.export.export(Count(), (indices,))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "count.pt2")
    )
    got = torch._inductor.aoti_load_package(package)(indices)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.cpu_only("about threads of the CPU")
def test_same_bits_for_any_number_of_threads():
    cases = [*many_slots(torch.float64)]  # narrower sums may be rounded to the same
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append([F.expert_bincount(*arguments) for arguments in cases])
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


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
            "token_mask must have shape of indices without its last = .2., got .3.",
        ),
        (
            (torch.zeros(2, 2, dtype=torch.long), 4, None, None, torch.tensor([0, 3]), 3),
            r"segment_ids must be in \[0, num_segments\) = \[0, 3\), got 3 for token 1",
        ),
        (
            (torch.zeros(2, 2, dtype=torch.long), 4, None, None, torch.tensor([-1, 0]), 3),
            r"segment_ids must be in \[0, num_segments\) = \[0, 3\), got -1 for token 0",
        ),
        (
            (torch.zeros(2, 2, dtype=torch.long), 4, None, None, torch.zeros(2), 3),
            "segment_ids must be Long, got Float",
        ),
        (
            (torch.zeros(2, 2, dtype=torch.long), 4, None, None, torch.zeros(2, 2).long(), 3),
            "segment_ids must have shape of indices without its last",
        ),
        (
            (torch.zeros(2, 2, dtype=torch.long), 4, None, None, torch.zeros(2).long()),
            "segment_ids needs num_segments",
        ),
        (
            (torch.zeros(2, 2, dtype=torch.long), 4, None, None, None, 3),
            "num_segments needs segment_ids",
        ),
        (
            (torch.zeros(2, 2, dtype=torch.long), 4, None, None, torch.zeros(2).long(), 0),
            "num_segments must be >= 1, got 0",
        ),
    ],
)
@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input(arguments, message):
    with pytest.raises(RuntimeError, match=f"expert_bincount: {message}"):
        F.expert_bincount(*arguments)


@pytest.mark.cpu_only("the checks are shared")
def test_bad_gradient():
    indices, ids = torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    for arguments, message in [
        (
            (torch.zeros(4, 4), indices, None, torch.float32),
            r"grad must have shape \[E\], got \[4, 4",
        ),
        (
            (torch.zeros(4), indices, None, torch.float32, ids),
            r"grad must have shape \[S, E\], got",
        ),
        ((torch.zeros(4), indices, None, torch.float64), "grad must be Double, got Float"),
        ((torch.zeros(2, 4), indices, None, torch.float32, ids + 2), "segment_ids must be in"),
    ]:
        with pytest.raises(RuntimeError, match=f"expert_bincount_backward: {message}"):
            ops.expert_bincount_backward(*arguments)

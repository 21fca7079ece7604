# SPDX-License-Identifier: Apache-2.0
"""Every op on CUDA, forward and backward, against the CPU backend in float64.

These tests run on a GPU, and without one under an interpreter of PTX (``make test-ptx``), which has
no kernels but those of this library. So tensors are made on the CPU and moved, gradients are given,
and results are compared on the CPU: nothing else may touch a tensor of the device. The sizes are
those that reach every kernel, small enough for an interpreter.
"""

import hashlib
import os
from pathlib import Path

import pytest
import test_dispatch_layout
import test_expert_bincount
import test_moe_align_block_size
import test_moe_permute
import test_moe_unpermute
import test_sort_chunks_by_index
import test_topk_gating
import torch
from helpers import FLOATS, tolerance
from test_topk_gating import make_logits

import equipoise.functional as F
from equipoise import _build, ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not _build.cuda, reason="the library was built without CUDA"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

bits = hashlib.sha256()  # of all that came back from the device in this test


@pytest.fixture(autouse=True)
def _digest(request):
    """Adds a line to the file EQUIPOISE_DIGEST: in two runs with equal files all bits are equal."""
    global bits
    bits = hashlib.sha256()
    yield
    if path := os.environ.get("EQUIPOISE_DIGEST"):
        with open(path, "a") as file:
            print(bits.hexdigest(), request.node.name, file=file)


# ---- on the device, and in float64 on the CPU ----------------------------------------------------


def compute_type(dtype):
    """The type of what is computed from inputs of this type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_cuda(tensor):
    """The tensor on the device in the same layout: a view, if it was one."""
    if tensor is None:
        return None
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    moved = storage.cuda().as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    return moved.requires_grad_(tensor.requires_grad)


def in_float64(tensor):
    """The same numbers; integers and masks stay as they are."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def evaluate(function, inputs):
    """The outputs of function(*inputs) and the gradients for the inputs that want one, from all its
    differentiable outputs together and from each alone; on the CPU.
    """
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    outputs = [o for o in outputs if o is not None]  # no statistics
    wanted = [i for i in inputs if i is not None and i.requires_grad]
    roots = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(0)
    # Of eight bits, so that they are the same numbers in every type.
    probes = [torch.randn(r.shape, generator=generator).bfloat16() for r in roots]
    probes = [p.to(r.dtype).to(r.device) for p, r in zip(probes, roots, strict=True)]
    groups = [range(len(roots))] if wanted and roots else []
    if len(roots) > 1:
        groups += [[i] for i in range(len(roots))]
    gradients = []
    for group in groups:
        gradients += torch.autograd.grad(
            [roots[i] for i in group],
            wanted,
            [probes[i] for i in group],
            retain_graph=True,
            allow_unused=True,
        )
    gradients = [g for g in gradients if g is not None]
    return [o.detach().cpu() for o in outputs], [g.cpu() for g in gradients]


def run_on_cuda(function, inputs):
    results = evaluate(function, [on_cuda(i) for i in inputs])
    for result in sum(results, []):
        bits.update(result.contiguous().view(-1).view(torch.uint8).numpy())
    return results


def check(function, *inputs):
    """function(*inputs) has the same outputs and gradients on CUDA as in float64 on the CPU."""
    outputs, gradients = run_on_cuda(function, inputs)
    exact_outputs, exact_gradients = evaluate(function, [in_float64(i) for i in inputs])
    for got, want in zip(outputs, exact_outputs, strict=True):
        if got.is_floating_point():
            torch.testing.assert_close(got.double(), want, **tolerance(got.dtype))
        else:
            assert torch.equal(got, want)
    for got, want in zip(gradients, exact_gradients, strict=True):
        bounds = tolerance(got.dtype)
        bounds["atol"] *= 5 * (1 + (want.abs().max().item() if want.numel() else 0))
        torch.testing.assert_close(got.double(), want, **bounds)


def test_one_library_is_loaded():
    """Two would mean that another one than the tested one may have answered."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split()[-1] for line in lines if line.endswith("/libequipoise.so")}
    assert len(loaded) == 1
    if path := os.environ.get("EQUIPOISE_LIBRARY"):
        assert loaded == {os.path.realpath(path)}


# ---- topk_gating ---------------------------------------------------------------------------------


def check_gating(logits, **arguments):
    tensors = {n: a for n, a in arguments.items() if isinstance(a, torch.Tensor)}
    for name, tensor in tensors.items():
        if name == "noise":
            tensors[name] = tensor.detach().requires_grad_()
        elif tensor.is_floating_point():  # what is cast would be cast by a kernel of torch
            tensors[name] = tensor.to(compute_type(logits.dtype))

    def gate(logits, *values):
        return F.topk_gating(logits, **arguments | dict(zip(tensors, values, strict=True)))

    check(gate, logits.detach().requires_grad_(), *tensors.values())


@pytest.mark.parametrize("dtype", FLOATS)
def test_gating_samples(dtype):
    for logits, arguments in test_topk_gating.sample_inputs(dtype):
        check_gating(logits, **arguments)


# Tokens and experts of every team of lanes, and of more experts than a team takes; with a block of
# its own, several blocks, and more blocks than one adds up.
SIZES = [(1, 1), (600, 8), (150, 32), (70, 64), (40, 100), (40, 128), (270, 250), (20, 512)]
SIZES += [(5, 513), (3, 1000)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens,experts", SIZES)
def test_gating_sizes(tokens, experts, dtype):
    if dtype == torch.float64:  # a block has one token at a time
        tokens = (tokens + 3) // 4
    logits = make_logits(tokens, experts, dtype)
    logits[0, 0] = torch.nan
    logits[-1, experts // 2] = -torch.inf
    logits[tokens // 2] = logits[tokens // 2].round()  # ties
    top_k = min(experts, 6)
    bias = torch.randn(experts) / 10
    mask = torch.rand(tokens) < 0.7
    weights = torch.rand(tokens) * mask
    for norm, n in ((False, tokens), (True, 40)):
        arguments = dict(norm_topk_prob=norm, scaling_factor=1.5)
        check_gating(logits[:n], top_k=top_k, **arguments)
        check_gating(logits[:n], top_k=1, expert_bias=bias, token_mask=weights[:n], **arguments)
        check_gating(logits[:40], top_k=top_k, stats=False, **arguments)
        check_gating(logits[:9], top_k=min(experts, 33), token_mask=mask[:9], **arguments)
        check_gating(logits[:9], top_k=top_k, expert_bias=bias, stats=False, **arguments)


SCORE_FUNCTIONS = ["softmax", "sigmoid", "sqrtsoftplus", "identity"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_gating_options(score_function, dtype):
    """What is optional, in every team of lanes and in a block: groups that end within a lane's
    experts, between two lanes, and nowhere near.
    """
    sizes = [(6, 3, 2), (30, 10, 4), (60, 60, 20), (120, 4, 3), (256, 8, 4), (500, 25, 7)]
    sizes += [(520, 40, 9), (518, 2, 1)]
    for i, (experts, num_groups, group_topk) in enumerate(sizes):
        if dtype == torch.float64 and experts < 500:  # goes the same way as more experts
            continue
        norm = score_function != "identity" and (i + SCORE_FUNCTIONS.index(score_function)) % 2 == 0
        x, noise = make_logits(9, experts, dtype), make_logits(9, experts, dtype, seed=1) / 4
        x[0, 0] = torch.nan
        x[1, : experts // 2] = -torch.inf
        x[3] = -torch.inf
        bias = torch.randn(experts) / 10
        weights = torch.rand(9) * (torch.arange(9) != 4)
        ids = torch.tensor([2, 2, 0, 1, 2, 0, 0, 4, 1])
        forced = torch.stack([torch.randperm(experts)[:4] for _ in range(9)])
        forced[5] = -1
        forced[torch.rand(9, 4) < 0.2] = -1
        groups = dict(num_groups=num_groups, group_topk=group_topk)
        segments = dict(segment_ids=ids, num_segments=5)
        common = dict(top_k=4, score_function=score_function, norm_topk_prob=norm)
        check_gating(x, **common)
        check_gating(x, **common, **groups, expert_bias=bias, stats=False)
        check_gating(x, **common, **groups, group_score="max", noise=noise, scaling_factor=2.5)
        check_gating(x, **common, **segments, expert_bias=bias, token_mask=weights)
        check_gating(x, **common, **segments, forced_indices=forced, token_mask=weights > 0.2)
        check_gating(x, **common, forced_indices=forced, token_mask=weights, noise=noise)


@pytest.mark.parametrize(
    "tokens,experts,segments,dtype",
    [
        (270, 250, 3, torch.bfloat16),  # more blocks than one adds up
        (600, 8, 40, torch.float32),
        (2500, 100, 20000, torch.float32),  # a block looks at its rows' segments more than once
        (80, 9, 4, torch.float64),
        (20, 513, 5, torch.float16),
    ],
)
def test_gating_segments(tokens, experts, segments, dtype):
    logits = make_logits(tokens, experts, dtype)
    ids = torch.randint(0, min(segments, 8), (tokens,)) * (segments // min(segments, 8))
    weights = torch.rand(tokens)
    for segment_ids, mask in ((ids, None), (ids.sort().values, weights), (ids.flip(0), weights)):
        arguments = dict(segment_ids=segment_ids, num_segments=segments, token_mask=mask)
        check_gating(logits, top_k=3, **arguments)
    check_gating(logits, top_k=2, norm_topk_prob=True, **arguments, stats=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gating_reports_bad_values(dtype):
    """A segment id that is none masks its token; a bad slot is empty. Nothing else changes."""
    ids = torch.tensor([0, -1, 2, 3, 1, 2**40, 0])
    forced = torch.tensor([[0, 2], [1, 0], [6, 2], [2, 1], [4, 4], [3, 1], [-2, 5]])
    good_ids, good_forced = ids.clone(), forced.clone()
    bad_tokens = torch.tensor([1, 3, 5])
    good_ids[bad_tokens], good_forced[bad_tokens] = 0, -1
    good_forced[forced >= 6], good_forced[4, 1], good_forced[6, 0] = -1, -1, -1
    mask = torch.ones(7, dtype=torch.bool)
    mask[bad_tokens] = False
    for columns in (6, 600):
        logits = make_logits(7, columns, dtype)
        forced[2, 0] = columns
        for extra in (dict(), dict(forced_indices=forced)):
            device = {name: tensor.cuda() for name, tensor in extra.items()}
            x = logits.cuda().requires_grad_()
            r = F.topk_gating(x, 2, segment_ids=ids.cuda(), num_segments=3, **device)
            kept = dict(segment_ids=good_ids, token_mask=mask) | (
                dict(forced_indices=good_forced) if extra else {}
            )
            exact = logits.clone().requires_grad_()
            want = F.topk_gating(exact, 2, num_segments=3, **kept)
            for got, expected in zip(r[:4], want[:4], strict=True):
                torch.testing.assert_close(got.detach().cpu(), expected.detach())
            sums = r.sums.detach().cpu()
            assert sums[:, -1].tolist() == [3 + bool(extra), bool(extra), bool(extra)]
            torch.testing.assert_close(sums[:, :-1], want.sums.detach()[:, :-1])
            for names in (["topk_weights", "lse", "sums"], ["lse"]):
                probes = [torch.randn_like(getattr(want, name)) for name in names]
                grads = [
                    torch.autograd.grad(
                        [getattr(result, name) for name in names],
                        leaf,
                        [p.to(leaf.device) for p in probes],
                        retain_graph=True,
                    )[0].cpu()
                    for result, leaf in ((r, x), (want, exact))
                ]
                torch.testing.assert_close(*grads)


def test_gating_many_blocks():
    """More tokens than a grid takes at once, forward and backward."""
    check_gating(make_logits(600, 4, torch.float64), top_k=2)
    check_gating(make_logits(2100, 4, torch.float64), top_k=1, stats=False)
    check_gating(make_logits(16500, 130), top_k=2, norm_topk_prob=True, stats=False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("experts,top_k", [(8, 3), (70, 6), (128, 20), (600, 5)])
def test_gating_ties(experts, top_k, dtype):
    logits = torch.randint(0, 3, (20, experts)).to(dtype)
    logits[::2] *= 2 * torch.rand(10, experts).round() - 1  # -0 is 0
    check_gating(logits, top_k=top_k)
    check_gating(logits, top_k=top_k, expert_bias=torch.randint(0, 2, (experts,)).float())


@pytest.mark.parametrize("dtype", FLOATS)
def test_gating_absent_experts(dtype):
    inf, nan = torch.inf, torch.nan
    rows = [[1, -inf, 0, nan], [-inf] * 4, [nan] * 4, [inf, 0, inf, -inf], [-inf, -inf, 3, -inf]]
    for experts in (4, 600):
        logits = torch.tensor(rows, dtype=dtype)
        logits = torch.nn.functional.pad(logits, (0, experts - 4), value=-inf)
        check_gating(logits[[0, 1, 2, 4]], top_k=3, norm_topk_prob=True)
        got, want = (F.topk_gating(x, 3, norm_topk_prob=True) for x in (logits.cuda(), logits))
        for a, b in zip(got, want, strict=True):  # 1e36 among the sums
            torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("experts", [30, 520])
def test_gating_layouts(experts, dtype):
    base = make_logits(9, experts + 40, dtype)
    for view in (
        base[:, 1 : experts + 1],
        base[::2, 16 : 16 + experts],
        base[:1, 8:].expand(5, -1),
    ):
        check_gating(view, top_k=2)
    leading = make_logits(24, experts, dtype).view(2, 3, 4, experts)
    check_gating(leading, top_k=3, token_mask=torch.rand(2, 3, 4) < 0.5)


def test_gating_reports_bad_token_weights():
    logits, weights = make_logits(5, 6), torch.tensor([1.0, -1.0, torch.nan, 0.0, 2.0])
    for columns in (6, 600):
        padded = torch.nn.functional.pad(logits, (0, columns - 6), value=-torch.inf)
        sums = F.topk_gating(padded.cuda(), 2, token_mask=weights.cuda()).sums.cpu()
        assert sums[-1] == 2 and sums[-5] == 3


# ---- expert_bincount -----------------------------------------------------------------------------


def check_bincount(
    indices, experts, weights=None, token_mask=None, segment_ids=None, segments=None
):
    def count(*tensors):
        indices, weights, token_mask, segment_ids = tensors
        return ops.expert_bincount(indices, experts, weights, token_mask, segment_ids, segments)

    check(count, indices, weights, token_mask, segment_ids)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bincount(dtype):
    for indices, experts, weights, *rest in test_expert_bincount.sample_inputs(dtype):
        weights = None if weights is None else weights.requires_grad_()
        check_bincount(indices, experts, weights, *rest)
    # One run, several, more than one block adds up, long ones whose length 32 does not divide.
    for tokens, top_k, experts in [(100, 2, 8), (401, 3, 20), (4500, 2, 40), (5000, 2, 8192)]:
        weights = torch.rand(tokens, top_k, dtype=torch.float64).to(dtype).requires_grad_()
        indices = torch.randint(-1, experts, (tokens, top_k))
        check_bincount(indices, experts, weights)
        ids = torch.randint(0, 3, (tokens,))
        check_bincount(indices, experts, weights, torch.rand(tokens) < 0.5, ids, 3)


def test_bincount_many_slots_and_experts():
    check_bincount(torch.randint(-1, 5, (131500, 4)), 5)  # more than a grid takes at once
    for experts in (12032, 12033):  # the last that fit into shared memory, the first that do not
        check_bincount(torch.randint(-1, experts, (700, 3)), experts)
    indices, mask = torch.randint(-1, 32, (700, 3)), torch.rand(700) < 0.5
    for segments in (376, 377):  # of 32 experts
        ids = torch.randint(0, segments, (700,))
        check_bincount(indices, 32, None, mask, ids, segments)


def test_bincount_counts_what_is_bad():
    """An index or segment that is none is skipped and counted, but not that of a masked token."""
    indices = torch.tensor([[0, 7], [-5, 2], [3, -1], [2**40, 1]]).cuda()
    ids, mask = torch.tensor([1, 0, 2, 0]).cuda(), torch.tensor([True, True, True, False]).cuda()
    for weights in (None, torch.ones(4, 2).cuda()):
        counts, num_invalid = ops.expert_bincount(indices, 3, weights)
        assert counts.tolist() == [1, 1, 1] and num_invalid.item() == 4
        counts, num_invalid = ops.expert_bincount(indices, 3, weights, mask)
        assert counts.tolist() == [1, 0, 1] and num_invalid.item() == 3
        counts, num_invalid = ops.expert_bincount(indices, 3, weights, mask, ids, 2)
        assert counts.tolist() == [[0, 0, 1], [1, 0, 0]] and num_invalid.item() == 4
    grad = ops.expert_bincount_backward(torch.ones(3).cuda(), indices, mask, torch.float32)
    assert grad.tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    grad = torch.arange(1.0, 7).view(2, 3).cuda()
    grad = ops.expert_bincount_backward(grad, indices, None, torch.float32, ids)
    assert grad.tolist() == [[4, 0], [0, 3], [0, 0], [0, 2]]


# ---- moe_permute and moe_unpermute ---------------------------------------------------------------


def check_permute(x, indices, experts, weights=None):
    def permute(x, indices, weights):
        return F.moe_permute(x, indices, experts, weights)

    x = x.detach().requires_grad_()
    check(permute, x, indices, None if weights is None else weights.requires_grad_())


def check_unpermute(permuted, row_id_map, weights=None):
    permuted = permuted.detach().requires_grad_()
    weights = None if weights is None else weights.detach().requires_grad_()
    check(F.moe_unpermute, permuted, row_id_map, weights)


@pytest.mark.parametrize("dtype", FLOATS)
def test_permute(dtype):
    for x, indices, experts, weights in test_moe_permute.sample_inputs(dtype):
        check_permute(x, indices, experts, weights)
    # One expert; a token at a time; more pairs than one block sorts; more experts than it has
    # memory for, with and without room for a second segment.
    for tokens, top_k, experts, width in [
        (300, 1, 1, 8),
        (1, 8, 64, 40),
        (2050, 4, 30, 16),
        (50, 3, 12032, 8),
        (50, 3, 12033, 8),
    ]:
        x = torch.randn(tokens, width).to(dtype)
        indices = torch.randint(-1, experts, (tokens, top_k))
        check_permute(x, indices, experts, torch.rand(tokens, top_k).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_permute_options(dtype):
    """Capacities, policies, alignment and the routing map: each field, and the gradients."""
    for options in test_moe_permute.sample_options(dtype):
        x = options.pop("x").requires_grad_()
        names = [n for n in ("topk_indices", "topk_weights", "routing_map") if n in options]
        tensors = [options.pop(n) for n in names]
        tensors = [
            t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors
        ]

        def permute(x, *tensors, names=names, options=options):
            return F.moe_permute(x, **dict(zip(names, tensors, strict=True)), **options)

        check(permute, x, *tensors)


def test_permute_many_slots_with_a_capacity():
    """More slots than one block sorts; experts that choose among more than a block has threads."""
    x, weights = torch.randn(2500, 4), torch.rand(2500, 4)
    for experts in (5, 300):
        indices = torch.randint(-1, experts, (2500, 4))
        for options in (
            dict(capacity=700, align=64),
            dict(capacity=7, drop_policy="probs"),
            dict(capacity=7, drop_policy="random", seed=3, pad_to_capacity=True),
        ):
            check(
                lambda x, i, w, e=experts, o=options: F.moe_permute(x, i, e, w, **o),
                x.requires_grad_(),
                indices,
                weights.requires_grad_(),
            )


def test_permute_counts_what_it_leaves_out():
    x, indices = torch.ones(5, 3), torch.tensor([[0, 1], [9, 1], [-2, 1], [1, 0], [-1, 0]])
    p = F.moe_permute(x.cuda(), indices.cuda(), 2, output_rows=5)
    assert p.num_invalid.item() == 2 and p.overflow.item() == 2
    assert p.tokens_per_expert.tolist() == [3, 4] and p.kept_per_expert.tolist() == [3, 2]
    assert p.expert_offsets.tolist() == [0, 3, 5]
    assert p.row_id_map.tolist() == [[0, 3], [-1, 4], [-1, -1], [-1, 1], [-1, 2]]


def test_permute_rows_of_8_bits_into_memory_that_is_given():
    for width, top_k in ((32, 3), (7, 3), (7, 40)):
        rows = torch.randint(0, 256, (20, width), dtype=torch.uint8)
        indices = torch.randint(-1, 4, (20, top_k))
        out = torch.zeros(20 * top_k, width, dtype=torch.uint8).cuda()
        p = F.moe_permute(rows.cuda(), indices.cuda(), 4, out=out)
        want = F.moe_permute(rows, indices, 4)
        assert torch.equal(out.cpu(), want.permuted)
        assert torch.equal(p.row_id_map.cpu(), want.row_id_map)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unpermute(dtype):
    for inputs in test_moe_unpermute.sample_inputs(dtype):
        check_unpermute(*inputs)
    for tokens, top_k, width in [(30, 6, 64), (5, 1, 520), (3, 70, 520)]:  # whole 16-byte pieces
        rows = min(tokens * top_k, 200)
        row_id_map = test_moe_unpermute.make_map(tokens, top_k, rows, rows - 1 - rows // 20)
        permuted = torch.randn(rows, width).to(dtype)
        for kind in (None, compute_type(dtype), dtype):
            weights = None if kind is None else torch.rand(tokens, top_k).to(kind)
            check_unpermute(permuted, row_id_map, weights)
        leaf = permuted.requires_grad_()
        check(F.moe_unpermute, leaf, row_id_map, weights)  # no gradient of the weights


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_all_layouts(dtype):
    """Rows a stride apart, on a boundary of 16 bytes and not, and one row many times."""
    base, indices = torch.randn(6, 48).to(dtype), torch.randint(-1, 3, (6, 2))
    row_id_map = torch.tensor([[0, 3], [1, 5], [-1, 2]])
    for view in (base[:, 16:32], base[:, 1:33], base[:, :21], base[:1, :16].expand(6, -1)):
        check_permute(view, indices, 3)
        check_unpermute(view, row_id_map, torch.rand(3, 2).to(dtype))


def test_unpermute_skips_what_is_no_row():
    rows = torch.ones(2, 4).cuda()
    out = F.moe_unpermute(rows, torch.tensor([[0, 2], [-7, 1]]).cuda(), torch.ones(2, 2).cuda())
    assert out.tolist() == [[1] * 4] * 2


@pytest.mark.parametrize("shape", [(0, 2, 3), (3, 0, 3), (3, 2, 0)])
def test_nothing_to_do(shape):
    tokens, top_k, width = shape
    check_permute(
        torch.randn(tokens, width), torch.zeros(tokens, top_k).long(), 4, torch.ones(tokens, top_k)
    )
    row_id_map = torch.arange(tokens * top_k).view(tokens, top_k)
    check_unpermute(torch.randn(tokens * top_k, width), row_id_map, torch.ones(tokens, top_k))
    check_bincount(torch.zeros(tokens, top_k).long(), 4, torch.ones(tokens, top_k).requires_grad_())
    if tokens == 0:
        check_gating(torch.empty(0, 4), top_k=2)


# ---- sort_chunks_by_index ------------------------------------------------------------------------


def check_sort_chunks(x, split_sizes, order, probs=None):
    x = x.detach().requires_grad_()
    probs = None if probs is None else probs.detach().requires_grad_()
    check(F.sort_chunks_by_index, x, split_sizes, order, probs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sort_chunks(dtype):
    for inputs in test_sort_chunks_by_index.sample_inputs(dtype):  # up to two chunks a thread
        check_sort_chunks(*inputs)
    split_sizes = torch.tensor([300, 0, 270, 1])  # several blocks
    x, probs = torch.randn(571, 8).to(dtype), torch.rand(571).to(dtype)
    check_sort_chunks(x, split_sizes, torch.tensor([3, 2, 0, 1]), probs)
    check_sort_chunks(x[:0], split_sizes[1:2], torch.zeros(1).long(), probs[:0])
    check_sort_chunks(x[:, :0], split_sizes, torch.tensor([3, 2, 0, 1]), probs)


def test_sort_chunks_drops_rows_without_a_place():
    rows = torch.arange(1.0, 6).unsqueeze(1).cuda()
    split_sizes = torch.tensor([1, -1, 1, 1, 2**62]).cuda()
    s = F.sort_chunks_by_index(rows, split_sizes, torch.tensor([3, 0, 7, 2, 0]).cuda())
    assert s.sorted.flatten().tolist() == [3, 2, 0, 0, 0]
    assert s.row_id_map.flatten().tolist() == [-1, 1, 0, -1, -1]


# ---- moe_align_block_size ------------------------------------------------------------------------


def check_blocks(indices, block_size, experts):
    check(lambda i: F.moe_align_block_size(i, block_size, experts), indices)


def test_align_block_size():
    for inputs in test_moe_align_block_size.sample_inputs():
        check_blocks(*inputs)
    # More places than slots and fewer, in several blocks; the other steps of the sort.
    for tokens, top_k, block_size, experts in [(50, 2, 16, 30), (300, 3, 1, 4), (2050, 4, 16, 30)]:
        check_blocks(torch.randint(-1, experts, (tokens, top_k)), block_size, experts)
    bad = torch.tensor([[4, -2, 0], [2**40, 3, -(2**62)]]).cuda()
    blocks = F.moe_align_block_size(bad, 2, 4)
    assert blocks.num_tokens_post_padded.tolist() == [4]


# ---- dispatch_layout -----------------------------------------------------------------------------


def check_layout(indices, ranks, experts):
    check(lambda i: F.dispatch_layout(i, ranks, experts), indices)


def test_layout_of_dispatch():
    for inputs in test_dispatch_layout.sample_inputs():
        check_layout(*inputs)
    # Several blocks; the most bins that a block has memory for, and one more; one token.
    for tokens, top_k, ranks, experts in [
        (1100, 2, 4, 12),
        (300, 5, 6016, 6016),
        (300, 5, 1, 12032),
        (1, 200, 3, 6),
    ]:
        check_layout(torch.randint(-1, experts, (tokens, top_k)), ranks, experts)
    bad = torch.tensor([[4, -2, 0], [2**40, 3, -(2**62)]]).cuda()
    layout = F.dispatch_layout(bad, 2, 4)
    assert layout.num_tokens_per_expert.tolist() == [1, 0, 0, 1]


# ---- load_metrics --------------------------------------------------------------------------------


def test_load_metrics():
    for experts in (1, 2, 7, 64, 300, 6100):  # the last do not fit in shared memory
        counts = torch.randint(0, 1000, (3, experts))
        counts[1, experts // 2 + 1 :] = 0
        for unbiased in (False, experts > 1):
            check(lambda c, unbiased=unbiased: ops.load_metrics(c, unbiased), counts)
    got = ops.load_metrics(torch.tensor([[5, -3], [0, 0], [1, 2]]).cuda(), False).cpu()
    assert got[:, 0].isnan().all() and got[0].isnan().tolist() == [True, True, False]


# ---- balance_loss --------------------------------------------------------------------------------


EVERY_LOSS = ["switch", "device", "z", "importance", "importance_of_probs", "uniform_kl"]
EVERY_LOSS += ["entropy", "variance", "mutual_information", "token_entropy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("experts,devices", [(1, 1), (6, 2), (300, 5)])
@pytest.mark.parametrize("segments", [None, 3, 70])
def test_balance_loss(experts, devices, segments, dtype):
    top_k, tokens = min(experts, 2), 20
    ids = None if segments is None else torch.randint(0, segments, (tokens,))
    masks = (None,) if segments else (None, torch.zeros(tokens, dtype=torch.bool))
    for mask in masks:
        logits = make_logits(tokens, experts, dtype)
        routing = F.topk_gating(
            logits, top_k, token_mask=mask, segment_ids=ids, num_segments=segments
        )
        gate_sums = torch.rand(experts, dtype=dtype)
        expert_weights = torch.rand(experts, dtype=dtype)
        for names in (["switch"], EVERY_LOSS, ["z", "z"], ["switch", "importance"] * 16):
            coefficients = torch.rand(len(names)).bfloat16().float()

            def loss(sums, gate_sums, expert_weights, names=names, coefficients=coefficients):
                return ops.balance_loss(
                    sums,
                    coefficients.to(sums.device),
                    names,
                    top_k,
                    gate_sums,
                    expert_weights,
                    devices,
                    unbiased=True,
                    guard_dense=False,
                )

            sums = routing.sums.detach().requires_grad_()
            check(loss, sums, gate_sums.requires_grad_(), expert_weights)


# ---- all together --------------------------------------------------------------------------------


def layer(logits, x):
    """A routed layer without its experts, and its loss."""
    routing = F.topk_gating(logits, 4, norm_topk_prob=True)
    permuted = F.moe_permute(
        x, routing.topk_indices, logits.size(-1), tokens_per_expert=routing.tokens_per_expert
    )
    out = F.moe_unpermute(permuted.permuted, permuted.row_id_map, routing.topk_weights)
    coefficients = torch.tensor([0.25, 0.5]).to(logits.device)
    total, _ = ops.balance_loss(routing.sums, coefficients, ["switch", "z"], 4)
    return out, total, permuted.expert_offsets


def test_layer():
    check(layer, make_logits(200, 64).requires_grad_(), torch.randn(200, 32).requires_grad_())


def test_same_bits_again():
    weights = torch.rand(4500, 2).requires_grad_()
    indices = torch.randint(-1, 40, (4500, 2))
    for function, *inputs in [
        (layer, make_logits(300, 130).requires_grad_(), torch.randn(300, 8).requires_grad_()),
        (layer, make_logits(40, 600).requires_grad_(), torch.randn(40, 8).requires_grad_()),
        (lambda i, w: F.expert_bincount(i, 40, w), indices, weights),
        (
            lambda i, w, s: F.expert_bincount(i, 40, w, None, s, 4),
            indices,
            weights,
            indices[:, 0] % 4,
        ),
        (lambda i, w: F.moe_permute(w, i, 40), indices, weights),
        (lambda i: F.dispatch_layout(i, 8, 40), indices),
        (lambda i: F.moe_align_block_size(i, 16, 40), indices),
    ]:
        first, second = (run_on_cuda(function, inputs) for _ in range(2))
        for a, b in zip(sum(first, []), sum(second, []), strict=True):
            assert torch.equal(a, b)


def test_what_kernels_of_torch_prepare():
    """Layouts and types that our kernels do not read are copied first, gradients included."""
    try:
        torch.ones(1).cuda().neg()
    except RuntimeError:
        pytest.skip("the interpreter has no kernels of torch")
    base, slots = torch.randn(16, 16), torch.randint(-1, 3, (2, 8)).t()
    check_gating(base.t(), top_k=2)
    check_gating(base[:, ::2], top_k=2)
    mask = torch.rand(16)

    def gate(logits, mask):
        return F.topk_gating(logits, 2, token_mask=mask)

    check(gate, base.double().requires_grad_(), mask)
    check_bincount(slots, 3, torch.rand(2, 8).t().requires_grad_())
    check_permute(base.t()[:8], slots, 3, torch.rand(2, 8).t())
    check_unpermute(base.t(), torch.randperm(16).view(2, 8).t(), torch.rand(2, 8).t())
    x, weights = torch.randn(8, 4).requires_grad_(), torch.rand(8, 2).requires_grad_()
    for output in (0, 1):  # the gradient of a sum is one number, expanded
        check(lambda *a, o=output: F.moe_permute(*a[:2], 3, a[2])[o].sum(), x, slots, weights)
    row_id_map = torch.randperm(16).view(8, 2)
    rows = torch.randn(16, 4).requires_grad_()
    sizes, order = torch.tensor([7, 1, 8]).int(), torch.tensor([2, 0, 1]).int()
    check_sort_chunks(base.t(), sizes, order, base[:, 3])
    check_layout(slots, 3, 3)
    check_blocks(slots, 4, 3)
    check(lambda *a: F.moe_unpermute(*a).sum(), rows, row_id_map, weights)
    check(lambda x: sum(t.sum() for t in gate(x, None)), base.clone().requires_grad_())


slots, scores = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 7)


@pytest.mark.parametrize(
    "function,first,second,message",
    [
        (lambda a, b: F.topk_gating(a, 1, token_mask=b), scores, scores[:, 0], "token_mask"),
        (lambda a, b: F.topk_gating(a, 1, expert_bias=b), scores, scores[0], "expert_bias"),
        (lambda a, b: F.expert_bincount(a, 3, b), slots, scores[:, :1], "weights"),
        (lambda a, b: F.expert_bincount(a, 3, None, None, b, 1), slots, slots[:, 0], "segment_ids"),
        (lambda a, b: F.moe_permute(a, b, 3), scores, slots, "topk_indices"),
        (F.moe_unpermute, scores, slots, "row_id_map"),
        (lambda a, b: F.sort_chunks_by_index(a, b, b), scores, slots[:, 0], "split_sizes"),
        (lambda a, b: ops.balance_loss(a, b, ["z"], 1), scores[0], scores[0, :1], "coefficients"),
    ],
)
def test_tensors_on_two_devices_are_refused(function, first, second, message):
    for a, b in ((first.cuda(), second), (first, second.cuda())):
        with pytest.raises(RuntimeError, match=f"{message} must be on the device of .*, got "):
            function(a, b)

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


def sample_options(dtype=torch.float32):
    """Arguments of moe_permute with what is optional in it."""
    for tokens, top_k, experts, width in [
        (40, 3, 5, 8),
        (9, 2, 30, 5),
        (33, 4, 4, 1),
        (7, 2, 1, 3),
    ]:
        x = torch.randn(tokens, width, dtype=torch.float64).to(dtype)
        indices = torch.randint(-1, experts, (tokens, top_k))
        # Few values: ties.
        weights = (torch.randint(1, 5, (tokens, top_k)) / 4).to(dtype)
        weights[-1] = -0.0
        common = dict(x=x, topk_indices=indices, num_experts=experts)
        weighted = dict(common, topk_weights=weights)
        yield dict(common, align=4)
        yield dict(weighted, capacity=3)
        yield dict(weighted, capacity=3, drop_policy="probs")
        yield dict(weighted, capacity=4, drop_policy="probs", align=3)
        yield dict(common, capacity=2, drop_policy="random", seed=7)
        yield dict(weighted, capacity=5, drop_policy="random", seed=-(2**62), pad_to_capacity=True)
        yield dict(weighted, capacity=2, pad_to_capacity=True)
        yield dict(common, capacity=0)
        yield dict(common, capacity=0, drop_policy="random", seed=1, pad_to_capacity=True)
        yield dict(weighted, capacity=1000, drop_policy="probs", output_rows=200)
        yield dict(weighted, capacity=6, align=2, output_rows=61 if experts == 30 else 150)
        routing_map = torch.rand(tokens, experts) < 0.3
        gates = torch.rand(tokens, experts, dtype=torch.float64).to(dtype)
        by_map = dict(
            x=x, topk_indices=None, num_experts=experts, routing_map=routing_map, topk_weights=gates
        )
        yield dict(by_map)
        yield dict(by_map, output_rows=int(routing_map.sum()))
        yield dict(by_map, capacity=3, drop_policy="probs", align=2)
        yield dict(by_map, capacity=2, drop_policy="random", seed=3)


def check(arguments):
    """Rows are only copied, so they are equal to the bit."""
    got = F.moe_permute(**arguments)
    for name, a, b in zip(got._fields, got, reference.moe_permute(**arguments), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), (name, arguments)
    return got


@pytest.mark.parametrize("dtype", FLOATS)
def test_values(dtype):
    for x, indices, experts, weights in sample_inputs(dtype):
        check(dict(x=x, topk_indices=indices, num_experts=experts, topk_weights=weights))


@pytest.mark.parametrize("dtype", FLOATS)
def test_options(dtype):
    for arguments in sample_options(dtype):
        check(arguments)


def test_equals_a_stable_sort_and_index_select():
    x, indices = torch.randn(50, 6), torch.randint(0, 9, (50, 3))
    order = indices.flatten().argsort(stable=True)
    assert torch.equal(F.moe_permute(x, indices, 9).permuted, x.index_select(0, order // 3))


def test_many_blocks_with_a_capacity():
    """More slots than one block sorts; experts that choose among more slots than it has threads."""
    x, indices = torch.arange(3000.0).unsqueeze(1), torch.randint(-1, 6, (3000, 4))
    common = dict(x=x, topk_indices=indices, num_experts=6, topk_weights=torch.rand(3000, 4))
    check(dict(common, capacity=700, align=128))
    check(dict(common, capacity=700, drop_policy="probs"))
    check(dict(common, capacity=1, drop_policy="random", seed=2, pad_to_capacity=True))


def test_what_each_policy_keeps():
    indices = torch.zeros(6, 1, dtype=torch.long)
    weights = torch.tensor([0.1, torch.nan, 0.5, 0.5, 0.9, 0.5]).unsqueeze(1)
    common = dict(x=torch.arange(6.0).unsqueeze(1), topk_indices=indices, num_experts=1)
    for capacity, kept in [(3, [0, 1, 2]), (0, [])]:
        p = F.moe_permute(**common, capacity=capacity)
        assert p.permuted[:capacity].flatten().tolist() == kept
    for capacity, kept in [(3, [2, 3, 4]), (1, [4]), (5, [0, 2, 3, 4, 5])]:
        p = F.moe_permute(**common, topk_weights=weights, capacity=capacity, drop_policy="probs")
        assert p.permuted[:capacity].flatten().tolist() == kept
        assert p.tokens_per_expert.tolist() == [6] and p.kept_per_expert.tolist() == [capacity]
        assert p.dropped_per_expert.tolist() == [6 - capacity]


def test_random_is_a_function_of_the_seed_alone():
    indices = torch.rand(60, 8).topk(2).indices
    routing_map = torch.zeros(60, 8, dtype=torch.bool).scatter(1, indices, True)
    x, options = torch.randn(60, 3), dict(capacity=5, drop_policy="random")

    def kept(slots, seed):
        p = F.moe_permute(x, num_experts=8, seed=seed, **slots, **options)
        return p.permuted[:40]

    rows = kept(dict(topk_indices=indices), 11)
    assert torch.equal(rows, kept(dict(topk_indices=indices), 11))
    assert torch.equal(rows, kept(dict(topk_indices=indices.flip(1)), 11))
    assert torch.equal(rows, kept(dict(topk_indices=None, routing_map=routing_map), 11))
    assert not torch.equal(rows, kept(dict(topk_indices=indices), 12))
    # Every token has the same chance.
    one = torch.zeros(20, 1, dtype=torch.long)
    times = torch.zeros(20)
    for seed in range(100):
        p = F.moe_permute(torch.randn(20, 1), one, 1, capacity=10, drop_policy="random", seed=seed)
        times += (p.row_id_map >= 0).flatten()
    assert times.min() > 30 and times.max() < 70


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_rows_of_8_bits(dtype):
    for width in (1, 16, 37, 64):
        rows = torch.randint(0, 256, (20, width), dtype=torch.uint8)
        indices = torch.randint(-1, 4, (20, 3))
        got = F.moe_permute(rows.view(dtype), indices, 4, align=4)
        want = reference.moe_permute(rows, indices, 4, align=4)[0]
        assert got.permuted.dtype == dtype and torch.equal(got.permuted.view(torch.uint8), want)
    x = torch.ones(2, 4).to(torch.float8_e5m2).requires_grad_()
    with pytest.raises(RuntimeError, match="x of 8 bits has no gradient"):
        F.moe_permute(x, torch.zeros(2, 1, dtype=torch.long), 1)


def test_out():
    x, indices, weights = torch.randn(9, 4), torch.randint(-1, 3, (9, 2)), torch.rand(9, 2)
    want = F.moe_permute(x, indices, 3, weights, align=4)
    out = torch.full_like(want.permuted, torch.nan)
    version, pointer = out._version, out.data_ptr()
    got = F.moe_permute(x, indices, 3, weights, align=4, out=out)
    assert got.permuted is out and out.data_ptr() == pointer and out._version > version
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for bad, message in (
        (out[1:], r"out must have shape \[N, H\] = \[28, 4\]"),
        (out.double(), "out must be Float"),
        (out.t().contiguous().t(), "out must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            F.moe_permute(x, indices, 3, weights, align=4, out=bad)
    with pytest.raises(RuntimeError, match="out must be absent where a gradient is wanted"):
        F.moe_permute(x.requires_grad_(), indices, 3, align=4, out=out)


def test_rows_that_do_not_fit(backend):
    """The CPU raises; CUDA drops them, says so, and stays within bounds."""
    x, indices = torch.arange(1.0, 7.0).unsqueeze(1), torch.tensor([[0], [1], [1], [2], [1], [2]])
    for options in (dict(), dict(capacity=2, drop_policy="random", seed=1)):
        arguments = dict(x=x, topk_indices=indices, num_experts=3, output_rows=2, **options)
        if backend == "cpu":
            with pytest.raises(RuntimeError, match="output_rows must be at least"):
                F.moe_permute(**arguments)
            continue
        p = check(arguments)
        assert p.expert_offsets.tolist() == [0, 1, 2, 2] and p.kept_per_expert.sum() == 2
        assert p.overflow == (4 if not options else 3)


def test_bad_indices(backend):
    """The CPU raises; CUDA counts them."""
    for tokens in (3, 9000):
        indices = torch.zeros(tokens, 1, dtype=torch.long)
        indices[0], indices[1], indices[2] = 4, -2, -1
        if backend == "cpu":
            with pytest.raises(RuntimeError, match="topk_indices must be in .*, got (4|-2)"):
                F.moe_permute(torch.ones(tokens, 2), indices, 4)
            continue
        p = F.moe_permute(torch.ones(tokens, 2), indices, 4)
        assert p.num_invalid == 2 and p.row_id_map[:3].flatten().tolist() == [-1] * 3
        assert p.tokens_per_expert.sum() == tokens - 3


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


@pytest.mark.parametrize("tokens,top_k,experts", [(0, 2, 3), (3, 0, 3), (0, 1, 20000)])
def test_no_slots_with_options(tokens, top_k, experts):
    common = dict(
        x=torch.ones(tokens, 2),
        topk_indices=torch.zeros(tokens, top_k, dtype=torch.long),
        num_experts=experts,
    )
    check(dict(common, align=8))
    check(dict(common, capacity=2, pad_to_capacity=True))
    check(dict(common, capacity=2, drop_policy="random", seed=0, output_rows=5))


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


def test_gradients_with_options():
    """The gradients are those of the reference; they do not see how the rows were chosen."""
    for arguments in sample_options(torch.float64):
        names = [n for n in ("x", "topk_weights") if arguments.get(n) is not None]
        leaves = [arguments[n].clone().requires_grad_() for n in names]
        arguments |= dict(zip(names, leaves, strict=True))
        results = F.moe_permute(**arguments), reference.moe_permute(**arguments)
        probes = [torch.randn_like(results[0][i]) for i in range(len(names))]
        got, want = (torch.autograd.grad(r[: len(names)], leaves, probes) for r in results)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_double_gradients_with_options():
    x, weights = torch.randn(6, 2, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    inputs, indices = (x.requires_grad_(), weights.requires_grad_()), torch.randint(0, 2, (6, 2))
    for options in (dict(drop_policy="probs"), dict(pad_to_capacity=True)):

        def permute(x, weights, options=options):
            return F.moe_permute(x, indices, 2, weights, capacity=3, **options)[:2]

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
    for arguments in list(sample_options())[:15]:
        x, rest = arguments.pop("x"), arguments
        torch.library.opcheck(ops.moe_permute, (x,), rest)
        out = torch.empty_like(ops.moe_permute(x, **rest)[0])
        torch.library.opcheck(ops.moe_permute_out, (x,), dict(rest, out=out))


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

    def drop(x, indices, weights, seed):
        capacity = F.expert_capacity(x.size(0), 2, 5, capacity_factor=0.8)
        p = F.moe_permute(
            x, indices, 5, weights, capacity=capacity, drop_policy="random", seed=seed, align=2
        )
        return p, F.moe_permute(x, indices, 5, out=torch.empty(indices.numel(), 4)).permuted

    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    fast = torch.compile(drop, fullgraph=True, dynamic=True, backend=graphs)
    for tokens, seed in ((8, 5), (6, 6), (13, 7), (12, 8)):
        x, indices, weights = torch.randn(tokens, 4), torch.randint(-1, 5, (tokens, 2)), None
        (got, got_out), (want, want_out) = (f(x, indices, weights, seed) for f in (fast, drop))
        for a, b in zip((*got, got_out), (*want, want_out), strict=True):
            assert torch.equal(a, b)
    assert graphs.frame_count <= 2  # a seed that changes does not compile again

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
            counts = F.expert_bincount(indices, 30)
            common = dict(x=x, topk_indices=indices, num_experts=30, tokens_per_expert=counts)
            probs = dict(topk_weights=x[:, :6].contiguous(), drop_policy="probs", capacity=200)
            results.append([F.moe_permute(**common), F.moe_permute(**common, **probs, align=16)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            for a, b in zip(one, another, strict=True):
                assert torch.equal(a, b)


@pytest.mark.cpu_only("counts are compared on the CPU alone")
def test_counts_that_are_wrong():
    """Whoever counts: one thread takes them over, several compare them."""
    indices = torch.randint(0, 4, (9000, 1))
    counts = F.expert_bincount(indices, 4)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for change in ([1, -1, 0, 0], [-20000, 20000, 0, 0], [0, 0, 0, 5]):
                wrong = counts + torch.tensor(change)
                for options in (dict(), dict(capacity=10, drop_policy="random", seed=0)):
                    with pytest.raises(RuntimeError, match="tokens_per_expert must be the counts"):
                        F.moe_permute(
                            torch.ones(9000, 1), indices, 4, tokens_per_expert=wrong, **options
                        )
    finally:
        torch.set_num_threads(threads)


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
        (dict(align=0), "align must be at least 1, got 0"),
        (dict(capacity=-1), "capacity must be at least 0, got -1"),
        (dict(output_rows=-1), "output_rows must be at least 0, got -1"),
        (dict(output_rows=1), "output_rows must be at least 2 for these slots, got 1"),
        (
            dict(drop_policy="first"),
            "drop_policy must be 'position', 'probs' or 'random', got 'first'",
        ),
        (dict(capacity=1, drop_policy="probs"), "topk_weights must be given for drop_policy"),
        (dict(capacity=1, drop_policy="random"), "seed must be given for drop_policy 'random'"),
        (dict(pad_to_capacity=True), "capacity must be given for pad_to_capacity"),
        (dict(pad_to_capacity=True, capacity=1, align=2), "align must be 1 with pad_to_capacity"),
        (dict(pad_to_capacity=True, capacity=1, output_rows=4), "output_rows must be absent with"),
        (dict(routing_map=torch.zeros(2, 4).bool()), "topk_indices must be given, or routing_map"),
        (
            dict(topk_indices=None, routing_map=torch.zeros(2, 3).bool()),
            r"routing_map must have shape \[T, E\] = \[2, 4\], got \[2, 3\]",
        ),
        (dict(topk_indices=None, routing_map=torch.zeros(2, 4)), "routing_map must be Bool"),
        (
            dict(
                topk_indices=None,
                routing_map=torch.zeros(2, 4).bool(),
                topk_weights=torch.zeros(2, 1),
            ),
            r"topk_weights must have shape \[T, E\] = \[2, 4\]",
        ),
    ],
)
@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input(change, message):
    arguments = (
        dict(x=torch.zeros(2, 3), topk_indices=torch.tensor([[1], [0]]), num_experts=4) | change
    )
    with pytest.raises(RuntimeError, match=f"moe_permute: {message}"):
        F.moe_permute(**arguments)


@pytest.mark.cpu_only("a function of numbers")
def test_expert_capacity():
    for tokens, top_k, experts, factor, least, want in [
        (4096, 2, 64, 1.25, 0, 160),
        (10, 1, 3, 1.0, 0, 4),
        (100, 1, 10, 1.1, 0, 11),  # 1.1 * 10 is a little more than 11
        (8, 2, 64, 1.0, 4, 4),
        (2, 2, 64, 1.0, 4, 2),
        (0, 2, 4, 1.0, 4, 0),
    ]:
        assert F.expert_capacity(tokens, top_k, experts, factor, least) == want
    for bad in (dict(num_experts=0), dict(capacity_factor=-1.0), dict(min_capacity=-1)):
        good = dict(num_tokens=4, top_k=1, num_experts=2, capacity_factor=1.0)
        with pytest.raises(
            ValueError, match=f"expert_capacity: {next(iter(bad))} must be at least"
        ):
            F.expert_capacity(**(good | bad))

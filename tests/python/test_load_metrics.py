# SPDX-License-Identifier: Apache-2.0
"""load_metrics against its formulas, one by one, in plain PyTorch."""

import pytest
import torch

from equipoise import ops, reference
from equipoise.metrics import LOAD_METRICS, load_metrics

pytestmark = pytest.mark.usefixtures("backend")


def check(counts, unbiased=False):
    got = ops.load_metrics(counts, unbiased)
    want = reference.load_metrics(counts, unbiased)
    assert got.dtype == torch.float64
    for name, a, b in zip(LOAD_METRICS, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)
    return got


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 8, 31, 64, 100, 256, 777])
def test_values(experts):
    for layers in (1, 3, 8, 17):
        check(torch.randint(0, 1000, (layers, experts)))
    many = torch.randint(0, 2**40, (5, experts)) * (torch.rand(5, experts) < 0.4)
    check(many)  # no float32 holds them
    check(many, unbiased=True)


def test_more_experts_than_fit_in_shared_memory():
    counts = torch.randint(0, 50, (2, 6100))
    counts[1, 7:] = 0
    check(counts)


def test_shapes():
    check(torch.tensor([3, 0, 5]))
    check(torch.randint(0, 9, (2, 3, 4, 5)))
    check(torch.randint(0, 9, (6, 4)).t())
    check(torch.randint(0, 9, (1, 6)).expand(3, 6))
    assert load_metrics(torch.randint(0, 9, (2, 3, 4)))["cv"].shape == (2, 3)


@pytest.mark.no_launch
def test_no_layers():
    assert ops.load_metrics(torch.zeros(0, 4, dtype=torch.long), False).shape == (13, 0)


def test_layers_without_tokens_are_nan_and_leave_the_others_alone():
    counts = torch.tensor([[0, 0, 0], [1, 2, 3], [0, 0, 0]])
    got = check(counts)
    assert torch.equal(got[:, 1], check(counts[1]))
    assert got[0].isnan().tolist() == [True, False, True]


def test_negative_counts(backend):
    """The CPU raises; on CUDA the layer has no figures, for all to see."""
    counts = torch.tensor([[4, 4, 4], [5, -3, -1], [1, 2, 3]])
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="tokens_per_expert must hold counts >= 0, got -3"):
            load_metrics(counts)
        return
    got = ops.load_metrics(counts, False)
    assert got[:, 1].isnan().all()
    assert torch.equal(got[:, 2], check(counts[2]))


@pytest.mark.no_launch
@pytest.mark.parametrize(
    "counts,message",
    [
        (torch.tensor(3), r"must have shape \[..., E\] with E >= 1, got \[\]"),
        (torch.zeros(2, 0, dtype=torch.long), r"must have shape .*, got \[2, 0\]"),
        (torch.ones(4), "must be Long, got Float"),
        (torch.ones(4, dtype=torch.int32), "must be Long, got Int"),
    ],
)
def test_bad_input(counts, message):
    with pytest.raises(RuntimeError, match="load_metrics: tokens_per_expert " + message):
        load_metrics(counts)


def test_opcheck():
    for counts in (torch.randint(0, 9, (3, 4)), torch.randint(0, 9, (7,))):
        torch.library.opcheck(ops.load_metrics, (counts, True))


def test_compile_and_export(compiled):
    def spread(counts):
        load = load_metrics(counts)
        return load, load["cv"] + load["gini"]

    fast = compiled(spread)
    for layers in (3, 5):
        counts = torch.randint(0, 9, (layers, 6))
        (got, got_sum), (want, want_sum) = fast(counts), spread(counts)
        assert got.keys() == want.keys() and torch.equal(got_sum, want_sum)
        assert torch.equal(got["top1_share"], want["top1_share"])

    class Spread(torch.nn.Module):
        def forward(self, counts):
            return load_metrics(counts)

    layers = torch.export.Dim("layers", min=2)
    exported = torch.export.export(
        Spread(), (torch.randint(0, 9, (4, 6)),), dynamic_shapes=({0: layers},)
    )
    counts = torch.randint(0, 9, (9, 6))
    assert torch.equal(exported.module()(counts)["gini"], load_metrics(counts)["gini"])


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    class Spread(torch.nn.Module):
        def forward(self, counts):
            return load_metrics(counts)["cv"] + 1

    counts = torch.randint(0, 9, (4, 6))
    torch._dynamo.reset()
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(Spread(), (counts,)), package_path=str(tmp_path / "spread.pt2")
    )
    for fast in (
        torch.compile(Spread(), fullgraph=True),
        torch._inductor.aoti_load_package(package),
    ):
        assert torch.equal(fast(counts), Spread()(counts))


@pytest.mark.cpu_only("about threads of the CPU")
def test_same_bits_for_any_number_of_threads():
    counts = torch.randint(0, 5000, (3000, 96))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = ops.load_metrics(counts, False)
        torch.set_num_threads(4)
        assert torch.equal(ops.load_metrics(counts, False), want)
    finally:
        torch.set_num_threads(threads)

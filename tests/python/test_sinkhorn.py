# SPDX-License-Identifier: Apache-2.0
"""sinkhorn against the scaling written out, and what a balanced plan must have."""

import pytest
import torch
from helpers import FLOATS, tolerance

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.no_launch]


def sample_inputs(dtype=torch.float32):
    """(logits, num_iters, token_mask)."""
    for tokens, experts, iterations in [(12, 4, 8), (1, 1, 1), (7, 1, 3), (1, 5, 2), (40, 17, 1)]:
        logits = (2 * torch.randn(tokens, experts, dtype=torch.float64)).to(dtype)
        yield logits, iterations, None
        yield logits, iterations, torch.arange(tokens) % 3 > 0
    logits = torch.randn(3, 5, 6, dtype=torch.float64).to(dtype)
    logits[0, :, 2] = -torch.inf
    logits[1, 1] = torch.nan
    logits[1, 2, 4] = torch.inf
    yield logits, 8, None
    yield logits, 8, torch.rand(3, 5).round()


@pytest.mark.parametrize("dtype", FLOATS)
def test_values(dtype):
    for logits, iterations, mask in sample_inputs(dtype):
        got = F.sinkhorn(logits, iterations, mask)
        want = reference.sinkhorn(logits.double(), iterations, mask)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        close = tolerance(torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, **close)


def test_factors_of_rows_and_columns():
    """Megatron's form: a factor per row and per column, and the plan is made of them at the end."""
    logits = torch.randn(30, 5, dtype=torch.float64)
    cost = torch.exp(logits)
    rows, columns = cost.new_ones(30), cost.new_ones(5)
    for _ in range(4):
        rows = 1 / 30 / (cost @ columns)
        columns = 1 / 5 / (rows @ cost)
    want = rows.unsqueeze(1) * cost * columns
    torch.testing.assert_close(F.sinkhorn(logits, 4), want, rtol=1e-12, atol=0)


def test_balances():
    logits = torch.randn(64, 8, dtype=torch.float64) + torch.arange(8)  # expert 7 is everyone's
    mask = torch.arange(64) % 4 > 0
    plan = F.sinkhorn(logits, 200, mask)
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 1 / 8, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), mask / 48.0, check_dtype=False)
    assert torch.equal(plan[~mask], torch.zeros(16, 8, dtype=torch.float64))
    assert logits.argmax(1).bincount(minlength=8).max() > 40
    assert plan.argmax(1)[mask].bincount(minlength=8).max() <= 12
    columns = F.sinkhorn(logits, 1).sum(0)
    torch.testing.assert_close(columns, torch.full((8,), 1 / 8, dtype=torch.float64))


def test_absent_experts_and_masked_tokens():
    logits = torch.randn(6, 4)
    logits[:, 1] = -torch.inf  # nobody may have it
    logits[2] = torch.nan
    logits[3, 0] = torch.inf
    plan = F.sinkhorn(logits)
    assert plan.isfinite().all() and (plan >= 0).all()
    assert (plan[:, 1] == 0).all() and (plan[2] == 0).all()
    torch.testing.assert_close(plan.sum(0), torch.tensor([0.25, 0, 0.25, 0.25]))
    masked = torch.tensor([True, True, False, True, True, True])
    assert torch.equal(F.sinkhorn(logits, 8, masked), plan)
    assert torch.equal(F.sinkhorn(logits, 8, torch.zeros(6)), torch.zeros(6, 4))


def test_far_apart():
    """Logits whose exponentials are denormal: a factor 1 / sum would be infinite."""
    for distance in (80.0, 100.0, 103.0, 1000.0):
        plan = F.sinkhorn(torch.tensor([[distance, 0.0], [distance, 0.0]]), 30)
        assert plan.isfinite().all() and (plan[0] == plan[1]).all()
        assert plan[0].tolist() == ([0.25, 0.25] if distance < 104 else [0.25, 0])


def test_empty():
    assert F.sinkhorn(torch.zeros(0, 4)).shape == (0, 4)
    assert F.sinkhorn(torch.zeros(2, 0, 4), 1, torch.ones(2, 0)).shape == (2, 0, 4)


def test_layouts():
    logits = torch.randn(6, 8)
    for x in (logits.t(), logits[:, 1:5], logits[:1].expand(5, 8), logits[:, :1], logits[0]):
        assert torch.equal(F.sinkhorn(x), F.sinkhorn(x.contiguous()))
    assert torch.equal(F.sinkhorn(logits.view(2, 3, 8)).view(6, 8), F.sinkhorn(logits))


def test_has_no_gradient_and_leaves_the_logits_alone():
    logits = torch.randn(5, 3, requires_grad=True)
    before = logits.detach().clone()
    assert not F.sinkhorn(logits).requires_grad
    assert torch.equal(logits.detach(), before)


def test_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    for shape in ((20000, 7), (70000, 1)):
        logits = torch.randn(shape)
        want = F.sinkhorn(logits)
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                assert torch.equal(F.sinkhorn(logits), want)
        finally:
            torch.set_num_threads(threads)


def test_opcheck():
    for inputs in sample_inputs():
        torch.library.opcheck(ops.sinkhorn, inputs)
        torch.library.opcheck(ops.sinkhorn, (inputs[0].clone().requires_grad_(), *inputs[1:]))


def test_compile_and_export(compiled):
    def plan(logits, mask):
        return F.sinkhorn(logits * 2, 3, mask)

    fast = compiled(plan)
    for tokens in (5, 9):
        inputs = (torch.randn(tokens, 4, requires_grad=True), torch.arange(tokens) > 1)
        torch.testing.assert_close(fast(*inputs), plan(*inputs))

    class Plan(torch.nn.Module):
        def forward(self, logits):
            return F.sinkhorn(logits)

    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(Plan(), (torch.randn(5, 4),), dynamic_shapes=({0: tokens},))
    logits = torch.randn(11, 4)
    torch.testing.assert_close(exported.module()(logits), F.sinkhorn(logits))


@pytest.mark.cpu_only("about autocast")
def test_autocast_changes_nothing():
    logits = torch.randn(9, 4)
    want = F.sinkhorn(logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.sinkhorn(logits), want)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(logits=torch.tensor(1.0)), r"logits must have shape \[..., E\], got a scalar"),
        (dict(logits=torch.zeros(5, 0)), r"logits must have at least one expert .* got \[5, 0\]"),
        (dict(logits=torch.zeros(5, 3).long()), "logits must be float32, .* got Long"),
        (dict(num_iters=0), "num_iters must be at least 1, got 0"),
        (dict(token_mask=torch.ones(4)), r"token_mask must have shape of logits .* = \[5\], got"),
        (dict(token_mask=torch.ones(5).long()), "token_mask must be bool or floating weights"),
        (dict(token_mask=torch.ones(5, device="meta")), "token_mask must be on the device of"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(RuntimeError, match=f"sinkhorn: {message}"):
        F.sinkhorn(**dict(logits=torch.zeros(5, 3)) | change)

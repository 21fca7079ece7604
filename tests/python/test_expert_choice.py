# SPDX-License-Identifier: Apache-2.0
"""expert_choice against every expert sorting its tokens in Python."""

import pytest
import torch
from helpers import FLOATS, tolerance
from torch.autograd import gradcheck, gradgradcheck

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.no_launch]


def sample_inputs(dtype=torch.float32):
    """(logits, capacity, token_mask)."""
    for tokens, experts, capacity in [(12, 4, 3), (1, 1, 1), (7, 1, 9), (5, 6, 0), (40, 17, 33)]:
        logits = torch.randn(tokens, experts, dtype=torch.float64).to(dtype)
        yield logits, capacity, None
        yield logits, capacity, torch.arange(tokens) % 3 > 0
    logits = torch.randn(3, 5, 6, dtype=torch.float64).to(dtype)
    logits[0, :, 2] = -torch.inf
    logits[1, 1] = torch.nan
    logits[1, 2, 4] = torch.inf
    yield logits, 12, None
    yield logits, 4, torch.rand(3, 5).round()


@pytest.mark.parametrize("dtype", FLOATS)
def test_values(dtype):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for logits, capacity, mask in sample_inputs(dtype):
        got = F.expert_choice(logits, capacity, mask)
        indices, weights = reference.expert_choice(logits.to(compute), capacity, mask)
        assert torch.equal(got.token_indices, indices) and got.token_weights.dtype == compute
        exact = reference.expert_choice(logits.double(), capacity, mask)[1]
        torch.testing.assert_close(got.token_weights.double(), exact, **tolerance(compute))


def test_ties_go_to_the_lower_token():
    logits = torch.zeros(200, 3)
    logits[100:, 1] = 1.0
    r = F.expert_choice(logits, 120)
    lower, upper = torch.arange(100), torch.arange(100, 200)
    assert torch.equal(r.token_indices[1], torch.cat([upper, lower[:20]]))
    assert torch.equal(r.token_indices[0], torch.cat([lower, upper[:20]]))
    saturated = torch.tensor([[30.0, 0.0], [40.0, 0.0]])  # p is 1 to the last bit
    assert F.expert_choice(saturated, 1).token_indices[0].tolist() == [0]


def test_weights_are_the_softmax_and_absent_is_minus_one():
    logits = torch.randn(6, 4, dtype=torch.float64)
    logits[:, 1] = -torch.inf
    logits[4] = torch.nan
    logits[0, 3] = torch.nan
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    r = F.expert_choice(logits, 6, mask)
    p = logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf).softmax(1)
    assert (r.token_indices[1] == -1).all() and (r.token_weights[1] == 0).all()
    for expert, tokens in ((0, {0, 1, 3, 5}), (2, {0, 1, 3, 5}), (3, {1, 3, 5})):
        chosen = r.token_indices[expert]
        assert set(chosen[: len(tokens)].tolist()) == tokens and (chosen[len(tokens) :] == -1).all()
        weights = r.token_weights[expert]
        torch.testing.assert_close(weights[: len(tokens)], p[chosen[: len(tokens)], expert])
        assert (weights[len(tokens) :] == 0).all()
        assert (weights.diff() <= 0).all()


def test_a_probability_that_underflows_is_not_absent():
    r = F.expert_choice(torch.tensor([[0.0, -1000.0], [0.0, -torch.inf]]), 2)
    assert r.token_indices[1].tolist() == [0, -1] and r.token_weights[1].tolist() == [0, 0]


def test_empty():
    r = F.expert_choice(torch.zeros(0, 4), 3)
    assert r.token_indices.shape == r.token_weights.shape == (4, 0)
    assert F.expert_choice(torch.zeros(3, 4), 0).token_indices.shape == (4, 0)
    r = F.expert_choice(torch.zeros(3, 4), 2, torch.zeros(3))
    assert (r.token_indices == -1).all() and (r.token_weights == 0).all()


def test_layouts():
    logits = torch.randn(6, 8)
    for x in (logits.t(), logits[:, 1:5], logits[:1].expand(5, 8), logits[:, :1], logits[0]):
        got, want = F.expert_choice(x, 3), F.expert_choice(x.contiguous(), 3)
        assert torch.equal(got.token_indices, want.token_indices)
        assert torch.equal(got.token_weights, want.token_weights)
    flat, deep = F.expert_choice(logits, 3), F.expert_choice(logits.view(2, 3, 8), 3)
    assert torch.equal(flat.token_indices, deep.token_indices)


def test_gradients():
    for logits, capacity, mask in sample_inputs(torch.float64):
        if logits.numel() > 100 or capacity == 0:
            continue

        def weights(x, capacity=capacity, mask=mask):
            return F.expert_choice(x, capacity, mask).token_weights

        leaf = logits.nan_to_num(nan=0.5, posinf=1.0, neginf=-1.0).requires_grad_()
        assert gradcheck(weights, leaf)
        assert gradgradcheck(weights, leaf)
        leaf = logits.clone().requires_grad_()  # of absent experts and masked tokens: zero
        with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
            gradient = torch.autograd.grad((weights(leaf) * 3).square().sum(), leaf)[0]
        assert gradient.isfinite().all()
        assert (gradient[~(logits > -torch.inf)] == 0).all()
        assert mask is None or (gradient[~(mask > 0)] == 0).all()


def test_opcheck():
    # With a gradient test_aot_dispatch_dynamic cannot add up results of which an integer one comes
    # first; test_compile_and_export sees it.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for inputs in sample_inputs():
        torch.library.opcheck(ops.expert_choice, inputs)
        leaf = inputs[0].clone().requires_grad_()
        torch.library.opcheck(ops.expert_choice, (leaf, *inputs[1:]), test_utils=tests)


def test_compile_and_export(compiled):
    def objective(logits, mask):
        r = F.expert_choice(logits * 2, len(logits) // 2, mask)
        return r.token_weights.square().sum() + r.token_indices.sum()

    fast = compiled(objective)
    for tokens in (6, 9):
        inputs = (torch.randn(tokens, 4, requires_grad=True), torch.arange(tokens) > 1)
        want, got = objective(*inputs), fast(*inputs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            *(torch.autograd.grad(value, inputs[0])[0] for value in (got, want))
        )

    class Choose(torch.nn.Module):
        def forward(self, logits):
            return F.expert_choice(logits, 3)

    tokens = torch.export.Dim("tokens", min=4)
    exported = torch.export.export(Choose(), (torch.randn(5, 4),), dynamic_shapes=({0: tokens},))
    logits = torch.randn(11, 4)
    got = exported.module()(logits)
    assert isinstance(got, F.ExpertChoiceResult)
    assert torch.equal(got.token_indices, F.expert_choice(logits, 3).token_indices)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(logits=torch.tensor(1.0)), r"logits must have shape \[..., E\], got a scalar"),
        (dict(logits=torch.zeros(5, 0)), r"logits must have at least one expert .* got \[5, 0\]"),
        (dict(logits=torch.zeros(5, 3).long()), "logits must be float32, .* got Long"),
        (dict(capacity=-1), "capacity must be at least 0, got -1"),
        (dict(token_mask=torch.ones(4)), r"token_mask must have shape of logits .* = \[5\], got"),
        (dict(token_mask=torch.ones(5).long()), "token_mask must be bool or floating weights"),
        (dict(token_mask=torch.ones(5, device="meta")), "token_mask must be on the device of"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(RuntimeError, match=f"expert_choice: {message}"):
        F.expert_choice(**dict(logits=torch.zeros(5, 3), capacity=2) | change)

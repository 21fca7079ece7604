# SPDX-License-Identifier: Apache-2.0
"""balance_loss against formulas in plain PyTorch: from the sums, and end to end from logits."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = pytest.mark.usefixtures("backend")


def switch_by_hand(logits, top_k):
    """Fedus 2021, equations 4 to 6, with f over the K choices of a token so that it sums to 1."""
    experts = logits.size(-1)
    p = logits.softmax(-1)
    indices = logits.sort(dim=-1, descending=True, stable=True).indices[
        :, :top_k
    ]  # ties: lowest index
    chosen = torch.nn.functional.one_hot(indices, experts).sum(1).to(p.dtype)
    return experts * (chosen.mean(0) / top_k * p.mean(0)).sum()


def z_by_hand(logits):
    """ST-MoE, equation 5."""
    return logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens,experts,top_k", [(7, 4, 1), (33, 16, 4), (300, 64, 6)])
def test_values_and_gradients_from_logits(tokens, experts, top_k, dtype):
    logits = torch.randn(tokens, experts, dtype=torch.float64).to(dtype)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    report = F.balance_loss(F.topk_gating(ours, top_k), {"switch": 0.3, "z": 0.07})
    switch, z = switch_by_hand(exact, top_k), z_by_hand(exact)
    total = 0.3 * switch + 0.07 * z
    tight = dict(rtol=1e-12, atol=0) if dtype == torch.float64 else dict(rtol=2e-6, atol=0)
    coefficient = dict(rtol=1e-6, atol=0)  # coefficients are float32
    torch.testing.assert_close(report.unscaled["switch"].double(), switch, **tight)
    torch.testing.assert_close(report.unscaled["z"].double(), z, **tight)
    torch.testing.assert_close(
        report.total.double(), total, **(coefficient if dtype == torch.float64 else tight)
    )
    torch.testing.assert_close(report.scaled["z"].double(), 0.07 * z, rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad(report.total, ours)
    (want,) = torch.autograd.grad(total, exact)
    torch.testing.assert_close(
        got.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7
    )


def test_value_at_balance_and_at_collapse():
    balanced = F.topk_gating(torch.eye(4).repeat(3, 1), 1)
    torch.testing.assert_close(F.switch_loss(balanced), torch.tensor(1.0))
    collapsed = F.topk_gating(torch.tensor([[100.0, 0, 0, 0]]).repeat(5, 1), 1)
    torch.testing.assert_close(F.switch_loss(collapsed), torch.tensor(4.0))


def test_masked_tokens_are_left_out():
    logits, mask = torch.randn(10, 6), torch.arange(10) < 7
    losses = {"switch": 1.0, "z": 1.0}
    masked = F.balance_loss(F.topk_gating(logits, 2, token_mask=mask), losses)
    kept = F.balance_loss(F.topk_gating(logits[:7], 2), losses)
    torch.testing.assert_close(masked.total, kept.total)


def test_segments_are_added_up():
    x = torch.randn(12, 6).requires_grad_()
    whole = F.topk_gating(x, 2)
    cut = F.topk_gating(x, 2, segment_ids=torch.randint(0, 3, (12,)), num_segments=4)
    losses = {"switch": 0.1, "z": 0.01}
    torch.testing.assert_close(F.balance_loss(cut, losses), F.balance_loss(whole, losses))
    grads = [torch.autograd.grad(F.balance_loss(r, losses).total, x)[0] for r in (cut, whole)]
    torch.testing.assert_close(*grads)


def test_token_weights_count_as_repetitions():
    logits = torch.randn(4, 5)
    weighted = F.topk_gating(logits, 2, token_mask=torch.tensor([2.0, 0.0, 1.0, 3.0]))
    repeated = F.topk_gating(logits[[0, 0, 2, 3, 3, 3]], 2)
    torch.testing.assert_close(weighted.sums, repeated.sums)
    torch.testing.assert_close(F.switch_loss(weighted), F.switch_loss(repeated))


@pytest.mark.parametrize("tokens,experts", [(0, 4), (3, 1)])
def test_nothing_to_balance_is_zero(tokens, experts):
    logits = torch.randn(tokens, experts, requires_grad=True)
    r = F.topk_gating(logits, 1)
    loss = F.switch_loss(r)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_all_masked_is_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    r = F.topk_gating(logits, 2, token_mask=torch.zeros(3, dtype=torch.bool))
    total = F.balance_loss(r, {"switch": 1.0, "z": 1.0}).total
    total.backward()
    assert total.item() == 0 and (logits.grad == 0).all()


def test_dense_routing_leaves_switch_out():
    r = F.topk_gating(torch.randn(5, 3), 3)
    report = F.balance_loss(r, {"switch": 1.0, "z": 1.0})
    assert report.unscaled["switch"].item() == 0
    torch.testing.assert_close(report.total, F.z_loss(r))
    assert F.switch_loss(r).item() > 0.9  # the single function always computes


def test_gradcheck_and_gradgradcheck():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    for losses in ({"switch": 0.5}, {"z": 0.5}, {"z": 0.25, "switch": 2.0}):

        def total(logits, losses=losses):
            report = F.balance_loss(F.topk_gating(logits, 2), losses)
            return report.total, *report.unscaled.values()

        assert gradcheck(total, (logits,))
        assert gradgradcheck(total, (logits,))


def sums_of(dtype=torch.float32):
    return F.topk_gating(torch.randn(9, 5, dtype=dtype), 2).sums


def test_op_matches_the_reference():
    for dtype in (torch.float32, torch.float64):
        sums = sums_of(dtype)
        for names in (["switch"], ["z", "switch"], ["z", "z"]):
            coefficients = torch.rand(len(names))
            got = ops.balance_loss(sums, coefficients, names, 2)
            for a, b in zip(got, reference.balance_loss(sums, coefficients, names, 2), strict=True):
                torch.testing.assert_close(a, b)


def test_gradient_notices_changed_sums():
    """As after adding them up over processes, in place, when the loss was already taken."""
    routing = F.topk_gating(torch.randn(5, 4).requires_grad_(), 2)
    loss = F.balance_loss(routing, {"switch": 1.0}).total
    with torch.no_grad():
        routing.sums.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    coefficients = torch.tensor([0.1, 0.2])
    for requires_grad in (False, True):
        sums = sums_of().detach().requires_grad_(requires_grad)
        torch.library.opcheck(ops.balance_loss, (sums, coefficients, ["switch", "z"], 2))
        gradients = (
            torch.tensor(1.0, requires_grad=requires_grad),
            torch.ones(2, requires_grad=requires_grad),
        )
        torch.library.opcheck(
            ops.balance_loss_backward, (*gradients, sums.detach(), coefficients, [0, 1], 2)
        )


def test_a_scheduled_coefficient_does_not_recompile():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    def loss(logits, coefficient):
        return F.balance_loss(F.topk_gating(logits, 2), {"switch": coefficient, "z": 1e-3}).total

    torch._dynamo.reset()
    fast = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    logits = torch.randn(8, 4)
    for value in (0.1, 0.2, 0.3):
        torch.testing.assert_close(fast(logits, torch.tensor(value)), loss(logits, value))
    assert len(compilations) == 1


def test_compile_and_export(compiled):
    def loss(logits):
        return F.balance_loss(F.topk_gating(logits, 2), {"switch": 0.1, "z": 0.01}).total

    fast = compiled(loss)
    for tokens in (4, 7):
        x = torch.randn(tokens, 5, requires_grad=True)
        (got,), (want,) = torch.autograd.grad(fast(x), x), torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(got, want)

    class Loss(torch.nn.Module):
        def forward(self, logits):
            return loss(logits)

    exported = torch.export.export(Loss(), (torch.randn(5, 4),))
    logits = torch.randn(5, 4)
    torch.testing.assert_close(exported.module()(logits), loss(logits))


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    class Loss(torch.nn.Module):
        def forward(self, logits):
            return F.balance_loss(F.topk_gating(logits, 2), {"switch": 0.1, "z": 0.01}).total

    logits = torch.randn(5, 4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(Loss(), fullgraph=True)(logits), Loss()(logits))
    exported = torch.export.export(Loss(), (logits,))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "loss.pt2")
    )
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(logits), Loss()(logits))


@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input():
    r = F.topk_gating(torch.randn(4, 3), 1)
    with pytest.raises(
        RuntimeError, match="losses must be among 'switch' and 'z' in this version, got 'swich'"
    ):
        F.balance_loss(r, {"swich": 1.0})
    with pytest.raises(ValueError, match="the coefficient of 'z' must be >= 0, got -1.0"):
        F.balance_loss(r, {"z": -1.0})
    with pytest.raises(RuntimeError, match="coefficients must be >= 0, got -1"):
        F.balance_loss(r, {"z": torch.tensor(-1.0)})
    with pytest.raises(RuntimeError, match="RoutingResult has no statistics"):
        F.balance_loss(F.topk_gating(torch.randn(4, 3), 1, stats=False), {"z": 1.0})
    with pytest.raises(RuntimeError, match="coefficients must have shape"):
        ops.balance_loss(r.sums, torch.ones(2), ["z"], 1)
    with pytest.raises(RuntimeError, match="top_k must be from 1 to num_experts = 3, got 4"):
        ops.balance_loss(r.sums, torch.ones(1), ["z"], 4)
    with pytest.raises(RuntimeError, match="coefficients must not require a gradient"):
        ops.balance_loss(r.sums, torch.ones(1, requires_grad=True), ["z"], 1)
    with pytest.raises(RuntimeError, match="grad_total must be on the device of sums"):
        ops.balance_loss_backward(
            torch.ones((), device="meta"), None, r.sums, torch.ones(1), [0], 1
        )

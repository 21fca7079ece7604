# SPDX-License-Identifier: Apache-2.0
"""nn.BalanceLoss, and the critics nn.InfoNCE and nn.MINE."""

import copy
import math

import pytest
import torch

import equipoise.functional as F
from equipoise import nn, schedules


def test_balance_loss_of_several_layers(capsys):
    balance = nn.BalanceLoss({"switch": 0.1, "device": {"coeff": 0.2, "num_devices": 2}, "z": 0.01})
    routings = [F.topk_gating(torch.randn(9, 6, requires_grad=True), 2) for _ in range(3)]
    report = balance(routings)
    of_layer = [
        F.balance_loss(r, {"switch": 0.1, "device": {"coeff": 0.2, "num_devices": 2}, "z": 0.01})
        for r in routings
    ]
    torch.testing.assert_close(report.total, sum(r.total for r in of_layer))
    for name in ("switch", "device", "z"):
        torch.testing.assert_close(
            report.unscaled[name], sum(r.unscaled[name] for r in of_layer) / 3
        )
        torch.testing.assert_close(report.scaled[name], sum(r.scaled[name] for r in of_layer))
    assert report.total.requires_grad
    torch.testing.assert_close(balance(routings[0]).total, of_layer[0].total)
    printed = capsys.readouterr().out
    assert printed.count("equipoise: BalanceLoss(switch={coeff: 0.1}") == 1  # once, not per call
    assert "device={coeff: 0.2, num_devices: 2}" in printed


def test_coefficients_follow_a_schedule_in_one_compilation(compiled):
    balance = nn.BalanceLoss({"switch": 0.0})
    schedule = schedules.Warmup(0.4, 4)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    torch._dynamo.reset()
    fast = torch.compile(
        lambda logits: balance(F.topk_gating(logits, 2)).total, fullgraph=True, backend=backend
    )
    logits = torch.randn(8, 6)
    unscaled = F.switch_loss(F.topk_gating(logits, 2))
    for _ in range(3):
        schedule.step()
        balance.coefficients["switch"].copy_(schedule.value)
        torch.testing.assert_close(fast(logits), schedule.value * unscaled)
    assert len(compilations) == 1
    again = nn.BalanceLoss({"switch": 0.0})
    again.load_state_dict(balance.state_dict())
    torch.testing.assert_close(again.coefficients["switch"], schedule.value)
    assert copy.deepcopy(balance).options == balance.options


def test_balance_loss_bad_input():
    for losses, message in [
        ({}, "losses must name at least one loss, got none"),
        ({"switch": -1.0}, "the coefficient of 'switch' must be >= 0, got -1.0"),
        ({"z": {"coeff": 1.0, "of": "probs"}}, "'z' takes coeff, .*; got 'of'"),
    ]:
        with pytest.raises(ValueError, match=message):
            nn.BalanceLoss(losses)
    with pytest.raises(ValueError, match="routing must be of at least one layer, got none"):
        nn.BalanceLoss({"z": 1.0})([])


@pytest.mark.parametrize("make", [nn.InfoNCE, nn.MINE])
def test_a_trained_critic_finds_the_information(make):
    """Gates that follow from the inputs carry log 4 nats, independent ones none."""
    labels = torch.randint(0, 4, (64,))
    inputs = torch.nn.functional.one_hot(labels, 4).float()
    bounds = []
    for gates in (inputs[:, [1, 2, 3, 0]], inputs[torch.randperm(64)]):
        critic = make(input_dim=4, gate_dim=4)
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
        for _ in range(120):
            order = torch.randperm(64)
            optimizer.zero_grad()
            (-critic(inputs[order], gates[order])).backward()
            optimizer.step()
        with torch.no_grad():
            values = [critic(inputs[o], gates[o]) for o in (torch.randperm(64) for _ in range(20))]
        bounds.append(torch.stack(values).mean().item())
    dependent, independent = bounds
    assert 0.8 * math.log(4) < dependent < 1.1 * math.log(4)
    assert independent < 0.2 * math.log(4)


@pytest.mark.parametrize("make", [nn.InfoNCE, nn.MINE])
def test_critics_compile_and_refuse_bad_input(make, compiled):
    critic = make(input_dim=4, gate_dim=3)
    inputs, gates = torch.randn(6, 4), torch.rand(6, 3)
    torch.testing.assert_close(compiled(critic)(inputs, gates), critic(inputs, gates))
    with pytest.raises(ValueError, match=r"gates \[B, 3\] with B >= 1, got \[6, 4\] and \[5, 3\]"):
        critic(inputs, gates[:5])
    with pytest.raises(ValueError, match="gate_dim must be at least 1, got 0"):
        make(input_dim=4, gate_dim=0)


def test_infonce_refuses_a_temperature_of_zero():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        nn.InfoNCE(4, 3, temperature=0)

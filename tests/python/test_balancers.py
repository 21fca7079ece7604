# SPDX-License-Identifier: Apache-2.0
"""The loss-free balancer: its rule, and when it counts."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from equipoise import nn


def test_rule():
    balancer = nn.LossFreeBalancer(4, bias_update_rate=1e-3)
    bias = balancer.expert_bias
    balancer.record(torch.tensor([7, 0, 2, 3]))
    balancer.record(torch.tensor([0, 0, 1, 3]))  # a second micro-batch: 7, 0, 3, 6 of mean 4
    balancer.update()
    assert balancer.expert_bias is bias  # in place
    torch.testing.assert_close(bias, torch.tensor([-1e-3, 1e-3, 1e-3, -1e-3]))
    balancer.record(torch.tensor([2, 2, 2, 2]))
    balancer.update()
    balancer.update()  # nothing recorded: nothing to do
    torch.testing.assert_close(bias, torch.tensor([-1e-3, 1e-3, 1e-3, -1e-3]))
    assert balancer.tokens_per_expert.tolist() == [0, 0, 0, 0]


def test_the_mean_is_compared_exactly():
    """In float32 the mean of these counts, 2^24 + 1/2, would round to the first count."""
    balancer = nn.LossFreeBalancer(2, bias_update_rate=1.0)
    balancer.record(torch.tensor([2**24, 2**24 + 1]))
    balancer.update()
    assert balancer.expert_bias.tolist() == [1.0, -1.0]


def test_center():
    balancer = nn.LossFreeBalancer(4, bias_update_rate=0.1, center=True)
    for _ in range(5):
        balancer.record(torch.tensor([97, 1, 1, 1]))
        balancer.update()
    torch.testing.assert_close(balancer.expert_bias, torch.tensor([-0.75, 0.25, 0.25, 0.25]))


def test_bias_stays_float32_and_keeps_its_bits():
    router = nn.TopKRouter(8, 4, 2, balancer=nn.LossFreeBalancer(4))
    bias = torch.tensor([1.001, -0.3, 1e-7, 0.0])
    router.balancer.expert_bias.copy_(bias)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        router.to(cast)
        assert router.weight.dtype == cast
        assert router.balancer.expert_bias.dtype == torch.float32
        assert torch.equal(router.balancer.expert_bias, bias)
    router.to(torch.bfloat16)(torch.randn(6, 8, dtype=torch.bfloat16))
    assert "expert_bias" in dict(router.balancer.named_buffers())  # still a buffer
    assert router.balancer.tokens_per_expert.sum() == 12


def test_state_dict():
    balancer = nn.LossFreeBalancer(4)
    balancer.record(torch.tensor([9, 0, 0, 0]))
    balancer.update()
    other = nn.LossFreeBalancer(4)
    other.load_state_dict(balancer.state_dict())
    assert torch.equal(other.expert_bias, balancer.expert_bias)
    assert list(balancer.state_dict()) == ["expert_bias"]


def test_counts_only_tokens_that_are_learnt_from():
    router = nn.TopKRouter(8, 4, 2, balancer=nn.LossFreeBalancer(4))
    x = torch.randn(10, 8)
    router.eval()
    router(x)
    router.train()
    with torch.no_grad():
        router(x)
    assert router.balancer.tokens_per_expert.sum() == 0
    router(x)
    assert router.balancer.tokens_per_expert.sum() == 20


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_once(use_reentrant):
    router = nn.TopKRouter(8, 4, 2, balancer=nn.LossFreeBalancer(4))
    layer = nn.MoELayer(8, 16, 4, 2, router=router)
    x = torch.randn(10, 8, requires_grad=True)
    plain, _ = layer(x)
    counts = router.balancer.tokens_per_expert.clone()
    router.balancer.tokens_per_expert.zero_()
    y = checkpoint(lambda x: layer(x)[0].sin(), x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert torch.equal(router.balancer.tokens_per_expert, counts)
    torch.testing.assert_close(y, plain.sin())


def test_balances():
    """Tokens that all prefer expert 0 are spread after some steps."""
    balancer = nn.LossFreeBalancer(4, bias_update_rate=0.02)
    router = nn.TopKRouter(4, 4, 1, balancer=balancer)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.randn(400, 4)
    x[:, 0] += 1.5
    first = router(x).tokens_per_expert
    for _ in range(100):
        balancer.update()
        last = router(x).tokens_per_expert
    assert first.max() > 240 and last.max() < 130 and last.min() > 70


RANK = """
import sys, torch
from equipoise import nn
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
balancer = nn.LossFreeBalancer(3, bias_update_rate=1.0)
balancer.record(torch.tensor([[9, 1, 2], [0, 1, 2]][rank]))  # together 9, 2, 4 of mean 5
balancer.update(group=torch.distributed.group.WORLD)
torch.distributed.destroy_process_group()
print(balancer.expert_bias.tolist())
"""


def test_ranks_make_the_same_step(tmp_path):
    store = (tmp_path / "store").as_uri()
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), store], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == [b"[-1.0, 1.0, 1.0]\n"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": 4, "bias_update_rate": -1.0}, "bias_update_rate must not be negative"),
        ({"num_experts": 4, "mode": "proportional"}, "mode must be 'sign', got 'proportional'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        nn.LossFreeBalancer(**options)

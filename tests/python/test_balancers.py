# SPDX-License-Identifier: Apache-2.0
"""The balancers: their rules, when they count, and what becomes of the loads."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from equipoise import functional as F
from equipoise import metrics, nn

BALANCERS = {
    "sign": lambda: nn.LossFreeBalancer(4),
    "proportional": lambda: nn.LossFreeBalancer(4, mode="proportional", center=True),
    "quantile": lambda: nn.LossFreeBalancer(4, mode="quantile", target_shares=[1, 2, 3, 4]),
    "ema": lambda: nn.EMABalancer(4),
    "dynamic": lambda: nn.DynamicExperts(4, patience=1, min_experts=2),
}
every_balancer = pytest.mark.parametrize("make", BALANCERS.values(), ids=BALANCERS)


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


def test_proportional_rule():
    balancer = nn.LossFreeBalancer(4, bias_update_rate=0.1, mode="proportional")
    balancer.record(torch.tensor([7, 0, 3, 6]))  # of mean 4
    balancer.update()
    torch.testing.assert_close(balancer.expert_bias, torch.tensor([-0.075, 0.1, 0.025, -0.05]))


@pytest.mark.parametrize(
    ("mode", "bias"), [("sign", [1, -1, 0, 0]), ("proportional", [0.5, -1, 0, 0])]
)
def test_target_shares(mode, bias):
    balancer = nn.LossFreeBalancer(4, 1.0, mode=mode, target_shares=torch.tensor([4, 2, 1, 1]))
    balancer.record(torch.tensor([2, 4, 1, 1]))
    balancer.update()
    assert balancer.expert_bias.tolist() == bias
    assert balancer.target_shares.tolist() == [0.5, 0.25, 0.125, 0.125]
    balancer.to(torch.bfloat16)
    assert balancer.target_shares.dtype == torch.float64
    balancer.reset_parameters()
    assert balancer.target_shares.tolist() == [0.5, 0.25, 0.125, 0.125]
    assert balancer.expert_bias.count_nonzero() == 0


def test_equal_target_shares_are_the_exact_rule():
    balancer = nn.LossFreeBalancer(3, 1.0, target_shares=[0.1, 0.1, 0.1])
    balancer.record(torch.tensor([2**60, 2**60, 2**60 + 3]))
    balancer.update()
    assert balancer.expert_bias.tolist() == [1.0, 1.0, -1.0]


def test_ema_rule():
    """Against the definition: the average first, the bias of it then."""
    balancer = nn.EMABalancer(4, balancing_strength=0.3, beta=0.8)
    average = torch.full((4,), 0.25, dtype=torch.float64)
    for counts in ([9, 5, 5, 1], [0, 0, 7, 1], [4, 4, 4, 4]):
        balancer.record(torch.tensor(counts))
        balancer.update()
        share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        average = 0.8 * average + 0.2 * share
        want = -0.3 * (4 * average - 1)
        torch.testing.assert_close(balancer.expert_bias.double(), want, rtol=1e-6, atol=1e-7)
    before = balancer.expert_bias.clone()
    balancer.update()  # nothing recorded: nothing to average
    assert torch.equal(balancer.expert_bias, before)


def biased_margin(scores, bias, top_k):
    """s - a, with a the (K+1)-th largest biased score of each token."""
    biased = scores + bias
    return scores - biased.topk(top_k + 1, dim=1).values[:, -1:]


def test_quantile_rule():
    """From a bias, too: as many margins as there should be tokens are above -b, half-way."""
    num_tokens, num_experts, top_k = 60, 6, 2
    for shares in (None, [1, 2, 3, 1, 2, 1]):
        balancer = nn.LossFreeBalancer(6, mode="quantile", target_shares=shares)
        balancer.expert_bias.uniform_(-0.1, 0.1)
        scores = torch.rand(num_tokens, num_experts) - 2
        scores[:10, 2] = scores[10:15, 4] = float("-inf")  # absent
        margin = biased_margin(scores, balancer.expert_bias, top_k)
        chosen = (scores + balancer.expert_bias).topk(top_k).indices
        counts = F.expert_bincount(chosen, num_experts)
        want = (balancer.target_shares * num_tokens * top_k).round().long()
        masked = torch.full((5, num_experts), float("-inf"))
        recorded = torch.cat([scores, masked])
        recorded[12:62] = recorded[12:62].nan_to_num(neginf=float("nan"))  # NaN says the same
        balancer.record(counts, scores=recorded.reshape(5, 13, num_experts))
        balancer.update()
        # The (K+1)-th itself has the margin -b of before: equal ones count half.
        assert ((margin > -balancer.expert_bias).sum(0) <= want).all()
        assert ((margin >= -balancer.expert_bias).sum(0) >= want).all()
        ranked = margin.sort(0, descending=True).values
        middle = [(ranked[n - 1, e] + ranked[n, e]).item() / 2 for e, n in enumerate(want.tolist())]
        torch.testing.assert_close(-balancer.expert_bias, torch.tensor(middle))


def test_quantiles_are_averaged_by_tokens():
    parts = [torch.rand(30, 4), torch.rand(90, 4)]
    counts = [torch.tensor([30, 30, 0, 0]), torch.tensor([90, 30, 30, 30])]  # top 2
    alone = []
    for part, count in zip(parts, counts, strict=True):
        balancer = nn.LossFreeBalancer(4, mode="quantile")
        balancer.record(count, scores=part)
        balancer.update()
        alone.append(balancer.expert_bias)
    balancer = nn.LossFreeBalancer(4, mode="quantile")
    for part, count in zip(parts, counts, strict=True):
        balancer.record(count, scores=part)
    balancer.update()
    torch.testing.assert_close(balancer.expert_bias, 0.25 * alone[0] + 0.75 * alone[1])
    before = balancer.expert_bias.clone()
    balancer.update()  # nothing recorded
    balancer.record(torch.zeros(4, dtype=torch.int64), scores=torch.rand(0, 4))
    balancer.update()
    balancer.record(torch.zeros(4, dtype=torch.int64), scores=torch.full((3, 4), float("-inf")))
    balancer.update()
    assert torch.equal(balancer.expert_bias, before)


def test_quantile_shares_out_among_present_experts():
    balancer = nn.LossFreeBalancer(4, mode="quantile")
    scores = torch.rand(60, 4)
    scores[:, 1] = float("-inf")
    for _ in range(20):
        chosen = (scores + balancer.expert_bias).topk(1).indices
        counts = F.expert_bincount(chosen, 4)
        balancer.record(counts, scores=scores)
        balancer.update()
    assert balancer.expert_bias[1] == 0 and balancer.expert_bias.abs().max() < 1
    assert counts[1] == 0 and counts.max() <= 23


def skewed(balancer, num_updates, num_tokens=4096):
    """Counts [updates, E] of a router with fixed skewed logits and noise: top 2 of 16, sigmoid."""
    preferred = torch.linspace(2, -2, 16)
    counts = []
    for _ in range(num_updates):
        logits = preferred + torch.randn(num_tokens, 16, requires_grad=True)
        routing = F.topk_gating(
            logits, 2, score_function="sigmoid", expert_bias=balancer.expert_bias
        )
        balancer.record(routing.tokens_per_expert, scores=logits.sigmoid())
        balancer.update()
        counts.append(routing.tokens_per_expert)
    return torch.stack(counts)


@pytest.mark.parametrize(
    ("make", "num_updates"),
    [
        (lambda: nn.LossFreeBalancer(16, bias_update_rate=1e-2), 80),
        (lambda: nn.LossFreeBalancer(16, bias_update_rate=2e-2, mode="proportional"), 80),
        (lambda: nn.LossFreeBalancer(16, mode="quantile"), 6),
        (lambda: nn.EMABalancer(16, balancing_strength=4.0, beta=0.99), 80),
    ],
    ids=["sign", "proportional", "quantile", "ema"],
)
def test_skewed_router_is_balanced(make, num_updates):
    max_vio = metrics.load_metrics(skewed(make(), num_updates))["max_vio"]
    assert max_vio[0] > 3
    assert max_vio[-3:].max() < 0.3


@pytest.mark.parametrize("mode", ["sign", "proportional"])
def test_too_large_a_rate_oscillates(mode):
    """Experts are full and empty by turns, to the end; a twentieth of the rate comes to rest."""
    counts = skewed(nn.LossFreeBalancer(16, bias_update_rate=0.4, mode=mode), 60)[-20:]
    assert metrics.load_metrics(counts)["max_vio"].min() > 1
    swings = (counts[1:] - counts[:-1]).abs().amax(1) / counts.double().mean()
    assert swings.min() > 1  # from one update to the next, more than a fair share
    counts = skewed(nn.LossFreeBalancer(16, bias_update_rate=0.02, mode=mode), 120)[-20:]
    assert metrics.load_metrics(counts)["max_vio"].max() < 0.7


def test_target_shares_are_reached():
    shares = torch.tensor([3.0] * 4 + [1.0] * 12)
    for mode, num_updates in (("proportional", 80), ("quantile", 8)):
        balancer = nn.LossFreeBalancer(16, 2e-2, mode=mode, target_shares=shares)
        counts = skewed(balancer, num_updates)[-1]
        torch.testing.assert_close(counts / counts.sum(), shares / 24, rtol=0.3, atol=0)


@pytest.mark.parametrize(
    ("make", "bias"),
    [
        (lambda: nn.LossFreeBalancer(4, 0.5), [-0.5, 0.0, 0.5, 0.25]),
        (lambda: nn.LossFreeBalancer(4, 0.5, target_shares=[1, 1, 1, 9]), [-0.5, 0.0, 0.5, 0.25]),
        (lambda: nn.LossFreeBalancer(4, 0.5, "proportional"), [-0.5, 0.0, 0.5, 0.25]),
        (lambda: nn.EMABalancer(4, 1.0, beta=0.5), [-0.5, 0.0, 0.5, 0.25]),
    ],
)
def test_inactive_experts_are_left_alone(make, bias):
    """Two fair shares, one and none of three; the fourth is out and keeps its bias."""
    balancer = make()
    balancer.expert_bias[3] = 0.25
    balancer.record(torch.tensor([8, 4, 0, 0]))
    balancer.update(active_experts=torch.tensor([True, True, True, False]))
    assert balancer.expert_bias.tolist() == bias


def updates(dynamic, *steps):
    """The active experts after each update, as strings like "110"."""
    states = []
    for counts in steps:
        dynamic.record(torch.tensor(counts))
        dynamic.update()
        states.append("".join(str(int(active)) for active in dynamic.active_experts))
    return states


def test_unused_experts_go():
    dynamic = nn.DynamicExperts(4, patience=3, min_experts=2)
    active = dynamic.active_experts
    low, used = [36, 30, 33, 1], [30, 30, 30, 10]
    assert updates(dynamic, low, low, used, low, low, low) == ["1111"] * 5 + ["1110"]
    assert dynamic.active_experts is active  # in place
    # Fair shares are those of three experts now: 20 of 200 is below a tenth of 200 / 3 no more.
    assert updates(dynamic, *[[90, 90, 20, 0]] * 4) == ["1110"] * 4
    assert updates(dynamic, *[[99, 99, 2, 0]] * 3) == ["1110", "1110", "1100"]
    assert updates(dynamic, *[[99, 1, 0, 0]] * 4) == ["1100"] * 4  # min_experts


def test_the_emptiest_go_first():
    dynamic = nn.DynamicExperts(5, prune_below=0.5, patience=1, min_experts=3)
    assert updates(dynamic, [50, 2, 1, 3, 44]) == ["10011"]
    dynamic = nn.DynamicExperts(5, prune_below=0.5, patience=1, min_experts=3)
    assert updates(dynamic, [50, 1, 1, 1, 47]) == ["10011"]  # ties: the lowest


def test_experts_come_back():
    dynamic = nn.DynamicExperts(5, prune_below=0.2, grow_above=1.5, patience=2, min_experts=2)
    assert updates(dynamic, [25, 25, 25, 0, 25], [25, 25, 25, 0, 25])[-1] == "11101"
    assert updates(dynamic, [50, 0, 50, 0, 50], [50, 0, 50, 0, 50])[-1] == "10101"
    crowded, even = [80, 0, 10, 0, 10], [34, 0, 33, 0, 33]
    states = updates(dynamic, crowded, even, crowded, crowded)
    assert states == ["10101", "10101", "10101", "10111"]  # expert 3 has been out for longer
    assert updates(dynamic, *[[70, 0, 10, 10, 10]] * 2) == ["10111", "11111"]  # one at a time


def test_dynamic_experts_survive_casts_and_state_dict():
    dynamic = nn.DynamicExperts(4, patience=2, min_experts=1)
    updates(dynamic, [9, 9, 9, 0])
    dynamic.to(torch.bfloat16)
    other = nn.DynamicExperts(4, patience=2, min_experts=1)
    other.load_state_dict(dynamic.state_dict())
    assert updates(other, [9, 9, 9, 0]) == updates(dynamic, [9, 9, 9, 0]) == ["1110"]
    dynamic.update()  # nothing recorded
    assert dynamic.active_experts.sum() == 3 and dynamic.updates_waited.tolist() == [0, 0, 0, 0]
    dynamic.reset_parameters()
    assert dynamic.active_experts.all()


@every_balancer
def test_update_before_any_forward(make):
    balancer = make()
    counts, scores = torch.tensor([1, 1, 0, 0]), torch.rand(2, 4)
    balancer.eval().record(counts, scores=scores)
    with torch.no_grad():
        balancer.train().record(counts, scores=scores)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"update\(\) before any recorded forward pass"):
            balancer.update()
    balancer.record(counts, scores=scores)
    balancer.update()
    before = {name: buffer.clone() for name, buffer in balancer.named_buffers()}
    balancer.update()  # nothing recorded since: no error, and no change
    for name, buffer in balancer.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=1e-8)
    balancer.reset_parameters()
    with pytest.raises(RuntimeError, match="before any recorded forward pass"):
        balancer.update()


@every_balancer
def test_compiled(make, compiled):
    """In one graph, once for all steps, and the same buffers as without."""
    plain, balancer = make(), make()
    record = compiled(lambda counts, scores: balancer.record(counts, scores=scores))
    update = torch.compile(balancer.update, fullgraph=True, backend="aot_eager")
    for step in range(4):
        scores = torch.rand(20 + step, 4)
        counts = F.expert_bincount(scores.topk(2).indices, 4)
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            record(counts, scores)
            update()
        plain.record(counts, scores=scores)
        plain.update()
        for got, want in zip(balancer.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(got, want)
    fresh = make()
    torch.compile(fresh.record, fullgraph=True, backend="aot_eager")(counts, scores)
    fresh.update()  # the compiled pass has said that there was one


@every_balancer
def test_nothing_waits_for_the_device(make):
    """The meta device has no values: asking for one is an error there."""
    balancer = make().to("meta")
    counts, scores = torch.zeros(4, dtype=torch.int64), torch.rand(9, 4)
    for _ in range(2):
        balancer.record(counts.to("meta"), scores=scores.to("meta"))
        balancer.update()


def test_counts_of_segments():
    balancer = nn.LossFreeBalancer(2)
    balancer.record(torch.tensor([[3, 1], [1, 0]]))
    assert balancer.tokens_per_expert.tolist() == [4, 1]


RANK = """
import sys, torch
from equipoise import nn
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
world = torch.distributed.group.WORLD
balancer = nn.LossFreeBalancer(3, bias_update_rate=1.0)
balancer.record(torch.tensor([[9, 1, 2], [0, 1, 2]][rank]))  # together 9, 2, 4 of mean 5
balancer.update(group=world)
print(balancer.expert_bias.tolist())
balancer = nn.LossFreeBalancer(3, mode="quantile")
scores = torch.tensor([[[0.9, 0.1, 0.5]], [[0.9, 0.3, 0.1]]][rank])
balancer.record(torch.tensor([1, 0, 0]), scores=scores)
balancer.update(group=world)
print([round(bias, 4) for bias in balancer.expert_bias.tolist()])
balancer = nn.EMABalancer(2)
try:
    balancer.update(group=world)  # nobody has recorded: both raise
except RuntimeError as error:
    print(str(error)[:21])
if rank == 0:
    balancer.record(torch.tensor([6, 2]))
balancer.update(group=world)  # one has: none raises
print(round(balancer.expert_bias[1].item(), 4))
torch.distributed.destroy_process_group()
"""


def test_ranks_make_the_same_step(tmp_path):
    store = (tmp_path / "store").as_uri()
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), store], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0].decode().splitlines() for rank in ranks]
    # Thresholds .5 and .3: margins (.4, -.4, 0) and (.6, 0, -.2); their means are minus the bias.
    want = ["[-1.0, 1.0, 1.0]", "[-0.5, 0.2, 0.1]", "EMABalancer: update()", "0.0025"]
    assert printed == [want] * 2


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.LossFreeBalancer, {"num_experts": 0}, "num_experts must be at least 1, got 0"),
        (nn.LossFreeBalancer, {"bias_update_rate": -1.0}, "bias_update_rate must not be negative"),
        (nn.LossFreeBalancer, {"mode": "no"}, "one of sign, proportional, quantile, got 'no'"),
        (nn.LossFreeBalancer, {"target_shares": [1, 2]}, "target_shares must be 4 finite numbers"),
        (nn.LossFreeBalancer, {"target_shares": [1, 2, 0, 1]}, "target_shares must be 4 finite"),
        (nn.EMABalancer, {"balancing_strength": -1.0}, "balancing_strength must not be negative"),
        (nn.EMABalancer, {"beta": 1.0}, "beta must be at least 0 and below 1, got 1.0"),
        (nn.DynamicExperts, {"prune_below": 1.0}, "prune_below must be at least 0 and below 1"),
        (nn.DynamicExperts, {"grow_above": 1.0}, "grow_above must be above 1, got 1.0"),
        (nn.DynamicExperts, {"patience": 0}, "patience must be at least 1, got 0"),
        (nn.DynamicExperts, {"min_experts": 5}, "between 1 and num_experts = 4, got 5"),
    ],
)
def test_bad_arguments(module, options, message):
    required = {"num_experts": 4} | ({"min_experts": 1} if module is nn.DynamicExperts else {})
    with pytest.raises(ValueError, match=f"^{module.__name__}: .*{message}"):
        module(**(required | options))


def test_bad_records():
    balancer = nn.LossFreeBalancer(4, mode="quantile")
    counts = torch.tensor([1, 1, 0, 0])
    for bad in (counts[:1], counts[0]):  # the first would be spread over all experts
        with pytest.raises(ValueError, match=r"tokens_per_expert must have shape \[..., E\]"):
            balancer.record(bad, scores=torch.rand(2, 4))
    with pytest.raises(ValueError, match="mode='quantile' needs the scores"):
        balancer.record(counts)
    with pytest.raises(ValueError, match=r"scores must have shape \[..., E\] = \[..., 4\], got"):
        balancer.record(counts, scores=torch.rand(2, 5))
    assert balancer.tokens_per_expert.sum() == 0
    balancer.record(counts, scores=torch.rand(2, 4))
    for bad in (torch.ones(4), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"active_experts must be bool of shape \[4\], got"):
            balancer.update(active_experts=bad)

# SPDX-License-Identifier: Apache-2.0
"""Balance over ranks and over micro-batches, on gloo processes."""

import datetime
import multiprocessing
import os
import tempfile

import pytest
import torch
import torch.distributed as dist

import equipoise.functional as F
from equipoise import distributed

EXPERTS, TOP_K = 6, 2
LOSSES = {
    "switch": 0.3,
    "device": {"coeff": 0.2, "num_devices": 3},
    "importance": 0.1,
    "z": 0.01,
    "uniform_kl": 0.4,
    "entropy": 0.5,
    "variance": 2.0,
    "mutual_information": 0.1,
    "token_entropy": 0.02,
}


def everywhere(scope):
    """LOSSES with that scope."""
    return {
        name: {**(value if isinstance(value, dict) else {"coeff": value}), "scope": scope}
        for name, value in LOSSES.items()
    }


def tokens_of(rank, world):
    """Unequal parts of one batch of inputs."""
    inputs = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sizes = [24 // world + (1 if r % 2 else -1) for r in range(world)]
    return inputs.split(sizes)[rank] if rank is not None else inputs


def router():
    weight = torch.randn(
        EXPERTS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    return torch.nn.Parameter(weight)


def run_ranks(function, world, timeout=60, dies=None):
    """Runs function(rank, world) on `world` gloo processes; what they returned, by rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (function, world, os.path.join(directory, "store"), timeout, results)
        processes = [
            context.Process(target=start_rank, args=(rank, *arguments)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        answers = dict(results.get(timeout=120) for rank in range(world) if rank != dies)
        for process in processes:
            process.join(60)
            assert process.exitcode is not None
    return answers


def start_rank(rank, function, world, store, timeout, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        answer = function(rank, world)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    results.put((rank, answer))
    if not isinstance(answer, str):
        dist.destroy_process_group()


def loss_on_a_rank(rank, world):
    """Under DistributedDataParallel, which takes the mean of the gradients."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = router()

        def forward(self, x):
            return F.balance_loss(F.topk_gating(x @ self.weight.T, TOP_K), everywhere("global"))

    model = torch.nn.parallel.DistributedDataParallel(Model())
    report = model(tokens_of(rank, world))
    report.total.backward()
    return report.total.item(), model.module.weight.grad.tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_global_scope_is_exact(world):
    weight = router()
    routing = F.topk_gating(tokens_of(None, world) @ weight.T, TOP_K)
    total = F.balance_loss(routing, LOSSES).total
    total.backward()
    for value, grad in run_ranks(loss_on_a_rank, world).values():
        torch.testing.assert_close(value, total.item(), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            torch.tensor(grad, dtype=torch.float64), weight.grad, rtol=1e-10, atol=1e-14
        )


def accumulate_on_a_rank(rank, world):
    """Micro-batches kept until the last forward; gradients of all ranks added up by hand."""
    weight = router()
    parts = [F.topk_gating(x @ weight.T, TOP_K) for x in tokens_of(rank, world).split(4)]
    together = F.concatenate_routings(parts)
    sums = distributed.sum_over_ranks(together.sums, gradients="sum")
    losses = {name: value for name, value in LOSSES.items() if name != "importance"}
    total = F.balance_loss(together._replace(sums=sums), losses).total
    total.backward()
    distributed.all_reduce_sum(weight.grad)
    return total.item(), weight.grad.tolist()


def test_accumulated_micro_batches_of_two_ranks_are_exact():
    weight = router()
    losses = {name: value for name, value in LOSSES.items() if name != "importance"}
    total = F.balance_loss(F.topk_gating(tokens_of(None, 2) @ weight.T, TOP_K), losses).total
    total.backward()
    for value, grad in run_ranks(accumulate_on_a_rank, 2).values():
        torch.testing.assert_close(value, total.item(), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            torch.tensor(grad, dtype=torch.float64), weight.grad, rtol=1e-10, atol=1e-14
        )


def die_on_one_rank(rank, world):
    if rank == 1:
        os._exit(1)
    routing = F.topk_gating(torch.randn(4, EXPERTS), TOP_K)
    return F.switch_loss(routing, scope="global").item()


def test_a_rank_that_dies_fails_the_others():
    (answer,) = run_ranks(die_on_one_rank, 2, timeout=20, dies=1).values()
    assert "RuntimeError" in answer and "a rank has died or is later than the timeout" in answer


def leave_a_rank_out(rank, world):
    group = dist.new_group([0])
    return distributed.sum_over_ranks(torch.ones(1), group).item()


def test_a_rank_outside_of_the_group_is_refused():
    answers = run_ranks(leave_a_rank_out, 2)
    assert answers[0] == 1.0
    assert "ValueError" in answers[1] and "group must have this rank as a member" in answers[1]


def test_without_a_process_group_there_is_one_rank():
    r = F.topk_gating(torch.randn(9, EXPERTS), TOP_K)
    torch.testing.assert_close(
        F.balance_loss(r, everywhere("global")).total, F.balance_loss(r, LOSSES).total
    )
    with pytest.raises(ValueError, match="gradients must be 'mean' or 'sum', got 'max'"):
        distributed.sum_over_ranks(r.sums, gradients="max")


def test_activation_checkpointing_changes_nothing():
    logits = torch.randn(9, EXPERTS, dtype=torch.float64, requires_grad=True)

    def loss(logits):
        return F.balance_loss(F.topk_gating(logits, TOP_K), LOSSES).total

    for reentrant in (False, True):
        again = torch.utils.checkpoint.checkpoint(loss, logits, use_reentrant=reentrant)
        torch.testing.assert_close(again, loss(logits), rtol=0, atol=0)
        grads = [torch.autograd.grad(t, logits, retain_graph=True) for t in (loss(logits),)]
        again.backward()
        torch.testing.assert_close(logits.grad, grads[0][0], rtol=0, atol=0)
        logits.grad = None


def test_running_sums():
    """The value is that of all tokens so far; the gradient is that of the last ones alone."""
    logits = torch.randn(12, EXPERTS, dtype=torch.float64, requires_grad=True)
    running = distributed.RunningSums()
    for begin in (0, 4, 8):
        routing = running.add(F.topk_gating(logits[begin : begin + 4], TOP_K))
        so_far = F.topk_gating(logits[: begin + 4], TOP_K)
        got, want = F.switch_loss(routing), F.switch_loss(so_far)
        torch.testing.assert_close(got, want)
        (grad,) = torch.autograd.grad(got, logits)
        (exact,) = torch.autograd.grad(want, logits)
        torch.testing.assert_close(grad[begin : begin + 4], exact[begin : begin + 4])
        assert not grad[:begin].any()
    running.reset()
    first = F.topk_gating(logits[:4], TOP_K)
    torch.testing.assert_close(F.switch_loss(running.add(first)), F.switch_loss(first))

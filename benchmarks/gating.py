# SPDX-License-Identifier: Apache-2.0
"""Gating on the CPU, side by side: what a router computes for one layer, forward and backward.

Every contestant returns (topk_weights, topk_indices, tokens_per_expert, mean_prob) of the same
logits: softmax, top-k, renormalised weights, counts, mean probability. Each is checked against
float64 before it is timed. They take turns in random order; a cell is the median of the rounds.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import equipoise
import equipoise.functional as F

SIZES = [(1, 128, 8), (512, 128, 8), (4096, 8, 2), (4096, 64, 6), (4096, 128, 8), (4096, 256, 8)]
HEADLINE = (1, torch.float32, (4096, 128, 8), "forward")
SAMPLE_SECONDS = 4e-3  # short calls are repeated until a sample lasts this long

Gate = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]


def eager(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prob = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, indices = torch.topk(prob, top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    counts = torch.bincount(indices.flatten(), minlength=logits.shape[-1])
    return weights, indices, counts, prob.mean(dim=0)


def fused(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r = F.topk_gating(logits, top_k, norm_topk_prob=True)
    return r.topk_weights, r.topk_indices, r.tokens_per_expert, r.prob_sum / logits.shape[0]


def forward(gate: Gate, logits: Tensor, top_k: int, pull: Tensor) -> object:
    with torch.no_grad():
        return gate(logits, top_k)


def forward_backward(gate: Gate, logits: Tensor, top_k: int, pull: Tensor) -> Tensor:
    """Gradient of the experts' pull on the weights and of the Switch loss."""
    weights, _, counts, mean_prob = gate(logits, top_k)
    share = counts / (logits.shape[0] * top_k)
    loss = (weights * pull).sum() + 1e-2 * logits.shape[1] * (share * mean_prob).sum()
    return torch.autograd.grad(loss, logits)[0]


def check(name: str, gate: Gate, logits: Tensor, top_k: int, pull: Tensor) -> None:
    """Against float64. Where logits tie, any of the tied experts is right."""
    num_tokens, num_experts = logits.shape
    exact = logits.detach().double().requires_grad_()
    weights, indices, counts, mean_prob = gate(logits, top_k)
    close = torch.testing.assert_close
    best = exact.topk(top_k).values
    chosen = exact.gather(1, indices)
    close(chosen, best, rtol=0, atol=1e-5, msg=lambda m: f"{name}: not the best experts: {m}")
    prob = exact.softmax(dim=-1)
    want = prob.gather(1, indices)
    want = want / want.sum(dim=-1, keepdim=True)
    close(weights.double(), want, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: weights: {m}")
    hits = torch.zeros_like(prob).scatter_(1, indices, 1).sum(0).long()
    close(counts, hits, msg=lambda m: f"{name}: counts: {m}")
    close(
        mean_prob.double(), prob.mean(0), rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: mean: {m}"
    )
    share = hits / (num_tokens * top_k)
    loss = (want * pull).sum() + 1e-2 * num_experts * (share * prob.mean(0)).sum()
    want_grad = torch.autograd.grad(loss, exact)[0]
    grad = forward_backward(gate, logits, top_k, pull).double()
    tolerance = 2e-2 if logits.dtype == torch.bfloat16 else 1e-4
    scale = want_grad.abs().max().item()
    close(
        grad, want_grad, rtol=tolerance, atol=1e-2 * tolerance * scale,
        msg=lambda m: f"{name}: gradient: {m}",
    )  # fmt: skip


def sample(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    repeats = {}
    for name, call in calls.items():
        sample(call, 3)  # warm up
        repeats[name] = max(1, round(SAMPLE_SECONDS / sample(call, 3)))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            times[name].append(sample(calls[name], repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=21, help="samples per cell (%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="also torch.compile of eager")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    gates = {"eager": eager, "equipoise": fused}
    if args.compile:
        gates["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    others = [name for name in gates if name != "equipoise"]
    print(
        f"equipoise {equipoise.__version__}, torch {torch.__version__}, {platform.machine()} with "
        f"{torch.backends.cpu.get_cpu_capability()}; microseconds per call, median of {args.rounds}"
    )
    print(
        f"{'threads':>7} {'dtype':>8} {'T':>5} {'E':>4} {'K':>3} {'pass':>16} "
        + "".join(f"{name:>11}" for name in gates)
        + f" {'ns/token':>9}"
        + "".join(f" {name + ' / equipoise':>20}" for name in others)
    )
    headline = None
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in (getattr(torch, name) for name in args.dtypes):
            for size in SIZES:
                num_tokens, num_experts, top_k = size
                torch.compiler.reset()  # one size at a time, not a row of recompilations
                logits = torch.randn(num_tokens, num_experts).to(dtype).requires_grad_()
                pull = torch.randn(num_tokens, top_k)
                for name, gate in gates.items():
                    check(name, gate, logits, top_k, pull)
                for run in (forward, forward_backward):
                    calls = {
                        name: lambda gate=gate, run=run: run(gate, logits, top_k, pull)  # noqa: B023
                        for name, gate in gates.items()
                    }
                    took = medians(calls, args.rounds)
                    ours = took["equipoise"]
                    label = run.__name__.replace("_", "+")
                    print(
                        f"{threads:>7} {str(dtype)[6:]:>8} {num_tokens:>5} {num_experts:>4} "
                        f"{top_k:>3} {label:>16} "
                        + "".join(f"{took[name] * 1e6:>11.1f}" for name in gates)
                        + f" {ours / num_tokens * 1e9:>9.0f}"
                        + "".join(f" {took[name] / ours:>19.1f}x" for name in others),
                        flush=True,
                    )
                    if (threads, dtype, size, label) == HEADLINE:
                        headline = took["eager"] / ours
    if headline:
        print(f"headline: forward, T=4096 E=128 K=8 float32, 1 thread: {headline:.1f}x eager")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Balance losses on the CPU, side by side: forward and backward, on one thread.

    losses.py                    all tables, then the demands
    losses.py --demands          only the rows that the demands need

All losses together are timed as part of a router's step, which has the gating and the gradient of
its weights anyway; what they cost is what that step takes longer. Eager PyTorch computes what
several losses need only once. Alone, a loss is a function of the logits.

Every contestant is checked against float64 before it is timed (harness.py); who fails is reported
as wrong and not timed. `floor` is the time to read the inputs twice and to write as much once.
"""

import argparse
import itertools
import math
import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from contestants import installed
from harness import (
    PEAKS_HEADER,
    TOLERANCE,
    Call,
    Contest,
    Times,
    Verdict,
    compare,
    memory_floor,
    print_machine,
    print_peaks,
    print_verdicts,
    ratio,
)
from torch import Tensor
from torch.nn.functional import normalize, one_hot

import equipoise.functional as F
from equipoise import reference

NUM_TOKENS, NUM_EXPERTS, TOP_K, NUM_DEVICES = 4096, 128, 8, 8
DTYPES = ["float32", "bfloat16"]
COEFFICIENT = 0.01
PROBS = "importance of probs"  # instead of the gates'
GATING, GATING_PLAIN = "equipoise, gating", "equipoise, gating, weights only"
EAGER_GATING, EAGER = "eager, gating", "eager"
HUGGING_FACE = "Hugging Face"
# How many times less time than those, at least.
STAND_ALONE = {
    "switch": {"eager": 3, "compile": 3, HUGGING_FACE: 80},
    "z": {"eager": 4, "compile": 4},
    PROBS: {"eager": 2.5, "compile": 2.5},
    "entropy": {"eager": 2.5, "compile": 2.5},
    "uniform_kl": {"eager": 2.5, "compile": 2.5},
    "mutual_information": {"eager": 2.5, "compile": 2.5},
}


class Result(NamedTuple):
    """Of a forward and backward."""

    values: dict[str, Tensor]
    gradients: tuple[Tensor, ...]
    pulled: str = "total"  # what has a gradient


class Inputs(NamedTuple):
    """The inputs of a router's step."""

    logits: Tensor  # [T, E], requires grad
    pull: Tensor  # [T, K] gradient of the weights
    pull_sum: Tensor  # [E] gradient of prob_sum
    pull_total: Tensor  # scalar, of the losses: as large a gradient of the logits as the others


def make_inputs(dtype: str, seed: int) -> Inputs:
    """Logits with some experts preferred, and no ties among the best.

    Nobody is asked for a certain one of two tied experts, but the losses show which it was.
    """
    torch.manual_seed(seed)
    drawn = torch.randn(8 * NUM_TOKENS, NUM_EXPERTS) + 0.5 * torch.randn(NUM_EXPERTS)
    drawn = drawn.to(getattr(torch, dtype))
    best = drawn.float().topk(TOP_K + 1).values
    gaps = -best.diff(dim=1)
    # The last decides who is chosen: there, probabilities rounded to bfloat16 differ too.
    told_apart = (gaps > 0).all(1) & (gaps[:, -1] > 2**-5)
    logits = drawn[told_apart][:NUM_TOKENS].clone().requires_grad_()
    assert len(logits) == NUM_TOKENS
    return Inputs(
        logits,
        torch.randn(NUM_TOKENS, TOP_K),
        torch.randn(NUM_EXPERTS),
        torch.tensor(100.0 * NUM_TOKENS),
    )


# ---- the losses, by who computes them -----------------------------------------------------------
def named(losses: Iterable[str], coefficient: float) -> dict[str, object]:
    """As balance_loss wants them."""
    options = {"device": {"num_devices": NUM_DEVICES}, PROBS: {"of": "probs"}}
    return {
        "importance" if name == PROBS else name: {"coeff": coefficient, **options.get(name, {})}
        for name in losses
    }


def exact_losses(logits: Tensor, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [T, K], prob_sum [E] and the losses, from the reference."""
    weights, indices, _, _, sums = reference.topk_gating(logits, TOP_K, norm_topk_prob=True)
    _, values = reference.balance_loss(
        sums,
        torch.ones(len(names)),
        ["importance_of_probs" if name == PROBS else name for name in names],
        TOP_K,
        reference.expert_bincount(indices, NUM_EXPERTS, weights),
        num_devices=NUM_DEVICES,
    )
    return weights, sums[:NUM_EXPERTS], values


def variation(x: Tensor) -> Tensor:
    return x.var(correction=0) / x.mean().square()


# Each loss once, of what eager_losses has computed for it.
EAGER_LOSSES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "switch": lambda r: torch.dot(r["load"], r["p"]),
    "device": lambda r: torch.dot(
        r["load"].view(NUM_DEVICES, -1).mean(1), r["p"].view(NUM_DEVICES, -1).sum(1)
    ),
    "importance": lambda r: variation(r["gates"]),
    "z": lambda r: r["lse"].square().mean(),
    "uniform_kl": lambda r: -r["log_p"].mean(),
    "entropy": lambda r: torch.dot(r["p"], r["log_p"]),
    "variance": lambda r: r["p"].var(),
    "mutual_information": lambda r: (
        r["token_entropy"] + torch.dot(r["p"], r["log_p"]) - math.log(NUM_EXPERTS)
    ),
    "token_entropy": lambda r: r["token_entropy"],
    PROBS: lambda r: variation(r["p"]),
}


def eager_losses(
    logits: Tensor, names: Iterable[str], weights_too: bool = False
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """As short as torch allows, and nothing that no loss needs."""
    names, r = set(names), {}
    x = logits.float()
    if "z" in names:
        r["lse"] = torch.logsumexp(x, dim=-1)
    if names != {"z"}:
        prob = torch.softmax(x, dim=-1)
        r["p"] = prob.mean(dim=0)
    if weights_too or names & {"switch", "device"}:
        weights, indices = torch.topk(prob if weights_too else prob.detach(), TOP_K, dim=-1)
        indices = indices.flatten()
    if weights_too:
        r["weights"] = weights / weights.sum(dim=-1, keepdim=True)
    if names & {"switch", "device"}:  # E f: 1 at balance
        count = torch.bincount(indices, minlength=NUM_EXPERTS)
        r["load"] = count.float() * (NUM_EXPERTS / (TOP_K * NUM_TOKENS))
    if "importance" in names:
        gates = r["weights"].flatten()
        r["gates"] = gates.new_zeros(NUM_EXPERTS).index_add(0, indices, gates)
    if names & {"uniform_kl", "entropy", "mutual_information"}:
        r["log_p"] = (NUM_EXPERTS * r["p"]).log()
    if names & {"mutual_information", "token_entropy"}:
        # The fastest form, which must not meet a probability of 0.
        r["token_entropy"] = -torch.dot(prob.flatten(), prob.log().flatten()) / NUM_TOKENS
    return r, [EAGER_LOSSES[name](r) for name in EAGER_LOSSES if name in names]


def hugging_face_form(gate_logits: tuple[Tensor, ...], num_experts: int, top_k: int) -> Tensor:
    """transformers' load_balancing_loss_func, for where transformers is not installed."""
    probs = torch.softmax(torch.cat(gate_logits), dim=-1)
    mask = one_hot(torch.topk(probs, top_k, dim=-1).indices, num_experts)
    per_slot = mask.float().mean(dim=0)  # [K, E]
    return num_experts * (per_slot * probs.mean(dim=0).unsqueeze(0)).sum()


def hugging_face() -> Callable[[tuple[Tensor, ...], int, int], Tensor]:
    if "transformers" not in installed():
        return hugging_face_form
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func


# ---- checks -------------------------------------------------------------------------------------
def checker(
    wanted: dict[str, Result], dtype: torch.dtype, slack: float = 1
) -> Callable[[Result], None]:
    """`wanted`: by what is pulled."""
    tolerance = slack * TOLERANCE[dtype]

    def check(got: Result) -> None:
        want = wanted[got.pulled]
        for name, value in got.values.items():
            exact = want.values[name].detach()
            compare(name, value, exact, tolerance * exact.abs())
        for one, exact in zip(got.gradients, want.gradients, strict=True):
            scale = exact.abs().amax(dim=1, keepdim=True) + 1e-2 * exact.abs().max()
            compare(f"gradient of {got.pulled}", one, exact, tolerance * scale)

    return check


# ---- all losses together ------------------------------------------------------------------------
TOGETHER = [name for name in EAGER_LOSSES if name != PROBS]


def together_calls(i: Inputs) -> dict[str, Call]:
    """Those of a router's step: weights, then nothing, prob_sum or all losses."""
    losses = named(TOGETHER, COEFFICIENT)

    def step(pulled: str, values: dict[str, Tensor], outs: list[Tensor]) -> Result:
        pulls = {"weights": [], "prob_sum": [i.pull_sum], "total": [i.pull_total]}[pulled]
        gradients = torch.autograd.grad(outs, i.logits, [i.pull, *pulls])
        return Result(values, gradients, pulled)

    def weights_only() -> Result:
        r = F.topk_gating(i.logits, TOP_K, norm_topk_prob=True)
        return step("weights", {"weights": r.topk_weights}, [r.topk_weights])

    def gating() -> Result:
        r = F.topk_gating(i.logits, TOP_K, norm_topk_prob=True)
        outs = [r.topk_weights, r.prob_sum]
        return step("prob_sum", {"weights": r.topk_weights, "prob_sum": outs[1]}, outs)

    def equipoise() -> Result:
        r = F.topk_gating(i.logits, TOP_K, norm_topk_prob=True)
        report = F.balance_loss(r, losses)
        return step("total", report.unscaled, [r.topk_weights, report.total])

    def eager_gating() -> Result:
        r, _ = eager_losses(i.logits, [], weights_too=True)
        weights, prob_sum = r["weights"], NUM_TOKENS * r["p"]
        values = {"weights": weights, "prob_sum": prob_sum}
        return step("prob_sum", values, [weights, prob_sum])

    def eager() -> Result:
        r, values = eager_losses(i.logits, TOGETHER, weights_too=True)
        total = COEFFICIENT * torch.stack(values).sum()
        values = dict(zip(TOGETHER, values, strict=True))
        return step("total", values, [r["weights"], total])

    return {
        GATING_PLAIN: weights_only,
        GATING: gating,
        "equipoise": equipoise,
        EAGER_GATING: eager_gating,
        EAGER: eager,
    }


def together_wanted(i: Inputs) -> dict[str, Result]:
    logits = i.logits.detach().double().requires_grad_()
    weights, prob_sum, values = exact_losses(logits, TOGETHER)
    outs = {
        "weights": ([weights], [i.pull]),
        "prob_sum": ([weights, prob_sum], [i.pull, i.pull_sum]),
        "total": ([weights, COEFFICIENT * values.sum()], [i.pull, i.pull_total]),
    }
    by_name = dict(zip(TOGETHER, values, strict=True))
    return {
        pulled: Result(
            {"weights": weights, "prob_sum": prob_sum, **by_name},
            torch.autograd.grad(out, logits, [p.double() for p in pulls], retain_graph=True),
        )
        for pulled, (out, pulls) in outs.items()
    }


def added(times: Times, name: str, without: str) -> float:
    """Seconds, the median of the rounds' differences."""
    rounds = zip(times[name], times[without], strict=True)
    return statistics.median(a - b for a, b in rounds)


def together_table(contest: Contest, args: argparse.Namespace) -> Iterator[Verdict]:
    for dtype in args.dtypes:
        i = make_inputs(dtype, args.seed)
        calls = together_calls(i)
        what = f"all {len(TOGETHER)} losses, {dtype}"
        times = contest.run(
            f"gating and {what}, T={NUM_TOKENS} E={NUM_EXPERTS} K={TOP_K}",
            memory_floor(i.logits, True),
            calls,
            checker(together_wanted(i), i.logits.dtype),
        )
        step = times_eager = None
        detail = eager_detail = ""
        if {"equipoise", GATING} <= times.keys():
            step, by_rounds = ratio(times, "equipoise", GATING)
            plain = ratio(times, GATING, GATING_PLAIN)[0]
            detail = f"by rounds {by_rounds:.3f}; gating is {plain:.2f} of that without prob_sum"
        yield Verdict(f"{what}: times gating + backward", 1.15, step, detail, at_most=True)
        if {*calls} <= times.keys():
            ours = added(times, "equipoise", GATING)
            eagers = added(times, EAGER, EAGER_GATING)
            # A difference of next to nothing is no measure.
            ours = max(ours, 1e-6)
            times_eager = eagers / ours
            eager_detail = f"they add {ours * 1e6:.0f} us, in eager {eagers * 1e6:.0f} us"
        yield Verdict(f"{what}: times less than eager's", 10, times_eager, eager_detail)


# ---- one loss, from logits ----------------------------------------------------------------------
def stand_alone_calls(i: Inputs, name: str) -> dict[str, Call]:
    losses = named([name], 1.0)

    def with_gradients(value: Tensor) -> Result:
        return Result({name: value}, torch.autograd.grad(value, i.logits))

    def form(logits: Tensor) -> Tensor:
        return eager_losses(logits, [name])[1][0]

    torch.compiler.reset()
    compiled = torch.compile(form, fullgraph=True, dynamic=False)
    calls = {
        "equipoise": lambda: with_gradients(
            F.balance_loss_from_logits(i.logits, TOP_K, losses).total
        ),
        "eager": lambda: with_gradients(form(i.logits)),
        "compile": lambda: with_gradients(compiled(i.logits)),
    }
    if name == "switch":
        loss = hugging_face()
        calls[HUGGING_FACE] = lambda: with_gradients(loss((i.logits,), NUM_EXPERTS, TOP_K) / TOP_K)
    return calls


def stand_alone_table(contest: Contest, args: argparse.Namespace) -> Iterator[Verdict]:
    names = STAND_ALONE if args.demands else [n for n in EAGER_LOSSES if n != "importance"]
    for dtype, name in itertools.product(args.dtypes, names):
        i = make_inputs(dtype, args.seed)
        logits = i.logits.detach().double().requires_grad_()
        (value,) = exact_losses(logits, [name])[2]
        want = Result({name: value}, torch.autograd.grad(value, logits))
        times = contest.run(
            f"{name} from logits, {dtype}, T={NUM_TOKENS} E={NUM_EXPERTS} K={TOP_K}",
            memory_floor(i.logits, True),
            stand_alone_calls(i, name),
            # Compiled code adds up the tokens one after another, which rounds more.
            checker({want.pulled: want}, i.logits.dtype, slack=3 if dtype == "float32" else 1),
        )
        for other, least in STAND_ALONE.get(name, {}).items():
            if other == HUGGING_FACE and dtype != "float32":
                continue  # its gradient in bfloat16 is too far off to be timed
            measured, detail = None, ""
            if {"equipoise", other} <= times.keys():
                measured, by_rounds = ratio(times, other, "equipoise")
                detail = f"by rounds {by_rounds:.2f}"
            yield Verdict(f"{name} from logits, {dtype}: times {other}", least, measured, detail)


# ---- similarity of inputs and gates -------------------------------------------------------------
def matrices_form(inputs: Tensor, gates: Tensor) -> Tensor:
    """By the definition, with two [B, B] matrices."""
    u, v = normalize(inputs, dim=1), normalize(gates, dim=1)
    return ((u @ u.T) * (v @ v.T)).mean()


def similarity_table(contest: Contest, args: argparse.Namespace) -> Iterator[Verdict]:
    rows, width, num_gates = 8192, 64, 8
    torch.manual_seed(args.seed)
    gates = torch.randn(rows, num_gates).softmax(-1).requires_grad_()
    # Gates that tell something of the inputs.
    inputs = torch.randn(rows, width)
    inputs[:, :num_gates] += 4 * gates.detach()
    leaves = inputs.requires_grad_(), gates

    def call(form: Callable[[Tensor, Tensor], Tensor], leaves: tuple[Tensor, ...]) -> Result:
        value = form(*leaves)
        return Result({"value": value}, torch.autograd.grad(value, leaves))

    calls = {
        "equipoise": lambda: call(F.similarity_correlation, leaves),
        "B x B": lambda: call(matrices_form, leaves),
    }
    want = call(matrices_form, tuple(leaf.detach().double().requires_grad_() for leaf in leaves))
    title = f"similarity_correlation, B={rows} D={width} N={num_gates}"
    contest.run(
        title, memory_floor(inputs, True), calls, checker({want.pulled: want}, inputs.dtype)
    )
    print(f"\n{'peak memory of it, forward and backward, bytes':<50} {PEAKS_HEADER}")
    peaks = {name: print_peaks(name, call)[0] for name, call in calls.items()}
    read = inputs.nbytes + gates.nbytes
    detail = f"{peaks['equipoise'] / 1e6:.1f} MB, B x B {peaks['B x B'] / 1e6:.0f} MB"
    yield Verdict(f"{title}: peak over inputs", 4, peaks["equipoise"] / read, detail, at_most=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21, help="samples per call (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--demands", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    warnings.simplefilter("ignore")  # the compiler's
    torch.set_num_threads(1)

    print_machine(args.rounds)
    contest = Contest(args.rounds)
    tables = (together_table, stand_alone_table, similarity_table)
    print_verdicts([verdict for table in tables for verdict in table(contest, args)])
    return int("equipoise" in contest.failed)


if __name__ == "__main__":
    sys.exit(main())

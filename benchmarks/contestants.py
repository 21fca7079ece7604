# SPDX-License-Identifier: Apache-2.0
"""Who takes part in benchmarks/gating.py: what a row computes, and who computes it.

A contestant makes, for a cell (one case, size and dtype), the function from logits to a routing, or
None where it does not play. The routing has the fields of equipoise's RoutingResult that the case
asks for.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import equipoise.functional as F

KEY_TOLERANCE = 2e-6  # experts whose keys are this close are not told apart in float32


class Case(NamedTuple):
    """What a row computes: arguments of topk_gating, and which of its results are wanted."""

    options: dict[str, Any]
    stats: bool = False  # tokens_per_expert, prob_sum and lse as well
    bias: bool = False  # a selection-only bias
    sizes: tuple[tuple[int, int], ...] | None = None  # the (E, K) it is about; None: any


CASES = {
    "weights": Case({"norm_topk_prob": True}),
    "stats": Case({"norm_topk_prob": True}, stats=True),
    "sigmoid_bias": Case(
        {"score_function": "sigmoid", "norm_topk_prob": True},
        bias=True,
        sizes=((256, 8), (384, 8)),
    ),
    "deepseek_v3": Case(
        {
            "score_function": "sigmoid",
            "norm_topk_prob": True,
            "scaling_factor": 2.5,
            "num_groups": 8,
            "group_topk": 4,
        },
        bias=True,
        sizes=((256, 8),),
    ),
}


class Cell(NamedTuple):
    """One case at one size, with its inputs."""

    name: str
    case: Case
    top_k: int
    logits: Tensor  # [T, E], requires grad
    bias: Tensor | None  # [E] float32
    pull: Tensor  # [T, E] gradient of the weight of token t's expert e
    pull_sum: Tensor  # [E] gradient of prob_sum


def make_cell(
    dtype: str, name: str, num_tokens: int, num_experts: int, top_k: int, seed: int
) -> Cell:
    torch.manual_seed(seed)
    case = CASES[name]
    logits = torch.randn(num_tokens, num_experts).to(getattr(torch, dtype))
    bias = torch.empty(num_experts).uniform_(-0.1, 0.1) if case.bias else None
    if "num_groups" in case.options:
        # Rows in which the last group kept and the next cannot be told apart become another row.
        kept = case.options["group_topk"]
        key = (logits.double().sigmoid() + bias).unflatten(-1, (case.options["num_groups"], -1))
        score = key.topk(2).values.sum(-1).sort(descending=True).values
        tied = score[:, kept - 1] - score[:, kept] < 4 * KEY_TOLERANCE
        logits[tied] = logits[~tied][:1]
    # Gradients that bfloat16 can hold, so that every contestant gets the same.
    pull = torch.randn(num_tokens, num_experts).bfloat16().float()
    pull_sum = num_experts * torch.randn(num_experts).bfloat16().float()
    return Cell(name, case, top_k, logits.requires_grad_(), bias, pull, pull_sum)


class Routing(NamedTuple):
    topk_weights: Tensor  # [T, K], or [T, E] with zeros (dense)
    topk_indices: Tensor  # [T, K] int64, or [T, E] bool (dense)
    tokens_per_expert: Tensor | None = None
    prob_sum: Tensor | None = None
    lse: Tensor | None = None
    ordered: bool = True  # slots by descending selection score; not promised by every peer


Gate = Callable[[Tensor], Any]


def equipoise(cell: Cell) -> Gate:
    top_k, options = cell.top_k, {**cell.case.options, "stats": cell.case.stats}
    if cell.bias is not None:
        options["expert_bias"] = cell.bias
    return lambda logits: F.topk_gating(logits, top_k, **options)


# ---- eager PyTorch: the same work, as short as torch allows -------------------------------------
def eager_weights(logits: Tensor, top_k: int, bias: None) -> Routing:
    prob = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, indices = torch.topk(prob, top_k, dim=-1)
    return Routing(weights / weights.sum(dim=-1, keepdim=True), indices)


def eager_stats(logits: Tensor, top_k: int, bias: None) -> Routing:
    x = logits.float()  # one cast for softmax and logsumexp
    prob = torch.softmax(x, dim=-1)
    weights, indices = torch.topk(prob, top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    counts = torch.bincount(indices.flatten(), minlength=logits.shape[-1])
    # The mean is this sum and one division of [E].
    return Routing(weights, indices, counts, prob.sum(dim=0), torch.logsumexp(x, dim=-1))


def eager_sigmoid_bias(logits: Tensor, top_k: int, bias: Tensor) -> Routing:
    score = torch.sigmoid(logits.float())
    indices = torch.topk(score.detach() + bias, top_k, dim=-1).indices
    weights = score.gather(1, indices)
    return Routing(weights / weights.sum(dim=-1, keepdim=True), indices)


def eager_deepseek_v3(logits: Tensor, top_k: int, bias: Tensor) -> Routing:
    score = torch.sigmoid(logits.float())
    key = (score.detach() + bias).unflatten(-1, (8, -1))
    best_groups = key.topk(2, dim=-1).values.sum(dim=-1).topk(4, dim=-1, sorted=False).indices
    dropped = torch.ones(key.shape[:2], dtype=torch.bool).scatter_(1, best_groups, False)
    key = key.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1)
    indices = torch.topk(key, top_k, dim=-1).indices
    weights = score.gather(1, indices)
    return Routing(weights / weights.sum(dim=-1, keepdim=True) * 2.5, indices)


EAGER = {
    "weights": eager_weights,
    "stats": eager_stats,
    "sigmoid_bias": eager_sigmoid_bias,
    "deepseek_v3": eager_deepseek_v3,
}


def eager(cell: Cell) -> Gate:
    form, top_k, bias = EAGER[cell.name], cell.top_k, cell.bias
    return lambda logits: form(logits, top_k, bias)


def compile(cell: Cell) -> Gate:
    torch.compiler.reset()  # one size at a time, not a row of recompilations
    form = torch.compile(EAGER[cell.name], fullgraph=True, dynamic=False)
    top_k, bias = cell.top_k, cell.bias
    return lambda logits: form(logits, top_k, bias)


# ---- peers, of the installed version ------------------------------------------------------------
def transformers(cell: Cell) -> Gate | None:
    """The router modules, fed with logits: their linear layer hands its input through."""
    num_experts, top_k = cell.logits.shape[1], cell.top_k
    if cell.case.stats:
        return None  # its balance loss is a function of all layers' logits, not of a router's
    if cell.bias is not None:  # without groups: what its models with one group run
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter as cls
    elif (num_experts, top_k) == (8, 2):
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter as cls
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as cls
    router = cls(
        SimpleNamespace(
            num_experts_per_tok=top_k,
            num_experts=num_experts,
            num_local_experts=num_experts,
            n_routed_experts=num_experts,
            hidden_size=num_experts,
            norm_topk_prob=True,
            n_group=cell.case.options.get("num_groups", 1),
            topk_group=cell.case.options.get("group_topk", 1),
            routed_scaling_factor=cell.case.options.get("scaling_factor", 1.0),
        )
    ).requires_grad_(False)
    if cell.bias is not None:
        router.e_score_correction_bias.copy_(cell.bias)
    through = SimpleNamespace(linear=lambda hidden_states, weight: hidden_states)
    forward = FunctionType(cls.forward.__code__, {**cls.forward.__globals__, "F": through})

    def gate(logits: Tensor) -> Routing:
        _, weights, indices = forward(router, logits)
        return Routing(weights, indices, ordered=cell.bias is None)

    return gate


def megatron(cell: Cell) -> Gate | None:
    """The router functions; their result is a dense [T, E] of weights and one of flags."""
    from megatron.core.transformer.moe import moe_utils

    case, top_k = cell.case, cell.top_k
    # softmax of the top-k logits, or sigmoid: renormalised either way
    options = {key: value for key, value in case.options.items() if key != "norm_topk_prob"}
    if cell.bias is not None:
        options["expert_bias"] = cell.bias
    route = getattr(moe_utils, "topk_routing_with_score_function", None)
    if route is None:  # before 0.15
        route = moe_utils.topk_softmax_with_capacity

    def gate(logits: Tensor) -> Routing:
        weights, chosen = route(logits, top_k, **options)[:2]
        return Routing(weights, chosen)

    def gate_with_stats(logits: Tensor) -> Routing:
        weights, chosen = route(logits, top_k, **options)[:2]
        _, prob = moe_utils.compute_routing_scores_for_aux_loss(logits, top_k, "softmax")
        lse = torch.logsumexp(logits, dim=-1)
        return Routing(weights, chosen, chosen.sum(dim=0), prob.sum(dim=0), lse)

    return gate_with_stats if case.stats else gate


CONTESTANTS: dict[str, Callable[[Cell], Gate | None]] = {
    "equipoise": equipoise,
    "eager": eager,
    "compile": compile,
    "transformers": transformers,
    "megatron": megatron,
}


def installed() -> list[str]:
    """The names in CONTESTANTS that can play here."""
    peers = {"transformers": "transformers", "megatron": "megatron.core"}

    def found(module: str) -> bool:
        try:
            return find_spec(module) is not None
        except ModuleNotFoundError:  # the package around it is missing
            return False

    return [name for name in CONTESTANTS if name not in peers or found(peers[name])]

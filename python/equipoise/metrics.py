# SPDX-License-Identifier: Apache-2.0
"""How evenly the experts are loaded: every figure that the field reports, from the counts alone.

With counts C_e, mean m and shares f_e = C_e / sum C:

    cv = std(C) / m                    imbalance_ratio = max(C) / m
    max_vio = (max(C) - m) / m         min_vio = (m - min(C)) / m
    entropy = -sum f log f (nats)      perplexity = exp(entropy), the number of experts in effect
    kl_to_uniform = log E - entropy    gini = sum_i (2 i - E - 1) C_i / (E sum C), C ascending

MaxVio is Wang 2024's (arXiv:2408.15664): relative, not in tokens.

Beside it stands what these are made of, for any distribution: entropy, divergence, mutual
information. `entropy` is in bits unless told otherwise, everything else in nats. What the
probabilities of the router say is in `router_metrics`, which experts go together in `co_activation`
and `expert_similarity`. Results are float64 unless said otherwise; nothing waits for the device.
"""

import math

import torch
from torch import Tensor

from . import ops
from .functional.routing import _SUMS_TAIL

#: The names of `load_metrics`, in the order of the op's rows.
LOAD_METRICS = (
    "cv",
    "imbalance_ratio",
    "max_vio",
    "max_vio_tokens",
    "min_vio",
    "gini",
    "entropy",
    "perplexity",
    "kl_to_uniform",
    "expert_utilization_rate",
    "expert_usage_rate",
    "dead_experts",
    "top1_share",
)


def load_metrics(tokens_per_expert: Tensor, unbiased: bool = False) -> dict[str, Tensor]:
    """Load figures of one layer, or of several layers side by side (never of their sum).

    One kernel for all of them and all layers.

    Args:
        tokens_per_expert: [E] or [..., E] counts >= 0, int64 as `topk_gating` gives them.
        unbiased: divide the variance in `cv` by E - 1 instead of E.

    Returns:
        Float64 tensors of shape [] or [...], on the device of the counts; nothing waits for it:

        - `cv`, `imbalance_ratio`, `max_vio`, `max_vio_tokens` (max - mean, in tokens), `min_vio`
        - `gini`, `entropy`, `perplexity`, `kl_to_uniform`
        - `expert_utilization_rate`: share of the experts with at least 10 % of a fair share
        - `expert_usage_rate`: share of the experts with any token
        - `dead_experts`: experts without a token
        - `top1_share`: share of the fullest expert

        Without a single token there is no load to speak of, and the ratios are NaN.

    Raises:
        RuntimeError: counts that are not int64; no experts dimension, or an empty one; on the CPU
            a negative count. On CUDA, where that cannot be known without waiting, all figures of
            its layer are NaN.

    Example:
        >>> counts = torch.tensor([1, 2, 261, 266, 6, 253, 229, 6])
        >>> for name, value in load_metrics(counts).items():
        ...     print(f"{name:<24}{value:8.3f}")
        cv                         0.974
        imbalance_ratio            2.078
        max_vio                    1.078
        max_vio_tokens           138.000
        min_vio                    0.992
        gini                       0.502
        entropy                    1.458
        perplexity                 4.298
        kl_to_uniform              0.621
        expert_utilization_rate    0.500
        expert_usage_rate          1.000
        dead_experts               0.000
        top1_share                 0.260
        >>> print(f"{load_metrics(counts, unbiased=True)['cv']:.3f}")
        1.041
    """
    rows = ops.load_metrics(tokens_per_expert, unbiased)
    return dict(zip(LOAD_METRICS, rows.unbind(), strict=True))


def gini(x: Tensor) -> Tensor:
    """Gini coefficient: 0 where all are equal, (E - 1) / E where one has all.

    `sum_i (2 i - E - 1) x_i / (E sum x)`, x ascending and i from 1.

    Args:
        x: [..., E] numbers >= 0, E >= 1.

    Returns:
        [...] float64; NaN where all are 0.

    Raises:
        ValueError: no last dimension, or an empty one.

    Example:
        >>> gini(torch.tensor([0, 0, 0, 5])).item()
        0.75
    """
    _check_last("gini", "x", x)
    n = x.shape[-1]
    x = x.to(torch.float64)
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=x.device)
    return ((2 * rank - n - 1) * x.sort(-1).values).sum(-1) / (n * x.sum(-1))


def entropy(p: Tensor, base: float = 2) -> Tensor:
    """Entropy `-sum p log p`, with `0 log 0 = 0`.

    Args:
        p: [..., E] probabilities: each row >= 0 and of sum 1.
        base: of the logarithm: 2 for bits, `math.e` for nats.

    Returns:
        [...] float64; differentiable.

    Raises:
        ValueError: no last dimension, or an empty one; a base that is not above 1.

    Example:
        >>> entropy(torch.tensor([0.5, 0.25, 0.25])).item()
        1.5
    """
    _check_last("entropy", "p", p)
    return torch.special.entr(p.to(torch.float64)).sum(-1) / _log("entropy", base)


def perplexity(p: Tensor) -> Tensor:
    """`exp(entropy)`: the number of experts in effect, from 1 (one has all) to E (all are equal).

    Args:
        p: [..., E] probabilities: each row >= 0 and of sum 1.

    Returns:
        [...] float64; differentiable.

    Raises:
        ValueError: no last dimension, or an empty one.

    Example:
        >>> round(perplexity(torch.tensor([0.5, 0.5, 0.0])).item(), 6)
        2.0
    """
    _check_last("perplexity", "p", p)
    return entropy(p, base=math.e).exp()


def kl_divergence(p: Tensor, q: Tensor, base: float = math.e) -> Tensor:
    """Kullback-Leibler divergence `KL(p || q) = sum p log(p / q)`, with `0 log 0 = 0`.

    Args:
        p: [..., E] probabilities: each row >= 0 and of sum 1.
        q: the same, of a shape that broadcasts with that of `p`.
        base: of the logarithm: `math.e` for nats, 2 for bits.

    Returns:
        [...] float64; infinite where q is 0 and p is not.

    Raises:
        ValueError: no last dimension, or an empty one, or another one; a base not above 1.

    Example:
        >>> kl_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), base=2).item()
        1.0
    """
    _check_last("kl_divergence", "p", p)
    if q.dim() == 0 or q.shape[-1] != p.shape[-1]:
        raise ValueError(
            f"kl_divergence: q must have as many values in a row as p, which has shape "
            f"{list(p.shape)}, got {list(q.shape)}"
        )
    p, q = p.to(torch.float64), q.to(torch.float64)
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1) / _log("kl_divergence", base)


def mutual_information(x: Tensor, y: Tensor, base: float = math.e) -> Tensor:
    """Mutual information of two discrete variables: `H(x) + H(y) - H(x, y)` of the frequencies.

    Args:
        x: [N] labels, of any type that can be compared; any shape.
        y: as many.
        base: of the logarithm: `math.e` for nats, 2 for bits.

    Returns:
        [] float64, >= 0. The estimate is too large for few samples of many labels, by about
        `(X - 1) (Y - 1) / (2 N)` nats.

    Raises:
        ValueError: another number of labels, or none; a base not above 1.

    Example:
        >>> x = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
        >>> round(mutual_information(x, x // 2, base=2).item(), 6)  # x tells y, which has 1 bit
        1.0
    """
    if x.numel() != y.numel() or x.numel() == 0:
        raise ValueError(
            f"mutual_information: x and y must have equally many labels, at least one, "
            f"got {x.numel()} and {y.numel()}"
        )
    x, y = _numbered(x.reshape(-1)), _numbered(y.reshape(-1))
    joint = _numbered(x * x.numel() + y)
    nats = _label_entropy(x) + _label_entropy(y) - _label_entropy(joint)
    return nats.clamp_min(0) / _log("mutual_information", base)  # rounding can go below


def binned_mutual_information(x: Tensor, y: Tensor, bins: int = 20, base: float = math.e) -> Tensor:
    """Mutual information of two continuous variables, each cut into `bins` bins of equal width.

    Args:
        x: [N] finite numbers; any shape. The bins go from the smallest to the largest.
        y: as many.
        bins: at least 1. The estimate cannot exceed `log(bins)`.
        base: of the logarithm: `math.e` for nats, 2 for bits.

    Returns:
        [] float64, >= 0; too large for few samples, see `mutual_information`.

    Raises:
        ValueError: another number of values, or none; `bins` below 1; a base not above 1.

    Example:
        >>> x = torch.linspace(0, 1, 1000)
        >>> round(binned_mutual_information(x, 1 - 3 * x, bins=4, base=2).item(), 2)
        2.0
    """
    if bins < 1:
        raise ValueError(f"binned_mutual_information: bins must be at least 1, got {bins}")
    if x.numel() != y.numel() or x.numel() == 0:
        raise ValueError(
            f"binned_mutual_information: x and y must have equally many values, at least one, "
            f"got {x.numel()} and {y.numel()}"
        )
    return mutual_information(_bin(x, bins), _bin(y, bins), base)


def expert_specialization_strength(
    counts_by_label: Tensor | None = None,
    *,
    token_entropy: Tensor | None = None,
    num_experts: int | None = None,
) -> Tensor:
    """How much the choice of an expert tells about the token, from 0 (nothing) to 1.

    With labels (language, domain, class): `I(expert; label) / H(label)`, the share of the label
    that is known from the expert. Without: `1 - mean H_t / log E`, how decided the router is.

    Args:
        counts_by_label: [labels, E] how many tokens of each label each expert got.
        token_entropy: the mean of `H_t` in nats, where there are no labels; [] or one per layer.
        num_experts: E, with `token_entropy`.

    Returns:
        Float64, [] or as `token_entropy`; NaN where there is nothing to know: no token, a single
        label, or a single expert without labels.

    Raises:
        ValueError: not one of the two, `num_experts` missing, or another shape.

    Example:
        >>> expert_specialization_strength(torch.tensor([[7, 0], [0, 7]])).item()
        1.0
        >>> expert_specialization_strength(torch.tensor([[6, 2], [3, 1]])).item()
        0.0
    """
    name = "expert_specialization_strength"
    if (counts_by_label is None) == (token_entropy is None and num_experts is None):
        raise ValueError(f"{name}: takes counts_by_label, or token_entropy and num_experts")
    if counts_by_label is None:
        if token_entropy is None or num_experts is None or num_experts < 1:
            raise ValueError(
                f"{name}: token_entropy needs num_experts >= 1 beside it, got {num_experts}"
            )
        return 1 - token_entropy.to(torch.float64) / math.log(num_experts)
    if counts_by_label.dim() != 2 or counts_by_label.numel() == 0:
        raise ValueError(
            f"{name}: counts_by_label must have shape [labels, E], both at least 1, "
            f"got {list(counts_by_label.shape)}"
        )
    joint = counts_by_label.to(torch.float64)
    joint = joint / joint.sum()
    of_label = entropy(joint.sum(1))
    known = of_label + entropy(joint.sum(0)) - entropy(joint.flatten())
    return known.clamp_min(0) / of_label


def router_metrics(sums: Tensor) -> dict[str, Tensor]:
    """What the probabilities of the router say, of one layer or of several side by side.

    Those named `_loss` are the unscaled values of `equipoise.functional`. `switch_loss` divides the
    loads by their sum, which is `K W` where every token has found K experts.

    Args:
        sums: [..., 2 E + 5] as in `RoutingResult.sums`.

    Returns:
        Float64 tensors of shape [...]; NaN where there was no token:

        - `switch_loss`: `E sum(f P)`, 1 at balance; `z_loss`: mean of lse^2
        - `uniform_kl_loss`, `entropy_loss`, `variance_loss`: of P, 0 at balance
        - `mutual_information_loss`: `mean(H_t) - H(P)`, from 0 down to -log E
        - `token_entropy`: mean of `H_t`, nats
        - `expert_specialization_strength`: `1 - token_entropy / log E`
        - `num_nan_rows`: tokens with a NaN logit (a number, not a mean)

    Raises:
        ValueError: the last dimension is not 2 E + 5.

    Example:
        >>> import equipoise.functional as F
        >>> r = F.topk_gating(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), top_k=1)
        >>> for name, value in router_metrics(r.sums).items():
        ...     print(f"{name:<31}{value:6.3f}")
        switch_loss                     1.612
        z_loss                          3.124
        uniform_kl_loss                 0.234
        entropy_loss                    0.201
        variance_loss                   0.187
        mutual_information_loss        -0.018
        token_entropy                   0.474
        expert_specialization_strength  0.316
        num_nan_rows                    0.000
    """
    width = sums.shape[-1] - _SUMS_TAIL if sums.dim() else 0
    if width < 2 or width % 2:
        raise ValueError(
            f"router_metrics: sums must have shape [..., 2 E + {_SUMS_TAIL}] with E >= 1, "
            f"got {list(sums.shape)}"
        )
    num_experts = width // 2
    sums = sums.detach().to(torch.float64)
    prob_sum, load, tail = sums.split([num_experts, num_experts, _SUMS_TAIL], dim=-1)
    num_tokens = tail[..., 0]
    p = prob_sum / num_tokens.unsqueeze(-1)
    of_tokens = tail[..., 2] / num_tokens
    of_mean = entropy(p, base=math.e)
    uniform = torch.full_like(p, 1 / num_experts)
    return {
        "switch_loss": switch_value(load, prob_sum),
        "z_loss": tail[..., 1] / num_tokens,
        # The clamp of the op, without which one absent expert makes the figure infinite.
        "uniform_kl_loss": kl_divergence(uniform, p.clamp_min(torch.finfo(torch.float32).tiny)),
        "entropy_loss": math.log(num_experts) - of_mean,
        "variance_loss": p.var(-1, correction=min(1, num_experts - 1)),
        "mutual_information_loss": of_tokens - of_mean,
        "token_entropy": of_tokens,
        "expert_specialization_strength": (
            expert_specialization_strength(token_entropy=of_tokens, num_experts=num_experts)
            if num_experts > 1
            else torch.full_like(of_tokens, math.nan)
        ),
        "num_nan_rows": tail[..., 3],
    }


def switch_value(load: Tensor, prob_sum: Tensor) -> Tensor:
    """The Switch loss of given loads and sums of probabilities: `E sum(f P)`, both made shares.

    With the load twice it is what the loss would be if the probabilities followed the load:
    `1 + cv^2`, the most that the loss can see of it.

    Args:
        load: [..., E] counts or weights >= 0.
        prob_sum: [..., E] sums of p.

    Returns:
        [...] float64; NaN without a token.

    Raises:
        ValueError: no last dimension, or an empty one.

    Example:
        >>> counts = torch.tensor([1, 2, 261, 266, 6, 253, 229, 6])
        >>> round(switch_value(counts, counts).item(), 3)
        1.949
    """
    _check_last("switch_value", "load", load)
    f, p = (
        x.to(torch.float64) / x.to(torch.float64).sum(-1, keepdim=True) for x in (load, prob_sum)
    )
    return load.shape[-1] * (f * p).sum(-1)


def co_activation(topk_indices: Tensor, num_experts: int) -> Tensor:
    """How many tokens went to both of two experts.

    Args:
        topk_indices: [..., K] int64 in [-1, E), an expert at most once in a row; -1 is skipped.
        num_experts: E.

    Returns:
        [E, E] int64, symmetric; the diagonal is `tokens_per_expert`.

    Raises:
        ValueError: no K dimension, `num_experts` below 1; on the CPU an index outside [-1, E). (On
            CUDA, where it cannot raise, such an index is skipped.)

    Example:
        >>> co_activation(torch.tensor([[0, 1], [0, 2], [1, 0], [2, -1]]), 3).tolist()
        [[3, 2, 1], [2, 2, 0], [1, 0, 2]]
    """
    experts = _slots("co_activation", topk_indices, num_experts)
    pairs = torch.zeros(num_experts * num_experts + 1, dtype=torch.int64, device=experts.device)
    for first in experts.unbind(-1):  # K passes over [T, K], and never a [T, E]
        first = first.unsqueeze(-1)
        both = (first < num_experts) & (experts < num_experts)
        place = torch.where(both, first * num_experts + experts, num_experts * num_experts)
        pairs.scatter_add_(0, place.flatten(), torch.ones_like(place.flatten()))
    return pairs[:-1].view(num_experts, num_experts)


def expert_similarity(
    x: Tensor, topk_indices: Tensor | None = None, num_experts: int | None = None
) -> Tensor:
    """The cosine between every two experts' mean inputs, or between given vectors of the experts.

    Args:
        x: [..., H] the inputs of the tokens, with `topk_indices`; or [E, ...], one output, weight
            or other vector for each expert.
        topk_indices: [..., K] int64 in [-1, E), which experts each token went to.
        num_experts: E, with `topk_indices`.

    Returns:
        [E, E] float64 in [-1, 1], symmetric; NaN in the rows and columns of experts without a
        token or with a zero vector.

    Raises:
        ValueError: shapes that do not fit; `num_experts` without `topk_indices` or the other way
            round; on the CPU an index outside [-1, E).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> experts = torch.tensor([[0], [1], [1]])
        >>> expert_similarity(x, experts, num_experts=2)[0, 1].item()  # (1, 0) and (1.5, 1)
        0.83205...
    """
    name = "expert_similarity"
    if (topk_indices is None) != (num_experts is None):
        raise ValueError(f"{name}: topk_indices and num_experts are given together or not at all")
    if topk_indices is None:
        if x.dim() < 2 or x.shape[0] == 0:
            raise ValueError(f"{name}: x must have shape [E, ...] with E >= 1, got {list(x.shape)}")
        vectors = x.detach().flatten(1).to(torch.float64)
    else:
        experts = _slots(name, topk_indices, num_experts)
        x = x.detach()
        if x.dim() < 1 or x.shape[:-1] != topk_indices.shape[:-1]:
            raise ValueError(
                f"{name}: x must have shape [..., H] with the leading dimensions of topk_indices, "
                f"{list(topk_indices.shape[:-1])}, got {list(x.shape)}"
            )
        x = x.reshape(-1, x.shape[-1])
        x = x if x.dtype == torch.float64 else x.to(torch.float32)
        chosen = x.new_zeros(x.shape[0], num_experts + 1).scatter_(1, experts, 1)[:, :-1]
        vectors = (chosen.T @ x).to(torch.float64)  # sums: a cosine does not mind the number
    length = vectors.norm(dim=1, keepdim=True)
    unit = vectors / torch.where(length > 0, length, math.nan)
    return (unit @ unit.T).clamp(-1, 1)


def expert_similarity_mean(
    x: Tensor, topk_indices: Tensor | None = None, num_experts: int | None = None
) -> Tensor:
    """The mean of `expert_similarity` over all pairs of different experts: 1 for one and the same.

    Takes the arguments of `expert_similarity`, and raises as it does. Pairs with an expert that has
    no vector are left out.

    Returns:
        [] float64; NaN without a pair.

    Example:
        >>> expert_similarity_mean(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])).item()
        0.333...
    """
    similarity = expert_similarity(x, topk_indices, num_experts)
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return similarity.masked_fill(itself, math.nan).nanmean()


def expert_diversity_score(
    x: Tensor, topk_indices: Tensor | None = None, num_experts: int | None = None
) -> Tensor:
    """`1 - expert_similarity_mean`: 0 where all experts see or do the same.

    Takes the arguments of `expert_similarity`, and raises as it does.

    Returns:
        [] float64 in [0, 2]; NaN without a pair.

    Example:
        >>> expert_diversity_score(torch.eye(4)).item()
        1.0
    """
    return 1 - expert_similarity_mean(x, topk_indices, num_experts)


def _slots(function: str, topk_indices: Tensor, num_experts: int) -> Tensor:
    """[T, K] with E in place of what is not counted."""
    if num_experts < 1:
        raise ValueError(f"{function}: num_experts must be at least 1, got {num_experts}")
    if topk_indices.dim() == 0 or topk_indices.dtype != torch.int64:
        raise ValueError(
            f"{function}: topk_indices must be int64 of shape [..., K], "
            f"got {topk_indices.dtype} of shape {list(topk_indices.shape)}"
        )
    outside = (topk_indices < -1) | (topk_indices >= num_experts)
    if topk_indices.device.type == "cpu" and bool(outside.any()):
        raise ValueError(
            f"{function}: topk_indices must be in [-1, {num_experts}), "
            f"got {topk_indices[outside][0].item()}"
        )
    return torch.where(outside | (topk_indices < 0), num_experts, topk_indices).reshape(
        -1, topk_indices.shape[-1]
    )


def _check_last(function: str, name: str, x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{function}: {name} must have shape [..., E] with E >= 1, got {list(x.shape)}"
        )


def _log(function: str, base: float) -> float:
    if not base > 1:
        raise ValueError(f"{function}: base must be above 1, got {base}")
    return math.log(base)


def _numbered(labels: Tensor) -> Tensor:
    """[N] labels -> numbers from 0 for the same, int64; torch.unique would wait for the device."""
    ordered, order = labels.sort()
    new = torch.cat([ordered.new_zeros(1, dtype=torch.int64), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter_(0, order, new.cumsum(0))


def _label_entropy(numbers: Tensor) -> Tensor:
    """Entropy in nats of [N] numbers below N."""
    counts = torch.zeros(numbers.numel(), dtype=torch.float64, device=numbers.device)
    counts.scatter_add_(0, numbers, torch.ones_like(counts))
    return entropy(counts / numbers.numel(), base=math.e)


def _bin(x: Tensor, bins: int) -> Tensor:
    """Values -> number of the bin, int64; the largest value belongs to the last bin."""
    x = x.to(torch.float64)
    low, high = x.aminmax()
    place = (x - low) / torch.where(high > low, high - low, 1) * bins
    return place.long().clamp_max(bins - 1)

# SPDX-License-Identifier: Apache-2.0
"""The routing of all layers over the steps of a run: kept as a few sums, read as figures.

Per step and layer one row of 4 E + 9 float64 numbers is kept, sums over the tokens, in this order:

    tokens_per_expert   E        counts of the chosen slots (float64 is exact up to 2^53)
    sums                2 E + 5  `RoutingResult.sums`: p, loads, tokens, lse^2, H, NaN rows, invalid
    first_choice        2        sum of the first weight of every token, number of such tokens
    dropped_per_expert  E        slots without a row in the experts' buffer
    dropped_of          1        slots that these were dropped from
    updates             1        1

What was not given is 0. All figures are functions of such rows, of a step or of a sum of steps, so
one all-reduce of [L, 4 E + 9] numbers joins the ranks. Rows stay on the device that the counts came
from, and nothing waits for it until a figure is read.
"""

import functools
import json
import math
import os
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .distributed import all_reduce_sum
from .functional.permutation import PermuteResult
from .functional.routing import _SUMS_TAIL, RoutingResult
from .metrics import load_metrics, router_metrics

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["LOG_VERSION", "RoutingAnalyzer", "torchmetrics_metric"]

#: Of the JSONL files; a reader refuses others.
LOG_VERSION = 1

_HEADER = "equipoise_routing_log"

# What papers compare runs by -> the figure of which it is the mean.
_PAPER = {
    "cv": "cv",
    "imbalance_ratio": "imbalance_ratio",
    "max_vio_batch": "max_vio",
    "gini": "gini",
    "perplexity": "perplexity",
    "dead_experts": "dead_experts",
    "expert_utilization_rate": "expert_utilization_rate",
    "switch_loss": "switch_loss",
    "token_entropy": "token_entropy",
    "expert_specialization_strength": "expert_specialization_strength",
    "router_confidence": "router_confidence",
    "drop_rate": "drop_rate",
}

Routing = RoutingResult | Tensor | Sequence[RoutingResult | Tensor]


class Row(NamedTuple):
    """The parts of rows [..., 4 E + 9], see the head of this file; [..., E] and the like."""

    tokens_per_expert: Tensor
    sums: Tensor
    first_choice: Tensor
    dropped_per_expert: Tensor
    dropped_of: Tensor
    updates: Tensor


class RoutingAnalyzer:
    """Keeps what the routers did, and tells every figure of it.

    Give it the routing of each step: `analyze_routing_step`, for torchmetrics `update`. That copies
    a few sums of each layer and computes nothing else. Two things are kept:

    - the sums of everything since `reset`, of which `compute` and `to_dict` are made;
    - the last `history` steps one by one, for `metric_history`, `get_aggregated_metrics`, `save`
      and `diagnose`. Older ones are dropped. A step takes `8 L (4 E + 9)` bytes: 17 KB for 2 layers
      of 256 experts, 0.4 MB for 48.

    The figures are those of `metrics.load_metrics`; those of `metrics.router_metrics` where the
    routing has statistics; `router_confidence`, the mean weight of a token's first expert (with
    softmax the largest probability; with `norm_topk_prob` its share among the K), where it is a
    RoutingResult; `drop_rate` where a permutation was given. A layer without a token has NaN for
    ratios, and NaN is left out of all means.

    Args:
        num_experts: E, of every layer.
        num_layers: L.
        history: how many steps are kept one by one; None for all of them.
        device: of the sums before the first step, which then go to where the counts are. Only for
            `compute(group)` on a rank that may have no step.

    Raises:
        ValueError: an argument below 1.

    Example:
        >>> analyzer = RoutingAnalyzer(num_experts=8)
        >>> analyzer.analyze_routing_step(torch.tensor([1, 2, 261, 266, 6, 253, 229, 6]))
        >>> analyzer.analyze_routing_step(torch.tensor([128, 128, 128, 128, 128, 128, 128, 128]))
        >>> cv = analyzer.get_aggregated_metrics()["cv"]
        >>> {name: round(value, 3) for name, value in cv.items()}
        {'mean': 0.487, 'std': 0.487, 'min': 0.0, 'max': 0.974, 'last': 0.0}
        >>> round(analyzer.compute()["cv"].item(), 3)  # of both steps together
        0.487
    """

    def __init__(
        self,
        num_experts: int,
        num_layers: int = 1,
        history: int | None = 500,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (
            ("num_experts", num_experts),
            ("num_layers", num_layers),
            ("history", 1 if history is None else history),
        ):
            if value < 1:
                raise ValueError(f"RoutingAnalyzer: {name} must be at least 1, got {value}")
        self.num_experts = num_experts
        self.num_layers = num_layers
        self._history = history
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forgets everything; steps are numbered from 0 again."""
        self._total = torch.zeros(
            self.num_layers, _width(self.num_experts), dtype=torch.float64, device=self._device
        )
        self._steps: deque[tuple[int, Tensor]] = deque(maxlen=self._history)
        self._num_updates = 0
        self._num_appended = 0  # of these, how many `append` has dealt with

    def analyze_routing_step(
        self,
        result: Routing,
        permuted: PermuteResult | Sequence[PermuteResult] | None = None,
        step: int | None = None,
    ) -> None:
        """Takes the routing of one step, of all layers.

        Segments (sequences) of a routing are added up. Of several micro-batches give
        `functional.concatenate_routings`, or they count as steps.

        Args:
            result: a RoutingResult, or one per layer; or integer counts [E], or [L, E], or [E] per
                layer.
            permuted: what `moe_permute` made of it, one per layer: counts what was dropped.
            step: its number; default one more than the last.

        Raises:
            ValueError: another number of layers or experts, counts that are not integers, or, on
                the CPU, negative ones.
        """
        row = _row(result, permuted, self.num_layers, self.num_experts)
        if step is None:
            step = self._steps[-1][0] + 1 if self._steps else 0
        self._add(step, row)

    update = analyze_routing_step  # torchmetrics' name for it

    @property
    def num_updates(self) -> int:
        """Steps since `reset`, whether they are still kept or not."""
        return self._num_updates

    @property
    def steps(self) -> list[int]:
        """The numbers of the steps that are kept."""
        return [step for step, _ in self._steps]

    @property
    def tokens_per_expert(self) -> Tensor:
        """[steps, L, E] int64 counts of the steps that are kept.

        Raises:
            RuntimeError: before the first step.
        """
        return self._kept("tokens_per_expert").tokens_per_expert.to(torch.int64)

    def metric_history(self) -> dict[str, Tensor]:
        """Every figure of every step that is kept.

        Returns:
            [steps, L] float64 tensors by name.

        Raises:
            RuntimeError: before the first step.
            ValueError: counts from CUDA were negative.
        """
        return _figures(self._kept("metric_history"))

    def compute(self, group: "torch.distributed.ProcessGroup | None" = None) -> dict[str, Tensor]:
        """Every figure of all tokens since `reset` taken together.

        Args:
            group: a process group over which the sums are added up first, in one all-reduce for
                all layers; each of its ranks has to call.

        Returns:
            [L] float64 tensors by name.

        Raises:
            RuntimeError: before the first step; in a group, when no rank has taken one.
            ValueError: counts from CUDA were negative.
        """
        total = self._total
        if group is not None:
            # A rank without a step must not raise before the others have its sums.
            total = total.clone()
            all_reduce_sum(total, group)
        row = _split(total, self.num_experts)
        if self._num_updates == 0 and (group is None or not bool((row.updates > 0).any())):
            raise RuntimeError("RoutingAnalyzer.compute: there is no step yet: call update first")
        return _figures(row)

    def to_dict(
        self,
        prefix: str = "moe/",
        last: int | None = None,
        per_layer: bool = True,
        group: "torch.distributed.ProcessGroup | None" = None,
    ) -> dict[str, float]:
        """The figures as plain numbers, for a log.

        Args:
            prefix: of every key.
            last: of the tokens of so many last steps taken together; default all since `reset`.
            per_layer: with the keys of the single layers.
            group: see `compute`; not with `last`.

        Returns:
            `moe/<metric>`, the mean over the layers; `moe/<metric>_p50` and `_p95`, percentiles
            over the layers; `moe/<metric>_layer_<i>`.

        Raises:
            RuntimeError: before the first step.
            ValueError: `last` below 1, or with `group`.

        Example:
            >>> analyzer = RoutingAnalyzer(num_experts=2, num_layers=2)
            >>> analyzer.update(torch.tensor([[4, 0], [2, 2]]))
            >>> [v for k, v in analyzer.to_dict().items() if k.startswith("moe/max_vio_layer")]
            [1.0, 0.0]
        """
        if last is None:
            figures = self.compute(group)
        else:
            if group is not None:
                raise ValueError("RoutingAnalyzer.to_dict: takes last or group, not both")
            figures = _figures(_split(self._sum_of_last("to_dict", last), self.num_experts))
        names, values = _over_layers(figures, per_layer)
        return dict(zip((prefix + name for name in names), values.tolist(), strict=True))

    def get_aggregated_metrics(self, per_layer: bool = True) -> dict[str, dict[str, float]]:
        """Of every figure "mean", "std" (population), "min", "max" and "last" over the steps kept.

        Args:
            per_layer: with the figures of the single layers.

        Returns:
            By name: `<metric>`, the mean over the layers; `<metric>_p50` and `_p95`, percentiles
            over the layers; `<metric>_layer_<i>`.

        Raises:
            RuntimeError: before the first step.
        """
        names, values = _over_layers(self.metric_history(), per_layer)
        mean = values.nanmean(-1)
        known = ~values.isnan()
        nothing = ~known.any(-1)
        over_steps = {
            "mean": mean,
            "std": (values - mean.unsqueeze(-1)).square().nanmean(-1).sqrt(),
            "min": values.where(known, math.inf).amin(-1).masked_fill(nothing, math.nan),
            "max": values.where(known, -math.inf).amax(-1).masked_fill(nothing, math.nan),
            "last": values[..., -1],
        }
        rows = torch.stack(list(over_steps.values()), -1).tolist()
        return {
            name: dict(zip(over_steps, row, strict=True))
            for name, row in zip(names, rows, strict=True)
        }

    def get_paper_metrics_summary(self) -> dict[str, float]:
        """What papers print of a run, over the steps kept: means over layers and steps.

        Returns:
            - `max_vio_batch`, the mean MaxVio of a step, and `max_vio_global`, that of the tokens
              of all steps together (Wang 2024, arXiv:2408.15664)
            - `cv` and `imbalance_ratio`, Shazeer's CV(Load) and max/mean load (arXiv:1701.06538)
            - `gini`, `perplexity`, `dead_experts` (per layer), `expert_utilization_rate`
            - with statistics `switch_loss`, `token_entropy` (nats) and
              `expert_specialization_strength`; `router_confidence`; `drop_rate`
            - `num_steps`, `num_layers`, `num_experts`, `num_slots`: chosen slots in all

        Raises:
            RuntimeError: before the first step.
        """
        aggregated = self.get_aggregated_metrics(per_layer=False)
        total = self._sum_of_last("get_paper_metrics_summary", len(self._steps))
        counts = _split(total, self.num_experts).tokens_per_expert
        summary = {
            name: aggregated[metric]["mean"]
            for name, metric in _PAPER.items()
            if metric in aggregated
        }
        return summary | {
            "max_vio_global": load_metrics(counts.long())["max_vio"].nanmean().item(),
            "num_steps": len(self._steps),
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "num_slots": int(counts.sum()),
        }

    def merge_state(self, other: "RoutingAnalyzer") -> None:
        """Adds what `other` has seen, for example on another rank.

        The sums are added up. So are steps with the same number; the others stand beside them, in
        the order of their numbers, and the last `history` of them stay.

        Raises:
            ValueError: `other` is of another number of layers or experts.
        """
        shape = (other.num_layers, other.num_experts)
        if shape != (self.num_layers, self.num_experts):
            raise ValueError(
                f"RoutingAnalyzer.merge_state: other must have (num_layers, num_experts) = "
                f"{(self.num_layers, self.num_experts)}, got {shape}"
            )
        rows = dict(self._steps)
        for step, row in dict(other._steps).items():
            rows[step] = rows[step] + row.to(rows[step].device) if step in rows else row
        self._steps = deque(sorted(rows.items()), maxlen=self._history)
        self._total = self._total + other._total.to(self._total.device)
        self._num_updates += other._num_updates

    def save(self, path: str | os.PathLike) -> None:
        """Writes the steps that are kept as a routing log, over whatever was there.

        A routing log is JSON Lines. The first line is
        `{"equipoise_routing_log": 1, "num_layers": L, "num_experts": E}`, every further line a
        step:

        - `step`: its number
        - `tokens_per_expert`: [L][E] whole numbers
        - `sums`: [L][2 E + 5], the statistics of the routers as in `RoutingResult.sums`
        - `first_choice`: [L][2], the sum of the tokens' first weights, and the number of tokens
        - `dropped_per_expert`: [L][E], and `dropped_of`: [L], the slots they were dropped from

        Only the first two are always there.

        Raises:
            RuntimeError: before the first step.
        """
        self._require_steps("save")
        with open(path, "w", encoding="utf-8") as file:
            file.write(self._header())
            file.writelines(self._lines(len(self._steps)))

    def append(self, path: str | os.PathLike) -> None:
        """Adds the steps since the last `append` to a routing log, which it begins if need be.

        It waits for the device: call it now and then, at least every `history` steps, or the log
        leaves out those that are no longer kept. The half line of a run that was killed is cut off.

        Args:
            path: always the same one.

        Raises:
            ValueError: the file is no routing log, or of another version, L or E.
        """
        path = Path(path)
        begin = self._header()
        if path.exists() and path.stat().st_size:
            with path.open(encoding="utf-8") as file:
                shape = _read_header(path, file.readline())
            if shape != (self.num_layers, self.num_experts):
                raise ValueError(
                    f"RoutingAnalyzer.append: {path} must be a log of (num_layers, num_experts) = "
                    f"{(self.num_layers, self.num_experts)}, got {shape}"
                )
            _cut_half_line(path)
            begin = "" if path.stat().st_size else begin
        new = min(self._num_updates - self._num_appended, len(self._steps))
        with path.open("a", encoding="utf-8") as file:
            file.write(begin + "".join(self._lines(new)))
        self._num_appended = self._num_updates

    @classmethod
    def load(cls, path: str | os.PathLike, history: int | None = None) -> "RoutingAnalyzer":
        """Reads a routing log, see `save`.

        Where the last line has been cut off, all lines before it are read, with one warning.

        Args:
            path: of the log.
            history: how many steps are kept one by one; default all.

        Raises:
            ValueError: the file is no routing log, or of another version; a line is damaged, or its
                counts are negative, no whole numbers, or of another L or E. It names the line.
        """
        path = Path(path)
        with path.open(encoding="utf-8") as file:
            num_layers, num_experts = _read_header(path, file.readline())
            analyzer = cls(num_experts, num_layers, history)
            for number, line in enumerate(file, start=2):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    if not line.endswith("\n"):
                        warnings.warn(
                            f"RoutingAnalyzer.load: {path} has been cut off in the middle of line "
                            f"{number}; the {number - 2} steps before it are read",
                            stacklevel=2,
                        )
                        break
                    raise ValueError(
                        f"RoutingAnalyzer.load: {path}, line {number} must be JSON, got {error}"
                    ) from error
                try:
                    analyzer._add(*_parse(record, num_layers, num_experts))
                except ValueError as error:
                    raise ValueError(
                        f"RoutingAnalyzer.load: {path}, line {number}: {error}"
                    ) from error
        analyzer._num_appended = analyzer._num_updates
        return analyzer

    def __repr__(self) -> str:
        return (
            f"RoutingAnalyzer(num_experts={self.num_experts}, num_layers={self.num_layers}, "
            f"history={self._history}): {self._num_updates} steps"
        )

    def _add(self, step: int, row: Tensor) -> None:
        if self._num_updates == 0:
            self._total = torch.zeros_like(row)
        self._total += row.to(self._total.device)
        self._steps.append((step, row))
        self._num_updates += 1

    def _require_steps(self, function: str) -> None:
        if not self._steps:
            raise RuntimeError(
                f"RoutingAnalyzer.{function}: there is no step yet: call analyze_routing_step first"
            )

    def _kept(self, function: str) -> Row:
        self._require_steps(function)
        device = self._total.device
        return _split(torch.stack([row.to(device) for _, row in self._steps]), self.num_experts)

    def _sum_of_last(self, function: str, last: int) -> Tensor:
        """[L, 4 E + 9], the sum of so many last steps."""
        if last < 1:
            raise ValueError(f"RoutingAnalyzer.{function}: last must be at least 1, got {last}")
        self._require_steps(function)
        rows = list(self._steps)[-last:]
        return torch.stack([row.to(self._total.device) for _, row in rows]).sum(0)

    def _header(self) -> str:
        header = {
            _HEADER: LOG_VERSION,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
        }
        return json.dumps(header) + "\n"

    def _lines(self, last: int) -> list[str]:
        """The lines of so many last steps."""
        steps = list(self._steps)[len(self._steps) - last :]
        if not steps:
            return []
        rows = torch.stack([row.to(self._total.device) for _, row in steps]).cpu()
        return [
            json.dumps({"step": step, **_record(row, self.num_experts)}) + "\n"
            for (step, _), row in zip(steps, rows, strict=True)
        ]


def torchmetrics_metric(num_experts: int, num_layers: int = 1) -> "Metric":
    """A `torchmetrics.Metric` of the figures of `RoutingAnalyzer.compute`, for who logs with it.

    Its `update` takes what `RoutingAnalyzer.update` takes (but no `step`), its `compute` returns
    [L] tensors by name. The state is one tensor, so that torchmetrics joins the ranks with a single
    gather for all layers.

    Args:
        num_experts: E.
        num_layers: L.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: an argument below 1.
    """
    return _metric_class()(num_experts, num_layers)


@functools.cache  # torchmetrics merges metrics of one class only
def _metric_class() -> "type[Metric]":
    try:
        from torchmetrics import Metric
    except ImportError as error:
        raise ImportError(
            "equipoise.analyzer.torchmetrics_metric: needs the package torchmetrics, which is not "
            "installed; RoutingAnalyzer has the same update, compute, reset and merge_state "
            "without it"
        ) from error

    class RoutingMetric(Metric):
        is_differentiable = False
        higher_is_better = None
        full_state_update = False
        total: Tensor

        def __init__(self, num_experts: int, num_layers: int) -> None:
            super().__init__()
            self.num_experts = num_experts
            self.num_layers = num_layers
            empty = RoutingAnalyzer(num_experts, num_layers)._total  # checks the arguments, too
            self.add_state("total", default=empty, dist_reduce_fx="sum")

        def update(
            self,
            result: Routing,
            permuted: PermuteResult | Sequence[PermuteResult] | None = None,
        ) -> None:
            row = _row(result, permuted, self.num_layers, self.num_experts)
            self.total = self.total + row.to(self.total.device)

        def compute(self) -> dict[str, Tensor]:
            row = _split(self.total, self.num_experts)
            if not bool((row.updates > 0).any()):
                raise RuntimeError("RoutingMetric.compute: there is no step yet: call update first")
            return _figures(row)

    return RoutingMetric


def _sizes(num_experts: int) -> list[int]:
    """Of the parts of a row, in the order of `Row`."""
    return [num_experts, 2 * num_experts + _SUMS_TAIL, 2, num_experts, 1, 1]


def _width(num_experts: int) -> int:
    return sum(_sizes(num_experts))


def _split(rows: Tensor, num_experts: int) -> Row:
    return Row(*rows.split(_sizes(num_experts), dim=-1))


@torch.no_grad()
def _row(
    result: Routing,
    permuted: PermuteResult | Sequence[PermuteResult] | None,
    num_layers: int,
    num_experts: int,
) -> Tensor:
    """[L, 4 E + 9] of one step; a few launches for all layers together, and no wait."""
    if isinstance(result, RoutingResult):
        results = [result]
    elif isinstance(result, Tensor):
        results = list(result.reshape(1, -1) if result.dim() == 1 else result)
    else:
        results = list(result)
    if len(results) != num_layers:
        raise ValueError(
            f"RoutingAnalyzer: result must have one routing for each of {num_layers} layers, "
            f"got {len(results)}"
        )
    of_layers = [_counts(r, num_experts) for r in results]
    device = of_layers[0].device
    counts = torch.stack([c.to(device) for c in of_layers])
    rows = counts.new_zeros(num_layers, _width(num_experts), dtype=torch.float64)
    row = _split(rows, num_experts)
    row.tokens_per_expert.copy_(counts)
    row.updates.fill_(1)
    if all(isinstance(r, RoutingResult) for r in results):
        if all(r.sums is not None for r in results):
            sums = [r.sums.sum(0) if r.sums.dim() == 2 else r.sums for r in results]
            row.sums.copy_(torch.stack([s.to(device) for s in sums]))
        weights = [r.topk_weights[..., 0].sum().to(device) for r in results]
        tokens = [(r.topk_indices[..., 0] >= 0).sum().to(device) for r in results]
        row.first_choice[:, 0].copy_(torch.stack(weights))
        row.first_choice[:, 1].copy_(torch.stack(tokens))
    if permuted is not None:
        parts = [permuted] if isinstance(permuted, PermuteResult) else list(permuted)
        dropped = [p.dropped_per_expert for p in parts]
        if len(dropped) != num_layers or any(d.shape != (num_experts,) for d in dropped):
            raise ValueError(
                f"RoutingAnalyzer: permuted must have one result of {num_experts} experts for each "
                f"of {num_layers} layers, got {[list(d.shape) for d in dropped]}"
            )
        row.dropped_per_expert.copy_(torch.stack([d.to(device) for d in dropped]))
        row.dropped_of.copy_(counts.sum(1, keepdim=True))
    return rows


def _counts(result: Any, num_experts: int) -> Tensor:
    """[E] of one layer."""
    counts = result.tokens_per_expert if isinstance(result, RoutingResult) else result
    if not isinstance(counts, Tensor):
        raise ValueError(
            "RoutingAnalyzer: result must be a RoutingResult or a tensor of counts, or one per "
            f"layer, got {type(result).__name__}"
        )
    if isinstance(result, RoutingResult) and counts.dim() == 2:
        counts = counts.sum(0)
    if counts.shape != (num_experts,):
        raise ValueError(
            f"RoutingAnalyzer: tokens_per_expert must have shape [E] = [{num_experts}] in each "
            f"layer, got {list(counts.shape)}"
        )
    if not isinstance(result, RoutingResult):
        check_counts("RoutingAnalyzer: tokens_per_expert", counts)
    return counts


def check_counts(name: str, counts: Tensor) -> None:
    """ValueError for what cannot be counts; of the values on the CPU only, where it is no wait."""
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers (counts, never means), got {counts.dtype}")
    if counts.device.type == "cpu" and bool((counts < 0).any()):
        raise ValueError(f"{name} must not be negative, got {counts.min().item()}")


def _figures(row: Row) -> dict[str, Tensor]:
    """Every figure of rows [..., 4 E + 9] that there is data for; [...] each."""
    if bool((row.tokens_per_expert < 0).any()):  # from CUDA, where it was not looked at
        raise ValueError(
            "RoutingAnalyzer: tokens_per_expert must not be negative, "
            f"got {int(row.tokens_per_expert.min())}"
        )
    figures = load_metrics(row.tokens_per_expert.long())
    num_tokens = row.sums[..., -_SUMS_TAIL]
    if bool((num_tokens > 0).any()):
        figures |= router_metrics(row.sums)
    weight, tokens = row.first_choice.unbind(-1)
    if bool((tokens > 0).any()):
        figures["router_confidence"] = weight / tokens
    slots = row.dropped_of.squeeze(-1)
    if bool((slots > 0).any()):
        figures["drop_rate"] = row.dropped_per_expert.sum(-1) / slots
    return figures


def _over_layers(figures: dict[str, Tensor], per_layer: bool) -> tuple[list[str], Tensor]:
    """[..., L] each -> names and [names, ...]: mean, percentiles and layers of each figure."""
    names, values = [], []
    for name, value in figures.items():
        percentiles = torch.tensor([0.5, 0.95], dtype=value.dtype, device=value.device)
        names += [name, f"{name}_p50", f"{name}_p95"]
        values += [value.nanmean(-1), *value.nanquantile(percentiles, dim=-1)]
        if per_layer:
            names += [f"{name}_layer_{layer}" for layer in range(value.shape[-1])]
            values += value.unbind(-1)
    return names, torch.stack(values)


def _record(row: Tensor, num_experts: int) -> dict[str, list]:
    """What a line of the log says of [L, 4 E + 9] on the CPU."""
    parts = _split(row, num_experts)
    record = {"tokens_per_expert": parts.tokens_per_expert.long().tolist()}
    if bool((parts.sums != 0).any()):
        record["sums"] = parts.sums.tolist()
    if bool((parts.first_choice != 0).any()):
        record["first_choice"] = parts.first_choice.tolist()
    if bool((parts.dropped_of != 0).any()):
        record["dropped_per_expert"] = parts.dropped_per_expert.long().tolist()
        record["dropped_of"] = parts.dropped_of.squeeze(-1).long().tolist()
    return record


def _parse(record: Any, num_layers: int, num_experts: int) -> tuple[int, Tensor]:
    """The step and its row, of a line of the log; ValueError says what is wrong."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("a step must be an object with its number under 'step'")
    row = torch.zeros(num_layers, _width(num_experts), dtype=torch.float64)
    parts = _split(row, num_experts)
    parts.updates.fill_(1)
    for name, whole in _FIELDS.items():
        if name not in record:
            if name == "tokens_per_expert":
                raise ValueError("tokens_per_expert is missing")
            continue
        part = getattr(parts, name)
        values = record[name]
        if name == "dropped_of" and isinstance(values, list):
            values = [[value] for value in values]
        if not _is_table(values, part.shape[1], num_layers):
            raise ValueError(
                f"{name} must be {num_layers} lists (layers) of {part.shape[1]} numbers each"
            )
        for value in (value for layer in values for value in layer):
            if type(value) is not int and (whole or type(value) is not float):
                wanted = "whole numbers" if whole else "numbers"
                raise ValueError(f"{name} must hold {wanted}, got {value!r}")
            if whole and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        part.copy_(torch.tensor(values, dtype=torch.float64))
    return record["step"], row


# The parts of a row that stand in a log, and whether they are whole numbers.
_FIELDS = {
    "tokens_per_expert": True,
    "sums": False,
    "first_choice": False,
    "dropped_per_expert": True,
    "dropped_of": True,
}


def _is_table(values: Any, width: int, num_layers: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == num_layers
        and all(isinstance(layer, list) and len(layer) == width for layer in values)
    )


def _read_header(path: Path, line: str) -> tuple[int, int]:
    """(num_layers, num_experts)."""
    try:
        header = json.loads(line)
        version = header[_HEADER]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"RoutingAnalyzer: {path} is no routing log: its first line must be "
            f'{{"{_HEADER}": {LOG_VERSION}, "num_layers": L, "num_experts": E}}, '
            f"got {line[:80]!r}"
        ) from error
    if version != LOG_VERSION:
        raise ValueError(
            f"RoutingAnalyzer: {path} is a routing log of version {version!r}; this equipoise "
            f"reads version {LOG_VERSION}"
        )
    shape = header.get("num_layers"), header.get("num_experts")
    if not all(type(n) is int and n >= 1 for n in shape):
        raise ValueError(
            f"RoutingAnalyzer: {path}: the header's num_layers and num_experts must be whole "
            f"numbers of at least 1, got {shape}"
        )
    return shape


def _cut_half_line(path: Path) -> None:
    """Cuts off what stands behind the last line end."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - 65536)
            file.seek(begin)
            line_end = file.read(end - begin).rfind(b"\n")
            if line_end >= 0:
                end = begin + line_end + 1
                break
            end = begin
        file.truncate(end)

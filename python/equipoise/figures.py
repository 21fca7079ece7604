# SPDX-License-Identifier: Apache-2.0
"""Figures of a routing, as matplotlib figures (`pip install 'equipoise[demo]'`).

All read in black and white: lines differ in dash and marker, heat maps run from white to black.
Every function takes plain tensors and returns a `Figure`, to be shown or saved by the caller.

>>> figure = load_histogram({"layer 0": torch.tensor([1, 2, 261, 266, 6, 253, 229, 6])})
>>> figure.axes[0].get_ylabel()
'load (1 = a fair share)'
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What `load_curves` draws unless told otherwise, and how its axes are named.
CURVES = {
    "max_vio": "MaxVio (fullest expert above a fair share)",
    "cv": "CV (standard deviation / mean)",
}
# Colours that differ in lightness; dash and marker tell them apart without.
_LINES = (
    {"color": "#c1272d", "linestyle": "-", "marker": "o"},
    {"color": "#0072b2", "linestyle": "--", "marker": "s"},
    {"color": "#202020", "linestyle": ":", "marker": "^"},
    {"color": "#7a5195", "linestyle": "-.", "marker": "D"},
    {"color": "#4d9221", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
)
_MANY = 40  # experts that still have a number each on an axis


def line_style(number: int, points: int) -> dict:
    """Colour, dash and marker of the line with this number, for a line of so many points."""
    style = _LINES[number % len(_LINES)]
    return {**style, "linewidth": 1.6, "markersize": 5, "markevery": max(1, points // 8)}


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, drawn without a window.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "equipoise.figures needs matplotlib: pip install 'equipoise[demo]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def tidy(ax: "Axes") -> None:
    """Grid, no frame, legend."""
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)


def in_windows(tokens_per_expert: Tensor, steps: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The last step of each window of `width` steps, and the counts [windows, L, E] in it."""
    ends = torch.stack([part[-1] for part in steps.split(width)])
    return ends, torch.stack([part.sum(0) for part in tokens_per_expert.split(width)])


def load_heatmap(
    runs: Mapping[str, Tensor],
    steps: Tensor | None = None,
    columns: int = 100,
    layers: Sequence[int] | None = None,
) -> "Figure":
    """Load of every expert over the steps: a row of panels per layer, a column per run.

    White is no token, black four times a fair share; experts in the order of their last load.

    Args:
        runs: label -> [S, L, E] counts, equally large.
        steps: [S] their numbers, from 1 on if not given.
        columns: about so many moments are told apart.
        layers: [L] their numbers, from 0 on if not given.
    """
    count, num_layers, experts = _history(runs)
    layers = range(num_layers) if layers is None else layers
    steps = torch.arange(1, count + 1) if steps is None else steps
    figure = new_figure(max(8, 4 * len(runs)), 0.9 + 2.2 * num_layers)
    figure.get_layout_engine().set(wspace=0.05)
    axes = figure.subplots(num_layers, len(runs), sharex=True, sharey=True, squeeze=False)
    first, last = steps[0].item() - 1, steps[-1].item()
    for column, (label, counts) in enumerate(runs.items()):
        counts = in_windows(counts, steps, max(1, count // columns))[1].double()
        load = counts * experts / counts.sum(-1, keepdim=True)  # 1 = a fair share
        for row, layer in enumerate(layers):
            order = load[-10:, row].nansum(0).argsort(descending=True)
            ax = axes[row, column]
            image = ax.imshow(
                load[:, row, order].T.numpy(),
                aspect="auto",
                cmap="gray_r",
                vmin=0,
                vmax=4,
                interpolation="nearest",
                extent=(first, last, experts, 0),
            )
            if row == 0:
                ax.set_title(label)
            if column == 0:
                ax.set_ylabel(f"layer {layer}: experts,\nby their last load")
            if row == num_layers - 1:
                ax.set_xlabel("step")
    bar = figure.colorbar(image, ax=axes, extend="max", aspect=11 * num_layers, pad=0.01)
    bar.set_label("load (1 = a fair share, white = no token)")
    return figure


def load_curves(
    runs: Mapping[str, Tensor],
    steps: Tensor | None = None,
    width: int = 1,
    names: Mapping[str, str] = CURVES,
) -> "Figure":
    """Load metrics over the steps, means over the layers: a panel per metric, a line per run.

    Args:
        runs: label -> [S, L, E] counts, equally large.
        steps: [S] their numbers, from 1 on if not given.
        width: steps behind one point.
        names: of metrics in `metrics.load_metrics` -> titles.
    """
    count, _, _ = _history(runs)
    steps = torch.arange(1, count + 1) if steps is None else steps
    figure = new_figure(5 * len(names), 3.8)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, (name, title) in zip(axes, names.items(), strict=True):
        for number, (label, counts) in enumerate(runs.items()):
            ends, windows = in_windows(counts, steps, width)
            values = metrics.load_metrics(windows)[name].nanmean(-1)
            ax.plot(ends.numpy(), values.numpy(), label=label, **line_style(number, len(ends)))
        ax.set_title(title, fontsize="medium")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("step")
        over = f", over {width} steps" if width > 1 else ""
        ax.set_ylabel(f"mean of the layers{over}")
        tidy(ax)
    return figure


def load_histogram(tokens_per_expert: Mapping[str, Tensor]) -> "Figure":
    """Load of the experts, fullest first: a line per layer or run, and the fair share.

    Args:
        tokens_per_expert: label -> [E] counts.
    """
    figure = new_figure(7, 3.8)
    ax = figure.subplots()
    for number, (label, counts) in enumerate(tokens_per_expert.items()):
        load = counts.double().sort(descending=True).values * counts.numel() / counts.sum()
        places = torch.arange(1, counts.numel() + 1)
        ax.step(
            places.numpy(),
            load.numpy(),
            where="mid",
            label=label,
            **line_style(number, counts.numel()),
        )
    ax.axhline(1, color="#808080", linewidth=1)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("experts, fullest first")
    ax.set_ylabel("load (1 = a fair share)")
    tidy(ax)
    return figure


def matrix(values: Tensor, title: str, of: str, low: float, high: float) -> "Figure":
    """A square of experts by experts, white at `low` and black at `high`.

    For the similarity of experts (`metrics.expert_similarity`, from -1 or 0 to 1) and how often
    two are chosen together (`metrics.co_activation`).

    Args:
        values: [E, E].
        title: of the figure.
        of: what a value is, named beside the scale.
        low: the value that is white.
        high: the value that is black.

    >>> figure = matrix(torch.eye(4), "Expert similarity", "cosine", 0, 1)
    >>> figure.axes[0].get_title()
    'Expert similarity'
    """
    if values.dim() != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"matrix: values must have shape [E, E], got {list(values.shape)}")
    figure = new_figure(5.4, 4.6)
    ax = figure.subplots()
    image = ax.imshow(values.numpy(), cmap="gray_r", vmin=low, vmax=high, interpolation="nearest")
    if values.shape[0] <= _MANY:
        ax.set_xticks(range(0, values.shape[0], 1 if values.shape[0] <= 16 else 4))
        ax.set_yticks(ax.get_xticks())
    ax.set_xlabel("expert")
    ax.set_ylabel("expert")
    ax.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=ax, label=of)
    return figure


def loss_terms(
    terms: Mapping[str, Sequence[float] | Tensor], steps: Tensor | None = None
) -> "Figure":
    """The unscaled terms of a loss over the steps, a line each, on a logarithmic scale.

    Args:
        terms: name -> [S] values. Those that are not positive leave a gap.
        steps: [S] their numbers, from 1 on if not given.
    """
    figure = new_figure(8, 3.8)
    ax = figure.subplots()
    for number, (name, values) in enumerate(terms.items()):
        values = torch.as_tensor(values, dtype=torch.float64)
        at = torch.arange(1, len(values) + 1) if steps is None else steps
        shown = torch.where(values > 0, values, torch.nan)
        ax.plot(at.numpy(), shown.numpy(), label=name, **line_style(number, len(values)))
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("unscaled value")
    tidy(ax)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # lines are everywhere
    return figure


def _history(runs: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """S, L and E of counts [S, L, E] of runs."""
    shapes = {tuple(counts.shape) for counts in runs.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or 0 in shape:
        got = {label: list(counts.shape) for label, counts in runs.items()}
        raise ValueError(f"counts must be [S, L, E], S >= 1, the same for all runs, got {got}")
    return shape

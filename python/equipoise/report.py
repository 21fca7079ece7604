# SPDX-License-Identifier: Apache-2.0
"""The demo's report folder: plots as PNG, figures as JSON, and one page that shows them.

Plots are drawn so that they read in black and white: lines differ in dash and marker, the heat map
runs from white (no token) to black. The page needs nothing but the files beside it.
"""

import argparse
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = {"none": "no balancing", "switch": "Switch loss", "loss_free": "loss-free bias"}
WINDOW = 20  # steps behind one point of a load curve, and behind the MaxVio shown live
COLUMNS = ["run", "bits/byte", "CV", "MaxVio", "perplexity\nof usage", "dead\nexperts", "seconds"]
_LINES = {
    "none": {"color": "#c1272d", "linestyle": "-", "marker": "o"},
    "switch": {"color": "#0072b2", "linestyle": "--", "marker": "s"},
    "loss_free": {"color": "#202020", "linestyle": ":", "marker": "^"},
}


@dataclass
class Corpus:
    """Bytes to learn from and bytes to be judged by."""

    train: Tensor
    """[N] uint8."""
    held_out: Tensor
    """[M] uint8, from other files."""
    num_files: int
    sha256: str
    """Of all bytes: the standard library differs from one Python to the next."""


@dataclass
class Run:
    """What one training run left behind."""

    method: str
    """A key of METHODS."""
    loss: Tensor
    """[steps] training loss without the balance loss, bits per byte."""
    tokens_per_expert: Tensor
    """[steps, layers, experts] int64."""
    seconds: float
    """Of training alone."""
    held_out_loss: float
    """Bits per byte on the held-out files."""
    held_out_tokens_per_expert: Tensor
    """[layers, experts] int64."""

    @property
    def label(self) -> str:
        """The method as people call it."""
        return METHODS[self.method]

    @property
    def summary(self) -> dict[str, float]:
        """Load on the held-out files: means over the layers, and all dead experts."""
        load = metrics.load_metrics(self.held_out_tokens_per_expert)
        return {
            "bits_per_byte": self.held_out_loss,
            "cv": load["cv"].mean().item(),
            "max_vio": load["max_vio"].mean().item(),
            "perplexity": load["perplexity"].mean().item(),
            "dead_experts": int(load["dead_experts"].sum()),
            "seconds": self.seconds,
        }


def rows(runs: list[Run]) -> list[list[str]]:
    """The table's cells, one row per run, in the order of COLUMNS."""
    cells = []
    for run in runs:
        layers, experts = run.held_out_tokens_per_expert.shape
        s = run.summary
        cells.append(
            [
                run.label,
                f"{s['bits_per_byte']:.3f}",
                f"{s['cv']:.2f}",
                f"{s['max_vio']:.2f}",
                f"{s['perplexity']:.1f}/{experts}",
                f"{s['dead_experts']}/{layers * experts}",
                f"{s['seconds']:.0f}",
            ]
        )
    return cells


def write(out: Path, runs: list[Run], corpus: Corpus, args: argparse.Namespace) -> Path:
    """Writes the report into the folder `out` and returns the path of its page."""
    figures = {
        "heatmap.png": _plot_heatmap(runs),
        "load.png": _plot_load(runs),
        "loss.png": _plot_loss(runs),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=130)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    settings["corpus_sha256"] = corpus.sha256
    results = {"settings": settings, "runs": {run.method: run.summary for run in runs}}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    page = out / "index.html"
    page.write_text(_page(runs, settings))
    return page


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # here, so that the demo can say what is not installed

    return Figure(figsize=(width, height), layout="constrained")


def _windows(run: Run, width: int) -> tuple[Tensor, Tensor]:
    """The last step of each window of `width` steps, and the counts [windows, L, E] in it."""
    steps = run.tokens_per_expert.shape[0]
    parts = run.tokens_per_expert.split(width)
    ends = torch.tensor([min((i + 1) * width, steps) for i in range(len(parts))])
    return ends, torch.stack([part.sum(0) for part in parts])


def _plot_heatmap(runs: list[Run]) -> "Figure":
    steps, layers, experts = runs[0].tokens_per_expert.shape
    figure = _figure(4 * len(runs), 0.9 + 2.6 * layers)
    figure.get_layout_engine().set(wspace=0.05)
    axes = figure.subplots(layers, len(runs), sharex=True, sharey=True, squeeze=False)
    width = max(1, steps // 100)
    for column, run in enumerate(runs):
        counts = _windows(run, width)[1].double()
        load = counts * experts / counts.sum(-1, keepdim=True)  # 1 = a fair share
        for layer in range(layers):
            order = load[-10:, layer].sum(0).argsort(descending=True)
            ax = axes[layer, column]
            image = ax.imshow(
                load[:, layer, order].T,
                aspect="auto",
                cmap="gray_r",
                vmin=0,
                vmax=4,
                interpolation="nearest",
                extent=(0, steps, experts, 0),
            )
            if layer == 0:
                ax.set_title(run.label)
            if column == 0:
                ax.set_ylabel(f"layer {layer + 1}: experts,\nby their last load")
            if layer == layers - 1:
                ax.set_xlabel("optimizer step")
    bar = figure.colorbar(image, ax=axes, extend="max", aspect=30, pad=0.01)
    bar.set_label("load (1 = a fair share, white = no token)")
    return figure


def _plot_load(runs: list[Run]) -> "Figure":
    figure = _figure(10, 3.8)
    width = _curve_width(runs)
    panels = {
        "max_vio": "MaxVio (fullest expert above a fair share)",
        "cv": "CV (standard deviation / mean)",
    }
    for ax, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for run in runs:
            steps, counts = _windows(run, width)
            values = metrics.load_metrics(counts)[name].mean(-1)
            ax.plot(steps, values, label=run.label, **_line(run, len(steps)))
        ax.set_title(title, fontsize="medium")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("optimizer step")
        ax.set_ylabel(f"mean of the layers, over {width} steps")
        _tidy(ax)
    return figure


def _plot_loss(runs: list[Run]) -> "Figure":
    figure = _figure(10, 3.8)
    ax, held_out = figure.subplots(1, 2, width_ratios=[3, 1])
    width = _curve_width(runs)
    for run in runs:
        steps, _ = _windows(run, width)
        values = [part.mean().item() for part in run.loss.split(width)]
        ax.plot(steps, values, label=run.label, **_line(run, len(steps)))
    ax.set_title("training", fontsize="medium")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(f"loss (bits per byte, mean of {width} steps)")
    _tidy(ax)
    if len(values) > 6:  # leave out the steep start, where the runs do not differ
        ax.set_ylim(0.97 * min(values), 1.03 * values[len(values) // 6])

    values = [run.held_out_loss for run in runs]
    for position, (run, value) in enumerate(zip(runs, values, strict=True)):
        style = _LINES[run.method]
        held_out.plot(position, value, color=style["color"], marker=style["marker"], markersize=9)
        held_out.annotate(
            f"{value:.3f}", (position, value), (0, 9), textcoords="offset points", ha="center"
        )
    margin = max(0.02, max(values) - min(values))
    held_out.set_ylim(min(values) - margin, max(values) + margin)
    held_out.set_xlim(-0.6, len(runs) - 0.4)
    held_out.set_xticks(range(len(runs)), [run.label.replace(" ", "\n") for run in runs])
    held_out.set_title("held-out files", fontsize="medium")
    held_out.set_ylabel("loss (bits per byte)")
    held_out.spines[["top", "right"]].set_visible(False)
    return figure


def _curve_width(runs: list[Run]) -> int:
    """Steps behind one point of a curve: fewer in a short run, which else had no curve."""
    return max(1, min(WINDOW, len(runs[0].loss) // 20))


def _line(run: Run, points: int) -> dict:
    return {**_LINES[run.method], "linewidth": 1.6, "markersize": 5, "markevery": points // 8 or 1}


def _tidy(ax: "Axes") -> None:
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)


def _page(runs: list[Run], settings: dict[str, object]) -> str:
    layers, experts = runs[0].held_out_tokens_per_expert.shape
    summary = {run.method: run.summary for run in runs}
    worst = summary["none"]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows(runs)
    )
    options = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>\n"
        for name, value in settings.items()
    )
    return _TEMPLATE.format(
        head=head,
        body=body,
        options=options,
        layers=layers,
        experts=experts,
        dead=worst["dead_experts"],
        all_experts=layers * experts,
        fullest=worst["max_vio"] + 1,
        in_effect=worst["perplexity"],
        switch=summary["switch"]["perplexity"],
        loss_free=summary["loss_free"]["perplexity"],
    )


_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>equipoise: three ways to load experts</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; color: #1a1a1a; background: #fff; }}
img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 2rem 0; }}
figcaption {{ color: #444; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }}
dd {{ margin: 0; overflow-wrap: anywhere; font-family: monospace; }}
</style>
</head>
<body>
<h1>Three ways to load {experts} experts</h1>
<p>The same byte-level transformer ({layers} MoE layers), from the same start, on the same batches
of Python's standard library source. Without balancing, {dead} of {all_experts} experts get no token
of the held-out files, the fullest of a layer gets {fullest:.1f} times its fair share, and a layer
works as if it had {in_effect:.1f} experts. With the Switch loss it is {switch:.1f}, with the
loss-free bias {loss_free:.1f}.</p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table>
<p>All on held-out files. CV, MaxVio and usage perplexity are means over the layers: CV is the
standard deviation of the tokens per expert over their mean, MaxVio how far the fullest expert is
above the mean, usage perplexity the number of experts in effect. Seconds are of training.</p>
<figure>
<img src="heatmap.png" alt="Load of every expert over the steps of each run">
<figcaption>Load of every expert while training. White rows are experts that get no token, black
ones get four times their share or more; even grey is balance.</figcaption>
</figure>
<figure>
<img src="load.png" alt="MaxVio and CV over the steps of each run">
<figcaption>How uneven the load is while training; 0 is perfect balance.</figcaption>
</figure>
<figure>
<img src="loss.png" alt="Training loss over the steps, and held-out loss, of each run">
<figcaption>What the model learns meanwhile, without the balance loss. A byte is predicted from the
bytes before it in its window, so these figures are for comparison with each other; another seed
moves them by a few hundredths of a bit.</figcaption>
</figure>
<h2>Settings</h2>
<dl>
{options}</dl>
</body>
</html>
"""

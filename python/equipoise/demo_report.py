# SPDX-License-Identifier: Apache-2.0
"""The demo's report folder: plots as PNG, figures as JSON, and one page that shows them.

The page needs nothing but the files beside it.
"""

import argparse
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from . import figures, metrics, report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = {"none": "no balancing", "switch": "Switch loss", "loss_free": "loss-free bias"}
WINDOW = 20  # steps behind one point of a load curve, and behind the MaxVio shown live
COLUMNS = ["run", "bits/byte", "CV", "MaxVio", "perplexity\nof usage", "dead\nexperts", "seconds"]


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
    counts = {run.label: run.tokens_per_expert for run in runs}
    plots = {
        "heatmap.png": figures.load_heatmap(counts),
        "load.png": figures.load_curves(counts, width=_curve_width(runs)),
        "loss.png": _plot_loss(runs),
    }
    for name, figure in plots.items():
        figure.savefig(out / name, dpi=130)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    settings["corpus_sha256"] = corpus.sha256
    results = {"settings": settings, "runs": {run.method: run.summary for run in runs}}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    page = out / "index.html"
    page.write_text(_page(runs, settings))
    return page


def _plot_loss(runs: list[Run]) -> "Figure":
    figure = figures.new_figure(10, 3.8)
    ax, held_out = figure.subplots(1, 2, width_ratios=[3, 1])
    width = _curve_width(runs)
    for number, run in enumerate(runs):
        values = [part.mean().item() for part in run.loss.split(width)]
        ends = [min((i + 1) * width, len(run.loss)) for i in range(len(values))]
        ax.plot(ends, values, label=run.label, **figures.line_style(number, len(ends)))
    ax.set_title("training", fontsize="medium")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(f"loss (bits per byte, mean of {width} steps)")
    figures.tidy(ax)
    if len(values) > 6:  # leave out the steep start, where the runs do not differ
        ax.set_ylim(0.97 * min(values), 1.03 * values[len(values) // 6])

    values = [run.held_out_loss for run in runs]
    for position, value in enumerate(values):
        style = {**figures.line_style(position, 1), "markersize": 9}
        held_out.plot(position, value, **style)
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


def _page(runs: list[Run], settings: dict[str, object]) -> str:
    layers, experts = runs[0].held_out_tokens_per_expert.shape
    summary = {run.method: run.summary for run in runs}
    worst = summary["none"]
    options = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>\n"
        for name, value in settings.items()
    )
    body = _BODY.format(
        table=report.table(COLUMNS, rows(runs)),
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
    return report.page(f"Three ways to load {experts} experts", body)


_BODY = """\
<p>The same byte-level transformer ({layers} MoE layers), from the same start, on the same batches
of Python's standard library source. Without balancing, {dead} of {all_experts} experts get no token
of the held-out files, the fullest of a layer gets {fullest:.1f} times its fair share, and a layer
works as if it had {in_effect:.1f} experts. With the Switch loss it is {switch:.1f}, with the
loss-free bias {loss_free:.1f}.</p>
{table}
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
"""

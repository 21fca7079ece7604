# SPDX-License-Identifier: Apache-2.0
"""A routing log as one HTML file: figures inside, nothing from the network."""

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import figures
from .analyzer import RoutingAnalyzer
from .diagnosis import diagnose

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The columns of the table of layers: figure -> heading and format.
_COLUMNS = {
    "cv": ("CV", ".2f"),
    "max_vio": ("MaxVio", ".2f"),
    "gini": ("Gini", ".2f"),
    "perplexity": ("experts in effect", ".1f"),
    "dead_experts": ("dead experts", ".0f"),
    "drop_rate": ("dropped", ".1%"),
    "switch_loss": ("Switch loss", ".3f"),
    "token_entropy": ("token entropy (nats)", ".2f"),
}
# Losses whose terms are drawn over the steps.
_TERMS = ("switch_loss", "z_loss", "uniform_kl_loss", "entropy_loss", "variance_loss")
_MOST_LAYERS = 5  # drawn in one figure


def write_report(
    analyzer: RoutingAnalyzer, path: str | os.PathLike, title: str = "Routing"
) -> None:
    """Writes what is known of a run as one HTML file.

    Args:
        analyzer: of the run, for example `RoutingAnalyzer.load("log.jsonl")`.
        path: of the file.
        title: of the page.

    Raises:
        RuntimeError: the analyzer has no step yet.
        ModuleNotFoundError: matplotlib is not installed.
    """
    counts = analyzer.tokens_per_expert.cpu()
    steps = torch.tensor(analyzer.steps)
    window = max(1, len(steps) // 100)
    history = analyzer.metric_history()
    layers = _worst_layers(counts)
    total = counts.sum(0)
    parts = [
        f"<p>{analyzer.num_layers} layers of {analyzer.num_experts} experts, steps {steps[0]} to "
        f"{steps[-1]}, {total[0].sum():,} choices of an expert in each layer.</p>",
        diagnose(analyzer=analyzer).to_html(),
        "<h2>Layers</h2>",
        table(*_rows_of_layers(analyzer)),
        "<h2>Over the steps</h2>",
        picture(
            figures.load_heatmap({"": counts[:, layers]}, steps, layers=layers),
            "Load of every expert. White is no token, black four times a fair share or more; even "
            "grey is balance.",
        ),
        picture(
            figures.load_curves({"all layers": counts}, steps, window),
            "How uneven the load is: 0 is balance.",
        ),
    ]
    terms = {name: history[name].nanmean(-1) for name in _TERMS if name in history}
    if terms:
        parts.append(
            picture(
                figures.loss_terms(terms, steps),
                "The balance losses before their coefficients, means over the layers. The Switch "
                "loss is 1 at balance, but also where probabilities are uniform, with any load.",
            )
        )
    parts += [
        "<h2>All steps together</h2>",
        picture(
            figures.load_histogram({f"layer {layer}": total[layer] for layer in layers}),
            "Load of the experts of a layer, fullest first; the line at 1 is a fair share.",
        ),
    ]
    Path(path).write_text(page(title, "\n".join(parts)), encoding="utf-8")


def page(title: str, body: str) -> str:
    """A whole HTML page; `body` is HTML, `title` is not."""
    title = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>equipoise: {title}</title>
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
<h1>{title}</h1>
{body}
</body>
</html>
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of texts."""
    lines = [
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        for tag, cells in [("th", head), *(("td", row) for row in rows)]
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines[1:])
    return f"<table>\n<thead><tr>{lines[0]}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def picture(figure: "Figure", caption: str) -> str:
    """A figure with its caption, the image inside the HTML."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    data = base64.b64encode(png.getvalue()).decode()
    caption = html.escape(caption)
    return (
        f'<figure>\n<img src="data:image/png;base64,{data}" alt="{caption}">\n'
        f"<figcaption>{caption}</figcaption>\n</figure>"
    )


def _worst_layers(counts: torch.Tensor) -> list[int]:
    """The layers that are drawn, of counts [S, L, E]: all, or those with the fullest expert."""
    total = counts.sum(0).double()
    share = (total.amax(-1) / total.sum(-1)).nan_to_num(0)
    return sorted(share.argsort(descending=True, stable=True)[:_MOST_LAYERS].tolist())


def _rows_of_layers(analyzer: RoutingAnalyzer) -> tuple[list[str], list[list[str]]]:
    metrics = analyzer.compute()
    columns = {name: column for name, column in _COLUMNS.items() if name in metrics}
    rows = [
        [str(layer), *(f"{metrics[name][layer]:{form}}" for name, (_, form) in columns.items())]
        for layer in range(analyzer.num_layers)
    ]
    return ["layer", *(heading for heading, _ in columns.values())], rows

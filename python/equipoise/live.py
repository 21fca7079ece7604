# SPDX-License-Identifier: Apache-2.0
"""A routing in the terminal: experts of all layers as a heat map, metrics as sparklines (rich)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import metrics

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHADES = " ░▒▓█"
_BARS = "▁▂▃▄▅▆▇█"


def heat(tokens_per_expert: Tensor, width: int = 64) -> str:
    """One layer in a line: a character per expert, or per several neighbours if they are many.

    A blank is no token at all, then less than half a fair share, up to 1.5, up to 2.5, and more.

    Args:
        tokens_per_expert: [E] counts.
        width: characters at most.

    >>> heat(torch.tensor([0, 10, 100, 200, 400, 90]))
    ' ░▒▓█▒'
    """
    experts = tokens_per_expert.numel()
    per_cell = -(-experts // width)
    load = tokens_per_expert.double() * experts / tokens_per_expert.sum().clamp_min(1)
    cells = torch.stack([part.mean() for part in load.split(per_cell)])
    shade = torch.bucketize(cells, torch.tensor([0.5, 1.5, 2.5]).double(), right=True) + 1
    return "".join(_SHADES[i] for i in torch.where(cells > 0, shade, 0))


def sparkline(values: Tensor, width: int = 24) -> str:
    """The last values as bars from 0 to their largest; a gap where there is no number.

    Args:
        values: [S] numbers >= 0, or NaN.
        width: how many are shown.

    >>> sparkline(torch.tensor([0.0, 1.0, 2.0, 4.0, float("nan")]))
    '▁▃▅█ '
    """
    values = values[-width:].double()
    largest = values.nan_to_num(0).max().clamp_min(1e-12)
    place = (values / largest * (len(_BARS) - 1)).round()
    return "".join(" " if v.isnan() else _BARS[int(v)] for v in place)


def view(tokens_per_expert: Tensor, step: int, width: int = 64) -> "RenderableType":
    """A table for the terminal, a row per layer: heat, metrics, and MaxVio over the last steps.

    Args:
        tokens_per_expert: [S, L, E] counts of the last steps; the heat is of all of them.
        step: the number of the last one.
        width: characters of the heat map at most.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    try:
        from rich.box import SIMPLE
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "equipoise.live needs rich: pip install 'equipoise[demo]'"
        ) from error
    steps, layers, experts = tokens_per_expert.shape
    total = tokens_per_expert.sum(0)
    load = metrics.load_metrics(total)
    history = metrics.load_metrics(tokens_per_expert)["max_vio"]
    table = Table(
        title=f"step {step}: load of {experts} experts over {steps} steps",
        title_justify="left",
        caption="blank: no token   ░ below half a fair share   ▒ fair   ▓ from 1.5   █ from 2.5",
        caption_justify="left",
        box=SIMPLE,
    )
    table.add_column("layer", justify="right")
    table.add_column("experts", no_wrap=True)
    for name in ("CV", "MaxVio", "dead"):
        table.add_column(name, justify="right")
    table.add_column("MaxVio, step by step", no_wrap=True)
    for layer in range(layers):
        table.add_row(
            str(layer),
            heat(total[layer], width),
            f"{load['cv'][layer]:.2f}",
            f"{load['max_vio'][layer]:.2f}",
            f"{load['dead_experts'][layer]:.0f}",
            sparkline(history[:, layer]),
        )
    return table

# SPDX-License-Identifier: Apache-2.0
"""The view for the terminal."""

import io

import pytest
import torch
from rich.console import Console

from equipoise import live


def text_of(renderable, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_heat_tells_dead_experts_from_starved_ones():
    counts = torch.tensor([0, 1, 49, 50, 149, 150, 249, 250])  # fair: 112.25
    assert live.heat(counts * 1000) == " ░░░▒▒▓▓"
    assert live.heat(torch.zeros(4, dtype=torch.long)) == "    "


@pytest.mark.parametrize("experts,cells", [(64, 64), (65, 33), (256, 64), (1000, 63)])
def test_heat_puts_neighbours_together(experts, cells):
    counts = torch.zeros(experts, dtype=torch.long)
    counts[-1] = 5
    heat = live.heat(counts)
    assert len(heat) == cells and heat.strip() == "█" == heat[-1]


def test_sparkline():
    assert live.sparkline(torch.zeros(3)) == "▁▁▁"
    assert live.sparkline(torch.tensor([7.0, 9.0, 1.0, 2.0, 4.0]), width=4) == "█▂▃▄"


@pytest.mark.parametrize("experts,width", [(8, 80), (256, 130)])
def test_view_has_a_row_per_layer_and_fits(experts, width):
    counts = torch.randint(1, 9, (30, 3, experts))
    counts[:, 1] = 0
    counts[:, 1, 2] = 7
    lines = text_of(live.view(counts, step=512), width).splitlines()
    assert max(map(len, lines)) <= width and lines[0].startswith("step 512")
    rows = [line.split() for line in lines if line.strip()[:1] in ("0", "1", "2")]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert f"{experts - 1:.2f}" in rows[1] and str(experts - 1) in rows[1]  # MaxVio, dead

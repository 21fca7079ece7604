# SPDX-License-Identifier: Apache-2.0
"""The report of a routing log, and the command line."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

import equipoise.functional as F
from equipoise import RoutingAnalyzer
from equipoise.__main__ import main
from equipoise.report import page, table, write_report


@pytest.fixture
def log(tmp_path):
    """Two layers of 8 experts over 20 steps; in the second nobody goes to expert 3."""
    analyzer = RoutingAnalyzer(num_experts=8, num_layers=2)
    bias = torch.zeros(2, 1, 8)
    bias[1, :, 3] = -50
    for _ in range(20):
        layers = torch.randn(2, 64, 8) + bias
        analyzer.analyze_routing_step([F.topk_gating(logits, 2) for logits in layers])
    path = tmp_path / "run.jsonl"
    analyzer.save(path)
    return path


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps sources, links and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta", "br", "hr", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_report_is_one_file_that_says_what_is_wrong(log, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", str(log), "-o", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    shown = Page(out.read_text())
    assert len(shown.sources) == 4  # heat map, curves, losses, histogram
    assert all(source.startswith("data:image/png;base64,") for source in shown.sources)
    assert "run" in shown.texts  # the title
    assert any("dead-experts" in text for text in shown.texts)
    row = shown.texts.index("1", shown.texts.index("dead experts"))
    assert "1" in shown.texts[row + 1 : row + 20]  # one dead expert in layer 1
    assert "nan" not in shown.texts


def test_report_from_counts_alone(tmp_path):
    analyzer = RoutingAnalyzer(num_experts=4, num_layers=12)
    analyzer.update(torch.randint(1, 9, (12, 4)))
    write_report(analyzer, tmp_path / "report.html", "<b>")
    shown = Page((tmp_path / "report.html").read_text())
    assert len(shown.sources) == 3 and "<b>" in shown.texts


def test_parts_of_a_page_are_escaped():
    text = page("a < b", table(["<i>"], [["&"]]))
    assert {"a < b", "<i>", "&"} <= set(Page(text).texts)


def test_diagnose(log, capsys):
    assert main(["diagnose", str(log)]) == 1  # something critical
    assert "dead-experts, layer 1" in capsys.readouterr().out
    main(["diagnose", "--json", str(log)])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert findings[0]["rule"] == "dead-experts"

    healthy = RoutingAnalyzer(num_experts=8)
    healthy.update(torch.full((8,), 100))
    healthy.save(log)
    assert main(["diagnose", str(log)]) == 0


def test_watch_once(log, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["watch", "--once", "--steps", "5", str(log)]) == 0
    out = capsys.readouterr().out
    assert "step 19" in out and "over 5 steps" in out and max(map(len, out.splitlines())) <= 100


def test_a_log_that_was_cut_is_read_with_a_warning(log, capsys):
    log.write_text(log.read_text()[:-20])
    assert main(["diagnose", str(log)]) == 1
    assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "must"),
        ("no json\n", "must"),
        ('{"equipoise_routing_log": 99, "num_layers": 1, "num_experts": 2}\n', "99"),
    ],
)
@pytest.mark.parametrize("command", ["report", "diagnose", "watch"])
def test_what_is_no_log_is_refused(command, text, message, tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    assert main([command, str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"equipoise {command}: error: ") and message in error
    assert main([command, str(tmp_path / "missing.jsonl")]) == 2


def test_info_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "equipoise", "info"], capture_output=True, text=True, check=True
    )
    assert "CPU kernels: " in done.stdout and f"torch {torch.__version__}" in done.stdout
    assert "matplotlib:" in done.stdout

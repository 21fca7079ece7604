# SPDX-License-Identifier: Apache-2.0
"""The demo, end to end at tiny sizes, and what it says to bad arguments."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from equipoise import demo, demo_report

TINY = [
    *("--steps", "12", "--batch-size", "4", "--seq-len", "8", "--layers", "2", "--d-model", "8"),
    *("--heads", "2", "--d-hidden", "8", "--experts", "4", "--top-k", "1"),
]


def run(*arguments):
    command = [sys.executable, "-m", "equipoise.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_end_to_end(tmp_path):
    out = tmp_path / "report"
    done = run(*TINY, "--out", str(out))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for label in ("no balancing", "Switch loss", "loss-free bias"):
        assert re.search(
            rf"{label} +step +12/12 +loss \d\.\d+ +[\d,]+ tokens/s +MaxVio", done.stdout
        )
        assert re.search(rf"^ *{label} +\d\.\d\d\d .*/4 .*/8 ", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.replace(str(out), "").splitlines())) <= 100

    names = {path.name for path in out.iterdir()}
    assert names == {"heatmap.png", "load.png", "loss.png", "results.json", "index.html"}
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    results = json.loads((out / "results.json").read_text())
    assert list(results["runs"]) == ["none", "switch", "loss_free"]
    assert 0 < results["runs"]["none"]["bits_per_byte"] < 10

    page = (out / "index.html").read_text()
    shown = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: shown.extend(
        value for name, value in attributes if name in ("src", "href")
    )
    parser.feed(page)
    assert sorted(shown) == ["heatmap.png", "load.png", "loss.png"]  # and nothing from elsewhere
    assert "Switch loss</td>" in page and "nan" not in page


def test_same_seed_same_numbers(tmp_path):
    args = demo.parse_arguments([*TINY, "--steps", "5", "--out", str(tmp_path / "report")])
    corpus = demo.load_corpus()
    for method in demo_report.METHODS:
        first, second = demo.train(method, args, corpus), demo.train(method, args, corpus)
        assert torch.equal(first.loss, second.loss)
        assert first.held_out_loss == second.held_out_loss
        assert torch.equal(first.tokens_per_expert, second.tokens_per_expert)
    args.seed = 1
    assert not torch.equal(demo.train(method, args, corpus).loss, first.loss)


def test_corpus_is_source_and_parts_do_not_overlap():
    corpus = demo.load_corpus()
    assert corpus.num_files > 100 and corpus.train.numel() > 4 * corpus.held_out.numel()
    assert b"import" in bytes(corpus.held_out[:20000].numpy())
    assert corpus.sha256 == demo.load_corpus().sha256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/folder/report"], "--out: the folder no/such/folder does not exist"),
        (["--out", __file__], "--out: cannot write to"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--layers", "-2"], "--layers: must be at least 1, got -2"),
        (["--seq-len", "100000"], "--seq-len: must be at most 65536"),
        (["--heads", "5"], "--heads: must divide --d-model 64, got 5"),
        (["--experts", "4", "--top-k", "4"], "--top-k: must be less than --experts 4, got 4"),
        (["--lr", "nan"], "--lr: must be a number >= 0, got nan"),
        (["--seed", "-1"], "--seed: must be between 0"),
        (["--device", "abacus"], "--device: cannot use 'abacus'"),
        (["--device", "meta"], "--device: cannot use 'meta': only cpu and cuda"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    output = capsys.readouterr()
    assert stopped.value.code == 2 and output.out == ""
    assert message in output.err and output.err.count("\n") == 1 and output.err.endswith("\n")


def test_bad_arguments_end_the_program_with_status_2():
    done = run("--steps", "0")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_diverging_run_is_said_in_one_line(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        assert demo.main([*TINY, "--lr", "1e30", "--out", str(tmp_path / "report")]) == 2
    finally:
        torch.set_num_threads(threads)
    assert "is not finite: try a smaller --lr" in capsys.readouterr().err

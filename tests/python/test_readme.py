# SPDX-License-Identifier: Apache-2.0
"""The examples of README.md: the Python one runs here, the C++ one is what tests/consumer runs."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def example(language: str) -> str:
    readme = (ROOT / "README.md").read_text()
    return re.search(rf"```{language}\n(.*?)```", readme, re.DOTALL)[1]


def test_python_example_runs(capsys):
    exec(compile(example("python"), "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_cpp_example_is_in_the_consumer():
    program = [line.strip() for line in (ROOT / "tests/consumer/main.cpp").read_text().splitlines()]
    lines = [line for line in example("cpp").splitlines() if line]
    assert [line for line in program if line in lines] == lines


def test_answers_to_complaints_exist():
    """docs/complaints.md names tests and rules: each is there."""
    text = (ROOT / "docs/complaints.md").read_text()
    tests = "".join(path.read_text() for path in ROOT.glob("tests/python/test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 25
    assert [name for name in named if f"def {name}(" not in tests] == []
    sources = "".join(path.read_text() for path in ROOT.glob("python/equipoise/**/*.py"))
    rules = re.findall(r'"([a-z]+-[a-z0-9-]+)"', text)
    assert len(rules) > 8
    assert [rule for rule in rules if f'"{rule}"' not in sources] == []

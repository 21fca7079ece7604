# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and the backends that the tests of the ops run on.

cpu   the library as it is installed
simt  the CUDA sources on the CPU (tests/simt), with the tensors of the same tests
"""

import collections
from pathlib import Path

import pytest
import torch
from simt import SIMT

from equipoise import ops  # loads the library: torch.ops.equipoise


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        cpu_only = metafunc.definition.get_closest_marker("cpu_only")
        others = ["simt"] if SIMT and not cpu_only else []
        metafunc.parametrize("backend", ["cpu", *others], indirect=True)


@pytest.fixture
def simt_ops(request, monkeypatch):
    """`equipoise.ops` leads to the CUDA sources on the CPU, under the schedule of the seed."""
    request.node.user_properties.append(("backend", "simt"))
    for name in ops.__all__:
        monkeypatch.setattr(ops, name, getattr(torch.ops.equipoise_simt, name).default)
    torch._dynamo.reset()
    SIMT.seed()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend(request):
    """The name of the backend that `equipoise.ops` leads to while the test runs."""
    if request.param == "simt":
        request.getfixturevalue("simt_ops")
        before = SIMT.launches()
    yield request.param
    if request.param == "simt" and not request.node.get_closest_marker("no_launch"):
        assert SIMT.launches() > before, "the test has not run a CUDA kernel"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    """torch.compile as the tests use it: one graph, dynamic shapes, no code generation."""

    def compile_function(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    return compile_function


def pytest_terminal_summary(terminalreporter):
    """How many tests each backend has passed: as the fixture says, or the name of the file."""
    of_file = {"test_simt.py": "simt", "test_cuda.py": "cuda"}
    passed = collections.Counter()
    for report in terminalreporter.stats.get("passed", []):
        default = of_file.get(Path(report.fspath).name, "cpu")
        passed[dict(report.user_properties).get("backend", default)] += 1
    counts = ", ".join(f"{name} {count}" for name, count in sorted(passed.items()))
    if not SIMT:
        counts += ", simt did not run: its library is not built"
    terminalreporter.write_line(f"passed per backend: {counts}")

# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests."""

import pytest
import torch

import equipoise  # noqa: F401  (loads the library: torch.ops.equipoise)


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

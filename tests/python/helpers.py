# SPDX-License-Identifier: Apache-2.0
"""What the tests of several ops share."""

import torch

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tolerance(dtype: torch.dtype) -> dict:
    """How far a result may be from the float64 reference of the same inputs."""
    return {
        torch.float64: {"rtol": 1e-12, "atol": 1e-12},
        torch.float32: {"rtol": 2e-5, "atol": 2e-6},
        torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-3},
        torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    }[dtype]

# SPDX-License-Identifier: Apache-2.0
"""The test library that runs the CUDA sources on the CPU; see tests/simt/simt.h."""

import contextlib
import ctypes
import os
from pathlib import Path

import torch

_BUILT = Path(__file__).parents[2] / "build/cmake/tests/simt/libequipoise_simt.so"


class Simt:
    """Loads the library, which registers torch.ops.equipoise_simt, and steers its scheduler."""

    def __init__(self, path: str):
        self.path = path
        torch.ops.load_library(path)
        self._library = ctypes.CDLL(path)
        self._library.simt_launches.restype = ctypes.c_int64
        self._library.simt_seed.argtypes = [ctypes.c_uint64]
        self._library.simt_know.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._library.simt_forget.argtypes = [ctypes.c_void_p]
        self._library.simt_run_fault.argtypes = [ctypes.c_char_p]
        self._library.simt_run_fault.restype = ctypes.c_char_p

    def launches(self) -> int:
        """Kernels launched so far."""
        return self._library.simt_launches()

    def seed(self, seed: int | None = None) -> None:
        """Starts the random schedule of blocks and threads; EQUIPOISE_SIMT_SEED unless told."""
        self._library.simt_seed(
            int(os.getenv("EQUIPOISE_SIMT_SEED", "1")) if seed is None else seed
        )

    def run_fault(self, name: str) -> str:
        """Runs one of the kernels of tests/simt/faults.cu; returns what was reported."""
        return self._library.simt_run_fault(name.encode()).decode()

    @contextlib.contextmanager
    def knowing(self, tensor: torch.Tensor):
        """Within, kernels may access this tensor, whose memory torch has not allocated."""
        self._library.simt_know(tensor.data_ptr(), tensor.nbytes)
        yield
        self._library.simt_forget(tensor.data_ptr())


def _load() -> Simt | None:
    path = os.getenv("EQUIPOISE_SIMT_LIBRARY", str(_BUILT))
    return Simt(path) if os.path.exists(path) else None


#: None where the library is not built.
SIMT = _load()

# SPDX-License-Identifier: Apache-2.0
"""Routes tokens to experts and keeps the experts evenly loaded.

`functional` has the ops, `nn` the modules, `balancers` what acts between steps, `schedules` what
changes with them, `distributed` what joins ranks and micro-batches, `metrics` the figures of load,
`cpp` the C++ modules of `equipoise::nn`, `ops` the doors to `torch.ops.equipoise`.
`RoutingAnalyzer` keeps what the routers did, `diagnose` says what is wrong with it, `figures`,
`report` and `live` show it; `python -m equipoise` does so with a log. `models` has what is for
other people's models.
"""

from pathlib import Path

import torch

from . import _build

__version__ = _build.version

# Compiled code calls into libtorch, whose binary interface holds within one minor version only.
if torch.__version__.split(".")[:2] != _build.torch.split(".")[:2]:
    raise ImportError(
        f"equipoise {__version__} was built against torch {_build.torch}, but torch "
        f"{torch.__version__} is installed: install equipoise again, or the torch that it wants"
    )

from . import (  # noqa: E402
    balancers,
    cpp,
    distributed,
    functional,
    metrics,
    models,
    nn,
    ops,
    schedules,
)
from .analyzer import RoutingAnalyzer  # noqa: E402
from .diagnosis import diagnose  # noqa: E402
from .models import audit, patch, unpatch, watch  # noqa: E402
from .nn import router_parameters  # noqa: E402

#: For find_package(equipoise): cmake -DCMAKE_PREFIX_PATH=<this>
cmake_prefix_path = str(Path(__file__).parent / "share" / "cmake")

__all__ = [
    "RoutingAnalyzer",
    "audit",
    "balancers",
    "cmake_prefix_path",
    "cpp",
    "diagnose",
    "distributed",
    "functional",
    "metrics",
    "models",
    "nn",
    "ops",
    "patch",
    "router_parameters",
    "schedules",
    "unpatch",
    "watch",
]

# SPDX-License-Identifier: Apache-2.0
"""Other people's models: watched, audited and patched.

For models with routers of `equipoise.nn`, and for Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE,
DeepSeek-V3 and their like in Hugging Face transformers 4 and 5. Nothing here imports transformers:
routers are known by the names of their classes.
"""

from .auditing import Audit, BalanceTerm, audit
from .patching import PatchTiming, measure_patch, patch, unpatch
from .watching import Watch, watch

__all__ = [
    "Audit",
    "BalanceTerm",
    "PatchTiming",
    "Watch",
    "audit",
    "measure_patch",
    "patch",
    "unpatch",
    "watch",
]

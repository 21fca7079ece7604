# SPDX-License-Identifier: Apache-2.0
"""The C++ modules `equipoise::nn::*` as Python sees them.

They have the parameters of their twins in `equipoise.nn`, under the same names, and give the same
numbers. torch's bridge for C++ modules leaves some things to the twins: `torch.compile` in one
graph, `torch.export`, `copy.deepcopy`, pickling, and the `state_dict` of a module with submodules
(`named_parameters()` has its tensors). A C++ router holds no balancer: its forward takes the
balancer's `expert_bias`, and the caller records the counts.
"""

import torch  # noqa: F401  before _C: it loads libtorch

from ._C import (
    AdvancedLoadBalancingLoss,
    DenseRouter,
    EMABalancer,
    ExpertChoiceRouter,
    LossFreeBalancer,
    MoELayer,
    NoisyTopKRouter,
    SequentialRouter,
    SinkhornRouter,
    SwitchBalanceLoss,
    TopKRouter,
)

__all__ = [
    "AdvancedLoadBalancingLoss",
    "DenseRouter",
    "EMABalancer",
    "ExpertChoiceRouter",
    "LossFreeBalancer",
    "MoELayer",
    "NoisyTopKRouter",
    "SequentialRouter",
    "SinkhornRouter",
    "SwitchBalanceLoss",
    "TopKRouter",
]

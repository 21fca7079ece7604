# SPDX-License-Identifier: Apache-2.0
"""Modules over the ops of `equipoise.functional`; C++ has the same as `equipoise::nn`."""

from ..balancers import DynamicExperts, EMABalancer, LossFreeBalancer
from .losses import AdvancedLoadBalancingLoss, SwitchBalanceLoss
from .moe import MoELayer
from .router import TopKRouter, router_parameters
from .router_variants import DenseRouter, ExpertChoiceRouter, NoisyTopKRouter, SinkhornRouter
from .sequential_router import SequentialRouter
from .transformer import MoETransformerBlock, MoETransformerLM

__all__ = [
    "AdvancedLoadBalancingLoss",
    "DenseRouter",
    "DynamicExperts",
    "EMABalancer",
    "ExpertChoiceRouter",
    "LossFreeBalancer",
    "MoELayer",
    "MoETransformerBlock",
    "MoETransformerLM",
    "NoisyTopKRouter",
    "SequentialRouter",
    "SinkhornRouter",
    "SwitchBalanceLoss",
    "TopKRouter",
    "router_parameters",
]

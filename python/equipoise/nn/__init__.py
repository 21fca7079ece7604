# SPDX-License-Identifier: Apache-2.0
"""Modules over the ops of `equipoise.functional`; C++ has the same as `equipoise::nn`."""

from ..balancers import DynamicExperts, EMABalancer, LossFreeBalancer
from .critics import MINE, InfoNCE
from .losses import AdvancedLoadBalancingLoss, BalanceLoss, SwitchBalanceLoss
from .moe import MoELayer
from .router import TopKRouter, router_parameters
from .router_variants import DenseRouter, ExpertChoiceRouter, NoisyTopKRouter, SinkhornRouter
from .sequential_router import SequentialRouter
from .transformer import MoETransformerBlock, MoETransformerLM

__all__ = [
    "MINE",
    "AdvancedLoadBalancingLoss",
    "BalanceLoss",
    "DenseRouter",
    "DynamicExperts",
    "EMABalancer",
    "ExpertChoiceRouter",
    "InfoNCE",
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

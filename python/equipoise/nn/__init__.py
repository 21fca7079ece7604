# SPDX-License-Identifier: Apache-2.0
"""Modules over the ops of `equipoise.functional`; C++ has the same as `equipoise::nn`."""

from ..balancers import DynamicExperts, EMABalancer, LossFreeBalancer
from .losses import AdvancedLoadBalancingLoss, SwitchBalanceLoss
from .moe import MoELayer
from .router import TopKRouter
from .transformer import MoETransformerBlock, MoETransformerLM

__all__ = [
    "AdvancedLoadBalancingLoss",
    "DynamicExperts",
    "EMABalancer",
    "LossFreeBalancer",
    "MoELayer",
    "MoETransformerBlock",
    "MoETransformerLM",
    "SwitchBalanceLoss",
    "TopKRouter",
]

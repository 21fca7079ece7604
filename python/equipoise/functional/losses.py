# SPDX-License-Identifier: Apache-2.0
"""Balance losses, from the sums of `topk_gating`."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from .. import ops
from .routing import RoutingResult, topk_gating  # noqa: F401  (for the examples)


class LossReport(NamedTuple):
    """What ``balance_loss`` returns."""

    total: Tensor
    """Scalar, the sum of the scaled losses; differentiable."""
    unscaled: dict[str, Tensor]
    """The value of each loss, 1.0 for ``switch`` at balance; differentiable."""
    scaled: dict[str, Tensor]
    """The same times its coefficient."""


def balance_loss(routing: RoutingResult, losses: Mapping[str, float | Tensor]) -> LossReport:
    """A weighted set of balance losses from the sums of ``topk_gating``; [T, E] is not touched.

    With f = load / (K W), P = prob_sum / W and W = num_tokens:

    - ``switch``: ``E sum(f P)``, f detached, 1 at balance (Fedus 2021, arXiv:2101.03961)
    - ``z``: ``mean(lse^2)`` (ST-MoE, arXiv:2202.08906)

    With K = E every expert gets every token: ``switch`` is then left out (value 0), with one
    warning. Segments are added up first.

    Args:
        routing: from ``topk_gating`` with ``stats=True``.
        losses: name -> coefficient >= 0, a float or (for schedules under ``torch.compile``) a
            scalar tensor.

    Returns:
        LossReport; float32, or float64 for float64 logits.

    >>> r = topk_gating(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), top_k=1)
    >>> report = balance_loss(r, {"switch": 0.01, "z": 0.001})
    >>> round(report.unscaled["switch"].item(), 3), round(report.total.item(), 5)
    (1.762, 0.02214)
    """
    return _balance_loss(routing, losses, guard_dense=True)


def switch_loss(routing: RoutingResult) -> Tensor:
    """The unscaled Switch loss, a scalar: 1 at balance. Computed even where K = E.

    >>> round(switch_loss(topk_gating(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), top_k=1)).item(), 3)
    1.0
    """
    return _balance_loss(routing, {"switch": 1.0}, guard_dense=False).total


def z_loss(routing: RoutingResult) -> Tensor:
    """The unscaled router z-loss, a scalar: the mean of lse^2.

    >>> round(z_loss(topk_gating(torch.zeros(3, 4), top_k=1)).item(), 3)  # log(4)^2
    1.922
    """
    return _balance_loss(routing, {"z": 1.0}, guard_dense=False).total


# A saved export names the types of its results; without these lines it could not.
_register_namedtuple(LossReport, serialized_type_name="equipoise.LossReport")


def _balance_loss(
    routing: RoutingResult, losses: Mapping[str, float | Tensor], guard_dense: bool
) -> LossReport:
    names = list(losses)
    sums = routing._stats()
    if sums.dim() == 2:  # of segments
        sums = sums.sum(0)
    for name, value in losses.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"balance_loss: the coefficient of '{name}' must be >= 0, got {value}")
    # Filled on the device: a copy from the host would wait for it.
    coefficients = torch.stack(
        [
            value.detach().to(torch.float32)
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.float32, device=sums.device)
            for value in losses.values()
        ]
    )
    total, values = ops.balance_loss(
        sums, coefficients, names, routing.top_k, guard_dense=guard_dense
    )
    unscaled = dict(zip(names, values.unbind(), strict=True))
    scaled = dict(zip(names, (values * coefficients).unbind(), strict=True))
    return LossReport(total, unscaled, scaled)

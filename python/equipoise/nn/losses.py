# SPDX-License-Identifier: Apache-2.0
"""Balance losses as modules: the functions of `equipoise.functional` with their coefficient."""

from torch import Tensor, nn

from .. import functional as F


class SwitchBalanceLoss(nn.Module):
    """`coeff * E sum_e f_e P_e`: pushes the router towards equal use of the experts.

    f_e is the share of the selections that expert e got (a constant for the gradient), P_e the mean
    probability that the router gave it. Perfect balance gives `coeff`. With `top_k == num_experts`
    every expert gets every token: there is nothing to balance, and the loss is 0 with one warning.
    Source: Fedus 2021, arXiv:2101.03961.

    Args:
        coeff: coefficient >= 0; the field uses 1e-2 to 1e-3.

    Raises:
        ValueError: a negative coefficient.

    Example:
        >>> import torch
        >>> balance = SwitchBalanceLoss(coeff=1e-2)
        >>> routing = F.topk_gating(torch.zeros(4, 8), top_k=2)  # probabilities all 1/8
        >>> round(balance(routing).item(), 6)
        0.01
    """

    def __init__(self, coeff: float = 1e-2) -> None:
        super().__init__()
        if coeff < 0:
            raise ValueError(f"SwitchBalanceLoss: coeff must not be negative, got {coeff}")
        self.coeff = coeff

    def forward(self, routing: F.RoutingResult) -> Tensor:
        """Scaled scalar to add to the main loss; of one layer (add up the layers' losses)."""
        return F.balance_loss(routing, {"switch": self.coeff}).total

    def extra_repr(self) -> str:
        return f"coeff={self.coeff}"

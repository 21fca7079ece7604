# SPDX-License-Identifier: Apache-2.0
"""Balance losses as modules: the functions of `equipoise.functional` with their coefficient."""

import math

import torch
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


class AdvancedLoadBalancingLoss(nn.Module):
    """Four balance losses on dense gating weights, such as those of a mixture of logits.

    With g the gating weights of B rows over N components, `P = mean_b g_b`, and every logarithm
    taken of `p + 1e-8`:

    - `uniform`: `KL(u || P) = -log N - mean_n log P_n`, 0 at balance; far above it where a
      component is dead
    - `entropy`: `log N - H(P)`, 0 at balance
    - `variance`: unbiased `Var(P)`, 0 at balance
    - `mutual_info`, with `mi="similarity"`: `functional.similarity_correlation` of features and
      gating weights; 0 without features
    - `mutual_info`, with `mi="information"`: `-H(P) + mean_b H(g_b)`, minus the mutual information
      of row and component (RAILS, arXiv:2407.15462), at least -log N; features are not needed

    No rows, or a single component, have nothing to balance: all are 0.

    Args:
        num_components: N.
        lambda_uniform: coefficient >= 0.
        lambda_entropy: coefficient >= 0.
        lambda_mi: coefficient >= 0.
        lambda_variance: coefficient >= 0.
        mi: `"similarity"` or `"information"`.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> balance = AdvancedLoadBalancingLoss(4)
        >>> gates = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]])
        >>> for name, value in balance(gates).items():
        ...     print(f"{name:<12}{value:.6f}")
        uniform     0.002951
        entropy     0.002974
        variance    0.000567
        mutual_info 0.000000
        total       0.006491
    """

    _EPSILON = 1e-8

    def __init__(
        self,
        num_components: int,
        lambda_uniform: float = 0.01,
        lambda_entropy: float = 0.01,
        lambda_mi: float = 0.005,
        lambda_variance: float = 0.01,
        mi: str = "similarity",
    ) -> None:
        super().__init__()
        if num_components < 1:
            raise ValueError(
                "AdvancedLoadBalancingLoss: num_components must be at least 1, "
                f"got {num_components}"
            )
        coefficients = {
            "lambda_uniform": lambda_uniform,
            "lambda_entropy": lambda_entropy,
            "lambda_mi": lambda_mi,
            "lambda_variance": lambda_variance,
        }
        for name, value in coefficients.items():
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"AdvancedLoadBalancingLoss: {name} must be finite and >= 0, got {value}"
                )
        if mi not in ("similarity", "information"):
            raise ValueError(
                f"AdvancedLoadBalancingLoss: mi must be similarity or information, got {mi!r}"
            )
        self.num_components = num_components
        self.lambda_uniform = lambda_uniform
        self.lambda_entropy = lambda_entropy
        self.lambda_mi = lambda_mi
        self.lambda_variance = lambda_variance
        self.mi = mi

    def forward(
        self, gating_weights: Tensor, input_features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            gating_weights: [B, N] floating, rows >= 0 of sum 1; or [B, ...] with N values in a row.
            input_features: [B, D] floating, or [B, ...].

        Returns:
            Scalars `uniform`, `entropy`, `variance`, `mutual_info`, each times its coefficient, and
            their sum `total`; float32, or float64 for float64 weights; differentiable twice.

        Raises:
            ValueError: another number of components; features of another number of rows; not
                floating.
        """
        gates, num_components = gating_weights, self.num_components
        if gates.dim() < 2 or gates.shape[1:].numel() != num_components:
            raise ValueError(
                "AdvancedLoadBalancingLoss: gating_weights must have shape [B, ...] with "
                f"num_components = {num_components} values in a row, got {list(gates.shape)}"
            )
        if not gates.is_floating_point():
            raise ValueError(
                f"AdvancedLoadBalancingLoss: gating_weights must be floating, got {gates.dtype}"
            )
        features = input_features
        if features is not None and (features.dim() < 2 or features.shape[0] != gates.shape[0]):
            raise ValueError(
                "AdvancedLoadBalancingLoss: input_features must have a row for each of the "
                f"{gates.shape[0]} rows of gating_weights, got shape {list(features.shape)}"
            )
        gates = gates.flatten(1)
        gates = gates.to(torch.float64 if gates.dtype == torch.float64 else torch.float32)
        if gates.shape[0] == 0 or num_components == 1:
            zero = (gates * 0).sum()
            losses = dict.fromkeys(("uniform", "entropy", "variance", "mutual_info"), zero)
            return losses | {"total": zero}

        mean = gates.mean(0)
        log_mean = torch.log(mean + self._EPSILON)
        entropy_of_mean = -(mean * log_mean).sum()
        if self.mi == "information":
            entropies = -(gates * torch.log(gates + self._EPSILON)).sum(1)
            mutual_info = entropies.mean() - entropy_of_mean
        elif features is not None:
            mutual_info = F.similarity_correlation(features.flatten(1), gates).to(gates.dtype)
        else:
            mutual_info = torch.zeros_like(entropy_of_mean)
        log_n = math.log(num_components)
        losses = {
            "uniform": self.lambda_uniform * (-log_n - log_mean.mean()),
            "entropy": self.lambda_entropy * (log_n - entropy_of_mean),
            "variance": self.lambda_variance * mean.var(),
            "mutual_info": self.lambda_mi * mutual_info,
        }
        return losses | {"total": sum(losses.values())}

    def extra_repr(self) -> str:
        return (
            f"num_components={self.num_components}, lambda_uniform={self.lambda_uniform}, "
            f"lambda_entropy={self.lambda_entropy}, lambda_mi={self.lambda_mi}, "
            f"lambda_variance={self.lambda_variance}, mi={self.mi!r}"
        )

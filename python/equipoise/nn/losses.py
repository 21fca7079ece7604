# SPDX-License-Identifier: Apache-2.0
"""Balance losses as modules: the functions of `equipoise.functional` with their coefficient."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import functional as F
from ..functional.losses import check_loss


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


class BalanceLoss(nn.Module):
    """A fixed set of balance losses for all layers of a model: `functional.balance_loss` on each.

    The configuration is printed once, at the first call outside of a compiled graph (on rank 0). A
    coefficient may be changed between steps, `balance.coefficients["switch"].fill_(0.02)`, or
    follow a schedule, `balance.coefficients["switch"].copy_(schedule.value)`, without a compiled
    step being compiled again: it is a float32 buffer, and in the `state_dict`.

    Args:
        losses: name -> coefficient, or a mapping with `coeff` and options, as in `balance_loss`.
        normalize: "none" or "hf".

    Raises:
        ValueError: no loss at all, an unknown option, or a negative coefficient.

    Example:
        >>> import torch
        >>> balance = BalanceLoss({"switch": 1e-2, "z": 1e-3})
        >>> routings = [F.topk_gating(torch.zeros(4, 8), top_k=2) for _ in range(3)]  # three layers
        >>> report = balance(routings)
        equipoise: BalanceLoss(switch={coeff: 0.01}, z={coeff: 0.001}, normalize='none')
        >>> round(report.unscaled["switch"].item(), 3), round(report.scaled["switch"].item(), 3)
        (1.0, 0.03)
    """

    def __init__(
        self, losses: Mapping[str, float | Mapping[str, Any]], normalize: str = "none"
    ) -> None:
        super().__init__()
        if not losses:
            raise ValueError("BalanceLoss: losses must name at least one loss, got none")
        self.normalize = normalize
        self.options: dict[str, dict[str, Any]] = {}
        for name, value in losses.items():
            options = dict(value) if isinstance(value, Mapping) else {"coeff": value}
            check_loss(name, options)
            self.register_buffer(
                f"coeff_{name}", torch.tensor(float(options.pop("coeff")), dtype=torch.float32)
            )
            self.options[name] = options
        self._announced = False

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """The coefficient of each loss, a scalar buffer."""
        return {name: getattr(self, f"coeff_{name}") for name in self.options}

    def forward(self, routing: F.RoutingResult | Sequence[F.RoutingResult]) -> F.LossReport:
        """The losses of one layer, or of each of several.

        Args:
            routing: of one layer, or one per layer; with statistics.

        Returns:
            LossReport: `total` and `scaled` are sums over the layers, which is what training adds
            to its loss; `unscaled` are means, so that balance is 1 however many layers there are.
        """
        routings = [routing] if isinstance(routing, F.RoutingResult) else list(routing)
        if not routings:
            raise ValueError("BalanceLoss: routing must be of at least one layer, got none")
        if not self._announced and not torch.compiler.is_compiling():
            self._announced = True
            if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
                print(f"equipoise: {self}")
        losses = {
            name: {"coeff": coefficient.float(), **self.options[name]}
            for name, coefficient in self.coefficients.items()
        }
        reports = [F.balance_loss(r, losses, self.normalize) for r in routings]
        return F.LossReport(
            torch.stack([r.total for r in reports]).sum(),
            {n: torch.stack([r.unscaled[n] for r in reports]).mean() for n in losses},
            {n: torch.stack([r.scaled[n] for r in reports]).sum() for n in losses},
            reports[0].coefficients,
        )

    def extra_repr(self) -> str:
        terms = [
            f"{name}={{{', '.join(f'{k}: {v}' for k, v in {'coeff': c, **options}.items())}}}"
            for (name, options), c in zip(
                self.options.items(),
                [round(c.item(), 8) for c in self.coefficients.values()],
                strict=True,
            )
        ]
        return ", ".join([*terms, f"normalize={self.normalize!r}"])


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

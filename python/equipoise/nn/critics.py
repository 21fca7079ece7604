# SPDX-License-Identifier: Apache-2.0
"""Estimators of how much the gates say about the inputs: lower bounds with a critic to be trained.

The critic's parameters are trained to raise the bound, by an optimizer of their own or together
with the model; to make the gates depend on the inputs, add the bound's negative to the loss.
"""

import torch
from torch import Tensor, nn

from .. import functional as F


def _check_positive(owner: nn.Module, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{type(owner).__name__}: {name} must be at least 1, got {size}")


def _check_pairs(owner: nn.Module, inputs: Tensor, gates: Tensor) -> None:
    wanted = owner.input_dim, owner.gate_dim
    fits = inputs.dim() == gates.dim() == 2 and len(inputs) == len(gates) and len(inputs) > 0
    if not fits or (inputs.shape[1], gates.shape[1]) != wanted:
        raise ValueError(
            f"{type(owner).__name__}: inputs must have shape [B, {wanted[0]}] and gates "
            f"[B, {wanted[1]}] with B >= 1, got {list(inputs.shape)} and {list(gates.shape)}"
        )


class InfoNCE(nn.Module):
    """`functional.infonce` of scores `<a(x_i), b(g_j)> / temperature`, a and b of length 1.

    Each of a and b is Linear, ReLU, Linear. The bound is at most log B: large batches are needed to
    see much information (van den Oord 2018, arXiv:1807.03748).

    Args:
        input_dim: D.
        gate_dim: N.
        hidden_dim: width of both networks and of what they give.
        temperature: > 0.

    Raises:
        ValueError: a size below 1, a temperature that is not positive, inputs that do not fit.

    Example:
        >>> critic = InfoNCE(input_dim=4, gate_dim=3)
        >>> bound = critic(torch.randn(8, 4), torch.rand(8, 3))
        >>> bound.shape, bool(bound <= torch.tensor(8.0).log())
        (torch.Size([]), True)
    """

    def __init__(
        self, input_dim: int, gate_dim: int, hidden_dim: int = 64, temperature: float = 0.1
    ) -> None:
        super().__init__()
        _check_positive(self, input_dim=input_dim, gate_dim=gate_dim, hidden_dim=hidden_dim)
        if not temperature > 0:
            raise ValueError(f"InfoNCE: temperature must be positive, got {temperature}")
        self.input_dim, self.gate_dim, self.temperature = input_dim, gate_dim, temperature
        self.of_inputs = _two_layers(input_dim, hidden_dim, hidden_dim)
        self.of_gates = _two_layers(gate_dim, hidden_dim, hidden_dim)

    def forward(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """The bound, a scalar in nats, from inputs [B, D] and their gates [B, N]."""
        _check_pairs(self, inputs, gates)
        a = nn.functional.normalize(self.of_inputs(inputs), dim=1)
        b = nn.functional.normalize(self.of_gates(gates), dim=1)
        return F.infonce(a @ b.T / self.temperature)


class MINE(nn.Module):
    """`functional.mine` of the scores of a network on pairs: `T(x_i, g_i)` against `T(x_i, g_j)`.

    T is Linear, ReLU, Linear on both together. The pairs that do not belong together are each
    input with the gates of the next one in the batch, which should be in random order (Belghazi
    2018, arXiv:1801.04062).

    Args:
        input_dim: D.
        gate_dim: N.
        hidden_dim: width of the network.

    Raises:
        ValueError: a size below 1, inputs that do not fit.

    Example:
        >>> critic = MINE(input_dim=4, gate_dim=3)
        >>> critic(torch.randn(8, 4), torch.rand(8, 3)).shape
        torch.Size([])
    """

    def __init__(self, input_dim: int, gate_dim: int, hidden_dim: int = 64) -> None:
        super().__init__()
        _check_positive(self, input_dim=input_dim, gate_dim=gate_dim, hidden_dim=hidden_dim)
        self.input_dim, self.gate_dim = input_dim, gate_dim
        self.score = _two_layers(input_dim + gate_dim, hidden_dim, 1)

    def forward(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """The bound, a scalar in nats, from inputs [B, D] and their gates [B, N]."""
        _check_pairs(self, inputs, gates)
        joint = self.score(torch.cat([inputs, gates], 1)).squeeze(1)
        marginal = self.score(torch.cat([inputs, gates.roll(1, 0)], 1)).squeeze(1)
        return F.mine(joint, marginal)


def _two_layers(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.ReLU(), nn.Linear(hidden, width_out))

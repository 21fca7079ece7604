# SPDX-License-Identifier: Apache-2.0
"""A router with a memory: the choice for a token depends on the tokens before it."""

import torch
from torch import Tensor, nn

from .. import functional as F
from .router import TopKRouter
from .router_base import without_autocast


class _GRU(nn.Module):
    """`nn.GRU`'s parameters; that module itself is not traced by `torch.compile`."""

    def __init__(self, input_size: int, hidden_size: int, **place) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        rows = 3 * hidden_size  # of reset, update and new gate
        self.weight_ih_l0 = nn.Parameter(torch.empty(rows, input_size, **place))
        self.weight_hh_l0 = nn.Parameter(torch.empty(rows, hidden_size, **place))
        self.bias_ih_l0 = nn.Parameter(torch.empty(rows, **place))
        self.bias_hh_l0 = nn.Parameter(torch.empty(rows, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(hidden_size), as nn.GRU."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, x: Tensor, damping: float, token_mask: Tensor | None, reset: Tensor | None
    ) -> Tensor:
        """[B, S, hidden_size] states of the tokens x [B, S, input_size], in the type of x."""
        batch, length, _ = x.shape
        weights = [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]
        weights = [weight.to(x.dtype) for weight in weights]
        if batch == 0 or length == 0:
            return x.new_zeros(batch, length, self.hidden_size)
        if damping == 1 and token_mask is None and reset is None:
            start = x.new_zeros(1, batch, self.hidden_size)
            return torch.gru(x, start, weights, True, 1, 0.0, self.training, False, True)[0]
        real = None if token_mask is None else (token_mask > 0).unsqueeze(-1)
        if real is not None:
            x = x.masked_fill(~real, 0)  # whatever stands there must reach no gradient
        state, states = x.new_zeros(batch, self.hidden_size), []
        for t in range(length):
            if reset is not None:
                state = state.masked_fill(reset[:, t, None], 0)
            after = torch.gru_cell(x[:, t], damping * state, *weights)
            state = after if real is None else torch.where(real[:, t], after, state)
            states.append(state)
        return torch.stack(states, 1)


class SequentialRouter(TopKRouter):
    """A GRU over the sequence gives the logits, mixed with those of the token alone.

        h_t = GRU(x_t, damping * h_{t-1}),   h_{-1} = 0
        logits_t = influence * W_seq h_t + (1 - influence) * W x_t

    A masked token leaves h as it is, as if it were not there. Causal: a token knows those before it
    only. The GRU runs in the router's type, as the matmul does.

    Torch's own GRU does it where it can: with `damping=1` and neither mask nor reset. The rest is a
    loop over the sequence; a compiled graph holds all its steps and is compiled again for another
    length.

    Args:
        d_model, num_experts, top_k: see `TopKRouter`.
        hidden_size: of the GRU; None: `d_model`.
        damping: in (0, 1], multiplies the state on its way from one token to the next. 1 is a plain
            GRU; smaller ones forget faster.
        influence: in [0, 1]; 0 is a `TopKRouter`.
        options: the keywords of `TopKRouter`.

    Parameters:
        weight: [E, d_model], normal with standard deviation `init_std`.
        sequence_weight: [E, hidden_size], the same.
        gru.*: those of `nn.GRU(d_model, hidden_size)`, under the same names.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> router = SequentialRouter(8, num_experts=4, top_k=2, damping=0.9, influence=0.5)
        >>> result = router(torch.randn(5, 3, 8))
        >>> result.topk_indices.shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        hidden_size: int | None = None,
        damping: float = 1.0,
        influence: float = 1.0,
        **options,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        hidden_size = d_model if hidden_size is None else hidden_size
        self._require(hidden_size >= 1, f"hidden_size must be at least 1, got {hidden_size}")
        self._require(0 < damping <= 1, f"damping must be in (0, 1], got {damping}")
        self._require(0 <= influence <= 1, f"influence must be in [0, 1], got {influence}")
        place = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.hidden_size = hidden_size
        self.damping = damping
        self.influence = influence
        self.gru = _GRU(d_model, hidden_size, **place)
        self.sequence_weight = nn.Parameter(torch.empty(num_experts, hidden_size, **place))
        nn.init.normal_(self.sequence_weight, std=self.init_std)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.gru.reset_parameters()
        nn.init.normal_(self.sequence_weight, std=self.init_std)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        reset: Tensor | None = None,
        segment_ids: Tensor | None = None,
        num_segments: int | None = None,
        forced_indices: Tensor | None = None,
    ) -> F.RoutingResult:
        """Routes the tokens.

        Args:
            x: [B, S, d_model] floating, B sequences.
            token_mask: [B, S] bool, True = real token, or floating weights >= 0.
            reset: [B, S] bool; True: the state is zero before this token (where a new sequence
                begins in packed ones).
            segment_ids: see `TopKRouter.forward`, as the next two.
            num_segments: S.
            forced_indices: [B, S, K] int64.

        Returns:
            RoutingResult: `topk_weights`, `topk_indices` [B, S, K] and the sums for the losses.

        Raises:
            RuntimeError: an argument of another shape or type.
        """
        logits, absent = self._present(self.logits(x, token_mask, reset))
        return self._route(logits, absent, token_mask, segment_ids, num_segments, forced_indices)

    def logits(
        self, x: Tensor, token_mask: Tensor | None = None, reset: Tensor | None = None
    ) -> Tensor:
        """[B, S, E] logits of the tokens `x` [B, S, d_model], with jitter and temperature."""
        inputs = self._inputs(x)
        if x.dim() != 3:
            raise RuntimeError(
                f"SequentialRouter: x must have shape [B, S, d_model], got {list(x.shape)}"
            )
        self._check_per_token("token_mask", token_mask, x.shape[:-1])
        self._check_per_token("reset", reset, x.shape[:-1])
        if reset is not None and reset.dtype != torch.bool:
            raise RuntimeError(f"SequentialRouter: reset must be torch.bool, got {reset.dtype}")
        with without_autocast(x):
            states = self.gru(inputs, self.damping, token_mask, reset)
        of_sequence = self._linear(states, self.sequence_weight)
        of_token = self._linear(inputs, self.weight, self.bias)
        return self._tempered(self.influence * of_sequence + (1 - self.influence) * of_token)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, hidden_size={self.hidden_size}, damping={self.damping}, "
            f"influence={self.influence}"
        )

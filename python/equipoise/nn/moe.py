# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Experts layer: route, permute, two grouped GEMMs, unpermute.

    y_t = sum_k weight_tk w_out[e] act(w_in[e] x_t),   e = topk_indices[t, k]

Nothing waits for the device: all shapes follow from the shape of x. The T K permuted rows end with
one row for each slot that has no expert (masked tokens). `grouped_mm` leaves those rows
uninitialised, in its result and in its gradient. That is harmless as long as rows are not mixed:
the activation works row by row, the GEMMs and their weight gradients stop at the last offset, and
`moe_unpermute` and the backward of `moe_permute` gather only rows that belong to a slot.
"""

import torch
from torch import Tensor, nn

from .. import functional as F
from .router import TopKRouter


def _grouped_linear(x: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """`y[r] = weight[e] x[r]` for the rows r of expert e; rows after the last offset are arbitrary.

    Args:
        x: [N, d_in], sorted by expert.
        weight: [E, d_out, d_in].
        expert_offsets: [E + 1] int64.

    Returns:
        [N, d_out].
    """
    if x.dtype == torch.float64 or x.device.type not in ("cpu", "cuda", "meta"):
        return _grouped_linear_dense(x, weight, expert_offsets)
    d_out, d_in = weight.shape[1:]
    multiple = 16 // x.element_size()  # grouped_mm wants rows of whole 16 bytes
    pad_in, pad_out = -d_in % multiple, -d_out % multiple
    if pad_in or pad_out:
        x = nn.functional.pad(x, (0, pad_in))
        weight = nn.functional.pad(weight, (0, pad_in, 0, pad_out))
    ends = expert_offsets[1:].to(torch.int32)
    return nn.functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends)[:, :d_out]


def _grouped_linear_dense(x: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """The same where `grouped_mm` does not exist: every expert on every row, E times the work."""
    row = torch.arange(x.shape[0], device=x.device)
    expert_of_row = torch.searchsorted(expert_offsets[1:], row, right=True)  # E for a row of none
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, expert_weight in enumerate(weight.unbind(0)):
        mine = (expert_of_row == expert).unsqueeze(1)
        y = y + torch.where(mine, x @ expert_weight.T, 0)
    return y


def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def _by_token(choice: F.ExpertChoiceResult, num_tokens: int) -> tuple[Tensor, Tensor]:
    """[T, E] which expert has chosen which token, and with what weight.

    In this form `moe_permute` and `moe_unpermute` take it, whose sums are deterministic in both
    directions; index_add's are not on CUDA.
    """
    num_experts = choice.token_indices.shape[0]
    size = num_tokens * num_experts
    expert = torch.arange(num_experts, device=choice.token_indices.device).unsqueeze(1)
    place = choice.token_indices * num_experts + expert
    place = torch.where(choice.token_indices < 0, size, place).flatten()  # cut off in the end
    chosen = torch.zeros(size + 1, dtype=torch.bool, device=place.device).scatter(0, place, True)
    weights = choice.token_weights.new_zeros(size + 1)
    weights = weights.scatter(0, place, choice.token_weights.flatten())
    return tuple(t[:-1].view(num_tokens, num_experts) for t in (chosen, weights))


_ACTIVATIONS = {"relu": nn.functional.relu, "gelu": nn.functional.gelu, "swiglu": _swiglu}


class MoELayer(nn.Module):
    """Feed-forward layer of `num_experts` experts, of which each token uses `top_k`.

    Equals a loop over the experts to rounding. Works under autocast (the experts run in its dtype,
    the router in float32), `torch.compile(fullgraph=True)` and `torch.export`. Differentiable once
    in float32 and the half types, as `grouped_mm` is.

    Args:
        d_model: width of a token.
        d_hidden: width inside an expert.
        num_experts: E.
        top_k: K, from 1 to E.
        activation: "relu", "gelu" or "swiglu" (`silu(gate) * up`; `w_in` holds gate, then up).
        norm_topk_prob: divide the K weights by their sum.
        router: a module from tokens to a RoutingResult or an ExpertChoiceResult; default
            `TopKRouter`.
        capacity_factor: None, for no token is dropped.

    Parameters:
        router.weight: [E, d_model], see `TopKRouter`.
        w_in: [E, d_hidden, d_model] ([E, 2 d_hidden, d_model] for swiglu), uniform within
            1/sqrt(d_model).
        w_out: [E, d_model, d_hidden], uniform within 1/sqrt(d_hidden).

    Raises:
        ValueError: an unknown activation, `d_hidden` below 1, a capacity, or a router for other
            sizes.

    Example:
        >>> layer = MoELayer(d_model=8, d_hidden=16, num_experts=4, top_k=2)
        >>> y, routing = layer(torch.randn(5, 3, 8))
        >>> y.shape, int(routing.tokens_per_expert.sum())
        (torch.Size([5, 3, 8]), 30)
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        top_k: int,
        activation: str = "relu",
        norm_topk_prob: bool = True,
        router: nn.Module | None = None,
        capacity_factor: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"MoELayer: activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
            )
        if d_hidden < 1:
            raise ValueError(f"MoELayer: d_hidden must be at least 1, got {d_hidden}")
        if capacity_factor is not None:
            raise ValueError(f"MoELayer: capacity_factor must be None, got {capacity_factor}")
        if router is None:
            router = TopKRouter(
                d_model,
                num_experts,
                top_k,
                norm_topk_prob=norm_topk_prob,
                device=device,
                dtype=dtype,
            )
        sizes = (router.num_experts, router.top_k)
        if sizes != (num_experts, top_k):
            raise ValueError(
                f"MoELayer: router must have (num_experts, top_k) = {(num_experts, top_k)}, "
                f"got {sizes}"
            )
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.num_experts = num_experts
        self.top_k = top_k
        self.activation = activation
        self.router = router
        d_in = 2 * d_hidden if activation == "swiglu" else d_hidden
        self.w_in = nn.Parameter(
            torch.empty(num_experts, d_in, d_model, device=device, dtype=dtype)
        )
        self.w_out = nn.Parameter(
            torch.empty(num_experts, d_model, d_hidden, device=device, dtype=dtype)
        )
        self._reset_experts()

    def reset_parameters(self) -> None:
        """Draws all parameters anew, the router's too."""
        self.router.reset_parameters()
        self._reset_experts()

    def _reset_experts(self) -> None:
        nn.init.uniform_(self.w_in, -(self.d_model**-0.5), self.d_model**-0.5)
        nn.init.uniform_(self.w_out, -(self.d_hidden**-0.5), self.d_hidden**-0.5)

    def forward(
        self, x: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, F.RoutingResult | F.ExpertChoiceResult]:
        """Sends each token through its experts.

        Args:
            x: [..., d_model], of the parameters' dtype (any floating one under autocast).
            token_mask: [...] bool, True = real token, or floating weights >= 0. Masked tokens cost
                no expert work and come out as zero.

        Returns:
            [..., d_model], and the router's result, for losses, balancers and metrics. A token that
            no expert has chosen comes out as zero.

        Raises:
            RuntimeError: x of another width or type, or a bad mask.
        """
        routing = self.router(x, token_mask)
        tokens, w_in, w_out = x.reshape(-1, self.d_model), self.w_in, self.w_out
        device_type = x.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)  # grouped_mm has no autocast rule
            tokens, w_in, w_out = tokens.to(dtype), w_in.to(dtype), w_out.to(dtype)
        if tokens.dtype != w_in.dtype:
            raise RuntimeError(
                f"MoELayer: x must have the type of w_in ({w_in.dtype}), got {tokens.dtype}"
            )
        if isinstance(routing, F.ExpertChoiceResult):
            routing_map, weights = _by_token(routing, tokens.shape[0])
            permuted = F.moe_permute(
                tokens,
                None,
                self.num_experts,
                routing_map=routing_map,
                output_rows=routing.token_indices.numel(),
            )
        else:
            weights = routing.topk_weights.reshape(-1, self.top_k)
            permuted = F.moe_permute(
                tokens,
                routing.topk_indices.reshape(-1, self.top_k),
                self.num_experts,
                tokens_per_expert=routing.tokens_per_expert,
            )
        hidden = _grouped_linear(permuted.permuted, w_in, permuted.expert_offsets)
        hidden = _ACTIVATIONS[self.activation](hidden)
        out = _grouped_linear(hidden, w_out, permuted.expert_offsets)
        if out.dtype != torch.float64:
            weights = weights.to(torch.float32)  # of a router in float64
        y = F.moe_unpermute(out, permuted.row_id_map, weights)
        return y.reshape(x.shape), routing

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_hidden={self.d_hidden}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, activation={self.activation!r}"
        )

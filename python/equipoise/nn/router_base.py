# SPDX-License-Identifier: Apache-2.0
"""What all routers share: the logits, `x W^T (+ b)`.

The matmul runs in float32 (float64 for float64) whatever the model runs in: in bfloat16 about one
token in thirty goes to another expert (Fedus 2021, "selective precision").
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """The parameters and the logits of a router; `router_parameters` finds routers by this class.

    The arguments are those of `TopKRouter`.
    """

    temperature: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        *,
        router_dtype: torch.dtype = torch.float32,
        jitter_eps: float = 0.0,
        temperature: float | None = None,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._require(d_model >= 1, f"d_model must be at least 1, got {d_model}")
        self._require(
            1 <= top_k <= num_experts,
            f"top_k must be between 1 and num_experts = {num_experts}, got {top_k}",
        )
        self._require(
            router_dtype in (torch.float32, torch.float64),
            f"router_dtype must be torch.float32 or torch.float64, got {router_dtype}",
        )
        self._require(0 <= jitter_eps < 1, f"jitter_eps must be in [0, 1), got {jitter_eps}")
        self._require(
            temperature is None or temperature > 0,
            f"temperature must be None or above 0, got {temperature}",
        )
        self._require(init_std >= 0, f"init_std must not be negative, got {init_std}")
        self.d_model = d_model
        self.num_experts = num_experts
        self.top_k = top_k
        self.router_dtype = router_dtype
        self.jitter_eps = jitter_eps
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        )
        self._initial_temperature = temperature
        self.register_buffer(
            "temperature",
            None if temperature is None else torch.empty((), dtype=torch.float32, device=device),
            persistent=False,
        )
        Router.reset_parameters(self)  # a subclass has not made its own yet

    def reset_parameters(self) -> None:
        """Draws the parameters anew and sets the temperature back."""
        nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.temperature is not None:
            self.temperature.fill_(self._initial_temperature)

    def logits(self, x: Tensor) -> Tensor:
        """[..., E] logits of the tokens `x` [..., d_model], with jitter and temperature."""
        return self._logits_of(self._inputs(x))

    def _logits_of(self, inputs: Tensor) -> Tensor:
        return self._tempered(self._linear(inputs, self.weight, self.bias))

    def _inputs(self, x: Tensor) -> Tensor:
        """The tokens in the router's type, with jitter in training."""
        if x.dim() < 1 or x.shape[-1] != self.d_model:
            raise RuntimeError(
                f"{type(self).__name__}: x must have shape [..., d_model] = "
                f"[..., {self.d_model}], got {list(x.shape)}"
            )
        if not x.is_floating_point():
            raise RuntimeError(f"{type(self).__name__}: x must be floating, got {x.dtype}")
        x = x.to(torch.float64 if x.dtype == torch.float64 else self.router_dtype)
        if self.training and self.jitter_eps > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_eps, 1 + self.jitter_eps)
        return x

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = inputs.dtype
        with without_autocast(inputs):
            bias = None if bias is None else bias.to(dtype)
            return nn.functional.linear(inputs, weight.to(dtype), bias)

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits if self.temperature is None else logits / self.temperature

    def _check_per_token(self, name: str, tensor: Tensor | None, shape: torch.Size) -> None:
        """Where `tensor` is used before `topk_gating` has looked at it."""
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(
                f"{type(self).__name__}: {name} must have shape [...] of x [..., d_model] = "
                f"{list(shape)}, got {list(tensor.shape)}"
            )

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")

    def _apply(self, fn, recurse: bool = True):  # .to(), .bfloat16(), .cuda(), ...
        temperature = self.temperature
        super()._apply(fn, recurse)
        if temperature is not None and self.temperature.dtype != torch.float32:
            # The value of before the rounding: a schedule makes small steps.
            self.temperature = temperature.to(device=self.temperature.device)
        return self

    def extra_repr(self) -> str:
        text = (
            f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"bias={self.bias is not None}"
        )
        if self.router_dtype != torch.float32:
            text += f", router_dtype={self.router_dtype}"
        if self.jitter_eps > 0:
            text += f", jitter_eps={self.jitter_eps}"
        if self.temperature is not None:
            text += f", temperature={self._initial_temperature}"
        return text


def without_autocast(x: Tensor) -> AbstractContextManager:
    """For what has to run in the type of `x`."""
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):  # the meta device has none
        return nullcontext()
    return torch.autocast(device_type, enabled=False)

# SPDX-License-Identifier: Apache-2.0
"""A small decoder-only transformer whose feed-forward layers are Mixtures of Experts.

    x <- x + attention(norm(x));   x <- x + moe(norm(x))        (pre-norm, causal)

It is here to train, to measure and to read; every block hands out its RoutingResult.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional as F
from .moe import MoELayer


class MoETransformerBlock(nn.Module):
    """Causal self-attention and a MoELayer, each behind a LayerNorm and a residual connection.

    Args:
        d_model: width of a token.
        num_heads: attention heads; divides `d_model`.
        d_hidden, num_experts, top_k, activation, norm_topk_prob, router: see `MoELayer`.

    Raises:
        ValueError: `num_heads` does not divide `d_model`.

    Example:
        >>> block = MoETransformerBlock(d_model=8, num_heads=2, d_hidden=16, num_experts=4, top_k=2)
        >>> y, routing = block(torch.randn(5, 3, 8))
        >>> y.shape, routing.topk_indices.shape
        (torch.Size([5, 3, 8]), torch.Size([5, 3, 2]))
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_hidden: int,
        num_experts: int,
        top_k: int,
        activation: str = "relu",
        norm_topk_prob: bool = True,
        router: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(
                f"MoETransformerBlock: num_heads must divide d_model = {d_model}, got {num_heads}"
            )
        place = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(d_model, **place)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False, **place)
        self.attention_out = nn.Linear(d_model, d_model, bias=False, **place)
        self.moe_norm = nn.LayerNorm(d_model, **place)
        self.moe = MoELayer(
            d_model,
            d_hidden,
            num_experts,
            top_k,
            activation=activation,
            norm_topk_prob=norm_topk_prob,
            router=router,
            **place,
        )

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for module in self.children():
            module.reset_parameters()

    def forward(
        self, x: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, F.RoutingResult]:
        """One block.

        Args:
            x: [B, S, d_model].
            token_mask: [B, S] bool, True = real token, or floating weights >= 0. Masked tokens are
                not attended to and not routed.

        Returns:
            [B, S, d_model], and the RoutingResult.
        """
        x = x + self._attention(self.attention_norm(x), token_mask)
        y, routing = self.moe(self.moe_norm(x), token_mask)
        return x + y, routing

    def _attention(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.transpose(1, 3).unbind(2)  # [B, heads, S, d_head] each
        attend = None
        if token_mask is not None:
            attend = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            attend = attend & (token_mask > 0)[:, None, None, :]
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attend, is_causal=attend is None
        )
        return self.attention_out(out.transpose(1, 2).reshape(x.shape))


class MoETransformerLM(nn.Module):
    """Language model: token and position embeddings, blocks, a norm and a linear head.

    Args:
        vocab_size: number of tokens, 256 for bytes.
        d_model: width of a token.
        num_layers: blocks.
        num_heads: attention heads; divides `d_model`.
        d_hidden, num_experts, top_k, activation, norm_topk_prob: see `MoELayer`.
        max_seq_len: the longest sequence.
        make_router: called once per block for its router, so that each has its own parameters and
            its own balancer; default `TopKRouter`.

    Example:
        >>> model = MoETransformerLM(
        ...     256, d_model=8, num_layers=2, num_heads=2, d_hidden=16, num_experts=4, top_k=2,
        ...     max_seq_len=16,
        ... )
        >>> logits, routings = model(torch.randint(256, (5, 12)))
        >>> logits.shape, len(routings)
        (torch.Size([5, 12, 256]), 2)
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_hidden: int,
        num_experts: int,
        top_k: int,
        max_seq_len: int,
        activation: str = "relu",
        norm_topk_prob: bool = True,
        make_router: Callable[[], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.max_seq_len = max_seq_len
        self.token_embedding = nn.Embedding(vocab_size, d_model, **place)
        self.position_embedding = nn.Embedding(max_seq_len, d_model, **place)
        self.blocks = nn.ModuleList(
            MoETransformerBlock(
                d_model,
                num_heads,
                d_hidden,
                num_experts,
                top_k,
                activation=activation,
                norm_topk_prob=norm_topk_prob,
                router=None if make_router is None else make_router(),
                **place,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model, **place)
        self.head = nn.Linear(d_model, vocab_size, bias=False, **place)
        self._reset_embeddings()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        self._reset_embeddings()
        for module in (*self.blocks, self.norm, self.head):
            module.reset_parameters()

    def _reset_embeddings(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(
        self, tokens: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, list[F.RoutingResult]]:
        """Logits of the next token at every position.

        Args:
            tokens: [B, S] int64, S at most `max_seq_len`.
            token_mask: [B, S] bool, True = real token.

        Returns:
            [B, S, vocab_size], and one RoutingResult per block.
        """
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        routings = []
        for block in self.blocks:
            x, routing = block(x, token_mask)
            routings.append(routing)
        return self.head(self.norm(x)), routings

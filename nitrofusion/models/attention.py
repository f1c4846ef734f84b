"""Attention of a diffusers ``Attention`` layer in two parts, for what meets several contexts with the same queries."""

from __future__ import annotations

import torch
from torch.nn import functional


def split_heads(attn, x: torch.Tensor) -> torch.Tensor:
    """[B, heads, tokens, d] of x [B, tokens, heads * d]."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, tokens, heads * d], heads merged, of q, k, v [B, heads, .., d]."""
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

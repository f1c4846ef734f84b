"""Drop-in modules on the fused ops; a module of the parent's class becomes one by a change of ``__class__``."""

from __future__ import annotations

import torch

from .ops.group_norm_silu import group_norm_silu
from .ops.layer_norm import layer_norm


class GroupNorm(torch.nn.GroupNorm):
    """[B, C, ...] -> same shape, dtype and layout; statistics in fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=False)


class GroupNormSilu(torch.nn.GroupNorm):
    """SiLU(GroupNorm(x)): takes the place of a norm whose activation follows at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class NormalisedSilu(torch.nn.SiLU):
    """The SiLU behind a ``GroupNormSilu``, which has already applied it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class LayerNorm(torch.nn.LayerNorm):
    """[..., C] -> same shape and dtype; statistics in fp32. Normalises the last dimension only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

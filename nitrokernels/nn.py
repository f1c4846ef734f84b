"""Drop-in modules on the fused ops; a module of the parent's class becomes one by a change of ``__class__``."""

from __future__ import annotations

import torch

from .ops.group_norm_silu import group_norm_silu
from .ops.layer_norm import layer_norm


def hooked(module: torch.nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks)


class GroupNorm(torch.nn.GroupNorm):
    """[B, C, ...] -> same shape, dtype and layout; statistics in fp32. [B, C] is PyTorch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim < 3:
            return super().forward(x)
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=False)


class GroupNormSilu(torch.nn.GroupNorm):
    """SiLU(GroupNorm(x)): takes the place of a norm whose activation, its ``partner``, follows at once.

    While one of them has a hook, each does its own part.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim < 3 or hooked(self) or hooked(self.partner):
            return super().forward(x)
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class NormalisedSilu(torch.nn.SiLU):
    """The SiLU behind a ``GroupNormSilu``, its ``partner``, which has already applied it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim < 3 or hooked(self) or hooked(self.partner):
            return super().forward(x)
        return x


class LayerNorm(torch.nn.LayerNorm):
    """[..., C] -> same shape and dtype; statistics in fp32. Normalises the last dimension only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

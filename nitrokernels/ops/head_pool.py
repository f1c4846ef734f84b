"""All sampled discriminator heads at once: [conv 4x4 stride 2 -> GroupNorm -> SiLU] repeated -> mean logit.

features: one map per entry, [B, C_e, H_e, W_e], any dtype; a pool keeps the heads of a level (equal C) stacked,
[P, ...], and ``index`` [E, n] names the n rows that read each entry, so sampling and refreshing move no weights.
Logits [B, E * n] fp32, entry-major. Reference only: differentiable to any order, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..dispatch import Op
from ..testing import Case


@dataclass(frozen=True)
class LevelParams:
    """The stacked heads of one level; P rows, width w, depth d.

    Attributes:
        conv: d tensors, [P, w, C, 4, 4] then [P, w, w, 4, 4].
        norm_weight, norm_bias: d tensors [P, w] each.
        logit_weight: [P, w]; logit_bias: [P].
    """

    conv: tuple[torch.Tensor, ...]
    norm_weight: tuple[torch.Tensor, ...]
    norm_bias: tuple[torch.Tensor, ...]
    logit_weight: torch.Tensor
    logit_bias: torch.Tensor

    def rows(self, index: torch.Tensor) -> LevelParams:
        """The named rows, differentiable back to the stack."""
        pick = lambda tensors: tuple(t.index_select(0, index) for t in tensors)  # noqa: E731
        return LevelParams(
            pick(self.conv),
            pick(self.norm_weight),
            pick(self.norm_bias),
            self.logit_weight.index_select(0, index),
            self.logit_bias.index_select(0, index),
        )

    def split(self, size: int) -> list[LevelParams]:
        """Consecutive groups of ``size`` rows."""
        cut = lambda t: t.split(size)  # noqa: E731
        columns = [map(cut, self.conv), map(cut, self.norm_weight), map(cut, self.norm_bias)]
        conv, weight, bias = (list(zip(*c, strict=True)) for c in columns)
        return [
            LevelParams(*parts)
            for parts in zip(conv, weight, bias, cut(self.logit_weight), cut(self.logit_bias), strict=True)
        ]


def _heads(x: torch.Tensor, p: LevelParams, num_groups: int) -> torch.Tensor:
    """[B, n] logits of n heads on one map: the first conv is dense over n * w outputs, the rest are grouped."""
    n, width = p.logit_weight.shape
    x = x.to(p.logit_weight.dtype)  # the heads' own precision, fp32 unless a test asks for fp64
    for depth, (conv, weight, bias) in enumerate(zip(p.conv, p.norm_weight, p.norm_bias, strict=True)):
        x = F.conv2d(x, conv.flatten(0, 1), stride=2, padding=1, groups=1 if depth == 0 else n)
        x = F.silu(F.group_norm(x, n * num_groups, weight.flatten(), bias.flatten()))
    # The 1x1 conv to the logit map commutes with the mean over positions.
    pooled = x.mean((2, 3)).view(len(x), n, width)
    return (pooled * p.logit_weight).sum(-1) + p.logit_bias


def head_pool_ref(
    features: Sequence[torch.Tensor],
    levels: Sequence[int],
    index: torch.Tensor,
    params: Sequence[LevelParams],
    num_groups: int,
) -> torch.Tensor:
    logits: list[torch.Tensor | None] = [None] * len(features)
    for level in sorted(set(levels)):
        entries = [e for e, at in enumerate(levels) if at == level]
        rows = params[level].rows(index[entries].flatten())  # one gather a level, whatever the number of tasks
        for entry, group in zip(entries, rows.split(index.shape[1]), strict=True):
            logits[entry] = _heads(features[entry], group, num_groups)
    return torch.cat(logits, 1)


OP = Op("head_pool", ref=head_pool_ref)


def head_pool(
    features: Sequence[torch.Tensor],
    levels: Sequence[int],
    index: torch.Tensor,
    params: Sequence[LevelParams],
    num_groups: int = 8,
) -> torch.Tensor:
    """Logits of the sampled heads.

    Args:
        features: E maps [B, C_e, H_e, W_e].
        levels: E ints, the level (so the stack of ``params``) each map belongs to.
        index: [E, n] int64, rows of that stack.
        params: one stack per level.
        num_groups: GroupNorm groups of each head.

    Returns:
        [B, E * n] fp32, entry-major.

    Raises:
        ValueError: shapes do not fit.
    """
    if not (len(features) == len(levels) == len(index)):
        raise ValueError(
            f"head_pool: levels and index must have one row per feature map ({len(features)}), "
            f"got {len(levels)} and {len(index)}"
        )
    for x, level in zip(features, levels, strict=True):
        channels = params[level].conv[0].shape[2]
        if x.ndim != 4 or x.shape[1] != channels or len(x) != len(features[0]):
            raise ValueError(
                f"head_pool: features of level {level} must be [{len(features[0])}, {channels}, H, W], "
                f"got {list(x.shape)}"
            )
    return OP.select(features, levels, index, params, num_groups)[1](features, levels, index, params, num_groups)


def _case(batch: int, maps: list[tuple[int, int]], tasks: int, heads: int, sampled: int, width: int) -> Case:
    """``maps``: (channels, side) of each level; every task reads every level."""

    def make(dtype, device):
        def stack(*shape, scale=1.0, shift=0.0):
            return torch.randn(tasks * heads, *shape, device=device) * scale + shift

        params, levels = [], []
        for c, side in maps:
            depth = max(1, min(3, side.bit_length() - 2))
            ins = [c] + [width] * (depth - 1)
            params.append(
                LevelParams(
                    tuple(stack(width, n, 4, 4, scale=(16 * n) ** -0.5) for n in ins),
                    tuple(stack(width, scale=0.1, shift=1.0) for _ in ins),
                    tuple(stack(width, scale=0.1) for _ in ins),
                    stack(width, scale=width**-0.5),
                    stack(),
                )
            )
        features, index = [], []
        for task in range(tasks):
            for level, (c, side) in enumerate(maps):
                features.append(torch.randn(batch, c, side, side, device=device).to(dtype))
                levels.append(level)
                index.append(task * heads + torch.randperm(heads)[:sampled])
        return features, levels, torch.stack(index).to(device), params, max(1, width // 8)

    return Case(make, grads=(0, 3))


CASES = {
    "small": _case(2, [(3, 8), (5, 4)], tasks=2, heads=3, sampled=2, width=8),
    "one head": _case(3, [(16, 16)], tasks=1, heads=1, sampled=1, width=16),
}

"""Draws scenes: signed distances, outline, stripes, directional light and a cast shadow, all vectorised."""

from __future__ import annotations

import numpy as np
import torch

from .scenes import Scenes

RESOLUTION = 32
_SUPERSAMPLE = 2

# sRGB in [0, 1], in the order of scenes.COLORS and scenes.BACKGROUNDS.
_COLORS = torch.tensor(
    [[0.88, 0.16, 0.14], [0.16, 0.72, 0.25], [0.18, 0.38, 0.95], [0.98, 0.84, 0.16], [0.62, 0.22, 0.78], [0.97] * 3]
)
_BACKGROUNDS = torch.tensor(
    [[0.55, 0.56, 0.58], [0.48, 0.32, 0.20], [0.13, 0.17, 0.38], [0.42, 0.46, 0.22], [0.90, 0.66, 0.70]]
)


def _distance(shape: torch.Tensor, p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Signed distance [n, s, s] to each object's edge (negative inside); p [n, 2, s, s], r [n, 1, 1]."""
    x, y = p[:, 0], p[:, 1]
    ax, ay, length = x.abs(), y.abs(), (x * x + y * y).sqrt()  # p.norm(dim=1) takes forty times as long
    candidates = torch.stack(
        [
            length - r,
            torch.maximum(ax, ay) - 0.86 * r,
            torch.maximum(y - 0.58 * r, 0.866 * ax - 0.5 * y - 0.58 * r),
            torch.minimum(
                torch.maximum(ax - r, ay - 0.36 * r),
                torch.maximum(ax - 0.36 * r, ay - r),
            ),
            (length - 0.72 * r).abs() - 0.28 * r,
        ]
    )
    return candidates[shape, torch.arange(len(shape))]


def render(scenes: Scenes, resolution: int = RESOLUTION) -> torch.Tensor:
    """[n, 3, resolution, resolution] float32 in [-1, 1]."""
    chunks = [_render(scenes[i : i + 64], resolution) for i in range(0, len(scenes), 64)]  # 64 fit in the cache
    return torch.cat(chunks) if chunks else torch.empty(0, 3, resolution, resolution)


def _render(scenes: Scenes, resolution: int) -> torch.Tensor:
    side = resolution * _SUPERSAMPLE
    as_tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a))  # noqa: E731
    axis = (torch.arange(side) + 0.5) / side
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None]  # [1, 2, s, s], (x, y)
    light = as_tensor(scenes.light).float()
    toward = torch.stack([light.cos(), light.sin()], 1)[:, :, None, None]  # points at the light
    sharp = lambda d: (0.5 - d * side).clamp(0, 1)  # noqa: E731  coverage of one subpixel

    image = _BACKGROUNDS[as_tensor(scenes.background)][:, :, None, None]
    image = image * (1 + 0.30 * ((grid - 0.5) * toward).sum(1, keepdim=True))
    center, radius = as_tensor(scenes.center).float(), as_tensor(scenes.radius).float()
    shape, color = as_tensor(scenes.shape), as_tensor(scenes.color)
    pair = as_tensor(scenes.relation) >= 0

    present = torch.stack([torch.ones_like(pair), pair], 1)[:, :, None, None, None].float()
    offsets = [grid - center[:, k, :, None, None] for k in range(2)]
    radii = [radius[:, k, None, None] for k in range(2)]
    for k in range(2):  # both shadows lie under both objects
        cast = _distance(shape[:, k], offsets[k] + 0.055 * toward, radii[k])
        image = image * (1 - 0.5 * present[:, k] * (0.5 - cast[:, None] * 24).clamp(0, 1))
    for k in range(2):
        p, r = offsets[k], radii[k]
        d = _distance(shape[:, k], p, r)
        stripes = 0.5 + 0.5 * torch.cos((p[:, 0] + p[:, 1]) * (2 * np.pi / 0.155))
        stripes = ((stripes - 0.5) * 6 + 0.5).clamp(0, 1) * as_tensor(scenes.pattern)[:, k, None, None]
        shade = 1 + 0.28 * (p * toward).sum(1) / r
        paint = _COLORS[color[:, k]][:, :, None, None] * (shade * (1 - 0.62 * stripes))[:, None]
        paint = paint * (1 - 0.8 * sharp(-d - 0.028))[:, None]  # outline
        alpha = present[:, k] * sharp(d)[:, None]
        image = image * (1 - alpha) + paint * alpha
    image = torch.nn.functional.avg_pool2d(image.clamp(0, 1), _SUPERSAMPLE)
    return image * 2 - 1

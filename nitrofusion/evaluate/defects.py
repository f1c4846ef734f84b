"""Two rates of pictures that no real picture looks like: grain, and structure such as strongly doubled outlines.

Both count the pictures beyond the 99th percentile of real ones, so that about 1 % is no defect at all.

- grain: the 25th percentile over pixels of |Laplacian|, mean over channels. At least a quarter of every scene is smooth
  ground, where it is near zero whatever the objects are. The limit is that of real pictures as the world's autoencoder
  decodes them, whose own grain every model of the world shares.
- structure: how far the channel means and deviations inside the judge's trunk are from what the named attributes
  predict, in standard deviations of real pictures (Mahalanobis). Prediction and deviations are fitted to reference
  scenes, the limit is found on others.

Measured on 1,000 fresh scenes (percent of pictures): see the table in DESIGN.md. Grain answers to pixel noise from
0.01 and structure to clearly doubled outlines and blur; outlines doubled faintly are mostly missed by both.
"""

from __future__ import annotations

import numpy as np
import torch

from ..world.scenes import ATTRIBUTES, Scenes
from .metrics import laplacian

GRAIN_QUANTILE = 0.25
GRAIN_LIMIT = 0.0077  # 99th percentile over decoded real pictures; a test measures it again on fresh scenes
_LIMIT_SHARE = 0.99
_TRUNK = (1, 2, 3)  # blocks of the judge's trunk whose maps are looked at
_RIDGE = 1e-3  # share of the mean variance added to each, so that fewer references than features still invert


def grain(images: torch.Tensor) -> torch.Tensor:
    """[n] grain of images [n, c, h, w]: |Laplacian| of the quietest quarter of the pixels."""
    return laplacian(images).mean(1).flatten(1).quantile(GRAIN_QUANTILE, dim=1)


@torch.no_grad()
def structure_features(judge, images: torch.Tensor) -> torch.Tensor:
    """[n, d] means and standard deviations over pixels of the judge's inner maps of images [n, 3, 32, 32]."""
    maps, parts = images, []
    for k, block in enumerate(judge.trunk[: max(_TRUNK) + 1]):
        maps = block(maps)
        if k in _TRUNK:
            parts += [maps.mean((2, 3)), maps.std((2, 3))]
    return torch.cat(parts, 1)


class Structure:
    """Distance of structure features from those of real pictures with the same attributes.

    Args:
        scenes: n real scenes. features: [n, d] of their pictures. Two thirds are fitted, on the others lies ``limit``.
    """

    def __init__(self, scenes: Scenes, features: np.ndarray):
        x, y = attribute_columns(scenes), features.astype(np.float64)
        fitted = 2 * len(x) // 3
        a = x[:fitted]
        self.weights = np.linalg.solve(a.T @ a + 1e-2 * np.eye(a.shape[1]), a.T @ y[:fitted])
        covariance = np.cov(y[:fitted] - a @ self.weights, rowvar=False)
        covariance += _RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        self.whiten = np.linalg.inv(np.linalg.cholesky(covariance))
        self.limit = float(np.quantile(self._distance(x[fitted:], y[fitted:]), _LIMIT_SHARE))

    def __call__(self, scenes: Scenes, features: np.ndarray) -> np.ndarray:
        """[n] squared distances of pictures drawn for ``scenes``."""
        return self._distance(attribute_columns(scenes), features.astype(np.float64))

    def _distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (((y - x @ self.weights) @ self.whiten.T) ** 2).sum(1)


def attribute_columns(scenes: Scenes) -> np.ndarray:
    """[n, k] indicators: layout, background, and of each object shape x pattern and colour x pattern.

    The object of a single scene is larger than those of a pair, so it has columns of its own.
    """
    values = scenes.attributes()
    one_hot = lambda name: np.eye(ATTRIBUTES[name])[values[:, list(ATTRIBUTES).index(name)]]  # noqa: E731
    single = values[:, 0] == 0
    columns = [one_hot("layout"), one_hot("background")]
    for number, present in ((1, single), (1, ~single), (2, ~single)):
        pattern = one_hot(f"pattern_{number}") * present[:, None]
        for name in ("shape", "color"):
            both = one_hot(f"{name}_{number}")[:, :, None] * pattern[:, None]
            columns.append(both.reshape(len(values), -1))
    return np.concatenate(columns, 1)

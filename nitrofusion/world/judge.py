"""The judge: an attribute classifier whose penultimate features also carry the Frechet distance."""

from __future__ import annotations

import torch
from torch import nn

from .scenes import ATTRIBUTES


class Judge(nn.Module):
    """Reads every attribute of a scene off its picture.

    Input [n, 3, 32, 32] in [-1, 1]; output logits [n, sum of ATTRIBUTES sizes] and features [n, 160].
    """

    num_features = 160

    def __init__(self):
        super().__init__()

        def block(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.GroupNorm(8, c_out), nn.SiLU())

        self.trunk = nn.Sequential(
            block(3, 32, 1), block(32, 48, 2), block(48, 64, 1), block(64, 96, 2), block(96, 128, 2), nn.Flatten()
        )
        self.features = nn.Linear(128 * 16, self.num_features)
        self.classify = nn.Linear(self.num_features, sum(ATTRIBUTES.values()))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(self.trunk(images))
        return self.classify(nn.functional.silu(features)), features

    def correct(self, images: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
        """[n, 8] bool: attribute right, or not applicable (-1)."""
        return self.look(images, attributes)[0]

    @torch.no_grad()
    def look(self, images: torch.Tensor, attributes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(``correct``, features [n, num_features]) of one pass."""
        logits, features = self(images)
        guess = torch.stack([part.argmax(1) for part in logits.split(list(ATTRIBUTES.values()), 1)], 1)
        return (guess == attributes) | (attributes < 0), features


def judge_loss(logits: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
    """Sum over attributes of the mean cross-entropy; attributes of -1 are ignored."""
    parts = logits.split(list(ATTRIBUTES.values()), 1)
    return sum(nn.functional.cross_entropy(p, attributes[:, k], ignore_index=-1) for k, p in enumerate(parts))

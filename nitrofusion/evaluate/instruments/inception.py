"""Inception-v3 as FID means it: the 2015 TensorFlow network's 2048 pooled features (arXiv 1706.08500).

Plain torch, from the weights that pytorch-fid and torch-fidelity publish. It differs from torchvision's Inception v3:
average pools do not count the padding, and the last block's pool takes maxima.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...errors import InputError
from ...models.weights import fill_
from ..weights import tensors
from .pictures import centre_crop, check_call, exact, pixels, resize_tf1

WIDTH = 2048
_EPS = 1e-3  # of the batch norms


def load(paths: dict[str, Path], device: str) -> Callable:
    """Features [n, 2048] of whole pictures, resized to 299x299 as TensorFlow 1 does."""
    return _load(paths["inception"], device, resize_tf1)


def load_patch(paths: dict[str, Path], device: str) -> Callable:
    """Features [n, 2048] of the 299x299 pixels in the middle of each picture."""
    return _load(paths["inception"], device, centre_crop)


def _load(path: Path, device: str, cut: Callable) -> Callable:
    network = read(path, device)

    def features(images: list, prompts: list[str] | None = None) -> np.ndarray:
        images = check_call("inception", images, prompts)
        if not images:
            return np.empty((0, WIDTH), np.float32)
        x = torch.stack([cut(pixels(image)) for image in images])
        with exact():
            return network((x.to(device) - 128) / 128).cpu().numpy()

    return features


def read(path: Path, device: str) -> Inception:
    """The network of a file that ``weights.locate`` found.

    Raises:
        InputError: it does not hold that network.
    """
    with torch.device("meta"):
        network = Inception()
    return fill_(network, _folded(tensors("inception", path), network, path), path, device, torch.float32)


def _folded(stored: dict[str, torch.Tensor], network: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Each convolution with the batch norm that follows it, as one convolution with a bias."""
    folded = {}
    for name, shape in ((k.removesuffix(".weight"), v.shape) for k, v in network.state_dict().items() if "weight" in k):
        names = [f"{name}.conv.weight"] + [f"{name}.bn.{k}" for k in ("weight", "bias", "running_mean", "running_var")]
        for k in names:
            wanted = tuple(shape) if k == names[0] else (shape[0],)
            got = tuple(stored[k].shape) if k in stored else "nothing"
            if got != wanted:
                raise InputError(f"evaluate: {path} must hold FID's Inception with {k} {wanted}, got {got}")
        weight, scale, shift, mean, variance = (stored[k].double() for k in names)
        scale = scale / (variance + _EPS).sqrt()
        folded[f"{name}.weight"] = weight * scale.view(-1, 1, 1, 1)
        folded[f"{name}.bias"] = shift - mean * scale
    return folded


class Conv(nn.Conv2d):
    """Convolution and ReLU; ``pad`` keeps the size for odd kernels."""

    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        super().__init__(channels, out, kernel, stride, (kernel[0] // 2, kernel[1] // 2) if pad else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(x))


def _mean_pool(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35: 1x1, 5x5 and two 3x3 beside a pool."""

    def __init__(self, channels: int, pool: int):
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(channels, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(channels, pool, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean_pool(x))], 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, 2, pad=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2, pad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17 x 17: 7x7 taken apart, once and twice."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        wide, tall = (1, 7), (7, 1)
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(channels, inner, 1), Conv(inner, inner, wide)
        self.branch7x7_3 = Conv(inner, 192, tall)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(channels, inner, 1), Conv(inner, inner, tall)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(inner, inner, wide), Conv(inner, inner, tall)
        self.branch7x7dbl_5 = Conv(inner, 192, wide)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_mean_pool(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(channels, 192, 1), Conv(192, 320, 3, 2, pad=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(channels, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, 2, pad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """8 x 8: 3x3 split into a row and a column. ``pool`` differs between the two of them."""

    def __init__(self, channels: int, pool: Callable):
        super().__init__()
        self.pool = pool
        wide, tall = (1, 3), (3, 1)
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, wide), Conv(384, 384, tall)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, wide), Conv(384, 384, tall)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(self.pool(x))]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """Pictures [n, 3, 299, 299] in [-1, 1] to features [n, 2048]; batch norms are folded into the convolutions."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, _mean_pool)
        self.Mixed_7c = BlockE(2048, lambda x: F.max_pool2d(x, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for block in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{block}")(x)
        return x.mean((2, 3))

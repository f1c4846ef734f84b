"""A UNet's difference to its base as a LoRA, by truncated singular value decomposition.

``models/lora.py`` goes the other way: it merges LoRA files into weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..models.layouts import Tensors
from ..models.writing import cast


@dataclass(frozen=True)
class Layer:
    """What became of one tensor.

    Attributes:
        rank: of its LoRA; 0 for what a LoRA cannot hold (norms, biases) and for layers that do not differ.
        energy: squared Frobenius norm of the difference.
        kept: share of it that the LoRA holds, 0 to 1; 1 where nothing differs.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    kept: float


def low_rank(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best approximation ``up @ down`` of a matrix.

    Args:
        delta: [m, n], any precision; worked on in fp64.
        rank: at most min(m, n) of them are used.

    Returns:
        up [m, r] and down [r, n] in fp64, of equal size so that half precision serves both, and the share of the
        squared norm that they hold.
    """
    delta = delta.double()
    if delta.shape[0] > delta.shape[1]:
        up, down, kept = low_rank(delta.T, rank)
        return down.T, up.T, kept
    # The eigenvectors of the small Gram matrix cost a fraction of a full decomposition and give the same subspace.
    _, vectors = torch.linalg.eigh(delta @ delta.T)
    up = vectors[:, -min(rank, len(delta)) :].flip(1)
    down = up.T @ delta
    energy, values = delta.square().sum().item(), down.norm(dim=1)
    kept = down.square().sum().item() / energy if energy else 1.0
    scale = torch.where(values > 0, values, 1.0).sqrt()
    return up * scale, down / scale[:, None], min(kept, 1.0)


def extract(unet: Tensors, base: Tensors, rank: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[Layer]]:
    """LoRA tensors in diffusers' PEFT layout (``unet.LAYER.lora_A.weight``), and a report of every UNet tensor.

    Every linear layer and convolution takes part, 3x3 included; a layer's rank is at most its smaller side. Zeros make
    the largest one the rank of all: diffusers before 0.40 multiplies layers of other ranks by a ratio of the two.

    Raises:
        InputError: the two UNets do not have the same tensors, one holds NaN or infinity, or ``dtype`` cannot hold what
            a layer takes.
    """
    wrong = [n for n in unet if n not in base] + [n for n in base if n not in unet]
    wrong += [n for n in unet if n in base and unet[n].shape != base[n].shape]
    if wrong:
        raise InputError(
            f"export: base must be a UNet of the same form, got {len(wrong)} tensors that differ (first: {wrong[0]})"
        )
    state, layers = {}, []
    for name in sorted(unet):
        delta, shape = unet[name].double() - base[name].double(), tuple(unet[name].shape)
        energy = delta.square().sum().item()
        if not math.isfinite(energy):
            raise InputError(f"export: model and base must hold finite weights, got NaN or infinity in {name}")
        if energy == 0 or delta.ndim not in (2, 4) or not name.endswith(".weight"):
            layers.append(Layer(name, shape, 0, energy, 0.0 if energy else 1.0))
            continue
        up, down, kept = low_rank(delta.flatten(1), rank)
        if delta.ndim == 4:
            up, down = up[..., None, None], down.unflatten(1, shape[1:])
        layer = f"unet.{name.removesuffix('.weight')}"
        for side, matrix in (("lora_A", down), ("lora_B", up)):
            state[f"{layer}.{side}.weight"] = cast(matrix, dtype, f"{side} of {layer}").contiguous()
        layers.append(Layer(name, shape, up.shape[1], energy, kept))
    most = max((layer.rank for layer in layers), default=0)
    return {name: _filled(matrix, most, dim=int("lora_B" in name)) for name, matrix in state.items()}, layers


def _filled(matrix: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    shape = list(matrix.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim)


def kept(layers: list[Layer]) -> float:
    """Share of the whole difference's squared norm, norms and biases included."""
    whole = sum(layer.energy for layer in layers)
    return sum(layer.energy * layer.kept for layer in layers) / whole if whole else 1.0

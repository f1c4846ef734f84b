"""LAION's aesthetic predictor V2: a linear head on CLIP ViT-L/14's normalised picture embeddings; about 1 to 10.

The published head has five layers and no activation between them. Its packages ask for old transformers, hence these
few lines over the published file. The authors ran CLIP in half precision on a GPU; here it is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...errors import InputError
from ...models.weights import is_finite
from ..weights import tensors
from .clip_score import image_embeddings, read
from .pictures import check_call, exact, resize_crop_of

LAYERS = (0, 2, 4, 6, 7)  # numbers of the linear layers; between them the authors had dropout


def load(paths: dict[str, Path], device: str) -> Callable:
    """Scores [n, 1] of pictures."""
    folder = paths["clip-vit-large-patch14"]
    clip, prepare = read("clip-vit-large-patch14", folder, device), resize_crop_of(folder)
    head = linear_head(tensors("aesthetic", paths["aesthetic"]), "", paths["aesthetic"], device)
    if head[0].in_features != clip.config.projection_dim:
        raise InputError(
            f"evaluate: {folder} must be a CLIP with embeddings of {head[0].in_features}, "
            f"got {clip.config.projection_dim}"
        )

    def scores(images: list, prompts: list[str] | None = None) -> np.ndarray:
        images = check_call("aesthetic", images, prompts)
        if not images:
            return np.empty((0, 1), np.float32)
        seen = image_embeddings(clip, torch.stack([prepare(image) for image in images]))
        with exact():
            return head(F.normalize(seen, dim=1)).cpu().numpy()

    return scores


def linear_head(stored: dict[str, torch.Tensor], prefix: str, path: Path, device: str) -> nn.Sequential:
    """The five linear layers under ``prefix``, each as wide as the file has it."""
    layers, width = [], None
    for number in LAYERS:
        names = [f"{prefix}layers.{number}.{kind}" for kind in ("weight", "bias")]
        for name in names:
            if name not in stored:
                raise InputError(f"evaluate: {path} must hold {name}, got nothing by that name")
        weight, bias = (stored[name].to(device, torch.float32) for name in names)
        wanted = "[out, in] after the layer before it" if number != LAYERS[-1] else "[1, in] after the layer before it"
        fits = weight.ndim == 2 and bias.shape == weight.shape[:1] and width in (None, weight.shape[1])
        if not fits or (number == LAYERS[-1] and len(weight) != 1):
            raise InputError(f"evaluate: {path} must have {names[0]} {wanted}, got {list(weight.shape)}")
        if not (is_finite(weight) and is_finite(bias)):
            raise InputError(f"evaluate: {path} must hold finite weights, got NaN or infinity in {names[0]}")
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        layers.append(layer.requires_grad_(False))
        width = len(weight)
    return nn.Sequential(*layers)

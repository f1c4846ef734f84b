"""CLIP score: the cosine of a picture's and its prompt's embedding (arXiv 2104.08718), not times 100, not cut at 0.

The prompt stands for itself; some code puts "A photo depicts" before it, whose numbers are others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import InputError
from ...models.weights import check, fill_
from ..weights import tensors
from .pictures import check_call, exact, resize_crop_of


def load(paths: dict[str, Path], device: str) -> Callable:
    """Scores [n, 1] of pictures and prompts, by the CLIP in ``paths["clip-vit-base-patch32"]``."""
    from transformers import CLIPTokenizer

    folder = paths["clip-vit-base-patch32"]
    model, prepare = read("clip-vit-base-patch32", folder, device), resize_crop_of(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    options["max_length"] = model.config.text_config.max_position_embeddings

    def scores(images: list, prompts: list[str] | None = None) -> np.ndarray:
        images = check_call("clip_score", images, prompts, needs_prompt=True)
        if not images:
            return np.empty((0, 1), np.float32)
        seen = image_embeddings(model, torch.stack([prepare(image) for image in images]))
        ids = tokenizer(list(prompts), **options).input_ids.to(device)
        with exact():
            told = model.text_projection(model.text_model(ids).pooler_output)
            return F.cosine_similarity(seen, told).cpu().numpy()[:, None]

    return scores


def image_embeddings(model, x: torch.Tensor) -> torch.Tensor:
    """[n, d] embeddings, not normalised, of prepared pictures [n, 3, s, s]."""
    with exact():
        return model.visual_projection(model.vision_model(x.to(model.device)).pooler_output)


def read(name: str, folder: Path, device: str):
    """The CLIPModel of a folder that ``weights.locate`` found, float32 and frozen.

    Raises:
        InputError: the folder holds something else.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = CLIPModel(config)
    except Exception as error:  # transformers has types of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"evaluate: {folder} must hold the configuration of a CLIP, got {reason}") from error
    stored = {k: v for k, v in tensors(name, folder).items() if not k.endswith("position_ids")}
    check(model, stored, folder, "CLIP")
    return fill_(model, stored, folder, device, torch.float32)

"""CLIP's view of pictures and captions, with gradients to the pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..errors import InputError
from .folder import check_sizes
from .weights import read_json


def check_clip(folder: str | Path) -> Path:
    """The folder, which must hold a ``CLIPModel`` as safetensors with its tokenizer; no weight is read."""
    folder = Path(folder)
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer_config.json")
               if not (folder / name).is_file()]  # fmt: skip
    if missing:
        raise InputError(f"clip: {folder} must be a folder with a CLIP model, got none with {missing[0]}")
    config = read_json(folder / "config.json")
    for part in (config, config.get("vision_config"), config.get("text_config")):
        check_sizes(part if isinstance(part, dict) else {}, folder)
    kind = config.get("model_type")
    if kind != "clip":
        raise InputError(f"clip: {folder} must hold a model of type clip, got {kind!r}")
    return folder


def files(folder: str | Path) -> list[Path]:
    """What ``Clip`` reads, but for the tokenizer."""
    return [Path(folder) / name for name in ("model.safetensors", "config.json")]


class Clip:
    """A frozen CLIP from a folder that ``check_clip`` accepts; nothing is fetched."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        from transformers import CLIPModel, CLIPTokenizer

        folder = check_clip(folder)
        self.model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device)
        self.model.requires_grad_(False).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, D] embeddings of square pictures [B, 3, H, H] in [-1, 1]; differentiable."""
        side = self.model.config.vision_config.image_size
        x = functional.interpolate((pixels.float() + 1) / 2, (side, side), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        return self.model.visual_projection(self.model.vision_model((x - mean) / std).pooler_output)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> torch.Tensor:
        """[B, D] embeddings of prompts, cut to what CLIP reads."""
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(prompts, **options).input_ids.to(self.model.device)
        return self.model.text_projection(self.model.text_model(ids).pooler_output)

"""ImageReward v1.0 (arXiv 2304.05977): BLIP-large looks at the picture while reading the prompt; a linear head scores.

The authors' package is pinned to old timm, fairscale and transformers and imports a package that is not on PyPI. Here
transformers' BLIP modules hold the published ``ImageReward.pt``'s weights under its own names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ...errors import InputError
from ...models.weights import check, fill_
from ..weights import tensors
from .aesthetic import linear_head
from .pictures import ResizeCrop, check_call, exact

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the training rewards
LENGTH = 35  # tokens of a prompt that are read
_HEAD_WIDTH = 64  # of the attention, in both networks
_VISION, _TEXT = "blip.visual_encoder.", "blip.text_encoder."
_VISION_NAMES = (  # the file's to transformers', in this order
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
)


def load(paths: dict[str, Path], device: str) -> Callable:
    """Rewards [n, 1] of pictures and prompts."""
    path = paths["image-reward"]
    stored = tensors("image-reward", path)
    vision, text, side = read(stored, path, device)
    head = linear_head(stored, "mlp.", path, device)
    prepare, tokenizer = ResizeCrop(side, side, rounded=True), read_tokenizer(paths["bert-vocabulary"])

    def scores(images: list, prompts: list[str] | None = None) -> np.ndarray:
        images = check_call("image_reward", images, prompts, needs_prompt=True)
        if not images:
            return np.empty((0, 1), np.float32)
        x = torch.stack([prepare(image) for image in images]).to(device)
        coded = tokenizer.encode_batch(list(prompts))
        ids, mask = (torch.tensor([getattr(c, k) for c in coded]).to(device) for k in ("ids", "attention_mask"))
        with exact():
            seen = vision(x).last_hidden_state
            read_ = text(ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
            return ((head(read_[:, 0]) - MEAN) / STD).cpu().numpy()

    return scores


def read_tokenizer(vocabulary: Path):
    """bert-base-uncased's, with the two tokens that BLIP adds; cuts and fills prompts to ``LENGTH``."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    tokenizer.add_special_tokens(["[DEC]", "[ENC]"])
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    return tokenizer


def read(stored: dict[str, torch.Tensor], path: Path, device: str):
    """The two networks of the published layout, float32 and frozen, and the side of the pictures they take.

    All sizes are read off the tensors. Names that scoring does not need (projections of the training) are left out.

    Raises:
        InputError: tensors are missing or do not fit each other.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    parts = {prefix: {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
             for prefix in (_VISION, _TEXT)}  # fmt: skip
    seen = {_renamed(k): v for k, v in parts[_VISION].items()}
    told = {k: v for k, v in parts[_TEXT].items() if not k.endswith("position_ids")}
    try:
        patch = seen["embeddings.patch_embedding.weight"]
        side = round((seen["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patch.shape[-1]
        vision = BlipVisionConfig(
            hidden_size=patch.shape[0],
            intermediate_size=len(seen["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=_depth(seen, "encoder.layers."),
            num_attention_heads=patch.shape[0] // _HEAD_WIDTH,
            image_size=side,
            patch_size=patch.shape[-1],
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        words = told["embeddings.word_embeddings.weight"]
        text = BlipTextConfig(
            vocab_size=len(words),
            hidden_size=words.shape[1],
            encoder_hidden_size=told["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=len(told["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_depth(told, "encoder.layer."),
            num_attention_heads=words.shape[1] // _HEAD_WIDTH,
            max_position_embeddings=len(told["embeddings.position_embeddings.weight"]),
            hidden_act="gelu",
            layer_norm_eps=1e-12,
        )
    except (KeyError, IndexError) as error:
        raise InputError(f"evaluate: {path} must hold ImageReward's tensors, got none for {error}") from error
    built = []
    with torch.device("meta"):
        made = (BlipVisionModel(vision), seen), (BlipTextModel(text, add_pooling_layer=False), told)
    for model, have in made:
        have = {k: v for k, v in have.items() if k in model.state_dict()}
        check(model, have, path, "ImageReward's BLIP")
        built.append(fill_(model, have, path, device, torch.float32))
    return *built, side


def _renamed(name: str) -> str:
    for pattern, new in _VISION_NAMES:
        name = re.sub(pattern, new, name)
    return name


def _depth(stored: dict, prefix: str) -> int:
    return len({k.removeprefix(prefix).split(".")[0] for k in stored if k.startswith(prefix)})

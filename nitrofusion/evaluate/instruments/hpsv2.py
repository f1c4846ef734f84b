"""HPS v2.1 (arXiv 2306.09341): the cosine of a picture and its prompt in a CLIP ViT-H/14 tuned on people's choices.

The authors' package misses a file its tokenizer needs and asks for old protobuf and pytest. Here transformers' CLIP
holds the published checkpoint, which has open_clip's names. Plain cosine, as their ``score`` gives it; their
``evaluate`` multiplies by 100. Theirs ran in half precision on a GPU, this is float32.
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
from .pictures import check_call, exact, pad_square

_VISION_HEAD, _TEXT_HEAD = 80, 64  # widths of a head of attention in ViT-H-14
_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


def load(paths: dict[str, Path], device: str) -> Callable:
    """Scores [n, 1] of pictures and prompts."""
    model = read(paths["hpsv2"], device)
    side = model.config.vision_config.image_size
    tokens = read_tokenizer(paths["clip-tokenizer"], model.config.text_config.max_position_embeddings)

    def scores(images: list, prompts: list[str] | None = None) -> np.ndarray:
        images = check_call("hpsv2", images, prompts, needs_prompt=True)
        if not images:
            return np.empty((0, 1), np.float32)
        x, ids = torch.stack([pad_square(image, side) for image in images]).to(device), tokens(prompts).to(device)
        with exact():
            seen = model.visual_projection(model.vision_model(x).pooler_output)
            states = model.text_model(ids).last_hidden_state
            # The end of the text is its highest token; what fills up comes after it, where nothing looks back.
            told = model.text_projection(states[torch.arange(len(ids), device=ids.device), ids.argmax(1)])
            return F.cosine_similarity(seen, told).cpu().numpy()[:, None]

    return scores


def read_tokenizer(path: Path, length: int) -> Callable[[list[str]], torch.Tensor]:
    """Prompts to ids [n, length]: begin, text, end, zeros; a long text is cut before its end token."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        raise InputError(f"evaluate: {path} must be a readable tokenizer, got {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def ids(prompts: list[str]) -> torch.Tensor:
        rows = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, coded in zip(rows, tokenizer.encode_batch(list(prompts)), strict=True):
            found = coded.ids if len(coded.ids) <= length else [*coded.ids[: length - 1], coded.ids[-1]]
            row[: len(found)] = torch.tensor(found)
        return rows

    return ids


def read(path: Path, device: str):
    """A CLIPModel with a checkpoint of open_clip's layout, float32 and frozen; all sizes are read off the tensors.

    Raises:
        InputError: tensors are missing or do not fit each other.
    """
    from transformers import CLIPConfig, CLIPModel

    stored = tensors("hpsv2", path)
    try:
        patch, words = stored["visual.conv1.weight"], stored["token_embedding.weight"]
        grid = round((len(stored["visual.positional_embedding"]) - 1) ** 0.5)
        vision = {
            "image_size": grid * patch.shape[-1],
            "patch_size": patch.shape[-1],
            **_tower(stored, "visual.transformer.resblocks.", len(patch), _VISION_HEAD),
        }
        text = {
            "vocab_size": len(words),
            "max_position_embeddings": len(stored["positional_embedding"]),
            **_tower(stored, "transformer.resblocks.", words.shape[1], _TEXT_HEAD),
        }
        dim = stored["text_projection"].shape[1]
        named = _renamed(stored)
    except (KeyError, IndexError) as error:
        raise InputError(f"evaluate: {path} must hold HPS v2.1's tensors, got none for {error}") from error
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim))
    check(model, named, path, "HPS v2.1's CLIP")
    return fill_(model, named, path, device, torch.float32)


def _tower(stored: dict[str, torch.Tensor], prefix: str, width: int, head: int) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": len(stored[f"{prefix}0.mlp.c_fc.weight"]),
        "num_hidden_layers": len({k.removeprefix(prefix).split(".")[0] for k in stored if k.startswith(prefix)}),
        "num_attention_heads": width // head,
        "hidden_act": "gelu",
    }


def _renamed(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's tensors by transformers' names: attention's joint projection taken apart, projections turned."""
    named = {new: stored[old] for old, new in _NAMES.items()}
    named["visual_projection.weight"] = stored["visual.proj"].T
    named["text_projection.weight"] = stored["text_projection"].T
    for prefix, tower in (("visual.transformer.resblocks.", "vision_model"), ("transformer.resblocks.", "text_model")):
        for name, value in stored.items():
            if not name.startswith(prefix):
                continue
            number, _, rest = name.removeprefix(prefix).partition(".")
            block = f"{tower}.encoder.layers.{number}."
            part, _, kind = rest.rpartition(".")
            if part in _BLOCK_NAMES:
                named[f"{block}{_BLOCK_NAMES[part]}.{kind}"] = value
            elif rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for which, third in zip("qkv", value.chunk(3), strict=True):
                    named[f"{block}self_attn.{which}_proj.{kind}"] = third
    return named

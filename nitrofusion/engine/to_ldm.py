"""Writing layouts: which tensors of diffusers make which of a single file (LDM's layout, which ComfyUI reads).

diffusers converts one way, LDM to diffusers; ``models/layouts.py`` reads by that. Here the names of all tensors an LDM
file could have, each with a number in place of its weights, go through the same converter, and what comes out is
inverted: diffusers' own correspondence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers.loaders import single_file_utils as ldm

from ..errors import InputError
from ..models.layouts import TEXT_ENCODERS, UNET, VAE

_ENDS = ("weight", "bias")
# What LDM calls the layers of its blocks; which of them is which of diffusers' is the converter's business.
_RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
_VAE_RESNET = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
_VAE_ATTENTION = ("norm", "q", "k", "v", "proj_out")
_CLIP_BLOCK = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class Entry:
    """One tensor of a single file.

    Attributes:
        parts: the diffusers tensors it is made of, joined along the first axis.
        form: ``same``, ``transposed``, or ``conv`` (a linear layer written as a 1x1 convolution).
    """

    parts: tuple[str, ...]
    form: str = "same"

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        first = (sum(s[0] for s in shapes), *shapes[0][1:])
        return {"same": first, "transposed": first[::-1], "conv": (*first, 1, 1)}[self.form]

    def make(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.form == "conv":
            return joined[..., None, None]
        return joined.T if self.form == "transposed" else joined

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of ``make``: the parts, which are of one size."""
        if self.form == "conv":
            tensor = tensor[..., 0, 0]
        return list((tensor.T if self.form == "transposed" else tensor).chunk(len(self.parts)))


def unet_entries(names: Iterable[str]) -> dict[str, Entry]:
    """Name in a single file to Entry, for all of a diffusers UNet's names.

    Raises:
        InputError: a tensor has no place in LDM's layout.
    """
    names = set(names)
    layers = len({n.split(".")[3] for n in names if n.startswith("down_blocks.0.resnets.")})
    levels = len({n.split(".")[1] for n in names if n.startswith("down_blocks.")})
    attention = sorted({n.split(".", 4)[4] for n in names if re.match(r"(down|up)_blocks\.\d+\.attentions\.", n)})
    attention_mid = {n.split(".", 3)[3] for n in names if n.startswith("mid_block.attentions.")}
    tables = ldm.DIFFUSERS_TO_LDM_MAPPING["unet"]
    candidates = [*tables["layers"].values(), *tables["addition_embed_type"].values()]
    blocks = [f"input_blocks.{i}" for i in range(1, levels * (layers + 1))]
    blocks += [f"output_blocks.{i}" for i in range(levels * (layers + 1))]
    for block in blocks:
        candidates += [f"{block}.0.{layer}.{end}" for layer in (*_RESNET, "op") for end in _ENDS]
        candidates += [f"{block}.1.{suffix}" for suffix in attention]
    for level in range(levels):  # an upsampler is its block's last layer, behind an attention where there is one
        place = 2 if any(n.startswith(f"up_blocks.{level}.attentions.") for n in names) else 1
        block = f"output_blocks.{level * (layers + 1) + layers}"
        candidates += [f"{block}.{place}.conv.{end}" for end in _ENDS]
    candidates += [f"middle_block.{i}.{layer}.{end}" for i in (0, 2) for layer in _RESNET for end in _ENDS]
    candidates += [f"middle_block.1.{suffix}" for suffix in sorted(attention_mid)]
    config = {"layers_per_block": layers, "addition_embed_type": "text_time"}
    found = ldm.convert_ldm_unet_checkpoint(_numbered({UNET + c: (1, 1) for c in candidates}), config)
    keys = {n: UNET + candidates[int(v.flatten()[0]) // 4] for n, v in found.items() if v is not None}
    return _entries(names, {name: Entry((name,)) for name in keys}, keys, "UNet")


def vae_entries(names: Iterable[str], config: dict) -> dict[str, Entry]:
    """The same for an AutoencoderKL; ``config`` is its own."""
    names = set(names)
    candidates = list(ldm.DIFFUSERS_TO_LDM_MAPPING["vae"].values())
    for i in range(len(config["block_out_channels"])):
        for side, sample in (("encoder.down", "downsample"), ("decoder.up", "upsample")):
            layers = range(config["layers_per_block"] + 1)
            candidates += [f"{side}.{i}.block.{j}.{n}.{e}" for j in layers for n in _VAE_RESNET for e in _ENDS]
            candidates += [f"{side}.{i}.{sample}.conv.{e}" for e in _ENDS]
    for side in ("encoder.mid", "decoder.mid"):
        candidates += [f"{side}.block_{k}.{n}.{e}" for k in (1, 2) for n in _VAE_RESNET for e in _ENDS]
        candidates += [f"{side}.attn_1.{n}.{e}" for n in _VAE_ATTENTION for e in _ENDS]
    found = ldm.convert_ldm_vae_checkpoint(_numbered({VAE + c: (1, 1) for c in candidates}), config)
    keys = {name: VAE + candidates[int(value.flatten()[0]) // 4] for name, value in found.items()}
    convs = {n for n in keys if ".attentions." in n and n.endswith(".weight") and "group_norm" not in n}
    return _entries(names, {n: Entry((n,), "conv" if n in convs else "same") for n in keys}, keys, "VAE")


def text_entries(names: Iterable[str]) -> dict[str, Entry]:
    """The same for SDXL's first text encoder. Recent transformers leave ``text_model.`` out of their names."""
    names = {n for n in names if not n.endswith("position_ids")}
    return {f"{TEXT_ENCODERS[0]}text_model.{n.removeprefix('text_model.')}": Entry((n,)) for n in sorted(names)}


def text_2_entries(names: Iterable[str]) -> dict[str, Entry]:
    """The same for SDXL's second text encoder, which single files hold in OpenCLIP's layout."""
    prefix = TEXT_ENCODERS[1]
    stored = {n.removeprefix("text_model."): n for n in names if not n.endswith("position_ids")}
    layers = len({n.split("layers.")[1].split(".")[0] for n in stored if "layers." in n})
    shapes = {prefix + c: (1, 1) for c in ldm.DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"].values()}
    for i in range(layers):
        block = f"{prefix}transformer.resblocks.{i}"
        shapes |= {f"{block}.{name}.{end}": (1, 1) for name in _CLIP_BLOCK for end in _ENDS}
        shapes |= {f"{block}.attn.in_proj_weight": (3, 1), f"{block}.attn.in_proj_bias": (3,)}
    keys, parts = list(shapes), {}
    for name, value in ldm.convert_open_clip_checkpoint(None, _numbered(shapes), prefix=prefix).items():
        number = int(value.flatten()[0])
        if (short := name.removeprefix("text_model.")) in stored:
            parts.setdefault(keys[number // 4], {})[number % 4] = stored[short]
    joined = {
        key: Entry(tuple(p for _, p in sorted(of.items())), "transposed" if key.endswith("text_projection") else "same")
        for key, of in parts.items()
    }
    _complete(set(stored.values()), {p for entry in joined.values() for p in entry.parts}, "second text encoder")
    return joined


def _numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Stand-ins for weights: tensor i of n rows holds 4 i to 4 i + n - 1."""
    return {
        name: torch.arange(4 * i, 4 * i + shape[0], dtype=torch.float64).reshape(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def _entries(names: set[str], entries: dict[str, Entry], keys: dict[str, str], what: str) -> dict[str, Entry]:
    _complete(names, keys.keys(), what)
    return {keys[name]: entries[name] for name in sorted(names, key=keys.get)}


def _complete(names: set[str], found, what: str) -> None:
    missing = sorted(names - set(found))
    if missing:
        raise InputError(
            f"model: the {what} must be one that single files can hold, got {len(missing)} tensors without a place in "
            f"LDM's layout (first: {missing[0]})"
        )

"""Reading layouts: what a weights file holds, and its tensors under diffusers' names, by diffusers' own converters.

``engine/to_ldm.py`` goes the other way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders import single_file_utils as ldm

from ..errors import InputError
from .weights import Weights

Tensors = Mapping[str, torch.Tensor]
UNET, VAE = ldm.LDM_UNET_KEY, "first_stage_model."  # prefixes in LDM's checkpoints
TEXT_ENCODERS = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
_OTHERS = {  # the piece of a name that gives a family away
    "double_blocks.": "FLUX",
    "single_transformer_blocks.": "FLUX",
    "joint_blocks.": "Stable Diffusion 3",
    "attn.add_k_proj.": "Stable Diffusion 3",
    "cond_stage_model.": "Stable Diffusion 1 or 2",
    "motion_modules.": "AnimateDiff",
    "control_model.": "ControlNet",
    "controlnet_cond_embedding.": "ControlNet",
    "edm_mean": "Playground 2.5",
}


def kind(tensors: Tensors, where: str | Path) -> str:
    """``unet`` in diffusers' names, ``ldm_unet``, or ``checkpoint``: UNet, both text encoders and VAE in LDM's names.

    Raises:
        InputError: it is something else; the message says what, and where that would go.
    """
    prefixed = any(name.startswith(UNET) for name in tensors)
    if any(".lora" in name or name.startswith("lora_") for name in tensors):
        raise InputError(f"load: {where} must be a UNet or a checkpoint, got a LoRA (give it as lora=, over a model)")
    for piece, family in _OTHERS.items():
        if any(piece in name for name in tensors):
            raise InputError(f"load: {where} must be of the SDXL family, got {family}")
    if "v_pred" in tensors:
        raise InputError(f"load: {where} must predict epsilon, got a v-prediction checkpoint")
    conv_in, embedding = first_shapes(tensors)
    if conv_in is None:
        is_vae = any(name.startswith(("decoder.", VAE)) for name in tensors)
        got = "a VAE (give it as vae=, over a model)" if is_vae else f"{len(tensors)} tensors of neither"
        raise InputError(f"load: {where} must be a UNet or a checkpoint, got {got}")
    if len(conv_in) != 4 or (embedding is not None and len(embedding) != 2):
        got = f"{list(conv_in)} and {None if embedding is None else list(embedding)}"
        raise InputError(f"load: {where} must have a kernel as conv_in and a matrix as added embedding, got {got}")
    if conv_in[1] != 4:
        name = " (an inpainting model)" if conv_in[1] == 9 else ""
        raise InputError(f"load: {where} must have a UNet of 4 input channels, got {conv_in[1]}{name}")
    if embedding is None:
        raise InputError(
            f"load: {where} must have an SDXL UNet (text_time), got one without its added embedding, "
            "as Stable Diffusion 1 and 2 have"
        )
    if "conv_in.weight" in tensors:
        return "unet"
    whole = prefixed and all(any(k.startswith(p) for k in tensors) for p in (*TEXT_ENCODERS, VAE))
    if prefixed and not whole and any(k.startswith(p) for k in tensors for p in (*TEXT_ENCODERS, VAE)):
        raise InputError(f"load: {where} must hold both text encoders and the VAE beside its UNet, or none of them")
    return "checkpoint" if whole else "ldm_unet"


def first_shapes(tensors: Tensors) -> tuple[torch.Size | None, torch.Size | None]:
    """Shapes of a UNet's first convolution and of its added embedding, in either layout; None where there is none."""

    def shape(*names: str) -> torch.Size | None:
        found = [p + n for n in names for p in ("", UNET, "diffusion_model.") if p + n in tensors]
        return tensors[found[0]].shape if found else None

    conv_in = shape("conv_in.weight", "input_blocks.0.0.weight")
    return conv_in, shape("add_embedding.linear_1.weight", "label_emb.0.0.weight")


def unet(tensors: Tensors, config: Mapping, where: str | Path) -> dict[str, torch.Tensor]:
    """The UNet's tensors in diffusers' names."""
    layout = kind(tensors, where)
    if layout == "unet":
        return dict(tensors)
    if layout == "ldm_unet":  # with prefix, or with the part of it that other programs leave
        tensors = {UNET + k.removeprefix(UNET).removeprefix("diffusion_model."): v for k, v in tensors.items()}
    return _converted(ldm.convert_ldm_unet_checkpoint, tensors, dict(config), where)


def unet_of_any_size(stored: Weights, what: str) -> dict[str, torch.Tensor]:
    """The same without a configuration, for UNets of Stable Diffusion's form with or without prefix.

    Args:
        what: begins the message.

    Raises:
        InputError: there is none.
    """
    for prefix in ("", "unet."):
        if f"{prefix}conv_in.weight" in stored:
            return _under(stored, prefix)
    for prefix in (UNET, ""):
        if f"{prefix}input_blocks.0.0.weight" in stored:
            found = _under(stored, prefix)
            # A level's downsampler stands behind its layers.
            ops = [int(m[1]) for name in found if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", name))]
            added = ldm.DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"].values()
            config = {
                "layers_per_block": min(ops) - 1 if ops else 2,
                "addition_embed_type": "text_time" if all(name in found for name in added) else None,
            }
            found = {UNET + name: tensor for name, tensor in found.items()}
            return _converted(ldm.convert_ldm_unet_checkpoint, found, config, stored.where, what)
    raise InputError(
        f"{what}: {stored.where} must hold a UNet in diffusers' or LDM's layout, got neither of their conv_in"
    )


def _under(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def vae(tensors: Tensors, config: Mapping, where: str | Path) -> dict[str, torch.Tensor]:
    """An AutoencoderKL's tensors in diffusers' names, from its own file or a checkpoint."""
    if any(".up_blocks." in k for k in tensors):
        return dict(tensors)
    if any(k.startswith(VAE) for k in tensors):
        tensors = {k: v for k, v in tensors.items() if k.startswith(VAE)}
    return _converted(ldm.convert_ldm_vae_checkpoint, tensors, dict(config), where)


def text_encoder(tensors: Tensors, number: int, module: torch.nn.Module, where: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint's text encoder ``number`` (0 or 1), named as transformers stores them."""
    if number == 0:
        return _converted(ldm.convert_ldm_clip_checkpoint, tensors, None, where)
    return _converted(
        lambda found, _: ldm.convert_open_clip_checkpoint(module, found, prefix=TEXT_ENCODERS[1]), tensors, None, where
    )


def _converted(convert, tensors: Tensors, config, where, what: str = "load") -> dict[str, torch.Tensor]:
    try:
        found = convert(dict(tensors), config)
    except (KeyError, IndexError, AttributeError, ValueError) as error:  # a name it counts on is not there
        raise InputError(f"{what}: {where} must hold an SDXL model in LDM's layout, got no {error}") from error
    return {k: v for k, v in found.items() if v is not None}

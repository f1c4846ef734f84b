"""Decoders that take the place of a pipeline's own: AutoencoderKL, and the small AutoencoderTiny (TAESD)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from ..errors import InputError
from . import layouts
from .folder import check_sizes, check_vae_config
from .weights import Weights, read_json, weight_files

_CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


def open_vae(path: Path, base: dict, allow_pickle: bool = False) -> tuple[torch.nn.Module, Weights]:
    """A VAE on the meta device and its stored tensors, from a folder with a configuration or from a single file.

    Args:
        base: configuration of the pipeline's own VAE: a file's has none, and latents and scale must agree.

    Raises:
        InputError: it is no VAE, or one of other latents.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
        config, stored = read_json(folder / "config.json"), Weights(weight_files(folder))
        check_sizes(config, folder)
        check_vae_config(config, folder)
        name = config.get("_class_name")
    elif path.is_file():
        stored = Weights(path, allow_pickle)
        name, config = ("AutoencoderTiny", {}) if _is_tiny(stored) else ("AutoencoderKL", base)
        if not any(piece in key for key in stored for piece in ("decoder.conv_in.", "decoder.layers.")):
            got = f"{len(stored)} other tensors"
            raise InputError(f"load: {path} must be an AutoencoderKL or AutoencoderTiny, got {got}")
    else:
        raise InputError(f"load: vae must be a folder or a file, got {path}, where there is nothing")
    if name not in _CLASSES:
        raise InputError(f"load: {path} must be one of {', '.join(_CLASSES)}, got {name!r}")
    try:
        with torch.device("meta"):
            module = _CLASSES[name].from_config(config)
            own = AutoencoderKL.from_config(base)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"load: {path} must have a configuration diffusers accepts, got {error}") from error
    for what, get in (
        ("latent channels", lambda vae: vae.config.latent_channels),
        ("pixels per latent", lambda vae: 2 ** (len(vae.config.block_out_channels) - 1)),
    ):
        if get(module) != get(own):
            raise InputError(f"load: {path} must have the model's {get(own)} {what}, got {get(module)}")
    return module, stored


def named(module: torch.nn.Module, stored: Weights) -> dict[str, torch.Tensor]:
    """The tensors by the module's names."""
    if isinstance(module, AutoencoderTiny):
        return dict(stored)
    return layouts.vae(stored, module.config, stored.where)


def _is_tiny(stored: Weights) -> bool:
    return any(name.startswith("decoder.layers.") for name in stored)

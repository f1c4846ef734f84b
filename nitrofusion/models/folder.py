"""What a StableDiffusionXLPipeline folder must hold, read from its JSON and its headers; no weights, no models."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .weights import PICKLES, Weights, read_json, weight_files

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def check_folder(folder: str | Path, weights: tuple[str, ...] = PARTS) -> Path:
    """Raises InputError, before any weight is read, unless the folder holds an epsilon, 4-channel SDXL pipeline.

    Args:
        weights: the parts whose weights must be there; of the others the configuration is enough.
    """
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing"
        raise InputError(f"model: {folder} must be a diffusers folder, got {got}")
    name = config_of(folder, "model_index.json").get("_class_name")
    if not str(name).startswith("StableDiffusionXL"):
        raise InputError(f"model: {folder} must hold a StableDiffusionXLPipeline, got {name}")
    check_unet_config(config_of(folder, "unet/config.json"), folder)
    scheduler = config_of(folder, "scheduler/scheduler_config.json")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise InputError(f"model: {folder} must predict epsilon, got prediction_type {prediction}")
    for key in ("beta_start", "beta_end"):
        if not isinstance(scheduler.get(key), float):
            raise InputError(f"model: {folder} must have a scheduler with {key}, got {scheduler.get(key)!r}")
    for part in PARTS:
        config_of(folder, f"{part}/config.json")
        if part in weights:
            Weights(weight_files(folder / part))  # reads the headers, which also tell whether the files are whole
    for part in ("tokenizer", "tokenizer_2"):
        if not any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise InputError(f"model: {folder / part} must hold a tokenizer, got none")
    return folder


def config_of(folder: Path, part: str) -> dict:
    if not (folder / part).is_file():
        raise InputError(f"model: {folder} must be a StableDiffusionXLPipeline folder, got no {part}")
    return read_json(folder / part)


def check_unet_config(config: dict, where: str | Path) -> None:
    if config.get("in_channels", 4) != 4:
        raise InputError(f"model: {where} must have a UNet of 4 input channels, got {config['in_channels']}")
    if config.get("addition_embed_type") != "text_time":
        raise InputError(f"model: {where} must have an SDXL UNet (text_time), got {config.get('addition_embed_type')}")
    size, step = config.get("sample_size"), 2 ** (len(config.get("block_out_channels", ())) - 1)
    if not isinstance(size, int) or size < 1 or size % step:
        raise InputError(f"model: {where} must have a UNet whose sample_size is a multiple of {step}, got {size!r}")


def unet_files(path: str | Path) -> list[Path]:
    """The files of a UNet given as a file, or as a folder that holds one or a pipeline."""
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors" and path.suffix not in PICKLES:
            raise InputError(f"load: {path} must be a UNet .safetensors file or a folder with one, got another file")
        return [path]
    if not path.is_dir():
        raise InputError(f"load: {path} must be a UNet .safetensors file or a folder with one, got nothing")
    return weight_files(path / "unet" if (path / "unet").is_dir() else path)

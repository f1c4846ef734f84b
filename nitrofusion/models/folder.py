"""What a StableDiffusionXLPipeline folder must hold, read from its JSON and its headers; no weights, no models."""

from __future__ import annotations

import math
import re
from pathlib import Path

from ..errors import InputError
from ..schedule import BETA_SCHEDULES
from .weights import PICKLES, Weights, read_json, short, weight_files

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
             "added_tokens.json")  # fmt: skip
_LIBRARIES = (["diffusers"], ["transformers"], [None])
_OUR_SCHEDULER = ["nitrofusion.scheduler", "TimestepShiftLCMScheduler"]  # as a pipeline that holds one is saved
_BETAS = ("beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
_LARGEST_TOKENIZER = 16 << 20  # bytes; CLIP's is 3.6 MB
_LARGEST_NUMBER = 1 << 18  # in a configuration: CLIP's vocabulary has 49,408 words
_LARGEST_SIDE = 1 << 12  # latents
_LONGEST_LIST = 64
_POSITIVE = ("attention_head_dim", "block_out_channels", "norm_num_groups", "num_attention_heads", "layers_per_block")
_COUNT = re.compile(r"(channels|layers?|size|dim|heads|groups|per_block|embeddings)$")  # keys of whole numbers
_DEEPEST = 48  # layers: one way through SDXL's UNet has 26, its larger text encoder 32; 64 take a second to build
_CLIP_TOKENS, _CLIP_WIDTH = 77, 512  # of a text encoder whose configuration does not say: transformers' defaults
_BLOCKS = 4  # of a UNet whose configuration does not say: diffusers' default


def check_folder(folder: str | Path, weights: tuple[str, ...] = PARTS) -> Path:
    """Raises InputError, before any weight is read, unless the folder holds an epsilon, 4-channel SDXL pipeline.

    Args:
        weights: the parts whose weights must be there; of the others the configuration is enough.
    """
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing"
        raise InputError(f"model: {folder} must be a diffusers folder, got {got}")
    index = config_of(folder, "model_index.json")
    for part, named in index.items():
        if isinstance(named, list) and named != _OUR_SCHEDULER and named[:1] not in _LIBRARIES:
            raise InputError(
                f"model: {folder} must be made of diffusers' and transformers' classes, got {part} {short(repr(named))}"
            )
    name = index.get("_class_name")
    if not str(name).startswith("StableDiffusionXL"):
        raise InputError(f"model: {folder} must hold a StableDiffusionXLPipeline, got {name}")
    for part in PARTS:
        check_sizes(config_of(folder, f"{part}/config.json"), folder / part)
    unet = config_of(folder, "unet/config.json")
    check_unet_config(unet, folder)
    _check_pooled(unet, config_of(folder, "text_encoder_2/config.json"), folder)
    check_vae_config(config_of(folder, "vae/config.json"), folder)
    scheduler = scheduler_config(folder)
    if scheduler.get("num_train_timesteps", 1000) != 1000:
        got = scheduler["num_train_timesteps"]
        raise InputError(f"model: {folder} must have a scheduler of 1000 num_train_timesteps, got {got!r}")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise InputError(f"model: {folder} must predict epsilon, got prediction_type {prediction}")
    _check_betas(scheduler, folder)
    for part in weights:
        Weights(weight_files(folder / part))  # reads the headers, which also tell whether the files are whole
    for part, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if not any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise InputError(f"model: {folder / part} must hold a tokenizer, got none")
        for name in TOKENIZER:
            if (folder / part / name).is_file() and (folder / part / name).stat().st_size > _LARGEST_TOKENIZER:
                raise InputError(f"model: {folder / part / name} must have at most {_LARGEST_TOKENIZER:,} bytes")
        length = config_of(folder, f"{part}/tokenizer_config.json").get("model_max_length")
        tokens = config_of(folder, f"{encoder}/config.json").get("max_position_embeddings", _CLIP_TOKENS)
        if length != tokens:
            got = short(repr(length))
            raise InputError(f"model: {folder / part} must have its encoder's model_max_length, {tokens}, got {got}")
    return folder


def config_of(folder: Path, part: str) -> dict:
    if not (folder / part).is_file():
        raise InputError(f"model: {folder} must be a StableDiffusionXLPipeline folder, got no {part}")
    return read_json(folder / part)


def zeros_for_no_prompt(folder: Path) -> bool:
    """Whether a pipeline folder's guidance without a negative prompt leads away from zeros, else from the prompt ""."""
    return bool(config_of(folder, "model_index.json").get("force_zeros_for_empty_prompt", True))


def scheduler_config(folder: Path) -> dict:
    """Of a pipeline folder: what any scheduler made of it may take."""
    config = config_of(folder, "scheduler/scheduler_config.json")
    check_sizes(config, folder / "scheduler")
    return config


def betas(config: dict) -> dict:
    """What a scheduler's configuration says of the betas, as ``schedule.make_alphas_cumprod`` takes it."""
    return {key: config[key] for key in _BETAS if key in config}


def _check_betas(scheduler: dict, folder: Path) -> None:
    for key in ("beta_start", "beta_end"):
        beta = scheduler.get(key)
        if not isinstance(beta, float) or not 0 < beta < 1:
            raise InputError(f"model: {folder} must have a scheduler with {key} between 0 and 1, got {beta!r}")
    name, rescaled = scheduler.get("beta_schedule", "scaled_linear"), scheduler.get("rescale_betas_zero_snr", False)
    if name not in tuple(BETA_SCHEDULES):
        known = " or ".join(BETA_SCHEDULES)
        raise InputError(f"model: {folder} must have a scheduler with beta_schedule {known}, got {short(repr(name))}")
    if not isinstance(rescaled, bool):
        got = short(repr(rescaled))
        raise InputError(f"model: {folder} must have a scheduler with rescale_betas_zero_snr true or false, got {got}")
    # What we draw a student with has none of these; a teacher's are its own scheduler's to follow.
    for key in ("trained_betas", "clip_sample", "thresholding") if "shifted_timestep" in scheduler else ():
        if scheduler.get(key):
            got = short(repr(scheduler[key]))
            raise InputError(f"model: {folder} must have a student's scheduler without {key}, got {got}")


def check_unet_config(config: dict, where: str | Path) -> None:
    if config.get("in_channels", 4) != 4:
        raise InputError(f"model: {where} must have a UNet of 4 input channels, got {config['in_channels']}")
    if config.get("addition_embed_type") != "text_time":
        raise InputError(f"model: {where} must have an SDXL UNet (text_time), got {config.get('addition_embed_type')}")
    if config.get("time_cond_proj_dim") is not None:
        got = short(repr(config["time_cond_proj_dim"]))
        raise InputError(f"model: {where} must have a UNet that is not told the guidance, got time_cond_proj_dim {got}")
    size, step = config.get("sample_size"), 2 ** (len(config.get("block_out_channels", ())) - 1)
    if not isinstance(size, int) or not 1 <= size <= _LARGEST_SIDE or size % step:
        raise InputError(f"model: {where} must have a UNet whose sample_size is a multiple of {step}, got {size!r}")


def _check_pooled(unet: dict, encoder: dict, where: str | Path) -> None:
    """A UNet's added embedding reads the pooled prompt and six sizes."""
    width, each = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    pooled = encoder.get("projection_dim", _CLIP_WIDTH)
    if not all(isinstance(n, int) for n in (width, each, pooled)) or width != pooled + 6 * each:
        raise InputError(
            f"model: {where} must have a UNet whose projection_class_embeddings_input_dim is the text encoder's "
            f"projection_dim, {pooled!r}, and 6 times addition_time_embed_dim, {each!r}, got {width!r}"
        )


def check_vae_config(config: dict, where: str | Path) -> None:
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise InputError(f"model: {where} must have a VAE without {key}, got {short(repr(config[key]))}")
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise InputError(f"model: {where} must have a VAE of 3 {key}, got {short(repr(config[key]))}")
    scale = config.get("scaling_factor", 1.0)
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < math.inf:
        raise InputError(f"model: {where} must have a VAE whose scaling_factor is above 0, got {short(repr(scale))}")


def check_sizes(config: dict, where: str | Path) -> None:
    """Raises InputError for sizes no model has: building one would take hours and memory before it failed.

    Works on what diffusers and transformers call a configuration; widths, depths and lengths of lists are looked at.
    """
    for key, value in config.items():
        numbers = _numbers(value)
        # Some schedulers have a limit of -Infinity, which is no size: what takes it for one fails at once.
        if numbers is None or any(_LARGEST_NUMBER < n < math.inf for n in numbers):
            got = f"{key} {short(repr(value))}"
            raise InputError(f"model: {where} must have a configuration of a model's size, got {got}")
        if key == "block_out_channels" and not (isinstance(value, list) and numbers and len(numbers) == len(value)):
            raise InputError(f"model: {where} must have a list of block_out_channels, got {short(repr(value))}")
        if key in _POSITIVE and numbers and min(numbers) < 1:
            raise InputError(f"model: {where} must have {key} >= 1, got {short(repr(value))}")
        if _COUNT.search(key) and any(isinstance(n, float) for n in numbers):
            raise InputError(f"model: {where} must have a whole number for {key}, got {short(repr(value))}")
    if (depth := _depth(config)) > _DEEPEST:
        raise InputError(f"model: {where} must have a configuration of a model's size, got {depth:,} layers")


def _depth(config: dict) -> float:
    """Layers that follow each other: of all blocks, layers times the transformer layers in each; and all others."""
    stacked = {key: value for key, value in config.items() if key.endswith("layers_per_block")}
    lists = [value for key, value in config.items() if "block" in key and isinstance(value, list)]
    blocks = max(map(len, lists), default=_BLOCKS if stacked else 0)
    stacked = {key: _per_block(value, blocks) for key, value in stacked.items()}
    layers = stacked.pop("layers_per_block", [1] * blocks)
    ways = list(stacked.values()) or [[1] * blocks]  # down, and where it is told apart, up
    others = (_numbers(value) for key, value in config.items() if re.search(r"(layers?|blocks)$|depth", key))
    return max(sum(map(math.prod, zip(layers, way, strict=True))) for way in ways) + sum(map(sum, others))


def _per_block(value, blocks: int) -> list[float]:
    """The number of layers, or where a block's have different ones the largest, of each block."""
    each = [max([1, *_numbers(item)]) for item in (value if isinstance(value, list) else [value])]
    return each + [max(each, default=1)] * (blocks - len(each))


def _numbers(value, level: int = 0) -> list[float] | None:
    """The numbers in a value and in the lists in it; None where lists are longer or deeper than any model's."""
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        return []
    if not isinstance(value, list):
        return [abs(value)]
    if len(value) > _LONGEST_LIST or level > 2:
        return None
    inner = [_numbers(item, level + 1) for item in value]
    return None if None in inner else [number for part in inner for number in part]


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

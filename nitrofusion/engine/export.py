"""Writing any model we draw with as a plain StableDiffusionXLPipeline folder."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline

from ..errors import InputError
from ..models.weights import Weights
from .source import Source, find

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def export(model: str | Path, output: str | Path, format: str = "diffusers", dtype: str | None = None) -> Path:
    """Writes a complete pipeline folder; it appears under its name when complete, or not at all.

    A student's scheduler is written as an ``LCMScheduler`` that carries ``shifted_timestep`` and
    ``original_inference_steps``; ``TimestepShiftLCMScheduler.from_pretrained(output, subfolder="scheduler")`` reads
    both. ``load(output)`` draws the same pictures as ``load(model)``.

    Args:
        model: what ``load`` takes.
        output: folder to make; an empty one may exist.
        format: ``diffusers`` is the only one.
        dtype: precision of the weights: float16, bfloat16 or float32; None keeps each part as it is stored.

    Returns:
        ``output`` as a path.

    Raises:
        InputError: the model cannot be found, an argument is not as above, or ``output`` is not empty.
    """
    output = Path(output).expanduser()
    if format != "diffusers":
        raise InputError(f"export: format must be diffusers, got {format!r}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"export: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"export: output must be a new or empty folder, got {output}, which is not empty")
    source = find(model)
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)  # first, so that an impossible output fails before gigabytes are read
    except OSError as error:
        raise InputError(f"export: output must be a folder that can be made, got {output}: {error}") from error
    try:
        dtypes = {part: DTYPES[dtype] if dtype else _stored_dtype(source, part) for part in _PARTS}
        # One file per part whatever its size: that is what load_unet_ and most other programs read.
        _pipeline(source, dtypes).save_pretrained(partial, safe_serialization=True, max_shard_size="1TB")
        for name in ("tokenizer", "tokenizer_2"):
            # transformers 5 writes tokenizer.json alone; earlier ones need the vocabulary files of the source.
            shutil.copytree(source.folder / name, partial / name, dirs_exist_ok=True)
        for weights in partial.rglob("*.safetensors"):
            weights.chmod((partial / "model_index.json").stat().st_mode)  # safetensors writes for the owner alone
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _stored_dtype(source: Source, part: str) -> torch.dtype:
    """Of a part's first tensor; parts of mixed precision do not occur."""
    first = next(iter(Weights(source.files(part), source.allow_pickle).values()))
    return first.dtype if first.dtype in (torch.float16, torch.bfloat16) else torch.float32


def _pipeline(source: Source, dtypes: dict[str, torch.dtype]) -> StableDiffusionXLPipeline:
    # Float32 holds every stored precision exactly; when all agree on another one, so does that, in half the memory.
    common = set(dtypes.values())
    loaded = source.read("cpu", common.pop() if len(common) == 1 else torch.float32)
    parts = dict(zip(_PARTS, (loaded.unet, loaded.vae, *loaded.text_encoders), strict=True))
    for name, module in parts.items():
        torch.nn.Module.to(module, dtypes[name])  # diffusers' own ``to`` warns of every cast
    return StableDiffusionXLPipeline(
        **parts,
        tokenizer=loaded.tokenizers[0],
        tokenizer_2=loaded.tokenizers[1],
        scheduler=_scheduler(source),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _scheduler(source: Source):
    if source.shifted_timestep is None:
        return source.scheduler()
    betas = json.loads((source.folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = LCMScheduler(beta_start=betas["beta_start"], beta_end=betas["beta_end"], original_inference_steps=4)
    scheduler.register_to_config(shifted_timestep=source.shifted_timestep)
    return scheduler

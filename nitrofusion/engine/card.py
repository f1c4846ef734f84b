"""What an exported model says of itself: the ModelSpec header of its safetensors and its model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .. import __version__
from .source import Source

IMPLEMENTATION = {
    "diffusers": "https://github.com/huggingface/diffusers",
    "comfyui": "https://github.com/Stability-AI/generative-models",
    "lora": "https://github.com/huggingface/diffusers",
}
_SDXL_WIDTHS = [320, 640, 1280]


def license_of(source: Source) -> str | None:
    """What is known of a model, or what the card in its folder's README.md says; None where nothing does."""
    if source.license != "unknown":
        return source.license
    trained = source.unet is None or source.unet.name == "ema.safetensors"
    if source.checkpoint is not None or not trained:
        return None  # another's weights beside a folder that only gives the form
    card = source.folder / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    line = re.search(r"^license: *(\S+)", head[1], re.MULTILINE) if head else None
    return line[1] if line else None


def resolution(folder: Path) -> int:
    """Side in pixels of the pictures a pipeline folder draws."""
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def model_spec(source: Source, title: str, format: str, rank: int | None = None) -> dict[str, str]:
    """Header metadata as ModelSpec 1.0 names it, and what one-step drawing needs besides."""
    side = resolution(source.folder)
    spec = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base" + ("/lora" if format == "lora" else ""),
        "modelspec.implementation": IMPLEMENTATION[format],
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "epsilon",
        "nitrofusion.version": __version__,
    }
    if licence := license_of(source):
        spec["modelspec.license"] = licence
    if source.is_student:
        shift = source.shifted_timestep
        spec["modelspec.timestep_range"] = f"0,{shift - 1}"
        spec["modelspec.usage_hint"] = f"1 to 4 LCM steps, guidance 0 (CFG 1), timesteps shifted to {shift}"
        spec["nitrofusion.shifted_timestep"] = str(shift)
        spec["nitrofusion.num_inference_steps"] = "1-4"
    if rank is not None:
        spec["nitrofusion.lora_rank"] = str(rank)
    return spec


def model_card(source: Source, title: str, format: str, files: dict[str, str], note: str = "") -> str:
    """README.md of an export.

    Args:
        format: as of ``export``; ``full`` is a ComfyUI checkpoint with all parts.
        files: name to one line of what it is.
        note: a paragraph of its own, such as what a LoRA keeps.
    """
    licence = license_of(source)
    head = ["---", *([f"license: {licence}"] if licence else []), "library_name: diffusers"]
    head += ["pipeline_tag: text-to-image", "tags: [stable-diffusion-xl, one-step, nitrofusion]", "---"]
    sections = ["\n".join(head), f"# {title}", _what(source, licence)]
    sections += ["\n".join(f"- `{name}`: {line}" for name, line in files.items())]
    sections += [note] if note else []
    sections += ["## diffusers", _diffusers(source, format, next(iter(files), ""))]
    if format in ("comfyui", "full"):
        sections += ["## ComfyUI", _comfyui(source)]
    return "\n\n".join(sections) + "\n"


def _what(source: Source, licence: str | None) -> str:
    side = resolution(source.folder)
    if source.is_student:
        kind = (
            f"A one-step student in SDXL's form, made by dynamic adversarial training (NitroFusion, arXiv 2412.02030). "
            f"1 to 4 steps, no guidance, {side}x{side} pixels, `shifted_timestep` {source.shifted_timestep}."
        )
    else:
        kind = f"A multi-step model in SDXL's form, {side}x{side} pixels."
    return f"{kind} Licence: {licence or 'that of the weights it was made from'}."


def _diffusers(source: Source, format: str, file: str) -> str:
    load = {
        "diffusers": 'pipe = StableDiffusionXLPipeline.from_pretrained("THIS_FOLDER")',
        "comfyui": "pipe = StableDiffusionXLPipeline.from_pretrained(BASE)\n"
        f'pipe.unet = UNet2DConditionModel.from_single_file("{file}", config=BASE, subfolder="unet")',
        "full": f'pipe = StableDiffusionXLPipeline.from_single_file("{file}")',
        "lora": "pipe = StableDiffusionXLPipeline.from_pretrained(BASE)\n"
        f'pipe.load_lora_weights("THIS_FOLDER", weight_name="{file}")',
    }[format]
    unet = ", UNet2DConditionModel" if format == "comfyui" else ""
    lines = [f"from diffusers import StableDiffusionXLPipeline{unet}", "", load]
    call = 'image = pipe("a red circle on a navy background").images[0]'
    if source.is_student:
        lines.insert(1, "from nitrofusion import TimestepShiftLCMScheduler")
        lines += [
            "pipe.scheduler = TimestepShiftLCMScheduler.from_config(",
            f"    pipe.scheduler.config, shifted_timestep={source.shifted_timestep}, original_inference_steps=4",
            ")",
        ]
        call = call.replace('background")', 'background", num_inference_steps=1, guidance_scale=0)')
    base = "`BASE` is the pipeline folder whose UNet this replaces" if format == "comfyui" else ""
    base = "`BASE` is the pipeline folder whose UNet this LoRA was taken against" if format == "lora" else base
    return "```python\n" + "\n".join([*lines, call]) + "\n```" + (f"\n\n{base}." if base else "")


def _comfyui(source: Source) -> str:
    widths = json.loads((source.folder / "unet" / "config.json").read_text()).get("block_out_channels")
    if list(widths or []) != _SDXL_WIDTHS:
        return (
            "ComfyUI's loaders know SDXL at its own size only; this model has its form and its names at another size "
            "and does not load there."
        )
    text = (
        "Put the UNet file in `models/diffusion_models` (Load Diffusion Model), a full checkpoint in "
        "`models/checkpoints` (Load Checkpoint). KSampler: sampler `lcm`, scheduler `sgm_uniform`, CFG 1, 1 to 4 steps."
    )
    if source.is_student:
        text += (
            f" Shift the timesteps with the TimestepShiftModel node (ComfyUI-TimestepShiftModel), `shifted_timestep` "
            f"{source.shifted_timestep}."
        )
    return text

"""Where the bytes of a run go, counted without reading a weight: device, host and disk."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from .. import recipes, shards
from ..adapters import count_parameters
from ..config import TrainConfig
from ..presets import resolve_folder
from .parallel import BUCKET
from .rehearse import Rehearsal, meta_unet, rehearse

_FLOAT = 4  # bytes; what is trained is fp32
_MOMENTS = 8  # of AdamW, for a parameter
_MOMENTS_8BIT = 2 + 2 * 4 / 256  # two bytes, and a scale for each 256 of them
_INDEX = 5 * 8  # a teacher sample's row, while training reads them


def trained_parameters(config: TrainConfig, unet) -> int:
    """Of the student: all, or its adapters'."""
    if not config.lora_rank:
        return sum(p.numel() for p in unet.parameters())
    return count_parameters(unet, config.lora_rank)


def extra_parameters(config: TrainConfig, unet) -> dict[str, int]:
    """Parameters that the recipe trains beside the student's, by what they belong to."""
    if config.backbone is not None:
        unet = meta_unet(Path(resolve_folder(config.backbone)))
    return recipes.find(config.recipe).extra_parameters(config, unet)


def device_bytes(config: TrainConfig, folder: Path, unet, processes: int = 1) -> tuple[dict[str, int], Rehearsal]:
    """(bytes of each component on each device, what a step of training takes beside what stays between steps).

    The last component, activations, is what the highest moment needs beside gradients.
    """
    share = processes if config.parallel == "fsdp2" else 1
    frozen = 2 if config.precision == "bf16" else 4
    whole = sum(p.numel() for p in unet.parameters())
    trained = trained_parameters(config, unet)
    state = _MOMENTS_8BIT if config.optimizer == "adamw8bit" else _MOMENTS
    backbone = None if config.backbone is None else meta_unet(Path(resolve_folder(config.backbone)))
    found = {"student weights": whole * (frozen if config.lora_rank else _FLOAT) // share}
    if config.lora_rank:
        found["adapters"] = trained * _FLOAT // share
    found["student AdamW"] = int(trained * state) // share
    found["student EMA"] = trained * _FLOAT // share
    found["teacher"] = whole * frozen
    if backbone is not None:
        found["backbone"] = sum(p.numel() for p in backbone.parameters()) * frozen
    for name, part in (("text encoders", ("text_encoder", "text_encoder_2")), ("decoder", ("vae",))):
        found[name] = sum(_stored_parameters(folder / inner) for inner in part) * frozen
    for name, count in extra_parameters(config, unet).items():
        pool = name == "head pool"
        found[name] = count * _FLOAT
        found[f"{name} AdamW"] = 0 if pool and config.pool_offload else int(count * (_MOMENTS if pool else state))
    rehearsed = rehearse(config, folder, unet, backbone)
    gradients = rehearsed.gradients
    kept = trained * _FLOAT
    found["gradients"] = gradients - kept + kept // share
    if processes > 1:
        exchanged = min(kept, BUCKET * _FLOAT) if share == 1 else 2 * _largest_block(unet) * _FLOAT
        found["gradients being exchanged"] = exchanged
    found["activations"] = max(rehearsed.moments.values()) - gradients
    if share > 1:
        found["gathered weights"] = 2 * _largest_block(unet) * frozen
    return found, rehearsed


def host_bytes(config: TrainConfig, unet) -> dict[str, int]:
    """Beside a device's: what the process holds in host memory."""
    found = {"teacher samples' index": _INDEX * config.num_teacher_samples * (config.teacher_samples == "cache")}
    if config.pool_offload:
        found["head pool AdamW"] = extra_parameters(config, unet).get("head pool", 0) * _MOMENTS
    # Each process reads the whole of one to go on from it, a file and its tensors at a time; writing takes less.
    files = checkpoint_bytes(config, unet)
    found["checkpoint being read or written"] = sum(files.values()) + max(files.values())
    return found


def checkpoint_bytes(config: TrainConfig, unet) -> dict[str, int]:
    """Of one's files: what is trained, its averages and its optimizers' state."""
    state = _MOMENTS_8BIT if config.optimizer == "adamw8bit" else _MOMENTS
    trained, extra = trained_parameters(config, unet), sum(extra_parameters(config, unet).values())
    return {
        "student": trained * _FLOAT,
        "ema": trained * _FLOAT,
        "optimizer_student": int(trained * state),
        "others": extra * _FLOAT,
        "optimizers of others": extra * _MOMENTS,
    }


def samples_bytes(config: TrainConfig, unet) -> int:
    """Of the teacher samples on disk; prompts are taken to be of up to 400 bytes."""
    return shards.stored_bytes(unet.config.in_channels * unet.config.sample_size**2) * config.num_teacher_samples


def disk_bytes(config: TrainConfig, unet) -> dict[str, int]:
    """In all: checkpoints kept and one being written, and the teacher samples."""
    found = {"checkpoints": sum(checkpoint_bytes(config, unet).values()) * (config.keep_checkpoints + 1)}
    if config.teacher_samples == "cache":
        found["teacher samples"] = samples_bytes(config, unet)
    return found


def _stored_parameters(folder: Path) -> int:
    files = list(folder.glob("*.safetensors"))
    total = 0
    for file in [f for f in files if ".fp16." not in f.name] or files:
        with safe_open(file, "pt") as header:
            for name in header.keys():  # noqa: SIM118
                count = 1
                for side in header.get_slice(name).get_shape():
                    count *= side
                total += count
    return total


def _largest_block(unet) -> int:
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return max(sum(p.numel() for p in block.parameters()) for block in blocks)

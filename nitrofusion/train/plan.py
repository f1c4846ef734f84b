"""What a run would take, before anything is trained: files and shapes checked, memory, disk and time estimated."""

from __future__ import annotations

import functools
import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import nitrokernels

from .. import recipes
from ..adapters import check_installed, count_parameters
from ..config import TrainConfig
from ..data import teacher_scheduler, training_prompts
from ..device import pick_device
from ..errors import InputError, StorageError
from ..models import sdxl
from ..models.folder import config_of
from ..models.stored import on_meta, open_stored
from ..models.weights import CONVERT, PICKLES, Weights
from ..presets import resolve_folder, resolve_unet

GB = 1e9


def plan(config: TrainConfig) -> dict:
    """Resolves and checks ``config``; trains nothing and reads no weight.

    Returns:
        Bytes per component, total memory and disk, floating-point operations per optimizer step, estimated hours.
        Activations are not counted; times assume 35 % of this machine's matmul rate.

    Raises:
        InputError, StorageError: as ``train`` would.
    """
    folder, unet = preflight(config)
    prompts = training_prompts(config, 1)
    vae = json.loads((folder / "vae" / "config.json").read_text())
    model = sdxl.SDXL(folder, unet, None, (), (), torch.empty(1000, device="meta"))
    weights = sum(p.numel() for p in unet.parameters())
    frozen = 2 if config.precision == "bf16" else 4
    extra = extra_parameters(config, unet)
    parts = ("vae", "text_encoder", "text_encoder_2")
    others = sum(file.stat().st_size for part in parts for file in _weights(folder / part))
    trained = trained_parameters(config, unet)
    state = 2 if config.optimizer == "adamw8bit" else 8  # bytes of AdamW's two moments
    memory = {
        "student weights": weights * 4,
        "student gradients, AdamW, EMA": trained * (4 + state + 4),
        "teacher and backbone": weights * frozen,
        "text encoders and decoder": others,
    }
    for name, count in extra.items():
        on_device = 8 if name == "head pool" and config.pool_offload else 16
        memory[f"{name}, gradients, AdamW"] = count * on_device
    disk = disk_bytes(config, unet)
    flops = _step_flops(config, unet, model.latent_size)
    rate = _matmul_rate(config) * 0.35
    samples = config.num_teacher_samples if config.teacher_samples == "cache" else 0
    hours = (flops["step"] * config.total_steps + flops["teacher sample"] * samples) / rate / 3600
    check_disk(config, unet)
    return {
        "teacher": str(folder),
        "resolution": model.latent_size * 2 ** (len(vae["block_out_channels"]) - 1),
        "first prompt": prompts[0],
        "memory_bytes": memory,
        "memory_total_bytes": sum(memory.values()),
        "disk_bytes": disk,
        "steps": config.total_steps,
        "images": config.total_steps * config.images_per_step,
        "flops_per_step": flops["step"],
        "estimated_hours": round(hours, 3),
    }


def preflight(config: TrainConfig) -> tuple[Path, UNet2DConditionModel]:
    """Everything that can be refused before a weight is read; (teacher folder, its UNet on the meta device)."""
    config.validate()
    recipes.find(config.recipe)
    folder, unet = check_teacher(config)
    recipes.check(config, unet)
    if config.lora_rank:
        check_installed("lora_rank")
    if config.optimizer == "adamw8bit":
        _check_adamw8bit()
    if config.backbone is not None:
        check_backbone(unet, config.backbone)
    if config.init is not None:
        check_unet_file("init", unet, resolve_unet(config.init))
    most, step = unet.config.sample_size, 2 ** (len(unet.config.block_out_channels) - 1)
    if config.crop_size % step or not 2 * step <= config.crop_size <= most:  # the smallest map of a crop is 2x2
        raise InputError(
            f"config: crop_size must be a multiple of {step} in {2 * step}..{most} latents, got {config.crop_size}"
        )
    check_disk(config, unet)
    return folder, unet


def check_teacher(config: TrainConfig) -> tuple[Path, UNet2DConditionModel]:
    """The part of ``preflight`` that drawing the teacher's samples needs."""
    config.validate()
    check_backend(config)
    stored = open_stored(resolve_folder(config.teacher))
    folder, unet = stored.folder, stored.modules["unet"]
    training_prompts(config, 1)
    teacher_scheduler(folder, config.teacher_scheduler)
    if config.teacher_unet is not None:
        check_unet_file("teacher_unet", unet, config.teacher_unet)
    return folder, unet


def _meta_unet(folder: Path) -> UNet2DConditionModel:
    return on_meta("unet", config_of(folder, "unet/config.json"), folder)


def check_backend(config: TrainConfig) -> None:
    """Raises InputError where a named backend cannot work on the run's device."""
    device = pick_device(config.device)
    if config.backend not in ("auto", "ref"):
        try:
            with nitrokernels.use(config.backend):
                nitrokernels.fusible(device)
        except RuntimeError as error:
            raise InputError(
                f"config: backend must be one that works on {device}, got {config.backend}: {error}"
            ) from error


def check_backbone(unet, backbone: str) -> None:
    """Raises InputError unless the backbone can read the teacher's latents and its text encoders' embeddings."""
    other = _meta_unet(sdxl.check_folder(resolve_folder(backbone)))
    for key in ("sample_size", "cross_attention_dim", "projection_class_embeddings_input_dim"):
        if other.config[key] != unet.config[key]:
            raise InputError(
                f"config: backbone must have the teacher's {key}, {unet.config[key]}, got {other.config[key]}"
            )


def extra_parameters(config: TrainConfig, unet) -> dict[str, int]:
    """Parameters that the recipe trains beside the student's, by what they belong to."""
    if config.backbone is not None:
        unet = _meta_unet(Path(resolve_folder(config.backbone)))
    return recipes.find(config.recipe).extra_parameters(config, unet)


def trained_parameters(config: TrainConfig, unet) -> int:
    """Of the student: all, or its adapters'."""
    if not config.lora_rank:
        return sum(p.numel() for p in unet.parameters())
    return count_parameters(unet, config.lora_rank)


def disk_bytes(config: TrainConfig, unet) -> int:
    """Checkpoints kept and one being written, and the teacher samples."""
    extra = sum(extra_parameters(config, unet).values())
    disk = (trained_parameters(config, unet) * 4 * 4 + extra * 4 * 3) * (config.keep_checkpoints + 1)
    if config.teacher_samples == "cache":
        disk += 4 * unet.config.sample_size**2 * 2 * config.num_teacher_samples
    return disk


def check_disk(config: TrainConfig, unet) -> None:
    """Raises StorageError when what is left to write does not fit."""
    needed, folder = disk_bytes(config, unet), Path(config.output).absolute()
    while not folder.exists():
        folder = folder.parent
    written = sum(f.stat().st_size for f in Path(config.output).rglob("*") if f.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed - written:
        raise StorageError(f"train: {folder} must have {needed / GB:.2f} GB free, got {free / GB:.2f} GB")


def format_plan(values: dict) -> str:
    """The plan as lines for a terminal."""
    lines = [f"teacher     {values['teacher']} ({values['resolution']} px)", f"prompt 0    {values['first prompt']}"]
    lines += [f"memory      {size / GB:8.2f} GB  {name}" for name, size in values["memory_bytes"].items()]
    lines.append(f"memory      {values['memory_total_bytes'] / GB:8.2f} GB  in all, and activations")
    lines.append(f"disk        {values['disk_bytes'] / GB:8.2f} GB")
    lines.append(f"steps       {values['steps']} ({values['images']} images)")
    lines.append(f"time        {values['estimated_hours']:8.2f} h   estimated at 35 % of this machine's matmul rate")
    return "\n".join(lines)


def check_unet_file(name: str, unet, path: str) -> None:
    """Compares a safetensors header with the UNet's names and shapes; reads no weight."""
    file = Path(path)
    if file.is_dir():
        found = [file / inner / "diffusion_pytorch_model.safetensors" for inner in ("unet", ".")]
        file = next((f for f in found if f.is_file()), file)
    if file.is_file() and file.suffix in PICKLES:
        raise InputError(f"{name}: {path} must be a .safetensors file, got a pickle, which can run code ({CONVERT})")
    if not file.is_file() or file.suffix != ".safetensors":
        got = "another file" if file.is_file() else "a folder without" if file.is_dir() else "nothing"
        raise InputError(f"{name}: {path} must be a UNet .safetensors file or a folder with one, got {got}")
    shapes = {key: tuple(tensor.shape) for key, tensor in Weights(file, what=name).items()}
    expected = {k: tuple(v.shape) for k, v in unet.state_dict().items()}
    if shapes != expected:
        wrong = sorted(k for k in expected.keys() | shapes.keys() if expected.get(k) != shapes.get(k))
        raise InputError(
            f"{name}: {path} must hold the teacher's UNet tensors, got {len(wrong)} that differ, first {wrong[0]}: "
            f"expected {expected.get(wrong[0])}, got {shapes.get(wrong[0])}"
        )


def _check_adamw8bit() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"config: optimizer adamw8bit needs bitsandbytes, got {error} (pip install 'nitrofusion[8bit]')"
        ) from error


def _weights(folder: Path) -> list[Path]:
    files = list(folder.glob("*.safetensors"))
    return [f for f in files if ".fp16." not in f.name] or files


def _step_flops(config: TrainConfig, unet, size: int) -> dict[str, float]:
    """Multiply-adds x 2 on the meta device: exact for the UNet, heads left out (a few percent)."""
    pooled = sdxl.pooled_width(unet)

    @functools.cache
    def count(part: str) -> float:
        side = config.crop_size if part == "crop_encoder" else size
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            cond = sdxl.Conditioning(
                torch.empty(1, 77, unet.config.cross_attention_dim), torch.empty(1, pooled), torch.empty(1, 6)
            )
            call = sdxl.denoise if part == "unet" else sdxl.encoder_features
            call(unet, torch.empty(1, 4, side, side), torch.zeros(1, dtype=torch.long), cond)
        return float(counter.get_total_flops())

    sample = count("unet") * config.teacher_steps * (2 if config.guidance_scale > 1 else 1)
    per_image = recipes.find(config.recipe).flops_per_image(config, count)
    if config.teacher_samples == "online":
        per_image += sample
    return {"step": per_image * config.images_per_step, "teacher sample": sample}


def _matmul_rate(config: TrainConfig) -> float:
    """Floating-point operations per second of a 1024 x 1024 product on this device."""
    device = pick_device(config.device)
    dtype = torch.bfloat16 if config.precision == "bf16" and device.type != "cpu" else torch.float32
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best

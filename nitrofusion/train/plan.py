"""What a run would take, before anything is trained: files and shapes checked, memory, disk and time estimated."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

import nitrokernels

from .. import recipes
from ..adapters import check_installed
from ..config import TrainConfig
from ..data import SHARD, cache_folder, shard_count, teacher_scheduler, training_prompts
from ..device import absent, pick_device, planned_device
from ..errors import InputError, StorageError
from ..models import sdxl
from ..models.stored import open_stored
from ..models.weights import CONVERT, PICKLES, Weights
from ..presets import resolve_folder, resolve_unet
from ..shards import finished
from ..storage import existing
from ..torchrun import MOST_PROCESSES
from .memory import device_bytes, disk_bytes, host_bytes, samples_bytes
from .rehearse import meta_unet, sample_flops

GB = 1e9
ASSUMED_SHARE = 0.35  # of a device's matmul rate
_TOTALS = {"memory": "memory_total_bytes", "host": "host_total_bytes", "disk": "disk_bytes"}


def plan(config: TrainConfig, processes: int = 1) -> dict:
    """Resolves and checks ``config``; trains nothing and reads no weight.

    Args:
        config: its device may be cuda on a machine that has none, to plan for one that has.
        processes: that share the run, each on a device of its own.

    Returns:
        Bytes of each component on a device, in host memory and on disk, floating-point operations per optimizer step,
        hours. Activations are those of a step on the meta device; estimated hours assume 35 % of the device's matmul
        rate and are None where it is not here.

    Raises:
        InputError, StorageError: as ``train`` would.
    """
    if not 1 <= processes <= MOST_PROCESSES:
        raise InputError(f"plan: processes must be in 1..{MOST_PROCESSES:,}, got {processes}")
    folder, unet = preflight(_checkable(config))
    vae = json.loads((folder / "vae" / "config.json").read_text())
    with use_backend(config):
        memory, rehearsed = device_bytes(config, folder, unet, processes)
    host, disk = host_bytes(config, unet), disk_bytes(config, unet)
    flops, sample = rehearsed.flops, sample_flops(config, folder, unet)
    flops += sample * config.images_per_step * (config.teacher_samples == "online")
    samples = config.num_teacher_samples / processes if config.teacher_samples == "cache" else 0
    return {
        "teacher": str(folder),
        "device": planned_device(config.device).type,
        "resolution": unet.config.sample_size * 2 ** (len(vae["block_out_channels"]) - 1),
        "first prompt": training_prompts(config, 1)[0],
        "processes": processes,
        "memory_bytes": memory,
        "memory_total_bytes": sum(memory.values()),
        "moments_bytes": rehearsed.moments,
        "host_bytes": host,
        "host_total_bytes": sum(host.values()),
        "disk_parts_bytes": disk,
        "disk_bytes": sum(disk.values()),
        "steps": config.total_steps,
        "images": config.total_steps * config.images_per_step * processes,
        "flops_per_step": flops,
        **_hours(config, flops * config.total_steps + sample * samples),
    }


def plan_samples(config: TrainConfig) -> dict:
    """What drawing the teacher samples takes: shards, bytes on disk, operations, hours as ``plan`` gives them."""
    folder, unet = check_samples(_checkable(config))
    count = config.num_teacher_samples
    flops = sample_flops(config, folder, unet)
    return {
        "teacher": str(folder),
        "samples": count,
        "shards": -(-count // SHARD),
        "bytes": samples_bytes(config, unet),
        "shard_bytes": samples_bytes(dataclasses.replace(config, num_teacher_samples=min(SHARD, count)), unet),
        "flops_per_sample": flops,
        "flops": flops * count,
        **_hours(config, flops * count),
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
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("config: tensorboard needs tensorboard, got none (pip install 'nitrofusion[train]')")
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


def check_samples(config: TrainConfig, part: tuple[int, int] | None = None) -> tuple[Path, UNet2DConditionModel]:
    """``preflight`` of drawing samples that ``train(config)`` is to read.

    Args:
        part: that is about to be drawn, as ``prepare`` takes it: it has to fit.
    """
    if config.teacher_samples != "cache":
        raise InputError(
            f"prepare: teacher_samples must be cache, got {config.teacher_samples!r}: training would not read them "
            "(say --teacher_samples cache here and to train)"
        )
    folder, unet = check_teacher(config)
    if part is not None:
        check_room("prepare", {cache_folder(config): _missing_samples(config, unet, part)})
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
    other = meta_unet(sdxl.check_folder(resolve_folder(backbone)))
    for key in ("sample_size", "cross_attention_dim", "projection_class_embeddings_input_dim"):
        if other.config[key] != unet.config[key]:
            raise InputError(
                f"config: backbone must have the teacher's {key}, {unet.config[key]}, got {other.config[key]}"
            )


def check_disk(config: TrainConfig, unet) -> None:
    """Raises StorageError where checkpoints or samples that are yet to be written do not fit."""
    output = Path(config.output)
    missing = {output: disk_bytes(config, unet)["checkpoints"] - _written(output / "checkpoints")}
    if config.teacher_samples == "cache":
        missing[cache_folder(config)] = _missing_samples(config, unet)
    check_room("train", missing)


def check_room(what: str, missing: dict[Path, int]) -> None:
    """Raises StorageError unless so many bytes fit into each folder; those on one file system share what is free.

    Args:
        what: begins the message.
    """
    systems: dict[int, dict[Path, int]] = {}
    for folder, size in missing.items():
        folder = existing(folder)
        if not folder.is_dir():
            raise StorageError(f"{what}: {folder} must be a folder, got a file")
        sizes = systems.setdefault(_file_system(folder), {})
        sizes[folder] = sizes.get(folder, 0) + max(0, size)
    for sizes in systems.values():
        free, needed = shutil.disk_usage(next(iter(sizes))).free, sum(sizes.values())
        if free < needed:
            where = " and ".join(str(folder) for folder, size in sizes.items() if size)
            raise StorageError(f"{what}: {where} must have {needed:,} bytes free, got {free:,}")


def _missing_samples(config: TrainConfig, unet, part: tuple[int, int] = (0, 1)) -> int:
    """Bytes of the part's shards that are not there yet; whether the others are in order is not looked at."""
    numbers = range(-(-config.num_teacher_samples // SHARD))[part[0] :: part[1]]
    count = len(numbers) * SHARD - sum(SHARD - shard_count(config, n) for n in numbers[-1:])  # the last may have fewer
    count -= sum(shard_count(config, n) for n in finished(cache_folder(config)) if n in numbers)
    return samples_bytes(dataclasses.replace(config, num_teacher_samples=count), unet)


def _written(folder: Path) -> int:
    """Bytes of the files below; of what another process removes or renames meanwhile, those it finds."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(where, name)).st_size
    return total


def _file_system(folder: Path) -> int:
    return folder.stat().st_dev


def format_plan(values: dict) -> str:
    """The plan as lines for a terminal."""
    lines = [f"teacher     {values['teacher']} ({values['resolution']} px)", f"prompt 0    {values['first prompt']}"]
    lines.append(f"device      {values['device']}")
    if values["processes"] > 1:
        lines.append(f"processes   {values['processes']}, each with a device of its own; all below is of one")
    for part, title in (("memory", "device"), ("host", "host"), ("disk", "disk")):
        parts, total = values[{"disk": "disk_parts_bytes"}.get(part, f"{part}_bytes")], values[_TOTALS[part]]
        lines += [f"{part:8} {size / GB:10.3f} GB  {name}" for name, size in parts.items() if size]
        lines.append(f"{part:8} {total / GB:10.3f} GB  in all on {title}" if part != "disk" else
                     f"{part:8} {total / GB:10.3f} GB  in all")  # fmt: skip
    moments = ", ".join(f"{name} {size / GB:.3f}" for name, size in values["moments_bytes"].items())
    lines.append(f"moments     {moments} GB   gradients and activations; the highest counts")
    lines.append(f"steps       {values['steps']} ({values['images']} images)")
    return "\n".join(lines + _format_hours(values))


def format_samples(values: dict) -> str:
    """``plan_samples`` as lines for a terminal."""
    return "\n".join(
        [
            f"teacher     {values['teacher']}",
            f"samples     {values['samples']:,} in {values['shards']:,} shards of {values['shard_bytes'] / 1e6:.1f} MB",
            f"disk        {values['bytes'] / GB:.3f} GB",
            f"operations  {values['flops_per_sample'] / 1e12:.3f} TFLOP a sample",
            *_format_hours(values),
        ]
    )


def _format_hours(values: dict) -> list[str]:
    found = {"hours_at_100_tflops": "by arithmetic, of a device that sustains 100 TFLOP/s"}
    if values["estimated_hours"] is not None:
        found["estimated_hours"] = "estimated at 35 % of this machine's matmul rate"
    return [f"time        {values[name]:8.2f} h   {how}" for name, how in found.items()]


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


def use_backend(config: TrainConfig):
    """The context in which the run's ops are chosen."""
    return contextlib.nullcontext() if config.backend == "auto" else nitrokernels.use(config.backend)


def _checkable(config: TrainConfig) -> TrainConfig:
    """With this machine's CPU in the place of a device that is planned for and not here."""
    if absent(planned_device(config.device)):
        return dataclasses.replace(config, device="cpu", backend="auto")
    return config


def _hours(config: TrainConfig, flops: float) -> dict[str, float | None]:
    device = planned_device(config.device)
    estimated = None if absent(device) else flops / (_matmul_rate(config, device) * ASSUMED_SHARE) / 3600
    return {"estimated_hours": estimated, "hours_at_100_tflops": flops / 1e14 / 3600}


def _matmul_rate(config: TrainConfig, device: torch.device) -> float:
    """Floating-point operations per second of a square product, large enough to keep the device busy."""
    dtype = torch.bfloat16 if config.precision == "bf16" and device.type != "cpu" else torch.float32
    side = 1024 if device.type == "cpu" else 8192  # a GPU takes longer to start the smaller one than to compute it
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best

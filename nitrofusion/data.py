"""Teacher samples and the order in which training sees them; every sample is a function of its global index."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from diffusers import schedulers as diffusers_schedulers
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from . import pictures, sampling
from .config import TrainConfig
from .errors import InputError
from .models import sdxl
from .models.weights import digest, read_json
from .prompts import read_prompts

SHARD = 256
_WORLD_PROMPTS = 3  # scene seed of training captions; evaluation uses other seeds


def training_prompts(config: TrainConfig, count: int) -> list[str]:
    """The prompts of samples 0 .. count - 1: the file's, repeated as needed, or fresh captions of the world."""
    lines = _prompt_lines(config)
    return _prompts_at(lines, range(count))


def _prompt_lines(config: TrainConfig) -> list[str] | None:
    """All prompts of the run, None for the world's endless ones."""
    if config.images is not None and config.images != pictures.WORLD:
        return [caption for _, caption in pictures.read_captions(config.images)]
    return read_prompts(config.prompts) if config.prompts else None


def _prompts_at(lines: list[str] | None, indices: range) -> list[str]:
    if lines is None:
        from .world.scenes import sample_scenes

        return sample_scenes(len(indices), _WORLD_PROMPTS, start=indices.start).captions()
    return [lines[i % len(lines)] for i in indices]


def teacher_scheduler(folder: Path, kind: str = "folder"):
    """The scheduler a pipeline folder names (only classes diffusers itself exports), or a few-step teacher's.

    ``lcm`` steps 999, 749, 499, 249 and re-noises (DMD2); ``ddim_trailing`` ends at t = 0 from 999 (Hyper-SDXL). Both
    keep the folder's betas.
    """
    values = read_json(folder / "scheduler" / "scheduler_config.json")
    betas = {k: values[k] for k in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps") if k in values}
    if kind == "lcm":
        return diffusers_schedulers.LCMScheduler(**betas, original_inference_steps=4)
    if kind == "ddim_trailing":
        return diffusers_schedulers.DDIMScheduler(
            **betas, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
        )
    name = values.get("_class_name", "")
    found = getattr(diffusers_schedulers, str(name), None)
    if found is None or not hasattr(found, "from_config"):
        raise InputError(f"model: {folder} must name a diffusers scheduler, got {name!r}")
    try:
        return found.from_config({k: v for k, v in values.items() if not k.startswith("_")})
    except Exception as error:  # a wrong value fails wherever it is used first
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"model: {folder} must have a scheduler diffusers accepts, got {reason}") from error


def sample_noise(model: sdxl.SDXL, generators: list[torch.Generator]) -> torch.Tensor:
    """[len(generators), 4, h, w] fp32 starting noise, one generator per sample."""
    shape = (model.unet.config.in_channels, model.latent_size, model.latent_size)
    return sampling.randn(shape, generators, device=model.device)


def draw_samples(
    config: TrainConfig, model: sdxl.SDXL, scheduler, prompts: list[str], indices: list[int]
) -> tuple[torch.Tensor, torch.Tensor, sdxl.Conditioning]:
    """Noise and teacher's x0 [n, 4, h, w] and conditioning of the samples ``indices``."""
    generators = sampling.seed_generators([_noise_seed(config.seed, i) for i in indices])
    cond, noise = sdxl.encode_prompt(model, prompts), sample_noise(model, generators)
    steps, scale = config.teacher_steps, config.guidance_scale
    denoise = sampling.with_unet(model.unet)
    return noise, sampling.sample_teacher(denoise, noise, cond, scheduler, steps, scale, generators), cond


def cache_folder(config: TrainConfig) -> Path:
    return Path(config.cache) if config.cache else Path(config.output) / "teacher_samples"


def prepare(config: TrainConfig, model: sdxl.SDXL, folder: Path, part: tuple[int, int] = (0, 1)) -> Path:
    """Draws ``num_teacher_samples`` teacher samples into shards; finished shards are kept, so it can be repeated.

    Args:
        part: (k, n) makes every n-th shard from the k-th, so that n processes share the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = training_prompts(config, config.num_teacher_samples)
    meta = {
        "num_samples": config.num_teacher_samples,
        "seed": config.seed,
        "teacher": teacher_digest(config, model.folder),
        "teacher_steps": config.teacher_steps,
        "teacher_scheduler": config.teacher_scheduler,
        "guidance_scale": config.guidance_scale,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }
    path = folder / "samples.json"
    if path.exists():
        found = json.loads(path.read_text())
        for key, value in meta.items():
            if found.get(key) != value:
                raise InputError(f"prepare: {folder} must hold samples of {key} {value}, got {found.get(key)}")
    else:
        _write(path, json.dumps(meta | {"prompts_list": prompts}))
    scheduler = teacher_scheduler(model.folder, config.teacher_scheduler)
    starts = list(range(0, config.num_teacher_samples, SHARD))[part[0] :: part[1]]
    todo = [s for s in starts if not (folder / f"shard-{s // SHARD:05d}.safetensors").exists()]
    count = sum(min(SHARD, config.num_teacher_samples - s) for s in todo)
    progress = tqdm(total=count, desc="teacher samples", unit="img", disable=not todo or part[0] > 0)
    for start in todo:
        seeds = list(range(start, min(start + SHARD, config.num_teacher_samples)))
        latents = []
        for i in range(0, len(seeds), 32):
            group = seeds[i : i + 32]
            _, x0, _ = draw_samples(config, model, scheduler, [prompts[s] for s in group], group)
            latents.append(x0.half().cpu())
            progress.update(len(group))
        shard = folder / f"shard-{start // SHARD:05d}.safetensors"
        save_file({"latents": torch.cat(latents).contiguous()}, f"{shard}.tmp")
        os.replace(f"{shard}.tmp", shard)
    progress.close()
    return folder


def teacher_digest(config: TrainConfig, folder: Path) -> str:
    """SHA-256 of the teacher UNet's weight files."""
    files = [Path(config.teacher_unet)] if config.teacher_unet else sorted((folder / "unet").glob("*.safetensors"))
    return digest(files)


def _write(path: Path, text: str) -> None:
    tmp = path.with_suffix(f".tmp{os.getpid()}")
    tmp.write_text(text)
    os.replace(tmp, path)


def _noise_seed(seed: int, index: int) -> int:
    return seed * 1_000_003 + index


class Samples:
    """What a step learns from, by global sample index; the teacher's part from a cache folder, drawn online, or none.

    The order is a fresh permutation of the cache per epoch, a function of the seed and the epoch alone, so the data
    position is one number.
    """

    def __init__(self, config: TrainConfig, model: sdxl.SDXL, folder: Path | None):
        self.config, self.model = config, model
        self.latents = None
        self.pictures = pictures.Pictures(config.images, model, _WORLD_PROMPTS) if config.images else None
        if folder is None:
            if config.teacher_samples == "online":
                self.scheduler = teacher_scheduler(model.folder, config.teacher_scheduler)
            self.prompts = _prompt_lines(config)
            return
        self.prompts = json.loads((folder / "samples.json").read_text())["prompts_list"]
        self.latents = torch.cat([load_file(p)["latents"] for p in sorted(folder.glob("shard-*.safetensors"))])
        if len(self.latents) != len(self.prompts):
            raise InputError(f"prepare: {folder} must hold {len(self.prompts)} samples, got {len(self.latents)}")
        self._order: tuple[int, torch.Tensor] | None = None

    def __call__(self, position: int, count: int) -> dict:
        """A ``recipes.Batch``'s noise, target, cond, image, prompts, of samples position .. position + count - 1.

        Target and image are None where the run has none.
        """
        if self.latents is None:
            picks = range(position, position + count)
            prompts = _prompts_at(self.prompts, picks)
        else:
            picks = [self._shuffled(i) for i in range(position, position + count)]
            prompts = [self.prompts[i] for i in picks]
        if self.config.teacher_samples == "online":
            noise, target, cond = draw_samples(self.config, self.model, self.scheduler, prompts, list(picks))
        else:
            seeds = [_noise_seed(self.config.seed, i) for i in picks]
            noise = sample_noise(self.model, sampling.seed_generators(seeds))
            target = None if self.latents is None else self.latents[picks].float().to(self.model.device)
            cond = sdxl.encode_prompt(self.model, prompts)
        image = self.pictures(list(picks)) if self.pictures else None
        return {"noise": noise, "target": target, "cond": cond, "image": image, "prompts": prompts}

    def _shuffled(self, index: int) -> int:
        epoch, offset = divmod(index, len(self.latents))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_noise_seed(self.config.seed, epoch) ^ 0x5EED)
            self._order = (epoch, torch.randperm(len(self.latents), generator=generator))
        return int(self._order[1][offset])

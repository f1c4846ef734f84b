"""Teacher samples and the order in which training sees them; every sample is a function of its global index."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers import schedulers as diffusers_schedulers
from tqdm import tqdm

from . import pictures, sampling, shards
from .config import TrainConfig
from .device import pick_device
from .errors import InputError
from .models import sdxl
from .models.folder import betas, scheduler_config, unet_files, zeros_for_no_prompt
from .models.weights import digest
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
    values = scheduler_config(folder)
    told = betas(values) | {k: values[k] for k in ("num_train_timesteps",) if k in values}
    name, settings = {
        "folder": (values.get("_class_name", ""), {k: v for k, v in values.items() if not k.startswith("_")}),
        "lcm": ("LCMScheduler", told | {"original_inference_steps": 4}),
        "ddim_trailing": (
            "DDIMScheduler",
            told | {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False},
        ),
    }[kind]
    found = getattr(diffusers_schedulers, str(name), None)
    if found is None or not hasattr(found, "from_config"):
        raise InputError(f"model: {folder} must name a diffusers scheduler, got {name!r}")
    try:
        found.from_config(settings).set_timesteps(4)  # some values are first used here
        return found.from_config(settings)
    except Exception as error:  # a wrong value fails wherever it is used first
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"model: {folder} must have a scheduler diffusers accepts, got {reason}") from error


def sample_noise(model: sdxl.SDXL, generators: list[torch.Generator]) -> torch.Tensor:
    """[len(generators), 4, h, w] fp32 starting noise, one generator per sample."""
    shape = (model.unet.config.in_channels, model.latent_size, model.latent_size)
    return sampling.randn(shape, generators, device=model.device)


def load_teacher(config: TrainConfig, folder: Path) -> sdxl.SDXL:
    """The teacher as training holds it, so that samples drawn beforehand are those it would draw."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = sdxl.load(folder, pick_device(config.device), dtype, config.teacher_unet, config.backend != "ref")
    if not zeros_for_no_prompt(folder):  # the teacher was taught so, and is to be asked so
        model.no_prompt = sdxl.embed_tokens(model, sdxl.tokenize(model, [""]).to(model.device))
    return model


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


def prepare(
    config: TrainConfig,
    model: sdxl.SDXL,
    folder: Path,
    part: tuple[int, int] = (0, 1),
    verify: bool = False,
    progress: bool | None = None,
) -> Path:
    """Draws ``num_teacher_samples`` teacher samples into shards; finished shards are kept, so it can be repeated.

    Args:
        part: (k, n) makes every n-th shard from the k-th, so that n processes share the work.
        verify: also compares the whole digest of each finished shard, and draws again what was altered.
        progress: shows a bar; by default in the first part only.

    Raises:
        InputError: the folder holds samples of another teacher, seed, ...; says what differs.
        StorageError: the disk is full or cannot be written.
    """
    own = claim(config, model.folder, folder, part, verify)
    return draw(config, model, folder, own, part[0] == 0 if progress is None else progress)


def claim(config: TrainConfig, teacher: Path, folder: Path, part=(0, 1), verify: bool = False) -> list[int]:
    """Makes ``folder`` the place of the samples, as ``prepare``; the part's shards that are yet to be drawn."""
    settings = sample_settings(config, teacher)
    shards.claim_folder(folder, settings)
    shards.sweep(folder)
    return missing_shards(config, settings, folder, part, verify)


def draw(config: TrainConfig, model: sdxl.SDXL, folder: Path, numbers: list[int], progress: bool = True) -> Path:
    """Draws these shards into a claimed folder."""
    drawer = ShardDrawer(config, model, sample_settings(config, model.folder))
    total = sum(shard_count(config, number) for number in numbers)
    with tqdm(total=total, desc="teacher samples", unit="img", disable=not (numbers and progress)) as bar:
        for number in numbers:
            drawer.draw(folder, number, bar.update)
    shards.sweep(folder)
    return folder


def shard_count(config: TrainConfig, number: int) -> int:
    """Samples of that shard."""
    return min(SHARD, config.num_teacher_samples - number * SHARD)


def missing_shards(config: TrainConfig, settings: dict, folder: Path, part=(0, 1), verify: bool = False) -> list[int]:
    """Numbers of the part's shards that are yet to be drawn, or are to be drawn again because they were altered."""
    found = []
    for number in range(-(-config.num_teacher_samples // SHARD))[part[0] :: part[1]]:
        try:
            path = shards.shard_path(folder, number)
            if shards.read_index(path, settings, shard_count(config, number), verify) is None:
                found.append(number)
        except shards.AlteredShard as error:
            tqdm.write(f"drawn again: {error}")
            found.append(number)
    return found


class ShardDrawer:
    """Draws any shard of a run's teacher samples, which is a function of ``settings`` and the shard's number."""

    def __init__(self, config: TrainConfig, model: sdxl.SDXL, settings: dict):
        self.config, self.model, self.settings = config, model, settings
        self._lines = _prompt_lines(config)
        self._scheduler = teacher_scheduler(model.folder, config.teacher_scheduler)

    def draw(self, folder: Path, number: int, advance=lambda count: None) -> str:
        """Writes a shard; the tar's SHA-256. Batches lie where the shard says, so that it is the same in any process.

        Args:
            advance: called with the number of samples after each batch.
        """
        first, size = number * SHARD, self.config.teacher_batch_size
        last, samples = first + shard_count(self.config, number), []
        for start in range(first, last, size):
            indices = list(range(start, min(start + size, last)))
            prompts = _prompts_at(self._lines, range(start, indices[-1] + 1))
            _, x0, _ = draw_samples(self.config, self.model, self._scheduler, prompts, indices)
            for i, prompt, latents in zip(indices, prompts, x0, strict=True):
                samples.append(shards.Sample(i, prompt, _noise_seed(self.config.seed, i), latents))
            advance(len(indices))
        return shards.write_shard(shards.shard_path(folder, number), samples, self.settings)


def sample_settings(config: TrainConfig, folder: Path) -> dict:
    """Everything the samples of ``config`` depend on; reads the teacher's weights to hash them.

    Bits may still differ between devices, numbers of threads and versions of PyTorch.
    """
    lines = _prompt_lines(config)
    known = _prompts_at(None, range(SHARD)) if lines is None else lines  # of endless captions, the first
    apart = "\n".join(prompt.replace("\n", "\n\0") for prompt in known)  # a prompt may have lines of its own
    return {
        "format": shards.FORMAT,
        "num_samples": config.num_teacher_samples,
        "shard_size": SHARD,
        "seed": config.seed,
        "teacher": teacher_digest(config, folder),
        "teacher_steps": config.teacher_steps,
        "teacher_scheduler": config.teacher_scheduler,
        "teacher_batch_size": config.teacher_batch_size,
        "guidance_scale": config.guidance_scale,
        "precision": config.precision,
        "prompts": hashlib.sha256(apart.encode()).hexdigest(),
    }


def teacher_digest(config: TrainConfig, folder: Path) -> str:
    """SHA-256 of what a sample comes from: weights of UNet and text encoders, the scheduler, an encoded no prompt."""
    unet = config.teacher_unet
    files = sorted((folder / "unet").glob("*.safetensors")) if unet is None else unet_files(unet)
    for part in ("text_encoder", "text_encoder_2"):
        files += sorted((folder / part).glob("*.safetensors"))
    index = [] if zeros_for_no_prompt(folder) else [folder / "model_index.json"]
    return digest([*files, folder / "scheduler" / "scheduler_config.json", *index])


def _noise_seed(seed: int, index: int) -> int:
    return seed * 1_000_003 + index


class Samples:
    """What a step learns from, by global sample index; the teacher's part from a cache folder, drawn online, or none.

    The order is a fresh permutation of the cache per epoch, a function of the seed and the epoch alone, so the data
    position is one number.
    """

    def __init__(self, config: TrainConfig, model: sdxl.SDXL, folder: Path | None):
        self.config, self.model = config, model
        self.shards = None
        self.pictures = pictures.Pictures(config.images, model, _WORLD_PROMPTS) if config.images else None
        if folder is None:
            if config.teacher_samples == "online":
                self.scheduler = teacher_scheduler(model.folder, config.teacher_scheduler)
            self.prompts = _prompt_lines(config)
            return
        self.shards = shards.Shards(folder)
        self._order: tuple[int, torch.Tensor] | None = None

    def __call__(self, position: int, count: int) -> dict:
        """A ``recipes.Batch``'s noise, target, cond, image, prompts, of samples position .. position + count - 1.

        Target and image are None where the run has none.
        """
        picks, drawn = range(position, position + count), None
        if self.shards is None:
            prompts = _prompts_at(self.prompts, picks)
        else:
            picks = [self._shuffled(i) for i in picks]
            drawn = [self.shards[i] for i in picks]
            prompts = [sample.prompt for sample in drawn]
        if self.config.teacher_samples == "online":
            noise, target, cond = draw_samples(self.config, self.model, self.scheduler, prompts, list(picks))
        else:
            seeds = [_noise_seed(self.config.seed, i) for i in picks]
            noise = sample_noise(self.model, sampling.seed_generators(seeds))
            target = None
            if drawn is not None:
                target = torch.stack([sample.latents for sample in drawn]).to(self.model.device, torch.float32)
            cond = sdxl.encode_prompt(self.model, prompts)
        image = self.pictures(list(picks)) if self.pictures else None
        return {"noise": noise, "target": target, "cond": cond, "image": image, "prompts": prompts}

    def _shuffled(self, index: int) -> int:
        epoch, offset = divmod(index, len(self.shards))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_noise_seed(self.config.seed, epoch) ^ 0x5EED)
            self._order = (epoch, torch.randperm(len(self.shards), generator=generator))
        return int(self._order[1][offset])

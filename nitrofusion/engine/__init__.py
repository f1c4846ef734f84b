"""Drawing pictures: ``load`` a model, ``generate`` from prompts and seeds.

    >>> engine = load("world")
    >>> picture = engine.generate("a red circle on a navy background", seed=7)[0]

A seed gives the same picture in plain diffusers, whatever else is in the batch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import OrderedDict
from pathlib import Path

import torch
from PIL import Image

import nitrokernels

from .. import __version__, sampling, schedule
from ..device import pick_device
from ..errors import InputError
from ..models import sdxl
from .source import Loras, Source, find

__all__ = ["Engine", "load"]

BACKENDS = ("auto", "ref", "cpu", "triton", "cuda")
OUTPUT_TYPES = ("pil", "pt", "latent")
PROMPT_CACHE = 256  # prompts; one of SDXL's takes 0.6 MB in fp32


def load(
    model: str | Path = "world",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    lora: Loras = None,
    vae: str | Path | None = None,
    allow_pickle: bool = False,
) -> Engine:
    """Loads a model for drawing.

    Args:
        model: a preset's name (``presets.MODELS``); a StableDiffusionXLPipeline folder, or its hub id; a training run's
            folder; a safetensors file, of a UNet alone or a checkpoint with text encoders and VAE, in diffusers' or
            LDM's (ComfyUI's) layout. A folder is a student if its scheduler's configuration has ``shifted_timestep``,
            else a multi-step teacher with the folder's own scheduler; a file is what its header or a published name
            says. A run draws with the averaged student of its newest checkpoint.
        device: None picks CUDA when there is one.
        dtype: None means float16 on CUDA, else float32.
        backend: ``auto``; ``ref``, eager PyTorch; or one of nitrokernels' backends, which then never falls back.
        lora: a file, or a list of (file, scale), merged into the weights.
        vae: another decoder: a name in ``published.VAES``, a folder, a file or a hub id.
        allow_pickle: reads a ``.bin`` file that you trust, tensors only.

    Raises:
        InputError: there is no such model, or it is not a complete SDXL pipeline in safetensors.
    """
    device = pick_device(device)
    check_backend(backend, device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"load: dtype must be one of torch's floating-point types, got {dtype!r}")
    source = find(model, lora, vae, allow_pickle)
    with ops(backend):
        return Engine(source, source.read(device, dtype, fused=backend != "ref"), backend)


def ops(backend: str) -> contextlib.AbstractContextManager:
    """Inside of it nitrokernels runs on ``backend``."""
    return contextlib.nullcontext() if backend == "auto" else nitrokernels.use(backend)


def check_backend(backend: str, device: torch.device) -> None:
    """Raises InputError unless ``backend`` works on ``device``."""
    if backend not in BACKENDS:
        raise InputError(f"load: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in ("auto", "ref"):
        try:
            with ops(backend):
                nitrokernels.fusible(device)
        except RuntimeError as error:
            raise InputError(f"load: backend must be one that works on {device}, got {backend}: {error}") from error


class Engine:
    """A loaded student or teacher; make one with ``load``.

    Attributes:
        source: where the model came from, with the defaults of a call.
        model: its parts, plain diffusers and transformers modules.
        scheduler: of a teacher, as its preset or folder configures it; None for a student.
        backend: as it was loaded with.
    """

    def __init__(self, source: Source, model: sdxl.SDXL, backend: str = "auto"):
        self.source, self.model, self.backend = source, model, backend
        self.scheduler = source.scheduler()
        self._prompts: OrderedDict[str, sdxl.Conditioning] = OrderedDict()

    @property
    def is_student(self) -> bool:
        return self.source.is_student

    @functools.cached_property
    def unet_digest(self) -> str:
        """First 12 hex digits of the SHA-256 of the UNet's weight files, as ``cat files | sha256sum`` prints it."""
        digest = hashlib.sha256()
        for path in self.source.unet_files:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:12]

    def generate(
        self,
        prompt: str | list[str],
        num_inference_steps: int | None = None,
        seed: int | list[int] = 0,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        batch_size: int = 4,
    ) -> list[Image.Image] | torch.Tensor:
        """Draws ``num_images_per_prompt`` pictures of each prompt; those of one prompt stand together.

        Args:
            prompt: one or several.
            num_inference_steps: 1 to 4 for a student, any number for a teacher; None is the model's default.
            seed: picture i has its own generator, seeded with seed + i or with the i-th of a list. It draws the
                starting noise and then that of each further step, as diffusers does with a list of generators.
            guidance_scale: of a teacher's classifier-free guidance; 1 or less is none. A student takes none.
            output_type: ``pil``, ``pt`` or ``latent``.
            batch_size: pictures drawn at a time; changes speed and memory, never a picture.

        Returns:
            A list of n PIL images; or a float32 tensor on the model's device: [n, 3, H, W] in [-1, 1] for ``pt``, the
            scaled latents [n, 4, h, w] for ``latent``.

        Raises:
            InputError: an argument is not as above.
        """
        prompts, seeds = check_pictures(prompt, num_images_per_prompt, seed)
        steps, guidance_scale = check_sampling(self.source, num_inference_steps, guidance_scale)
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type: must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        _check_count("batch_size", batch_size)

        batches = []
        with torch.inference_mode(), ops(self.backend):
            for start in range(0, len(prompts), batch_size):
                cond = sdxl.Conditioning.cat([self._encode(p) for p in prompts[start : start + batch_size]])
                latents = self._draw(cond, seeds[start : start + batch_size], steps, guidance_scale)
                batches.append(latents if output_type == "latent" else sdxl.decode(self.model, latents))
                if output_type == "pil":
                    batches[-1] = batches[-1].cpu()
        if output_type == "pil":
            return [picture for images in batches for picture in to_pil(images)]
        return torch.cat(batches)  # outside of inference mode, so that the caller may train on it

    def settings(
        self, prompt: str, seed: int, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> dict:
        """What ``png.save_png`` writes beside a picture: all it takes to draw it again."""
        steps, guidance_scale = check_sampling(self.source, num_inference_steps, guidance_scale)
        return {
            "prompt": prompt,
            "model": self.source.name,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "height": self.model.resolution,
            "width": self.model.resolution,
            "version": __version__,
            "unet": self.unet_digest,
        }

    def _encode(self, prompt: str) -> sdxl.Conditioning:
        """One prompt's embeddings, the newest PROMPT_CACHE of which are kept.

        Prompts are encoded one by one: in a batch the last bits would depend on its other prompts.
        """
        if prompt not in self._prompts:
            self._prompts[prompt] = sdxl.encode_prompt(self.model, [prompt])
            if len(self._prompts) > PROMPT_CACHE:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(prompt)
        return self._prompts[prompt]

    def _draw(self, cond: sdxl.Conditioning, seeds: list[int], steps: int, guidance_scale: float) -> torch.Tensor:
        """[len(seeds), 4, h, w] float32 latents."""
        model, generators = self.model, sampling.seed_generators(seeds)
        shape = (model.unet.config.in_channels, model.latent_size, model.latent_size)

        def noise() -> torch.Tensor:
            # In the UNet's precision, where diffusers draws it.
            return sampling.randn(shape, generators, model.device, model.unet.dtype).float()

        if self.is_student:
            timesteps = schedule.origin_timesteps(steps)
            shift = self.source.shifted_timestep
            *_, x0 = sampling.student_steps(
                model.unet, noise(), cond, model.alphas_cumprod, timesteps, shift, next_noise=noise
            )
            return x0
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # theirs hold state; calls share none
        options = {"timesteps": self.source.timesteps(steps), "eta": self.source.eta}
        return sampling.sample_teacher(
            model.unet, noise(), cond, scheduler, steps, guidance_scale, generators, **options
        )


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """PIL images of a float tensor [n, 3, H, W] in [-1, 1], rounded as diffusers does."""
    pixels = (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in (pixels * 255).round().astype("uint8")]


def check_pictures(prompt, num_images_per_prompt, seed) -> tuple[list[str], list[int]]:
    """A prompt and a seed for each picture, or InputError; needs no model."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"prompt: must be a string or a list of at least one, got {prompt!r}")
    for text in prompts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that were no UTF-8
            raise InputError(f"prompt: must be valid Unicode, got {text!a}") from error
    _check_count("num_images_per_prompt", num_images_per_prompt)
    prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
    return prompts, _check_seeds(seed, len(prompts))


def check_sampling(source: Source, num_inference_steps, guidance_scale) -> tuple[int, float]:
    """Steps and guidance of a call, the source's where None, or InputError; needs no weights."""
    steps = source.num_inference_steps if num_inference_steps is None else num_inference_steps
    _check_count("num_inference_steps", steps, most=max(source.steps or (schedule.NUM_TRAIN_TIMESTEPS,)))
    if source.steps is not None and steps not in source.steps:
        allowed = ", ".join(map(str, source.steps))
        raise InputError(f"num_inference_steps: must be one of {allowed} for {source.name}, got {steps}")
    scale = source.guidance_scale if guidance_scale is None else guidance_scale
    most = 1 if source.is_student else 100
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale <= most:
        reason = " (a student draws without guidance)" if source.is_student else ""
        raise InputError(f"guidance_scale: must be in 0..{most}{reason}, got {scale!r}")
    return steps, float(scale)


def _check_count(name: str, value, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        wanted = "an integer >= 1" if most is None else f"an integer in 1..{most}"
        raise InputError(f"{name}: must be {wanted}, got {value!r}")


def _check_seeds(seed, count: int) -> list[int]:
    seeds = list(seed) if isinstance(seed, (list, tuple, range)) else [seed]
    if not all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**63 for s in seeds):
        raise InputError(f"seed: must be an integer in 0..2**63-1 or a list of them, got {seed!r}")
    if not isinstance(seed, (list, tuple, range)):
        return [seed + i for i in range(count)]
    if len(seeds) != count:
        raise InputError(f"seed: must be one integer or one for each of the {count} pictures, got {len(seeds)}")
    return seeds

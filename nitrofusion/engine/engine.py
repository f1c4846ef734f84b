"""``Engine``: prompts and seeds to pictures, at once or step by step."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import nitrokernels
from nitrokernels.dispatch import Refused

from .. import sampling, schedule
from ..models.conditioning import Conditioning
from . import images
from .arguments import (
    NAG_ALPHA,
    NAG_SCALE,
    NAG_TAU,
    NASA_SCALE,
    STRENGTH,
    Call,
    check_call,
    check_names,
    check_output,
    fail,
)
from .files import LoadedFiles
from .negative import Negative
from .results import Refinement, Switched
from .settings import settings_of
from .source import Loras, Source, find
from .turns import Turns

Picture = Image.Image | torch.Tensor
EXECUTORS = ("auto", "plan", "graph", "openvino")  # backends that are no backend of nitrokernels
PROMPT_CACHE = 256  # prompts; one of SDXL's takes 0.6 MB in fp32


@dataclass(frozen=True)
class _Batch:
    """What pictures drawn together begin with, whatever the number of steps.

    Attributes:
        cond, uncond: of each picture; uncond is what a teacher's guidance leads away from.
        negative: prompts that act in attention.
        image: [B, 4, h, w] scaled latents to start from.
        noise: noise(i) is the i-th [B, 4, h, w] that the pictures' generators draw, however often it is asked for.
        generators: one for each picture.
    """

    cond: Conditioning
    uncond: Conditioning | None
    negative: Negative | None
    image: torch.Tensor | None
    noise: Callable[[int], torch.Tensor]
    generators: list[torch.Generator]


class Engine:
    """A loaded student or teacher; make one with ``load``. Threads that share it wait for each other.

    Attributes:
        source: where the model came from, with the defaults of a call.
        executor: runs the networks; ``modules.Modules`` says what is asked of it.
        backend: as it was loaded with.
        model: the parts as plain diffusers and transformers modules; plans load them when they are asked for.
        loras: what was merged, one report each.
        scheduler: of a teacher, as its preset or folder configures it; None for a student.
    """

    def __init__(self, source: Source, executor, backend: str = "auto", files: LoadedFiles | None = None):
        self._turns = Turns()  # first, see there
        self.source, self.executor, self.backend = source, executor, backend
        self.scheduler = source.scheduler()
        self._files = files or LoadedFiles(source)
        self._generation = 0  # of weights; a stream ends with its own
        self._prompts: OrderedDict[str, Conditioning] = OrderedDict()
        self._images = images.Newest()  # encoded

    @property
    def model(self):
        return self.executor.model

    @property
    def loras(self) -> tuple:
        return self.executor.loras

    @property
    def is_student(self) -> bool:
        return self.source.is_student

    @property
    def unet_digest(self) -> str:
        """First 12 hex digits of the SHA-256 of the files of UNet and LoRAs, as ``cat files | sha256sum`` prints it.

        Raises:
            InputError: they have changed since they were loaded.
        """
        return self._files.digest(*self._files.parts["unet"], *self._files.loras)

    def set_lora(self, lora: Loras = None) -> Switched:
        """Draws with these LoRAs from now on, and no others; without any, as before the first, to the bit.

        Weights are written where they lie: nothing is captured or compiled anew, and only those are written that
        differ. Static plans and OpenVINO's graphs have copies, which are made anew. LoRAs that belong to the model
        itself (a preset's) stay.

        Args:
            lora: a file, or a list of (file, scale), as ``load`` takes it.

        Returns:
            How many weights were written in how many seconds, and how many keys of each file were applied.

        Raises:
            InputError: a file is no LoRA, or none for this model; then nothing has changed.
        """
        with self._turns:
            return self._become(self.source.with_lora(lora))

    def switch(
        self, model: str | Path, lora: Loras = None, vae: str | Path | None = None, allow_pickle: bool = False
    ) -> Switched:
        """Draws with another model from now on, without loading it beside this one or capturing anything anew.

        Args:
            model, lora, vae, allow_pickle: as for ``load``. Its parts must have the form of those loaded; sizes of
                pictures, the scheduler and the weights may differ.

        Returns:
            As ``set_lora``.

        Raises:
            InputError: there is no such model, or it is of another form; then nothing has changed.
        """
        return self._become(find(model, lora, vae, allow_pickle))

    def _become(self, source: Source) -> Switched:
        with self._turns, ops(self.backend):
            start, scheduler, files = time.perf_counter(), source.scheduler(), LoadedFiles(source, self._files)
            counts = self.executor.become(source, self.source)
            self.source, self.scheduler, self._files = source, scheduler, files
            self._generation += 1
            self._prompts.clear()
            self._images.clear()
            return Switched(source.name, *counts, time.perf_counter() - start, self.loras)

    def generate(
        self,
        prompt: str | list[str],
        num_inference_steps: int | None = None,
        seed: int | list[int] = 0,
        negative_prompt: str | list[str | None] | None = None,
        *,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        image: Picture | list[Picture] | None = None,
        strength: float = STRENGTH,
        guidance_scale: float | None = None,
        negative: str | None = None,
        nag_scale: float = NAG_SCALE,
        nag_tau: float = NAG_TAU,
        nag_alpha: float = NAG_ALPHA,
        nasa_scale: float = NASA_SCALE,
        nag_steps: int | None = None,
        output_type: str = "pil",
        batch_size: int = 4,
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Draws ``num_images_per_prompt`` pictures of each prompt; those of one prompt stand together.

        Args:
            prompt: one or several.
            num_inference_steps: 1 to 4 for a student, any number for a teacher; None is the model's default.
            seed: picture i has its own generator, seeded with seed + i or with the i-th of a list. It draws the
                starting noise and then that of each further step, as diffusers does with a list of generators.
            negative_prompt: one, or one or None for each prompt; what it acts through is ``negative``.
            height, width: in pixels, multiples of the autoencoder's scale (8 for SDXL); None is the model's own.
            image: to start from, one or one for each prompt: PIL images, resized to height and width; float tensors
                [3, H, W] in [-1, 1]; or latents [4, h, w] as ``latent`` returns them. Their size is the picture's
                unless height and width say otherwise.
            strength: of image-to-image, above 0 and at most 1: the last int(num_inference_steps * strength) steps are
                walked, as in diffusers. Where that is none, a student is called once, from where four steps of that
                strength would begin, and a teacher walks its last step. The default, 0.6, begins a student at t = 499
                for every number of steps: in the embedded world places and sizes then stay while colours and patterns
                are the prompt's; from 249 outlines stay too, from 749 little does.
            guidance_scale: of a teacher's classifier-free guidance; 1 or less is none. A student takes none.
            negative: ``nag`` or ``nasa`` act in cross-attention, at any number of steps; ``cfg``, for a guided teacher,
                is the usual meaning, the other side of guidance. None is cfg where there is guidance, else nag.
                Of a guided teacher nag and nasa act beside it: the negative prompt is then at both places.
            nag_scale: how far to extrapolate, the paper's phi; its authors' programs count nag_scale = phi + 1.
            nag_tau: largest growth of a token's L1 norm.
            nag_alpha: share of the guided attention in the result.
            nasa_scale: share of the negative prompt's attention that is taken away.
            nag_steps: nag and nasa act in the first so many model calls; None is all.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            batch_size: pictures drawn at a time; changes speed and memory, not a picture (modules: but for rounding).

        Returns:
            A list of n PIL images; [n, H, W, 3] float32 in [0, 1] for ``np``; or a float32 tensor on the model's
            device: [n, 3, H, W] in [-1, 1] for ``pt``, the scaled latents [n, 4, h, w] for ``latent``.

        Raises:
            InputError: an argument is not as above, or the model drew NaN.
        """
        with self._turns:
            call = check_call(
                self.source, prompt, num_inference_steps, seed, negative_prompt,
                num_images_per_prompt=num_images_per_prompt, height=height, width=width, image=image, strength=strength,
                guidance_scale=guidance_scale, negative=negative, nag_scale=nag_scale, nag_tau=nag_tau,
                nag_alpha=nag_alpha, nasa_scale=nasa_scale, nag_steps=nag_steps,
            )  # fmt: skip
            check_output(output_type, batch_size)
            size, sources = self._size(call)
            drawn = []
            with torch.inference_mode(), ops(self.backend):
                encoded = self._encode_sources(call, sources)
                for start in range(0, len(call), batch_size):
                    at = range(start, min(start + batch_size, len(call)))
                    if self._drawn_whole(call, output_type):
                        drawn.append(self._whole(call, at, size, output_type))
                    else:
                        drawn.append(self._finish(self._draw(call, self._begin(call, at, size, encoded)), output_type))
        return _joined(drawn, output_type)

    def stream(
        self,
        prompt: str,
        num_inference_steps: int = 4,
        seed: int = 0,
        negative_prompt: str | None = None,
        *,
        output_type: str = "pil",
        **options,
    ) -> Iterator[Refinement]:
        """Draws one picture in 1 step, then in 2, up to ``num_inference_steps``, and yields each when it is ready.

        Each is the picture that ``generate`` draws of the same arguments in so many steps. They are separate
        trajectories from one starting noise, {999}, {999, 499}, {999, 749, 499}, {999, 749, 499, 249}, so whatever
        they have in common is done once: five model calls for the four pictures, not ten. A consumer that stops
        iterating costs nothing more.

        Args:
            prompt, seed, negative_prompt, options: as for ``generate``, of one picture. With an image and a strength
                below 1 several numbers of steps may be the same trajectory: then they are the same picture.

        Raises:
            InputError: at the call, as ``generate``; or the model is a multi-step teacher. At a picture: the model or
                its LoRAs were switched since the call.
        """
        check_names("Engine.stream", options)
        with self._turns:
            if not self.is_student:
                fail("model", "a student", f"the multi-step teacher {self.source.name}", "stream")
            call = check_call(self.source, prompt, num_inference_steps, seed, negative_prompt, **options)
            check_output(output_type, 1)
            if len(call) != 1:
                fail("prompt", "one picture", f"{len(call)} pictures", "stream")
            return self._stream(call, output_type, *self._size(call), self._generation)

    def _stream(self, call: Call, output_type: str, size, sources, generation: int) -> Iterator[Refinement]:
        batch, known, pictures, seconds = None, {}, {}, 0.0
        for steps in range(1, call.num_inference_steps + 1):
            start = time.perf_counter()
            # Not around the yield: it would reach the consumer's code.
            with self._turns, torch.inference_mode(), ops(self.backend):
                if generation != self._generation:
                    fail("model", "the one it began with", f"{self.source.name}, switched to since", "stream")
                if batch is None:
                    batch = self._begin(call, range(1), size, self._encode_sources(call, sources))
                timesteps = self._timesteps(call, steps)
                if tuple(timesteps) not in pictures:
                    x0 = self._student(batch, timesteps, known)
                    pictures[tuple(timesteps)] = self._finish(x0, output_type)
            image = _joined([pictures[tuple(timesteps)]], output_type)[0]
            seconds += time.perf_counter() - start
            yield Refinement(image, steps, seconds)

    def settings(self, prompt: str, **options) -> dict:
        """What ``png.save_png`` writes beside a picture: all it takes to draw it again.

        Args:
            prompt, options: as for ``generate``, of one picture.
        """
        check_names("Engine.settings", options)
        with self._turns:
            call = check_call(self.source, prompt, **options)
            if len(call) != 1:
                fail("prompt", "one picture", f"{len(call)} pictures", "settings")
            size, _ = self._size(call)
            return settings_of(call, size, self.source, self.executor, self._files)

    def _size(self, call: Call) -> tuple[tuple[int, int], list[torch.Tensor] | None]:
        """(height, width) in pixels and the images to start from in that size, or InputError."""
        scale = self.executor.vae_scale
        for name, side in (("height", call.height), ("width", call.width)):
            if side is not None and side % scale:
                fail(name, f"a multiple of {scale}", str(side))
        if call.images is None:
            return (call.height or self.executor.resolution, call.width or self.executor.resolution), None
        ready = images.prepare(call.images, call.height, call.width, scale)
        height, width = ready[0].shape[1:]
        return ((height, width) if len(ready[0]) == 3 else (height * scale, width * scale)), ready

    def _encode_sources(self, call: Call, sources: list[torch.Tensor] | None) -> list | None:
        """Of each image its latents, or mean and deviation of them: each is encoded once, on its own."""
        if sources is None:
            return None
        return [
            image.to(self.executor.device)[None]
            if len(image) == 4
            else self._images.get(image, lambda image: self.executor.encode_image(image[None]))
            for image in sources
        ]

    def _begin(self, call: Call, at: range, size: tuple[int, int], sources: list | None) -> _Batch:
        cond = Conditioning.cat([self._encode(call.prompts[i]) for i in at])
        cond = cond.with_time_ids(_time_ids(size, len(at), self.executor.device))
        texts = [call.negative_prompts[i] for i in at]
        uncond = negative = None
        guided = call.guidance_scale > 1
        zeros = self.source.force_zeros_for_empty_prompt
        if guided and (call.negative is not None or not zeros):
            parts = [
                cond[i : i + 1].null() if n is None and zeros else self._encode(n or "") for i, n in enumerate(texts)
            ]
            uncond = Conditioning.cat(parts).with_time_ids(cond.time_ids)
        rows = [i for i, n in enumerate(texts) if n is not None]
        if call.guidance is not None and rows:
            embeds = torch.cat([self._encode(texts[i]).prompt_embeds for i in rows])
            # Under guidance x_t is doubled, and its second half is the one that sees the prompt.
            negative = Negative(call.guidance, embeds, [i + guided * len(at) for i in rows])

        generators = sampling.seed_generators([call.seeds[i] for i in at])
        image = None
        if sources is not None:
            image = torch.cat([
                self._sample_latents(sources[call.image_of[i]], g) for i, g in zip(at, generators, strict=True)
            ])  # fmt: skip
        drawn: list[torch.Tensor] = []

        def noise(i: int) -> torch.Tensor:
            while len(drawn) <= i:
                drawn.append(self._noise(size, generators))
            return drawn[i]

        return _Batch(cond, uncond, negative, image, noise, generators)

    def _noise(self, size: tuple[int, int], generators: list[torch.Generator]) -> torch.Tensor:
        """[B, 4, h, w] float32, drawn in the UNet's precision as diffusers does."""
        model = self.executor
        shape = (model.in_channels, *(side // model.vae_scale for side in size))
        return sampling.randn(shape, generators, model.device, model.dtype).float()

    def _sample_latents(self, source, generator: torch.Generator) -> torch.Tensor:
        """[1, 4, h, w] scaled latents of an encoded image; the picture's first draw, as in diffusers."""
        if isinstance(source, torch.Tensor):
            return source
        mean, std = source
        if std is not None:  # there is something to draw
            mean = mean + std * sampling.randn(mean.shape[1:], [generator], mean.device, mean.dtype)
        latents = mean.to(self.executor.dtype)  # where diffusers rounds
        return (latents * self.executor.scaling_factor).float()

    def _timesteps(self, call: Call, steps: int) -> list[int]:
        if call.images is None:
            return schedule.origin_timesteps(steps)
        return schedule.image_timesteps(steps, call.strength)

    def _draw(self, call: Call, batch: _Batch) -> torch.Tensor:
        """[B, 4, h, w] float32 latents."""
        steps = call.num_inference_steps
        if self.is_student:
            return self._student(batch, self._timesteps(call, steps), {})
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # theirs hold state; calls share none
        return sampling.sample_teacher(
            lambda x_t, t, cond, step: self._denoise(x_t, t, cond, batch.negative, step),
            batch.noise(0), batch.cond, scheduler, steps, call.guidance_scale, batch.generators,
            image=batch.image, strength=call.strength, uncond=batch.uncond, timesteps=self.source.timesteps(steps),
            eta=self.source.eta,
        )  # fmt: skip

    def _student(self, batch: _Batch, timesteps: list[int], known: dict[tuple, torch.Tensor]) -> torch.Tensor:
        """[B, 4, h, w] float32 x0 at the end of a trajectory.

        Args:
            known: eps by the timesteps that led to it, so that trajectories share their first calls.
        """

        def denoise(x_t, t, cond, step):
            path = tuple(timesteps[: step + 1])
            if path not in known:
                known[path] = self._denoise(x_t, t, cond, batch.negative, step)
            return known[path]

        alphas, x_t = self.executor.alphas_cumprod, batch.noise(0)
        if batch.image is not None:
            t = torch.full((len(x_t),), timesteps[0], device=x_t.device)
            x_t = schedule.add_noise(batch.image, x_t, t, alphas)
        further = map(batch.noise, itertools.count(1))
        *_, x0 = sampling.student_steps(
            denoise, x_t, batch.cond, alphas, timesteps, self.source.shifted_timestep, lambda: next(further)
        )
        return x0

    def _drawn_whole(self, call: Call, output_type: str) -> bool:
        """Whether the executor draws such a call in one go: a student's pictures of noise and prompts alone."""
        plain = self.is_student and call.images is None and call.negative is None
        return plain and output_type != "latent" and hasattr(self.executor, "picture")

    def _whole(self, call: Call, at: range, size: tuple[int, int], output_type: str) -> torch.Tensor:
        """``_finish`` of pictures drawn in one go; where all prompts are known, the text encoders do not run."""
        prompts, steps = [call.prompts[i] for i in at], call.num_inference_steps
        generators = sampling.seed_generators([call.seeds[i] for i in at])
        noises = torch.stack([self._noise(size, generators) for _ in range(steps)])
        time_ids = _time_ids(size, len(at), self.executor.device)
        if all(prompt in self._prompts for prompt in prompts):
            cond = Conditioning.cat([self._encode(prompt) for prompt in prompts])
            text = cond.prompt_embeds, cond.pooled_prompt_embeds
        else:
            text = (self.executor.tokenize(prompts),)
        timesteps = tuple(self._timesteps(call, steps))
        drawn = self.executor.picture(timesteps, self.source.shifted_timestep, noises, time_ids, *text)
        told = Conditioning(drawn.prompt_embeds, drawn.pooled_prompt_embeds, time_ids)
        for i, prompt in enumerate(prompts):
            self._remember(prompt, told[i : i + 1])
        return self._out(drawn.rgb if output_type == "pil" else drawn.pixels, drawn.finite, output_type)

    def _finish(self, latents: torch.Tensor, output_type: str) -> torch.Tensor:
        """Pictures of latents as ``_joined`` takes them."""
        if output_type == "latent":
            return self._out(latents, images.finite(latents), output_type)
        if output_type == "pil":
            return self._out(*self.executor.decode_rgb(latents), output_type)
        pixels = self.executor.decode(latents)
        return self._out(pixels, images.finite(pixels), output_type)

    def _out(self, result: torch.Tensor, finite: bool | torch.Tensor, output_type: str) -> torch.Tensor:
        """``result``, off the device where its form allows it, so that it is free for the next batch."""
        if output_type in ("pil", "np"):
            result = images.to_host(result)
        if not finite:
            name = "latents" if output_type == "latent" else "pixels"
            fail(name, "finite (float32 has the range that float16 lacks)", f"NaN or infinity from {self.source.name}")
        return result

    def _encode(self, prompt: str) -> Conditioning:
        """One prompt's embeddings, the newest PROMPT_CACHE of which are kept.

        Prompts are encoded one by one: in a batch the last bits would depend on its other prompts.
        """
        self._remember(prompt, self._prompts.get(prompt) or self.executor.encode(prompt))
        return self._prompts[prompt]

    def _remember(self, prompt: str, cond: Conditioning) -> None:
        self._prompts[prompt] = cond
        self._prompts.move_to_end(prompt)
        if len(self._prompts) > PROMPT_CACHE:
            self._prompts.popitem(last=False)

    def _denoise(self, x_t, t, cond: Conditioning, negative: Negative | None, step: int) -> torch.Tensor:
        """``step`` counts a picture's calls from 0."""
        acts = negative is not None and negative.guidance.acts(step)
        return self.executor.denoise(x_t, t, cond, negative if acts else None)


@functools.lru_cache(maxsize=64)
def _time_ids(size: tuple[int, int], count: int, device: torch.device) -> torch.Tensor:
    """[count, 6], shared by all calls: nobody writes it."""
    return torch.tensor([[*size, 0, 0, *size]] * count, dtype=torch.float32, device=device)


@contextlib.contextmanager
def ops(backend: str) -> Iterator[None]:
    """Inside of it nitrokernels runs on ``backend``; on Triton what there is no CUDA C++ of.

    Raises:
        InputError: it was named and cannot run a call.
    """
    order = ("cuda", "triton") if backend == "cuda" else (backend,)
    try:
        with contextlib.nullcontext() if backend in EXECUTORS else nitrokernels.use(*order):
            yield
    except Refused as error:
        fail("backend", "one that runs all of this model and call, as auto and ref do", str(error))


def _joined(drawn: list[torch.Tensor], output_type: str):
    if output_type == "pil":
        return [picture for batch in drawn for picture in images.to_pil(batch)]
    joined = torch.cat(drawn)  # outside of inference mode, so that the caller may train on it
    return images.to_np(joined) if output_type == "np" else joined

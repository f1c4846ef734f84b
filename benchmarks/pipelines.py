"""SDXL at 1024x1024 with random weights, prompt to pixels, on an NVIDIA GPU: ours and what a user would run.

All draw one step in bf16 from one folder (``shapes.write_sdxl``); ``taesd`` variants have the small decoder. None of
this has run on a GPU yet. ``sdxl_tiny`` is the same code on a model a thousandth of the size, in fp32 on a CPU.

    diffusers_eager, diffusers_taesd            StableDiffusionXLPipeline with our scheduler, channels last
    diffusers_compile, diffusers_taesd_compile  the same, UNet and vae.decode by torch.compile, max-autotune
    nitrofusion_accelerate                      ``accelerate`` of the first
    nitrofusion_modules                         ``load``, backend auto
    nitrofusion_graph, nitrofusion_taesd_graph  the whole picture as one CUDA graph
    nitrofusion_graph_ops, nitrofusion_taesd_graph_ops   the same with nitrokernels' GPU ops, named as they must be
    nitrofusion_taesd_fp8_graph, nitrofusion_taesd_fp8_graph_ops, nitrofusion_taesd_fp8_compile   fp8 linears
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import nitrokernels
from nitrofusion.device import pick_device

from .shapes import write_sdxl
from .skip import Skip

SHIFTED = 499  # what the student is told of t = 999


class Pipeline:
    """What every variant starts from."""

    def __init__(self, shape: str, taesd: bool, folder: Path, threads: int):
        self.device = pick_device()
        if shape == "sdxl" and self.device.type != "cuda":
            raise Skip("SDXL at 1024x1024 needs an NVIDIA GPU")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.folder, self.vae = folder / shape, folder / shape / "taesd" if taesd else None
        if not (self.folder / "lora.safetensors").exists():
            write_sdxl(self.folder, self.device, shape == "sdxl_tiny")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Diffusers(Pipeline):
    def __init__(
        self, shape: str, folder: Path, threads: int, taesd: bool = False, compiled: bool = False, ours: bool = False
    ):
        super().__init__(shape, taesd, folder, threads)
        from diffusers import AutoencoderTiny, StableDiffusionXLPipeline

        from nitrofusion.engine.accelerate import accelerate
        from nitrofusion.scheduler import TimestepShiftLCMScheduler

        if compiled and self.device.type != "cuda":
            raise Skip("torch.compile's max-autotune needs an NVIDIA GPU")
        model = self.folder / "model"
        options = {"vae": AutoencoderTiny.from_pretrained(self.vae, torch_dtype=self.dtype)} if taesd else {}
        scheduler = TimestepShiftLCMScheduler.from_pretrained(model, subfolder="scheduler")
        pipe = StableDiffusionXLPipeline.from_pretrained(
            model, scheduler=scheduler, torch_dtype=self.dtype, **options
        ).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        for part in (pipe.unet, pipe.vae):
            part.to(memory_format=torch.channels_last)
        if compiled:
            pipe.unet = torch.compile(pipe.unet, mode="max-autotune")
            pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune")
        self.pipe, self.known = accelerate(pipe) if ours else pipe, {}

    def draw(self, prompt: str, seed: int, **given) -> np.ndarray:
        options = {"num_inference_steps": 1, "guidance_scale": 0, "generator": torch.Generator().manual_seed(seed)}
        return np.asarray(self.pipe(**(given or {"prompt": prompt}), **options).images[0])

    def redraw(self, prompt: str, seed: int) -> np.ndarray:
        if prompt not in self.known:
            embeds, pooled = self.text(prompt)
            self.known = {prompt: {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}}
        return self.draw(prompt, seed, **self.known[prompt])

    def text(self, prompt: str):
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        self.wait()
        return embeds, pooled

    def unet(self, noise: np.ndarray, cond) -> None:
        embeds, pooled = cond
        side = 8.0 * noise.shape[-1]
        time_ids = torch.tensor([[side, side, 0, 0, side, side]], device=self.device, dtype=self.dtype)
        x_t, t = torch.from_numpy(noise).to(self.device, self.dtype), torch.tensor(SHIFTED, device=self.device)
        with torch.no_grad():
            added = {"text_embeds": pooled, "time_ids": time_ids}
            self.pipe.unet(x_t, t, embeds, added_cond_kwargs=added, return_dict=False)
        self.wait()

    def decode(self, latents: np.ndarray) -> None:
        x = torch.from_numpy(latents).to(self.device, self.dtype) / self.pipe.vae.config.scaling_factor
        with torch.no_grad():
            self.pipe.vae.decode(x, return_dict=False)
        self.wait()


class Nitrofusion(Pipeline):
    def __init__(
        self,
        shape: str,
        folder: Path,
        threads: int,
        taesd: bool = False,
        backend: str = "auto",
        fp8: bool = False,
        compiled: bool = False,
        own_ops: bool = False,
    ):
        super().__init__(shape, taesd, folder, threads)
        import nitrofusion
        from nitrofusion.engine.calibrate import PROMPTS, calibrate
        from nitrofusion.models import fp8 as eight_bits

        if backend == "graph" and self.device.type != "cuda":
            raise Skip("CUDA graphs need an NVIDIA GPU")
        model, scales = self.folder / "model", self.folder / "fp8.json"
        if fp8 and (reason := eight_bits.missing(self.device)) is not None:
            raise Skip(f"fp8: {reason}")
        if fp8 and not scales.exists():
            calibrate(model, scales, PROMPTS[:2], seeds=1)
        self.own_ops = own_ops
        with self.ops():
            self.engine = nitrofusion.load(
                model, self.device, self.dtype, backend, vae=self.vae, compile=compiled, fp8=scales if fp8 else None
            )

    def ops(self) -> contextlib.AbstractContextManager:
        return nitrokernels.use("cuda", "triton", "ref") if self.own_ops else contextlib.nullcontext()

    def draw(self, prompt: str, seed: int) -> np.ndarray:
        with self.ops():
            return np.asarray(self.engine.generate(prompt, seed=seed)[0])

    redraw = draw  # the engine keeps a prompt's embeddings

    def text(self, prompt: str):
        with self.ops(), torch.inference_mode():
            cond = self.engine.executor.encode(prompt)
        self.wait()
        return cond

    def unet(self, noise: np.ndarray, cond) -> None:
        x_t, t = torch.from_numpy(noise).to(self.device), torch.tensor([SHIFTED], device=self.device)
        with self.ops(), torch.inference_mode():
            self.engine.executor.denoise(x_t, t, cond, None)
        self.wait()

    def decode(self, latents: np.ndarray) -> None:
        with self.ops(), torch.inference_mode():
            self.engine.executor.decode(torch.from_numpy(latents).to(self.device))
        self.wait()

    def switch(self, i: int) -> float:
        """Milliseconds until a LoRA is in, or out again, every other time."""
        start = time.perf_counter()
        self.engine.set_lora(None if i % 2 else self.folder / "lora.safetensors")
        self.wait()
        return 1e3 * (time.perf_counter() - start)


def variants(shape: str) -> dict[str, Callable]:
    def make(kind: type, **options) -> Callable:
        return functools.partial(kind, shape, **options)

    return {
        "diffusers_eager": make(Diffusers),
        "diffusers_compile": make(Diffusers, compiled=True),
        "diffusers_taesd": make(Diffusers, taesd=True),
        "diffusers_taesd_compile": make(Diffusers, taesd=True, compiled=True),
        "nitrofusion_accelerate": make(Diffusers, ours=True),
        "nitrofusion_modules": make(Nitrofusion),
        "nitrofusion_graph": make(Nitrofusion, backend="graph"),
        "nitrofusion_graph_ops": make(Nitrofusion, backend="graph", own_ops=True),
        "nitrofusion_taesd_graph": make(Nitrofusion, taesd=True, backend="graph"),
        "nitrofusion_taesd_graph_ops": make(Nitrofusion, taesd=True, backend="graph", own_ops=True),
        "nitrofusion_taesd_fp8_graph": make(Nitrofusion, taesd=True, backend="graph", fp8=True),
        "nitrofusion_taesd_fp8_graph_ops": make(Nitrofusion, taesd=True, backend="graph", fp8=True, own_ops=True),
        "nitrofusion_taesd_fp8_compile": make(Nitrofusion, taesd=True, fp8=True, compiled=True),
    }

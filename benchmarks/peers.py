"""What ``benchmarks.one_step`` times: our backends and the peers a user would pick, each at its best.

``WORLD`` draws pictures of the world's student, ``SDXL30M`` takes one step of ``shapes.sdxl30m``. All work in fp32 from
the same weights. Heavy imports are inside, because the time they take is part of a cold start.

    diffusers_eager    StableDiffusionXLPipeline with our scheduler, as its documentation says
    diffusers_compile  the same, torch.compile around the UNet, vae.decode and both text encoders, defaults of PyTorch.
                       channels_last and Inductor's freezing made no difference here (28.0 to 29.4 ms, one thread)
    openvino           convert_model from the PyTorch modules, static shapes, the one timestep and the size folded in,
                       LATENCY, fp32, unpinned (pinning made it slower here); a loop of a dozen lines around it
    xformers_eager     diffusers_eager with xformers' attention, where xformers imports
    nitrofusion_*      ``load("world")`` on each backend; accelerate is ``accelerate`` of diffusers_eager

``sdxl`` and ``sdxl_tiny`` are ``benchmarks.pipelines``.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .skip import Skip

SHIFTED = 499  # what the world's student is told of t = 999
HALF = {"num_inference_steps": 2, "strength": 0.6}  # of image-to-image: one call, from t = 499
OPENVINO = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}


# --- ours; a new backend is a line here ---------------------------------------------------------------------------


def _fused(unet):
    import nitrokernels

    return _fixed_unet(nitrokernels.fuse_(unet), Step.side)


def _planned(unet):
    """One UNet as a plan, called as ``_fixed_unet``'s module is."""
    import torch

    from nitrofusion.engine.plans.unet import UNetPlan

    from .shapes import TOKENS

    plan = UNetPlan(unet.config, unet.state_dict(), 32, 32, TOKENS)
    time_ids = torch.tensor([Step.side, Step.side, 0, 0, Step.side, Step.side])
    return lambda x_t, embeds, pooled: plan(x_t[0], SHIFTED, embeds[0], pooled[0], time_ids)[None]


# What makes a step of a diffusers UNet.
BACKENDS: dict[str, Callable] = {"ref": lambda unet: _fixed_unet(unet, Step.side), "cpu": _fused, "plan": _planned}


def _use(backend: str):
    import nitrokernels

    return contextlib.nullcontext() if backend == "plan" else nitrokernels.use(backend)


class Nitrofusion:
    """``Engine.generate`` and the engine's parts."""

    def __init__(self, backend: str, folder: Path, threads: int):
        import nitrofusion

        self.backend = backend
        self.engine = nitrofusion.load("world", device="cpu", backend=backend)

    def draw(self, prompt: str, seed: int) -> np.ndarray:
        return np.asarray(self.engine.generate(prompt, seed=seed)[0])

    redraw = draw  # the engine keeps a prompt's embeddings

    def from_image(self, prompt: str, image, seed: int) -> np.ndarray:
        return np.asarray(self.engine.generate(prompt, seed=seed, image=image, **HALF)[0])

    def text(self, prompt: str):
        import torch

        with _use(self.backend), torch.inference_mode():
            return self.engine.executor.encode(prompt)

    def unet(self, noise: np.ndarray, cond) -> np.ndarray:
        import torch

        with _use(self.backend), torch.inference_mode():
            x_t, t = torch.from_numpy(noise), torch.tensor([SHIFTED])
            return self.engine.executor.denoise(x_t, t, cond, None).numpy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        import torch

        with _use(self.backend), torch.inference_mode():
            return self.engine.executor.decode(torch.from_numpy(latents)).numpy()


# --- peers --------------------------------------------------------------------------------------------------------


class Diffusers:
    """A plain pipeline of the exported folder."""

    def __init__(
        self, folder: Path, threads: int, compiled: bool = False, xformers: bool = False, accelerated: bool = False
    ):
        import torch
        from diffusers import StableDiffusionXLPipeline

        from nitrofusion.scheduler import TimestepShiftLCMScheduler

        scheduler = TimestepShiftLCMScheduler.from_pretrained(folder / "model", subfolder="scheduler")
        pipe = StableDiffusionXLPipeline.from_pretrained(
            folder / "model", scheduler=scheduler, torch_dtype=torch.float32
        )
        pipe.set_progress_bar_config(disable=True)
        if xformers:
            _need_xformers()
            pipe.enable_xformers_memory_efficient_attention()
        if compiled:
            pipe.unet, pipe.vae.decode = torch.compile(pipe.unet), torch.compile(pipe.vae.decode)
            pipe.text_encoder = torch.compile(pipe.text_encoder)
            pipe.text_encoder_2 = torch.compile(pipe.text_encoder_2)
        if accelerated:
            from nitrofusion.engine.accelerate import accelerate

            accelerate(pipe)
        self.pipe, self.prompt = pipe, None

    def draw(self, prompt: str, seed: int, **options) -> np.ndarray:
        import torch

        generator = torch.Generator().manual_seed(seed)
        options = options or {"prompt": prompt}
        return np.asarray(self.pipe(**options, num_inference_steps=1, guidance_scale=0, generator=generator).images[0])

    def redraw(self, prompt: str, seed: int) -> np.ndarray:
        """Embeddings computed once and passed in, as diffusers' documentation advises."""
        return self.draw(prompt, seed, **self._embedded(prompt))

    def _embedded(self, prompt: str) -> dict:
        if prompt != self.prompt:
            self.prompt, (embeds, pooled) = prompt, self.text(prompt)
            self.options = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        return self.options

    def from_image(self, prompt: str, image, seed: int) -> np.ndarray:
        import torch

        options = self._embedded(prompt) | HALF | {"generator": torch.Generator().manual_seed(seed)}
        return np.asarray(self._img2img(image=image, guidance_scale=0, **options).images[0])

    @functools.cached_property
    def _img2img(self):
        from diffusers import StableDiffusionXLImg2ImgPipeline

        pipe = StableDiffusionXLImg2ImgPipeline(**self.pipe.components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def text(self, prompt: str):
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        return embeds, pooled

    def unet(self, noise: np.ndarray, cond) -> np.ndarray:
        import torch

        embeds, pooled = cond
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
        with torch.no_grad():
            return self.pipe.unet(
                torch.from_numpy(noise), torch.tensor(SHIFTED), embeds, added_cond_kwargs=added, return_dict=False
            )[0].numpy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            scaled = torch.from_numpy(latents) / self.pipe.vae.config.scaling_factor
            return self.pipe.vae.decode(scaled, return_dict=False)[0].numpy()


def _need_xformers() -> None:
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise Skip(f"xformers does not import: {error}") from error


class OpenVINO:
    """Text encoders, UNet and decoder as three static graphs."""

    def __init__(self, folder: Path, threads: int, torch_noise: bool = True):
        core = _openvino(folder)
        from transformers import CLIPTokenizer

        if not (folder / "openvino" / "decoder.xml").exists():
            _convert_world(folder)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "model" / "tokenizer")  # both are the same
        options = OPENVINO | {"INFERENCE_NUM_THREADS": threads}
        self.parts = [
            core.compile_model(folder / "openvino" / f"{part}.xml", "CPU", options).create_infer_request()
            for part in ("text", "unet", "decoder")
        ]
        self.alpha = float(np.load(folder / "openvino" / "alpha.npy"))
        self.torch_noise, self.prompt = torch_noise, None

    def text(self, prompt: str):
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=length, return_tensors="np"
        ).input_ids
        out = self.parts[0].infer([ids.astype(np.int64)])
        return out[0], out[1]

    def unet(self, noise: np.ndarray, cond) -> np.ndarray:
        return self.parts[1].infer([noise, *cond], share_inputs=True)[0]

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self.parts[2].infer([latents], share_inputs=True)[0]

    def draw(self, prompt: str, seed: int, cond=None) -> np.ndarray:
        noise = self._noise(seed)
        eps = self.unet(noise, cond or self.text(prompt))
        x0 = (noise - (1 - self.alpha) ** 0.5 * eps) / self.alpha**0.5
        image = self.decode(x0.astype(np.float32))[0].transpose(1, 2, 0)
        return ((image / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)

    def redraw(self, prompt: str, seed: int) -> np.ndarray:
        if prompt != self.prompt:
            self.prompt, self.cond = prompt, [np.copy(x) for x in self.text(prompt)]
        return self.draw(prompt, seed, self.cond)

    def _noise(self, seed: int) -> np.ndarray:
        if not self.torch_noise:  # for a cold start: another picture, and PyTorch is never imported
            return np.random.default_rng(seed).standard_normal((1, 4, 16, 16), np.float32)
        import torch

        return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)).numpy()


def _openvino(folder: Path):
    try:
        import openvino
    except ImportError as error:
        raise Skip(f"openvino does not import: {error}") from error
    core = openvino.Core()
    core.set_property({"CACHE_DIR": str(folder / "openvino_cache")})
    return core


def _convert(module, example: tuple, path: Path) -> None:
    import openvino
    import torch

    with torch.no_grad():
        shapes = [list(x.shape) for x in example]
        model = openvino.convert_model(module.eval(), example_input=example, input=shapes)
    openvino.save_model(model, path, compress_to_fp16=False)


def _convert_world(folder: Path) -> None:
    import torch

    pipe = Diffusers(folder, 1).pipe

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoders = torch.nn.ModuleList([pipe.text_encoder, pipe.text_encoder_2])

        def forward(self, ids):
            first, second = (encoder(ids, output_hidden_states=True) for encoder in self.encoders)
            return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second[0]

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = pipe.vae

        def forward(self, latents):
            return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

    tokens = pipe.tokenizer.model_max_length
    out = folder / "openvino"
    out.mkdir(exist_ok=True)
    np.save(out / "alpha.npy", pipe.scheduler.alphas_cumprod[SHIFTED].item())
    _convert(Text(), (torch.zeros(1, tokens, dtype=torch.long),), out / "text.xml")
    latents, cond = torch.randn(1, 4, 16, 16), (torch.randn(1, tokens, 128), torch.randn(1, 64))
    _convert(_fixed_unet(pipe.unet, 32.0), (latents, *cond), out / "unet.xml")
    _convert(Decoder(), (latents,), out / "decoder.xml")


def _fixed_unet(unet, side: float):
    """eps of (x_t, prompt_embeds, pooled_prompt_embeds) at t' of the first step and one size, for static graphs."""
    import torch

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x_t, embeds, pooled):
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]])}
            return self.unet(x_t, torch.tensor([SHIFTED]), embeds, added_cond_kwargs=added, return_dict=False)[0]

    return Fixed()


# --- one step of a UNet ---------------------------------------------------------------------------------------------


class Step:
    """x0 [1, 4, 32, 32] of ``shapes.sdxl30m`` from noise and random embeddings; ``unet`` alone is eps."""

    side = 256.0

    def __init__(self, folder: Path, threads: int):
        from .shapes import sdxl30m

        self.conds: dict = {}
        self.model = self.prepare(sdxl30m())

    def prepare(self, unet):
        return _fixed_unet(unet, self.side)

    def text(self, prompt: str):
        """Random embeddings that the prompt seeds; made before the clock starts."""
        if prompt not in self.conds:
            from .shapes import POOLED, SDXL30M, TOKENS

            rng = np.random.default_rng(list(prompt.encode()))
            shapes = (1, TOKENS, SDXL30M["cross_attention_dim"]), (1, POOLED)
            self.conds[prompt] = [rng.standard_normal(shape, np.float32) for shape in shapes]
        return self.conds[prompt]

    def unet(self, noise: np.ndarray, cond) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.model(*map(torch.from_numpy, (noise, *cond))).numpy()

    def draw(self, prompt: str, seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).standard_normal((1, 4, 32, 32), np.float32)
        return (noise - (1 - _alpha()) ** 0.5 * self.unet(noise, self.conds[prompt])) / _alpha() ** 0.5

    redraw = draw


@functools.cache
def _alpha() -> float:
    from nitrofusion.schedule import make_alphas_cumprod

    return make_alphas_cumprod()[SHIFTED].item()


class CompiledStep(Step):
    def prepare(self, unet):
        import torch

        return _fixed_unet(torch.compile(unet), self.side)


class XformersStep(Step):
    def prepare(self, unet):
        _need_xformers()
        unet.enable_xformers_memory_efficient_attention()
        return super().prepare(unet)


class OpenVINOStep(Step):
    def __init__(self, folder: Path, threads: int):
        self.threads, self.folder = threads, folder
        super().__init__(folder, threads)

    def prepare(self, unet):
        import torch

        core = _openvino(self.folder)
        path = self.folder / "sdxl30m.xml"
        if not path.exists():
            cond = map(torch.from_numpy, self.text("example"))
            _convert(_fixed_unet(unet, self.side), (torch.randn(1, 4, 32, 32), *cond), path)
        options = OPENVINO | {"INFERENCE_NUM_THREADS": self.threads}
        return core.compile_model(path, "CPU", options).create_infer_request()

    def unet(self, noise: np.ndarray, cond) -> np.ndarray:
        return self.model.infer([noise, *cond], share_inputs=True)[0]


class NitrofusionStep(Step):
    def __init__(self, backend: str, folder: Path, threads: int):
        self.backend = backend
        super().__init__(folder, threads)

    def prepare(self, unet):
        with _use(self.backend):
            return BACKENDS[self.backend](unet)

    def unet(self, noise: np.ndarray, cond) -> np.ndarray:
        with _use(self.backend):
            return super().unet(noise, cond)


WORLD: dict[str, Callable] = {
    "diffusers_eager": Diffusers,
    "diffusers_compile": functools.partial(Diffusers, compiled=True),
    "xformers_eager": functools.partial(Diffusers, xformers=True),
    "openvino": OpenVINO,
    "nitrofusion_accelerate": functools.partial(Diffusers, accelerated=True),
    **{f"nitrofusion_{name}": functools.partial(Nitrofusion, name) for name in BACKENDS},
}
STEP: dict[str, Callable] = {
    "diffusers_eager": Step,
    "diffusers_compile": CompiledStep,
    "xformers_eager": XformersStep,
    "openvino": OpenVINOStep,
    **{f"nitrofusion_{name}": functools.partial(NitrofusionStep, name) for name in BACKENDS},
}


def _pipeline(shape: str, variant: str, *args, **options):
    from .pipelines import variants  # needs diffusers, which some variants of a cold start must not import

    return variants(shape)[variant](*args, **options)


PIPELINES = (
    "diffusers_eager", "diffusers_compile", "diffusers_taesd", "diffusers_taesd_compile", "nitrofusion_accelerate",
    "nitrofusion_modules", "nitrofusion_graph", "nitrofusion_graph_ops", "nitrofusion_taesd_graph",
    "nitrofusion_taesd_graph_ops", "nitrofusion_taesd_fp8_graph", "nitrofusion_taesd_fp8_graph_ops",
    "nitrofusion_taesd_fp8_compile",
)  # fmt: skip
SHAPES = {
    "world": WORLD,
    "sdxl30m": STEP,
    **{s: {v: functools.partial(_pipeline, s, v) for v in PIPELINES} for s in ("sdxl", "sdxl_tiny")},
}
# What keeps files between starts: its first start is timed apart.
CACHED = ("diffusers_compile", "openvino", "diffusers_taesd_compile", "nitrofusion_taesd_fp8_compile")


def build(shape: str, variant: str, folder: Path, threads: int, **options):
    """One variant, ready to draw; files it keeps between starts go to ``folder``.

    Raises:
        Skip: this machine lacks it.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    if variant != "openvino" or options.get("torch_noise", True):
        import torch

        torch.set_num_threads(threads)
    return SHAPES[shape][variant](folder, threads, **options)

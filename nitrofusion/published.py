"""Models as literal data: which weights, which scheduler, which timesteps, under which licence."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

WORLD = Path(__file__).parent / "world" / "weights"


@dataclass(frozen=True)
class Sampler:
    """How a model's authors draw with it in diffusers.

    Attributes:
        scheduler: class in diffusers, made from the pipeline folder's own configuration.
        options: what replaces values of that configuration.
        timesteps: those of each number of steps; empty means the scheduler's own grid.
        eta: noise of the step, for schedulers that take it.
    """

    scheduler: str
    options: dict = field(default_factory=dict)
    timesteps: dict[int, tuple[int, ...]] = field(default_factory=dict)
    eta: float = 0.0


@dataclass(frozen=True)
class ModelPreset:
    """Where a model lies and how it is drawn with.

    Attributes:
        folder: StableDiffusionXLPipeline folder or hub id.
        unet: the UNet's file or ``repo/file`` on the hub; None means the folder's own.
        shifted_timestep: S of a one-step student; None is a model that a diffusers scheduler draws with.
        num_inference_steps, guidance_scale: of a call that names none.
        license: of the weights, as their authors name it.
        vae: decoder: a name in ``VAES``, hub id, folder or file; None means the folder's own.
        lora: file or ``repo/file`` merged into the UNet.
        sampler: None means the folder's own scheduler.
        steps: numbers of steps it may be drawn with; None means any.
        sha256: of the UNet's (or LoRA's) file, where it is known.
        comfyui: name of the same model's single file for ComfyUI.
    """

    name: str
    folder: str
    unet: str | None = None
    shifted_timestep: int | None = None
    num_inference_steps: int = 1
    guidance_scale: float = 0.0
    resolution: int = 1024
    license: str = "apache-2.0"
    vae: str | None = None
    lora: str | None = None
    sampler: Sampler | None = None
    steps: tuple[int, ...] | None = None
    sha256: str | None = None
    comfyui: str | None = None

    @property
    def prediction_type(self) -> str:
        return self.sampler.options.get("prediction_type", "epsilon") if self.sampler else "epsilon"


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
FEATURES = {"world-features": str(WORLD / "features")}  # vision transformers: what ADD's heads look at
VAES = {"sdxl-fp16-fix": "madebyollin/sdxl-vae-fp16-fix", "taesdxl": "madebyollin/taesdxl"}

_STUDENT = (1, 2, 3, 4)
_TRAILING = {"timestep_spacing": "trailing"}
_LIGHTNING, _HYPER, _DMD2 = "ByteDance/SDXL-Lightning", "ByteDance/Hyper-SD", "tianweiy/DMD2"
_DMD2_STEPS = {2: (999, 499), 3: (999, 749, 499), 4: (999, 749, 499, 249)}
_DMD2_LICENSE, _HYPER_LICENSE = "cc-by-nc-sa-4.0", "not stated by its authors"


def _world(name: str, sha256: str, unet: str | None = None, **options) -> ModelPreset:
    file = None if unet is None else str(WORLD / unet)
    steps = None if unet is None else _STUDENT
    return ModelPreset(name, str(WORLD / "teacher"), file, resolution=32, steps=steps, sha256=sha256, **options)


def _sdxl(name: str, unet: str | None = None, **options) -> ModelPreset:
    """SDXL's parts, with the decoder that does not overflow in float16."""
    return ModelPreset(name, SDXL, unet, **({"vae": "sdxl-fp16-fix", "license": "openrail++"} | options))


def _lightning(name: str, file: str, steps: int, **options) -> ModelPreset:
    sampler = Sampler("EulerDiscreteScheduler", _TRAILING | options)
    return _sdxl(name, f"{_LIGHTNING}/{file}", num_inference_steps=steps, steps=(steps,), sampler=sampler)


def _hyper(steps: int) -> ModelPreset:
    return _sdxl(
        f"hyper-sdxl-{steps}step",
        lora=f"{_HYPER}/Hyper-SDXL-{steps}steps-lora.safetensors",
        num_inference_steps=steps,
        steps=(steps,),
        sampler=Sampler("DDIMScheduler", _TRAILING),
        license=_HYPER_LICENSE,
    )


MODELS = {
    preset.name: preset
    for preset in (
        _world(
            "world",
            "1920640f082ab501751b32371ae3c3a7f72022d14181e7d59d01e230af68b815",
            "student.safetensors",
            shifted_timestep=500,
        ),
        _world(
            "world-start",
            "924ff56f2a3a3eaca8d3e616746eca139e22df14eb5fe6222de55c3942751a20",
            "start.safetensors",
            shifted_timestep=500,
        ),
        _world(
            "world-teacher",
            "d1c2b926f9ff7d3edc865a82730f996b464ab87ea4e932bf0d962bd5fadd8755",
            num_inference_steps=8,
            guidance_scale=2.5,
        ),
        _sdxl(
            "nitrosd-realism",
            "ChenDY/NitroFusion/nitrosd-realism_unet.safetensors",
            shifted_timestep=250,
            steps=_STUDENT,
            license="cc-by-nc-4.0",
            comfyui="nitrosd-realism_comfyui.safetensors",
        ),
        _sdxl(
            "nitrosd-vibrant",
            "ChenDY/NitroFusion/nitrosd-vibrant_unet.safetensors",
            shifted_timestep=500,
            steps=_STUDENT,
            comfyui="nitrosd-vibrant_comfyui.safetensors",
        ),
        _sdxl("sdxl-base", num_inference_steps=25, guidance_scale=6.0, sampler=Sampler("EulerDiscreteScheduler")),
        ModelPreset(
            "sdxl-turbo",
            "stabilityai/sdxl-turbo",
            resolution=512,
            license="sai-nc-community",
            vae="sdxl-fp16-fix",
            sampler=Sampler("EulerAncestralDiscreteScheduler", _TRAILING),
            steps=_STUDENT,
            comfyui="sd_xl_turbo_1.0_fp16.safetensors",
        ),
        _lightning("sdxl-lightning-1step", "sdxl_lightning_1step_unet_x0.safetensors", 1, prediction_type="sample"),
        _lightning("sdxl-lightning-2step", "sdxl_lightning_2step_unet.safetensors", 2),
        _lightning("sdxl-lightning", "sdxl_lightning_4step_unet.safetensors", 4),
        _lightning("sdxl-lightning-8step", "sdxl_lightning_8step_unet.safetensors", 8),
        _sdxl(
            "hyper-sdxl-1step",
            f"{_HYPER}/Hyper-SDXL-1step-Unet.safetensors",
            sampler=Sampler("LCMScheduler", {}, {1: (800,)}),
            steps=(1,),
            license=_HYPER_LICENSE,
        ),
        _sdxl(
            "hyper-sdxl",
            lora=f"{_HYPER}/Hyper-SDXL-1step-lora.safetensors",
            sampler=Sampler("TCDScheduler", eta=1.0),
            steps=tuple(range(1, 9)),
            license=_HYPER_LICENSE,
        ),
        *(_hyper(steps) for steps in (2, 4, 8)),
        _sdxl(
            "dmd2-1step",
            f"{_DMD2}/dmd2_sdxl_1step_unet_fp16.bin",
            sampler=Sampler("LCMScheduler", {}, {1: (399,)}),
            steps=(1,),
            license=_DMD2_LICENSE,
        ),
        _sdxl(
            "dmd2",
            f"{_DMD2}/dmd2_sdxl_4step_unet_fp16.bin",
            num_inference_steps=4,
            sampler=Sampler("LCMScheduler", {}, _DMD2_STEPS),
            steps=(2, 3, 4),
            license=_DMD2_LICENSE,
        ),
        _sdxl(
            "dmd2-lora",
            lora=f"{_DMD2}/dmd2_sdxl_4step_lora_fp16.safetensors",
            num_inference_steps=4,
            sampler=Sampler("LCMScheduler", {}, _DMD2_STEPS),
            steps=(2, 3, 4),
            license=_DMD2_LICENSE,
        ),
    )
}

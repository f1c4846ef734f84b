"""Runs as literal data, and the names of models (``published``)."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

from . import checkpoint
from .config import TrainConfig
from .errors import InputError
from .models.weights import read_json
from .pool import PoolConfig
from .published import FEATURES, MODELS, SDXL, WORLD, ModelPreset, Sampler

__all__ = ["MODELS", "RUNS", "WORLD", "ModelPreset", "Sampler"]

_WORLD_RUN = TrainConfig(
    output="runs/world-student",
    seed=2,  # other noises than the start was fitted to: on those it equals the teacher, and heads have nothing to see
    batch_size=32,
    accumulation=2,
    images="world",  # beside teacher samples the student gains hardly anything on its start
    num_teacher_samples=6144,
    stages=(150,),
    lr=5e-5,
    betas=(0.5, 0.99),
    head_lr=3e-3,
    regression_weight=1.5,  # without the anchor, heads this young pull colours astray
    regression_features=3.0,  # as in the start: an anchor in latents alone would pull back to washed-out stripes
    discriminator_warmup=40,
    ema_decay=0.98,
    crop_size=8,
    # With so narrow heads all four of a cell cost little more than one; the noisier t* say less about so good a start.
    pool=PoolConfig(
        width=16, max_depth=2, sampled_per_cell=4, refresh_rate=0.003, t_star_weights=(3.0, 1.0, 1.0, 1.0)
    ),
    precision="fp32",
    preview_every=25,
    checkpoint_every=25,
)

# What makes a run its control: regression to the same teacher samples from the same start.
CONTROL = {"recipe": "regression", "images": None, "lr": 3e-4, "betas": (0.9, 0.99), "lr_decay": "cosine"}

# The world's one-step initialisation, in the part DMD2's and Hyper-SDXL's one-step weights play in the paper.
_WORLD_START = dataclasses.replace(
    _WORLD_RUN,
    output="runs/world-start",
    seed=0,
    recipe="regression",
    images=None,
    init=None,
    num_teacher_samples=10_240,
    batch_size=64,
    accumulation=1,
    regression_weight=0.0,
    regression_features=0.0,
    stages=(1100, 0, 0, 700),
    lr=8e-4,
    betas=(0.9, 0.99),
    warmup_steps=50,
    lr_decay="cosine",
    ema_decay=0.995,
    preview_every=250,
    checkpoint_every=100,
)
_WORLD_START_3 = dataclasses.replace(
    _WORLD_START,
    output="runs/world-start-3",
    seed=4,
    init="runs/world-start-2",
    num_teacher_samples=40_960,
    stages=(1000, 0, 0, 600),
    lr=4e-4,
    warmup_steps=20,
    ema_decay=0.99,
)

# What learns from scores on the world: no teacher samples, and no anchor but the teacher's score. Slow students: where
# the second score lags behind, what it does not know yet drives colours astray.
_WORLD_SCORES = dataclasses.replace(
    _WORLD_RUN,
    accumulation=1,
    images=None,
    teacher_samples="none",
    regression_weight=0.0,
    regression_features=0.0,
    betas=(0.9, 0.99),
)

# Any method on SDXL from the teacher's own weights, without samples of it.
_SDXL_RUN = TrainConfig(teacher=SDXL, init=None, teacher_samples="none", gradient_checkpointing=True)

# Of noise-free score distillation (arXiv 2310.17590).
_NFSD_NEGATIVE = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"
)

RUNS = {
    "world": _WORLD_RUN,
    "world-student": dataclasses.replace(_WORLD_RUN, images=None, num_teacher_samples=8_192, stages=(300, 0, 0, 60)),
    "world-smoke": dataclasses.replace(
        _WORLD_RUN,
        output="runs/world-smoke",
        batch_size=4,
        accumulation=2,
        stages=(4, 2),
        num_teacher_samples=32,
        discriminator_warmup=1,
        checkpoint_every=2,
        num_previews=2,
        preview_every=3,
        pool=PoolConfig(width=8, max_depth=2),
    ),
    "regression-world": dataclasses.replace(_WORLD_RUN, **CONTROL, output="runs/regression-world"),
    "world-start": _WORLD_START,
    # Again on pairs of other noises: on its own pairs the first run's error was a quarter of that on fresh ones.
    "world-start-2": dataclasses.replace(
        _WORLD_START,
        output="runs/world-start-2",
        seed=1,
        init="runs/world-start",
        num_teacher_samples=36_864,
        stages=(700, 0, 0, 600),
        lr=4e-4,
        warmup_steps=20,
        ema_decay=0.99,
    ),
    "world-start-3": _WORLD_START_3,
    # What was left of the error was washed-out stripes: the mean of two pictures, which features tell from either.
    "world-start-4": dataclasses.replace(
        _WORLD_START_3,
        output="runs/world-start-4",
        init="runs/world-start-3",
        regression_features=3.0,
        stages=(400, 0, 0, 100),
        lr=2e-4,
    ),
    "pgsb-world": dataclasses.replace(
        _WORLD_SCORES,
        output="runs/pgsb-world",
        recipe="pgsb",
        stages=(160,),
        lr=3e-6,
        generator_interval=2,
        options={
            "kappa_min": 1.0,  # 2.5 on average, the teacher's own
            "teacher_rank": 16,
            # The first level has no attention, and attention alone cannot follow a student's colours.
            "teacher_layers": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out", "ff.net.2"],
        },
    ),
    "dmd2-world": dataclasses.replace(
        _WORLD_SCORES,
        output="runs/dmd2-world",
        recipe="dmd2",
        images="world",
        stages=(120,),
        lr=5e-6,
        discriminator_warmup=30,
        generator_interval=3,
        options={"real_guidance": 2.5, "fake_lr": 2e-4},
    ),
    # Adversarial diffusion distillation from the same start, against rendered scenes.
    "add-world": dataclasses.replace(
        _WORLD_RUN,
        output="runs/add-world",
        recipe="add",
        images="world",
        teacher_samples="none",
        accumulation=1,
        stages=(150,),
        lr=1e-5,
        regression_weight=0.0,
        regression_features=0.0,
        discriminator_warmup=60,
        # At the paper's lambda the heads' gradient is twelve times that of the distance, here a mean over pixels.
        # Colours are what prompts ask for: they are not augmented.
        options={"features": "world-features", "augment": ["translation", "cutout"], "distill_weight": 10.0},
        preview_every=50,
        checkpoint_every=50,
    ),
    # ADD, sections 3 and 4: DINOv2-S, lambda 2.5, gamma 1e-5, 512 px pictures. The paper gives no learning rate, batch
    # size or guidance of the teacher. SDXL's own folder draws at 1024 px: pictures are scaled or cut to the vision
    # network's 518, and are encoded at the UNet's resolution, so a teacher with sample_size 64 is the paper's setting.
    "add-sdxl": dataclasses.replace(
        _SDXL_RUN,
        output="runs/add-sdxl",
        recipe="add",
        images="pictures",
        guidance_scale=5.0,
        shifted_timestep=500,
        batch_size=4,
        accumulation=32,
        stages=(20_000,),
        lr=1e-6,
        options={"features": "facebook/dinov2-small", "distill_kind": "nfsd", "negative_prompt": _NFSD_NEGATIVE},
    ),
    # SNOOPI's learning rates, rank, scale and guidance for SD 1.5 and 2.1, none for SDXL being reported; where they do
    # not fit SDXL, DMD2's: the normalised gradient and timestep 399. ``clip_model`` adds the paper's CLIP term.
    "pgsb-sdxl": dataclasses.replace(
        _SDXL_RUN,
        output="runs/pgsb-sdxl",
        recipe="pgsb",
        prompts="prompts.txt",
        teacher_steps=25,
        guidance_scale=6.0,
        shifted_timestep=400,
        batch_size=4,
        accumulation=16,
        stages=(40_000,),
        lr=1e-6,
        betas=(0.9, 0.999),
        preview_every=500,
        checkpoint_every=500,
        options={"weighting": "dmd"},
    ),
    # The four-step model: unshifted timesteps, every step equally often. Its one-step sibling is told 399
    # (``shifted_timestep`` 400) and starts from a regression.
    "dmd2-sdxl": dataclasses.replace(
        _SDXL_RUN,
        output="runs/dmd2-sdxl",
        recipe="dmd2",
        images="pictures",
        teacher_steps=25,
        guidance_scale=6.0,
        shifted_timestep=1000,
        batch_size=2,
        accumulation=64,
        stages=(0, 0, 0, 19_000),
        first_step_weight=(1.0, 1.0, 1.0, 0.25),
        lr=5e-7,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        head_lr=5e-7,
        generator_interval=5,
        clip_grad_norm=10.0,
        pool=PoolConfig(width=1280),
        preview_every=500,
        checkpoint_every=500,
    ),
    # Paper section 4: one A100, batch 5, accumulation 20, pool 480. Learning rates, crop side and stage lengths are
    # not in the paper; these are its nearest relatives'. The published UNets of DMD2 and Hyper-SDXL are given as
    # safetensors files; SDXL's own folder is the pipeline around them.
    "nitrosd-realism": TrainConfig(
        output="runs/nitrosd-realism",
        teacher=SDXL,
        teacher_unet="dmd2_sdxl_4step_unet_fp16.safetensors",
        init="dmd2_sdxl_1step_unet_fp16.safetensors",
        prompts="prompts.txt",
        teacher_samples="online",
        teacher_steps=4,
        teacher_scheduler="lcm",
        guidance_scale=0.0,
        shifted_timestep=250,
        stages=(10_000, 2_000, 2_000, 2_000),
        gradient_checkpointing=True,
    ),
    "nitrosd-vibrant": TrainConfig(
        output="runs/nitrosd-vibrant",
        teacher=SDXL,
        teacher_unet="hyper_sdxl_8step_unet.safetensors",
        init="Hyper-SDXL-1step-Unet.safetensors",
        prompts="prompts.txt",
        teacher_samples="online",
        teacher_steps=8,
        teacher_scheduler="ddim_trailing",
        guidance_scale=0.0,
        shifted_timestep=500,
        stages=(10_000, 2_000, 2_000, 2_000),
        gradient_checkpointing=True,
    ),
}


def suggest(name: str, known) -> str:
    """`` (did you mean X?)`` when a known name is close, else the list of them."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(known)})"


def run_preset(name: str) -> TrainConfig:
    if name not in RUNS:
        raise InputError(f"preset: must be one of {', '.join(RUNS)}, got {name!r}{suggest(name, RUNS)}")
    return RUNS[name]


def resolve_folder(name: str) -> str:
    """A preset's folder (a model or a feature network), a hub id's in the local cache, or the path itself."""
    name = MODELS[name].folder if name in MODELS else FEATURES.get(name, name)
    if name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return snapshot_download(name, local_files_only=True)
        except LocalEntryNotFoundError as error:
            raise InputError(
                f"model: {name} must be a folder or a hub id in the local cache, got neither "
                f"(fetch it with: hf download {name})"
            ) from error
    return name


def resolve_unet(name: str) -> str:
    """A model preset's UNet, a run folder's averaged student, or the path itself."""
    if name not in MODELS:
        newest, _ = checkpoint.latest(name)
        if newest and read_json(Path(name) / "config.json").get("lora_rank"):
            raise InputError(f"init: {name} must be a run of whole weights, got one of adapters (export it first)")
        return str(newest / "ema.safetensors") if newest else name
    return MODELS[name].unet or str(Path(MODELS[name].folder) / "unet")

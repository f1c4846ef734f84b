"""Every model preset draws, step by step, what plain diffusers draws with the published scheduler and timesteps."""

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch

from nitrofusion import presets, sampling
from nitrofusion.engine import load
from nitrofusion.errors import InputError
from nitrofusion.presets import MODELS, WORLD

from .tiny import PROMPTS, SnippetScheduler, generators, plain_pipeline, tiny_folder

# scheduler/scheduler_config.json of stable-diffusion-xl-base-1.0 and of sdxl-turbo
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
TURBO = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
QUARTERS = {1: [999], 2: [999, 499], 3: [999, 749, 499], 4: [999, 749, 499, 249]}
THIRDS = QUARTERS | {3: [999, 666, 332]}
EIGHTHS = {8: [999, 874, 749, 624, 499, 374, 249, 124]}


def snippet(config, shift):
    scheduler = SnippetScheduler.from_config(config, shifted_timestep=shift)
    scheduler.config.original_inference_steps = 4
    return scheduler


def shifted(shift):
    return {steps: [t * shift // 1000 for t in grid] for steps, grid in QUARTERS.items()}


def euler(config, **options):
    return diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing", **options)


def ddim(config):
    return diffusers.DDIMScheduler.from_config(config, timestep_spacing="trailing")


def lcm(config):
    return diffusers.LCMScheduler.from_config(config)


def custom(grids, counts):
    return {steps: {"timesteps": grids[steps]} for steps in counts}


# The authors' recipes: name -> (scheduler, {steps: what the UNet is told or None}, {steps: options of the pipeline}).
RECIPES = {
    "world": (lambda c: snippet(c, 500), shifted(500), {}),
    "world-start": (lambda c: snippet(c, 500), shifted(500), {}),
    "world-teacher": (lambda c: None, {3: None, 8: EIGHTHS[8]}, {}),
    "nitrosd-realism": (lambda c: snippet(c, 250), shifted(250), {}),
    "nitrosd-vibrant": (lambda c: snippet(c, 500), shifted(500), {}),
    "sdxl-base": (lambda c: diffusers.EulerDiscreteScheduler.from_config(c), {3: None, 25: None}, {}),
    "sdxl-turbo": (lambda c: diffusers.EulerAncestralDiscreteScheduler.from_config(c), THIRDS, {}),
    "sdxl-lightning-1step": (lambda c: euler(c, prediction_type="sample"), {1: [999]}, {}),
    "sdxl-lightning-2step": (euler, {2: [999, 499]}, {}),
    "sdxl-lightning": (euler, {4: QUARTERS[4]}, {}),
    "sdxl-lightning-8step": (euler, EIGHTHS, {}),
    "hyper-sdxl-1step": (lcm, {1: [800]}, {1: {"timesteps": [800]}}),
    "hyper-sdxl": (
        lambda c: diffusers.TCDScheduler.from_config(c),
        {n: None for n in range(1, 9)},
        {n: {"eta": 1.0} for n in range(1, 9)},
    ),
    "hyper-sdxl-2step": (ddim, {2: [999, 499]}, {}),
    "hyper-sdxl-4step": (ddim, {4: QUARTERS[4]}, {}),
    "hyper-sdxl-8step": (ddim, EIGHTHS, {}),
    "dmd2-1step": (lcm, {1: [399]}, {1: {"timesteps": [399]}}),
    "dmd2": (lcm, {n: QUARTERS[n] for n in (2, 3, 4)}, custom(QUARTERS, (2, 3, 4))),
    "dmd2-lora": (lcm, {n: QUARTERS[n] for n in (2, 3, 4)}, custom(QUARTERS, (2, 3, 4))),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small random pipelines with the scheduler configurations of the published ones."""
    out = {}
    for name, config in {"world": None, "sdxl": SDXL, "turbo": TURBO}.items():
        out[name] = tiny_folder(tmp_path_factory.mktemp(name))
        if config is not None:
            (out[name] / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return out


def test_every_preset_has_a_recipe_for_every_step_count():
    assert RECIPES.keys() == MODELS.keys()
    for name, (_, told, _) in RECIPES.items():
        assert MODELS[name].steps is None or set(MODELS[name].steps) == told.keys(), name
        assert MODELS[name].num_inference_steps in told, name
        assert MODELS[name].prediction_type == ("sample" if name == "sdxl-lightning-1step" else "epsilon")


@pytest.mark.parametrize("name, steps", [(name, n) for name, (_, told, _) in RECIPES.items() for n in told])
def test_a_preset_draws_what_diffusers_draws_step_by_step(folders, monkeypatch, name, steps):
    kind = "world" if name.startswith("world") else "turbo" if name == "sdxl-turbo" else "sdxl"
    preset = dataclasses.replace(MODELS[name], folder=str(folders[kind]), unet=None, lora=None, vae=None)
    monkeypatch.setitem(presets.MODELS, name, preset)
    make, told, options = RECIPES[name]

    config = json.loads((folders[kind] / "scheduler" / "scheduler_config.json").read_text())
    scheduler = make(config)
    pipeline = plain_pipeline(folders[kind], **({} if scheduler is None else {"scheduler": scheduler}))
    theirs, x0s, seen = [], [], []
    step = pipeline.scheduler.step

    def spy(*args, **kwargs):
        out = step(*args, **kwargs)
        theirs.append(out[0])
        x0s.append(out[1] if len(out) > 1 else None)
        return out

    pipeline.scheduler.step = spy
    spy.__signature__ = inspect.signature(step)  # the pipeline asks it what a step takes
    final = pipeline(  # one prompt: the last bits of embeddings depend on the batch they were made in
        PROMPTS[0],
        num_inference_steps=steps,
        guidance_scale=preset.guidance_scale,
        generator=generators([5]),
        output_type="latent",
        **options.get(steps, {}),
    ).images

    engine = load(name, backend="ref")
    ours, walk = [], "student_steps" if engine.is_student else "scheduler_steps"
    original = getattr(sampling, walk)

    def recorded(*args, **kwargs):
        for x in original(*args, **kwargs):
            ours.append(x)
            yield x

    monkeypatch.setattr(sampling, walk, recorded)
    engine.model.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1].flatten()[0])))
    latents = engine.generate(PROMPTS[0], steps, seed=5, output_type="latent")

    assert told[steps] is None or seen == told[steps]
    assert len(ours) == len(theirs) == len(seen) == steps
    for a, b in zip(ours, x0s if engine.is_student else theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latents, final, rtol=1e-5, atol=1e-5)
    assert final.std() > 1e-2


@pytest.mark.parametrize("name, steps, words", [("dmd2", 1, "one of 2, 3, 4 for dmd2"), ("sdxl-lightning", 2, "of 4 ")])
def test_other_step_counts_are_refused(folders, monkeypatch, name, steps, words):
    preset = dataclasses.replace(MODELS[name], folder=str(folders["sdxl"]), unet=None, lora=None, vae=None)
    monkeypatch.setitem(presets.MODELS, name, preset)
    with pytest.raises(InputError, match=words):
        load(name).generate(PROMPTS[0], steps)


def test_literal_data():
    record = json.loads((WORLD / "record.json").read_text())["files"]
    for preset in MODELS.values():
        assert preset.license and preset.resolution in (32, 512, 1024)
        if preset.sha256 is not None:
            file = Path(preset.unet) if preset.unet else WORLD / "teacher/unet/diffusion_pytorch_model.safetensors"
            assert hashlib.sha256(file.read_bytes()).hexdigest() == preset.sha256 in record.values()
        if preset.resolution > 32:
            assert preset.vae == "sdxl-fp16-fix" and preset.sha256 is None  # no digest of theirs is known

"""One drawing, prompt to pixels: our engine against plain diffusers, one image, the world's student."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from nitrofusion import TimestepShiftLCMScheduler, load
from nitrofusion.presets import MODELS

PROMPT = "a striped red circle left of a blue ring on an olive background"


@pytest.fixture(scope="module")
def diffusers_pipeline():
    preset = MODELS["world"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(preset.folder)
    pipeline.unet = load("world", device="cpu", backend="ref").model.unet
    pipeline.scheduler = TimestepShiftLCMScheduler.from_config(
        pipeline.scheduler.config, shifted_timestep=preset.shifted_timestep, original_inference_steps=4
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.benchmark(group="one drawing")
@pytest.mark.parametrize("steps", [1, 4])
def test_ours(benchmark, steps):
    engine = load("world", device="cpu")  # as the pipeline
    benchmark(lambda: engine.generate(PROMPT, num_inference_steps=steps, seed=1))


@pytest.mark.benchmark(group="one drawing")
@pytest.mark.parametrize("steps", [1, 4])
def test_eager(benchmark, diffusers_pipeline, steps):
    benchmark(
        lambda: diffusers_pipeline(
            PROMPT, num_inference_steps=steps, guidance_scale=0, generator=[torch.Generator().manual_seed(1)]
        )
    )

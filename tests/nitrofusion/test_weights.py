"""The shipped weights: what they are, that plain diffusers loads them, and that they do what the README says."""

import hashlib
import json
import math

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from nitrofusion import load
from nitrofusion.evaluate import evaluate
from nitrofusion.evaluate.world import load_judge
from nitrofusion.models import sdxl
from nitrofusion.presets import WORLD
from nitrofusion.world.render import render
from nitrofusion.world.scenes import WORDS, sample_scenes

FRESH = 31_337_000  # scenes that no stage of training or tuning used


def test_files_are_those_of_the_record():
    record = json.loads((WORLD / "record.json").read_text())
    found = {str(p.relative_to(WORLD)): p for p in WORLD.rglob("*") if p.is_file() and p.name != "record.json"}
    assert found.keys() == record["files"].keys()
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == record["files"][name], name
    sizes = [p.stat().st_size for p in found.values()]
    assert sum(sizes) <= 40 << 20 and max(sizes) <= 12 << 20
    names = load_file(WORLD / "teacher" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names), "as all versions of transformers read them"


def test_plain_diffusers_loads_the_teacher_and_draws_the_same():
    pipeline = DiffusionPipeline.from_pretrained(WORLD / "teacher")
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    assert all(p.dtype == torch.float32 for p in pipeline.text_encoder.parameters())
    pipeline.set_progress_bar_config(disable=True)
    prompts = sample_scenes(2, FRESH).captions()
    engine = load("world-teacher")
    ours = engine.generate(prompts, seed=3, output_type="pt")
    theirs = pipeline(
        prompts,
        num_inference_steps=8,
        guidance_scale=2.5,
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
        output_type="pt",
    ).images
    assert ((ours / 2 + 0.5) - theirs).abs().max() <= 2 / 255


def test_ten_feature_maps_and_one_token_a_word():
    model = load("world").model
    assert len(sdxl.feature_shapes(model.unet, 16)) == 10
    for tokenizer in model.tokenizers:
        for word in WORDS:
            assert len(tokenizer(word).input_ids) == 3, word
        assert tokenizer("Ünïcode, 42!").input_ids[0] == tokenizer.bos_token_id


def test_autoencoder():
    vae = load("world").model.vae
    pictures = render(sample_scenes(200, FRESH))
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    assert 10 * math.log10(4 / (decoded - pictures).square().mean().item()) >= 30


def test_judge():
    scenes = sample_scenes(2000, FRESH)
    right = load_judge().correct(render(scenes), torch.from_numpy(scenes.attributes()))
    assert right.all(1).float().mean() >= 0.995


@pytest.mark.parametrize("model, least", [("world-teacher", 0.94), ("world", 0.92)])
def test_prompts_are_followed(model, least):
    """A floor well below the measured value: 100 pictures have a standard error of about 0.02."""
    assert evaluate(model, num_images=100, seed=977)["accuracy"] >= least

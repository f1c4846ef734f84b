"""Pipeline folders: what their configurations say is followed as diffusers follows it, or refused at load."""

import json
import shutil

import pytest
import torch

from nitrofusion.engine import load
from nitrofusion.errors import InputError
from nitrofusion.scheduler import TimestepShiftLCMScheduler

from .tiny import PROMPTS, generators, plain_pipeline, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("pipeline"), loud=True)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuses(words, folder):
    with pytest.raises(InputError, match=words) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["auto", "ref"])
@pytest.mark.parametrize("changes", [{"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}])
def test_a_students_betas_are_those_of_its_scheduler(folder, tmp_path, changes, backend):
    """In a folder as plain diffusers saves it, which names our class."""
    scheduler = TimestepShiftLCMScheduler(shifted_timestep=500, **changes)
    pipeline = plain_pipeline(folder, scheduler=scheduler)
    pipeline.save_pretrained(tmp_path)
    options = {"num_inference_steps": 2, "guidance_scale": 0.0, "generator": generators([3]), "output_type": "pt"}
    theirs = pipeline(PROMPTS[0], **options).images
    loaded = load(tmp_path, backend=backend)
    assert loaded.is_student
    ours = loaded.generate(PROMPTS[0], 2, seed=3, output_type="pt") / 2 + 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule linear or scaled_linear, got 'squaredcos_cap_v2'"),
        ({"beta_schedule": ["linear"]}, "beta_schedule linear or scaled_linear, got"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr true or false, got 'yes'"),
        ({"beta_start": -0.1}, "beta_start between 0 and 1, got -0.1"),
        ({"beta_end": float("nan")}, "beta_end between 0 and 1, got nan"),
        ({"shifted_timestep": 500, "clip_sample": True}, "a student's scheduler without clip_sample, got True"),
        ({"timestep_spacing": "zzz"}, "must have a scheduler diffusers accepts, got ValueError"),
    ],
)
def test_schedulers_that_no_picture_could_be_drawn_with(folder, tmp_path, changes, words):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy / "scheduler/scheduler_config.json", **changes)
    refuses(words, copy)


@pytest.mark.parametrize(
    "file, changes, words",
    [
        ("vae/config.json", {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, "a VAE without latents_mean, got"),
        ("vae/config.json", {"scaling_factor": None}, "a VAE whose scaling_factor is above 0, got None"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor is above 0, got 'x'"),
        ("vae/config.json", {"scaling_factor": [1]}, r"scaling_factor is above 0, got \[1\]"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "not told the guidance, got time_cond_proj_dim 256"),
        ("unet/config.json", {"addition_time_embed_dim": 15}, "projection_dim, 64, and 6 times .* 15, got 160"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 21}, "tokenizer must have .*_length, 20, got 21"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": None}, "tokenizer_2 must have .*, 20, got None"),
        ("tokenizer/tokenizer_config.json", {"pad_token": "[PAD]"}, "pad with one of its text encoder's 602 .*'.PAD.'"),
    ],
)
def test_configurations_that_no_picture_could_be_drawn_with(folder, tmp_path, file, changes, words):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy / file, **changes)
    refuses(words, copy)


def test_what_guidance_leads_away_from_is_what_the_folder_says(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    drawn = {}
    for zeros in (True, False):
        edit(copy / "model_index.json", force_zeros_for_empty_prompt=zeros)
        theirs = plain_pipeline(copy)(PROMPTS[0], **options, generator=generators([3])).images
        drawn[zeros] = load(copy).generate(PROMPTS[0], seed=3, **options) / 2 + 0.5
        torch.testing.assert_close(drawn[zeros], theirs, rtol=0, atol=2e-3)
    assert (drawn[True] - drawn[False]).abs().max() > 1e-4

"""Teacher schedulers by name, against the published few-step timesteps and diffusers' own step."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from nitrofusion.config import TrainConfig
from nitrofusion.data import draw_samples, load_teacher, sample_settings, teacher_scheduler
from nitrofusion.errors import InputError
from nitrofusion.presets import MODELS, RUNS

from .tiny import PROMPTS, plain_pipeline, tiny_folder

FOLDER = MODELS["world-teacher"].folder


@pytest.mark.parametrize(
    "kind, steps, timesteps",
    [
        ("lcm", 4, [999, 749, 499, 249]),  # DMD2
        ("ddim_trailing", 8, [999, 874, 749, 624, 499, 374, 249, 124]),  # Hyper-SDXL
        ("folder", 4, [999, 749, 499, 249]),  # the world's: DPM-Solver++, trailing
    ],
)
def test_timesteps(kind, steps, timesteps):
    scheduler = teacher_scheduler(Path(FOLDER), kind)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps


def test_ddim_step_is_the_closed_form():
    scheduler = teacher_scheduler(Path(FOLDER), "ddim_trailing")
    scheduler.set_timesteps(8)
    x, eps = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    a, b = scheduler.alphas_cumprod.double()[[874, 749]]
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    got = scheduler.step(eps, 874, x, return_dict=False)[0]
    torch.testing.assert_close(got.double(), b.sqrt() * x0 + (1 - b).sqrt() * eps, rtol=1e-5, atol=1e-5)


def test_the_sdxl_presets_name_their_teachers_schedulers():
    assert RUNS["nitrosd-realism"].teacher_scheduler == "lcm" and RUNS["nitrosd-realism"].teacher_steps == 4
    assert RUNS["nitrosd-vibrant"].teacher_scheduler == "ddim_trailing" and RUNS["nitrosd-vibrant"].teacher_steps == 8
    with pytest.raises(InputError, match="teacher_scheduler must be one of folder, lcm, ddim_trailing"):
        dataclasses.replace(TrainConfig(), teacher_scheduler="euler").validate()


@pytest.mark.parametrize("kind", ["folder", "lcm", "ddim_trailing"])
@pytest.mark.parametrize("wrong", [{"beta_schedule": "no such"}, {"beta_start": "0.1"}, {"num_train_timesteps": None}])
def test_wrong_betas_are_the_folders_fault_whichever_scheduler_takes_them(tmp_path, kind, wrong):
    known = json.loads((Path(FOLDER) / "scheduler/scheduler_config.json").read_text())
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(known | wrong))
    with pytest.raises(InputError, match=f"model: {tmp_path} must have a scheduler diffusers accepts, got "):
        teacher_scheduler(tmp_path, kind)


def test_a_prompt_of_two_lines_is_not_two_prompts(tmp_path):
    folder, digests = tiny_folder(tmp_path / "teacher"), set()
    for i, prompts in enumerate((["a ring", "a star"], ["a ring\na star"], ["a ring", "a star", "a star"])):
        file = tmp_path / f"{i}.jsonl"
        file.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
        digests.add(sample_settings(TrainConfig(prompts=str(file)), folder)["prompts"])
    assert len(digests) == 3


def test_samples_are_led_away_from_what_the_teachers_folder_says(tmp_path):
    """From zeros, or from the prompt "" where it says so, as plain diffusers is; and so is the unconditional task."""
    folder, drawn, digests = tiny_folder(tmp_path, loud=True), {}, set()
    config = TrainConfig(precision="fp32", teacher_steps=2, guidance_scale=2.0, device="cpu")
    index = json.loads((folder / "model_index.json").read_text())
    for zeros in (True, False):
        (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
        model = load_teacher(config, folder)
        noise, drawn[zeros], cond = draw_samples(config, model, teacher_scheduler(folder), PROMPTS[:2], [0, 1])
        pipeline = plain_pipeline(folder)
        options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
        theirs = pipeline(PROMPTS[:2], latents=noise, **options).images
        torch.testing.assert_close(drawn[zeros], theirs, rtol=1e-4, atol=1e-4)
        _, embeds, _, pooled = pipeline.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=True)
        null = cond[torch.tensor([1, 0])].with_time_ids(cond.time_ids).null()
        torch.testing.assert_close((null.prompt_embeds, null.pooled_prompt_embeds), (embeds, pooled))
        digests.add(sample_settings(config, folder)["teacher"])
    assert (drawn[True] - drawn[False]).abs().max() > 1e-3 and len(digests) == 2

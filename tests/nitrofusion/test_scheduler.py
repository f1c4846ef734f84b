"""The shifted scheduler against the published snippet, against our sampler, and as a diffusers object."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler

from nitrofusion import sampling, schedule
from nitrofusion.scheduler import TimestepShiftLCMScheduler

from .tiny import SnippetScheduler, generators

CASES = [(steps, shift) for steps in (1, 2, 3, 4) for shift in (250, 500)]


def fake_unet(x, t):
    """A cheap eps that depends on what the UNet is shown and told."""
    return torch.sin(3 * x) + 0.1 * torch.cos(t.float() / 50) * x


def draw(scheduler, steps, seeds=(5, 6, 7)):
    """What a diffusers pipeline does with a scheduler: every x_t, x0 and timestep."""
    noise = generators(seeds)
    x = sampling.randn((4, 8, 8), noise)
    scheduler.set_timesteps(steps)
    seen = [x]
    for t in scheduler.timesteps:
        x, x0 = scheduler.step(fake_unet(x, t), t, x, generator=noise, return_dict=False)
        seen += [x, x0, t]
    return seen


def snippet(shift):
    scheduler = SnippetScheduler(shifted_timestep=shift)
    scheduler.config.original_inference_steps = 4
    return scheduler


@pytest.mark.parametrize("steps, shift", CASES)
def test_bit_equal_to_the_snippet(steps, shift):
    ours = draw(TimestepShiftLCMScheduler(shifted_timestep=shift), steps)
    for a, b in zip(ours, draw(snippet(shift), steps), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps, shift", CASES)
def test_equal_to_student_steps(steps, shift):
    denoise = lambda x, t, cond, step: fake_unet(x, t[0])  # noqa: E731
    seeds = (5, 6, 7)
    noise = generators(seeds)
    fresh = lambda: sampling.randn((4, 8, 8), noise)  # noqa: E731
    x_t = fresh()
    alphas = schedule.make_alphas_cumprod()
    *_, x0 = sampling.student_steps(denoise, x_t, None, alphas, schedule.origin_timesteps(steps), shift, fresh)
    last = draw(TimestepShiftLCMScheduler(shifted_timestep=shift), steps, seeds)[-2]
    torch.testing.assert_close(x0, last, rtol=1e-5, atol=1e-5)


def test_two_uses_in_a_row_are_equal_and_leave_the_timesteps():
    scheduler = TimestepShiftLCMScheduler(shifted_timestep=500)
    first = draw(scheduler, 4)
    assert scheduler.timesteps.tolist() == [499, 374, 249, 124]
    draw(scheduler, 1)
    for a, b in zip(first, draw(scheduler, 4), strict=True):
        assert torch.equal(a, b)


def test_a_failed_step_leaves_the_timesteps():
    scheduler = TimestepShiftLCMScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(RuntimeError):
        scheduler.step(torch.zeros(1, 4, 8, 8), scheduler.timesteps[0], torch.zeros(1, 4, 3, 3))
    assert scheduler.timesteps.tolist() == [249, 187, 124, 62]
    with pytest.raises(ValueError, match="set_timesteps"):
        TimestepShiftLCMScheduler().step(torch.zeros(1), 999, torch.zeros(1))


def test_config_round_trip(tmp_path):
    scheduler = TimestepShiftLCMScheduler(shifted_timestep=500, beta_end=0.02, clip_sample=True, timestep_scaling=8.0)
    scheduler.save_pretrained(tmp_path)
    for again in (
        TimestepShiftLCMScheduler.from_pretrained(tmp_path),
        TimestepShiftLCMScheduler.from_config(scheduler.config),
    ):
        wanted = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        assert {k: v for k, v in again.config.items() if not k.startswith("_")} == wanted
        assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
        assert wanted["shifted_timestep"] == 500 and wanted["original_inference_steps"] == 4


def test_reads_the_config_of_another_scheduler(tmp_path):
    """SDXL's own folder names Euler; its betas must arrive, which the snippet's ``*args, **kwargs`` prevents."""
    EulerDiscreteScheduler(beta_start=0.001, beta_end=0.02, beta_schedule="scaled_linear").save_pretrained(tmp_path)
    scheduler = TimestepShiftLCMScheduler.from_pretrained(tmp_path, shifted_timestep=500)
    assert (scheduler.config.beta_start, scheduler.config.beta_end) == (0.001, 0.02)
    assert (scheduler.config.shifted_timestep, scheduler.config.original_inference_steps) == (500, 4)
    lcm = LCMScheduler(original_inference_steps=4)
    lcm.register_to_config(shifted_timestep=400)
    lcm.save_pretrained(tmp_path / "lcm")
    assert TimestepShiftLCMScheduler.from_pretrained(tmp_path / "lcm").config.shifted_timestep == 400


def test_origin_grid_is_that_of_four_steps():
    scheduler = TimestepShiftLCMScheduler()
    for steps in (1, 2, 3, 4):
        scheduler.set_timesteps(steps)
        assert scheduler.origin_timesteps.tolist() == schedule.origin_timesteps(steps)
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(5)


def test_equal_shifted_timesteps_take_every_step():
    scheduler = TimestepShiftLCMScheduler(shifted_timestep=1)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [0, 0, 0, 0]
    scheduler.step(torch.zeros(1, 4, 2, 2), scheduler.timesteps[0], torch.zeros(1, 4, 2, 2))
    assert scheduler.step_index == 1


def test_add_noise_uses_the_origin_alphas():
    scheduler = TimestepShiftLCMScheduler(shifted_timestep=500)
    scheduler.set_timesteps(4)
    x0, noise = torch.randn(2, 3, 4, 8, 8)
    noised = scheduler.add_noise(x0, noise, scheduler.timesteps[[0, 1, 3]])
    wanted = schedule.add_noise(x0, noise, torch.tensor([999, 749, 249]), scheduler.alphas_cumprod)
    torch.testing.assert_close(noised, wanted)


@pytest.mark.parametrize("shift", [0, -1, 1001])
def test_bad_shift(shift):
    with pytest.raises(ValueError, match=f"shifted_timestep must be in 1..1000, got {shift}"):
        TimestepShiftLCMScheduler(shifted_timestep=shift)

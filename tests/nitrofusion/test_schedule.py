"""The schedule against diffusers' schedulers and closed forms in fp64."""

import pytest
import torch
from diffusers import DDPMScheduler, LCMScheduler

from nitrofusion import schedule
from nitrokernels import _native, use

AB = schedule.make_alphas_cumprod()


def test_alphas_are_those_of_sdxl():
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(AB, reference.alphas_cumprod, rtol=1e-6, atol=0)
    assert abs(AB[999].item() - 0.00466) < 1e-5 and abs(AB[249].item() - 0.6754) < 1e-4


def test_add_noise_equals_diffusers():
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x, noise, t = torch.randn(5, 4, 6, 6), torch.randn(5, 4, 6, 6), torch.randint(0, 1000, (5,))
    torch.testing.assert_close(schedule.add_noise(x, noise, t, AB), reference.add_noise(x, noise, t))


def test_to_x0_inverts_add_noise():
    x, noise, t = torch.randn(7, 4, 4, 4), torch.randn(7, 4, 4, 4), torch.tensor([0, 10, 249, 499, 750, 900, 999])
    ab = AB.double()[t].view(-1, 1, 1, 1)
    x_t = ab.sqrt() * x.double() + (1 - ab).sqrt() * noise.double()
    torch.testing.assert_close(schedule.to_x0(x_t.float(), noise, t, AB), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_origin_timesteps_are_lcm_s(steps):
    reference = LCMScheduler(beta_start=0.00085, beta_end=0.012, original_inference_steps=4)
    reference.set_timesteps(steps)
    assert schedule.origin_timesteps(steps) == reference.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, 5])
def test_origin_timesteps_refuse_others(steps):
    with pytest.raises(ValueError, match=r"num_inference_steps must be in 1\.\.4, got"):
        schedule.origin_timesteps(steps)


def test_shift_is_the_published_table():
    t = torch.tensor([999, 749, 499, 249])
    assert schedule.shift_timestep(t, 250).tolist() == [249, 187, 124, 62]
    assert schedule.shift_timestep(t, 500).tolist() == [499, 374, 249, 124]
    assert [schedule.shift_timestep(one, 500) for one in t.tolist()] == [499, 374, 249, 124]


def test_fused_renoise_equals_the_two_functions():
    x, eps, noise = (torch.randn(3, 4, 5, 5) for _ in range(3))
    t, t_next = torch.tensor([499, 374, 249]), torch.tensor([749, 499, 249])
    x0, x_next = schedule.to_x0_and_renoise(x, eps, noise, t, t_next, AB)
    torch.testing.assert_close(x0, schedule.to_x0(x, eps, t, AB))
    torch.testing.assert_close(x_next, schedule.add_noise(x0, noise, t_next, AB))


@pytest.mark.parametrize("backend", ["cpu", "ref"])
def test_a_unet_in_half_precision_on_a_named_backend(backend):
    if backend == "cpu" and (reason := _native.missing("cpu")):
        pytest.skip(reason)
    x, eps, noise = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5).bfloat16(), torch.randn(2, 4, 5, 5)
    t, t_next = torch.tensor([499, 374]), torch.tensor([749, 499])
    with use(backend):
        x0, x_next = schedule.to_x0_and_renoise(x, eps, noise, t, t_next, AB)
    torch.testing.assert_close(x0, schedule.to_x0(x, eps, t, AB))
    torch.testing.assert_close(x_next, schedule.add_noise(x0, noise, t_next, AB))

"""Drawing latents: the student's 1 to 4 steps and the teacher's many."""

from __future__ import annotations

import inspect

import torch
from diffusers import SchedulerMixin

from . import schedule
from .models import sdxl


def seed_generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator per image, so that a batch never changes a picture."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def randn(shape: tuple[int, ...], generators: list[torch.Generator], device="cpu", dtype=torch.float32) -> torch.Tensor:
    """[len(generators), *shape] normal noise, drawn image by image on the CPU exactly as diffusers does."""
    noise = [torch.randn((1, *shape), generator=g, dtype=dtype) for g in generators]
    return torch.cat(noise).to(device) if noise else torch.empty(0, *shape, dtype=dtype, device=device)


def student_steps(
    unet,
    x_t: torch.Tensor,
    cond: sdxl.Conditioning,
    alphas_cumprod: torch.Tensor,
    timesteps: list[int],
    shifted_timestep: int,
    next_noise,
):
    """Yields x0 [B, 4, h, w] fp32 after each of the given origin timesteps.

    Args:
        x_t: [B, 4, h, w] latents at ``timesteps[0]``; pure noise for generation.
        next_noise: called without arguments for fresh noise like ``x_t`` before each further step.
    """
    batch = len(x_t)
    for i, origin in enumerate(timesteps):
        t = schedule.shift_timestep(torch.full((batch,), origin, device=x_t.device), shifted_timestep)
        eps = sdxl.denoise(unet, x_t.to(unet.dtype), t, cond)
        if i + 1 == len(timesteps):
            yield schedule.to_x0(x_t, eps, t, alphas_cumprod)
            return
        t_next = torch.full_like(t, timesteps[i + 1])
        x0, x_t = schedule.to_x0_and_renoise(x_t, eps, next_noise(), t, t_next, alphas_cumprod)
        yield x0


@torch.no_grad()
def sample_teacher(
    unet,
    noise: torch.Tensor,
    cond: sdxl.Conditioning,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    guidance_scale: float,
    generators: list[torch.Generator] | None = None,
    image: torch.Tensor | None = None,
    timestep: int | None = None,
    timesteps: list[int] | None = None,
    eta: float = 0.0,
) -> torch.Tensor:
    """[B, 4, h, w] fp32 x0 of the multi-step teacher from the given starting noise (unit variance).

    Args:
        generators: one per image, for schedulers that add noise of their own.
        image: [B, 4, h, w] latents to start from instead, re-noised to ``timestep`` by ``noise``; only the steps from
            there on are walked.
        timesteps: to walk instead of the scheduler's own grid, for schedulers that take them.
        eta: noise of a step, for schedulers that take it.
    """
    if timesteps is None:
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
    else:
        scheduler.set_timesteps(timesteps=timesteps, device=noise.device)
    if image is None:
        x, walked = noise.float() * scheduler.init_noise_sigma, scheduler.timesteps
    else:
        begin = min(int((scheduler.timesteps > timestep).sum()), len(scheduler.timesteps) - 1)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        walked = scheduler.timesteps[begin:]
        x = scheduler.add_noise(image.float(), noise.float(), walked[:1].expand(len(image)))
    *_, x = scheduler_steps(unet, x, cond, scheduler, walked, guidance_scale, generators, eta)
    return x


def scheduler_steps(
    unet,
    x: torch.Tensor,
    cond: sdxl.Conditioning,
    scheduler: SchedulerMixin,
    timesteps: torch.Tensor,
    guidance_scale: float,
    generators: list[torch.Generator] | None,
    eta: float = 0.0,
):
    """Yields the latents [B, 4, h, w] fp32 after each of ``timesteps``, as any diffusers scheduler makes them."""
    takes = inspect.signature(scheduler.step).parameters
    options = {k: v for k, v in {"generator": generators, "eta": eta}.items() if k in takes}
    guided = guidance_scale > 1
    both = sdxl.Conditioning.cat([cond.null(), cond]) if guided else cond
    for t in timesteps:
        x_in = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        eps = sdxl.denoise(unet, x_in.to(unet.dtype), t.expand(len(x_in)), both).float()
        if guided:
            uncond, text = eps.chunk(2)
            eps = uncond + guidance_scale * (text - uncond)
        x = scheduler.step(eps, t, x, return_dict=False, **options)[0]
        yield x

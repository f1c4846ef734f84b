"""Drawing latents: the student's 1 to 4 steps and the teacher's many."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch

from . import schedule
from .errors import InputError
from .models.conditioning import Conditioning
from .models.conditioning import denoise as denoise_unet


def seed_generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator per image, so that a batch never changes a picture."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def randn(shape: tuple[int, ...], generators: list[torch.Generator], device="cpu", dtype=torch.float32) -> torch.Tensor:
    """[len(generators), *shape] normal noise, drawn image by image on the CPU exactly as diffusers does."""
    noise = [torch.randn((1, *shape), generator=g, device=g.device, dtype=dtype) for g in generators]
    if len(noise) == 1:
        return noise[0].to(device)
    return torch.cat(noise).to(device) if noise else torch.empty(0, *shape, dtype=dtype, device=device)


def with_unet(unet):
    """The ``denoise`` of the functions below that calls a diffusers UNet."""
    return lambda x_t, t, cond, step: denoise_unet(unet, x_t.to(unet.dtype), t, cond)


def student_steps(
    denoise,
    x_t: torch.Tensor,
    cond: Conditioning,
    alphas_cumprod: torch.Tensor,
    timesteps: Sequence[int] | Sequence[torch.Tensor],
    shifted_timestep: int,
    next_noise,
):
    """Yields x0 [B, 4, h, w] fp32 after each of the given origin timesteps.

    Args:
        denoise: called as denoise(x_t, t, cond, step) with the shifted timesteps t [B] and the index of the call in
            this trajectory, for eps.
        x_t: [B, 4, h, w] latents at ``timesteps[0]``; pure noise for generation.
        timesteps: each one for all images, or [B].
        next_noise: called without arguments for fresh noise like ``x_t`` before each further step.
    """
    for i, origin in enumerate(timesteps):
        t = _each(schedule.shift_timestep(origin, shifted_timestep), x_t)
        eps = denoise(x_t, t, cond, i)
        if i + 1 == len(timesteps):
            yield schedule.to_x0(x_t, eps, t, alphas_cumprod)
            return
        t_next = _each(timesteps[i + 1], x_t)
        x0, x_t = schedule.to_x0_and_renoise(x_t, eps, next_noise(), t, t_next, alphas_cumprod)
        yield x0


def _each(t: int | torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """[B] timestep of every image."""
    return t if isinstance(t, torch.Tensor) else torch.full((len(x_t),), t, device=x_t.device)


@torch.no_grad()
def sample_teacher(
    denoise,
    noise: torch.Tensor,
    cond: Conditioning,
    scheduler,
    num_inference_steps: int,
    guidance_scale: float,
    generators: list[torch.Generator] | None = None,
    image: torch.Tensor | None = None,
    timestep: int | None = None,
    timesteps: list[int] | None = None,
    eta: float = 0.0,
    strength: float | None = None,
    uncond: Conditioning | None = None,
) -> torch.Tensor:
    """[B, 4, h, w] fp32 x0 of the multi-step teacher from the given starting noise (unit variance).

    Args:
        denoise: as for ``student_steps``, with the scheduler's timesteps.
        generators: one per image, for schedulers that add noise of their own.
        image: [B, 4, h, w] latents to start from instead, re-noised by ``noise`` to the first step not above
            ``timestep``, or to where diffusers' image-to-image begins at ``strength`` (the last step at the latest);
            only the steps from there on are walked.
        uncond: what guidance leads away from; None is no prompt.
        timesteps: to walk instead of the scheduler's own grid, for schedulers that take them.
        eta: noise of a step, for schedulers that take it.

    Raises:
        InputError: the scheduler takes no such number of steps.
    """
    try:
        if timesteps is None:
            scheduler.set_timesteps(num_inference_steps, device=noise.device)
        else:
            scheduler.set_timesteps(timesteps=timesteps, device=noise.device)
    except ValueError as error:  # PNDM's has four steps at least, LCM's no more than its original_inference_steps
        wanted, got = f"a number that {type(scheduler).__name__} takes", f"{num_inference_steps}: {error}"
        raise InputError(f"generate: num_inference_steps must be {wanted}, got {got}") from error
    walked = scheduler.timesteps
    if image is None:
        x = noise.float() * scheduler.init_noise_sigma
    else:
        if strength is None:
            begin = int((walked > timestep).sum())
        else:
            begin = (num_inference_steps - int(num_inference_steps * strength)) * scheduler.order
        begin = min(begin, len(walked) - 1)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        walked = walked[begin:]
        x = scheduler.add_noise(image.float(), noise.float(), walked[:1].expand(len(image)))
    *_, x = scheduler_steps(denoise, x, cond, scheduler, walked, guidance_scale, generators, eta, uncond)
    return x


def scheduler_steps(
    denoise,
    x: torch.Tensor,
    cond: Conditioning,
    scheduler,
    timesteps: torch.Tensor,
    guidance_scale: float,
    generators: list[torch.Generator] | None,
    eta: float = 0.0,
    uncond: Conditioning | None = None,
):
    """Yields the latents [B, 4, h, w] fp32 after each of ``timesteps``, as any diffusers scheduler makes them."""
    takes = inspect.signature(scheduler.step).parameters
    options = {k: v for k, v in {"generator": generators, "eta": eta}.items() if k in takes}
    guided = guidance_scale > 1
    both = Conditioning.cat([cond.null() if uncond is None else uncond, cond]) if guided else cond
    for i, t in enumerate(timesteps):
        x_in = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        eps = denoise(x_in, t.expand(len(x_in)), both, i).float()
        if guided:
            away, text = eps.chunk(2)
            eps = away + guidance_scale * (text - away)
        x = scheduler.step(eps, t, x, return_dict=False, **options)[0]
        yield x

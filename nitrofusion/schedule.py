"""The noise schedule as pure functions of t: nothing here holds state, and nothing else computes x0.

The one scheduler fact of NitroFusion: the UNet is told t' = floor(t S / 1000) and x0 is formed with the alphas of t',
while re-noising uses those of t. Every function takes ``alphas_cumprod`` [1000] fp32 on the device of its tensors.
"""

from __future__ import annotations

import torch

from nitrokernels import renoise

NUM_TRAIN_TIMESTEPS = 1000
BETA_SCHEDULES = {"linear": 1, "scaled_linear": 2}  # what roots of the betas are evenly spaced


def make_alphas_cumprod(
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
    beta_schedule: str = "scaled_linear",
    rescale_betas_zero_snr: bool = False,
) -> torch.Tensor:
    """[num_train_timesteps] fp32, of SDXL's betas unless told otherwise.

    Args:
        beta_schedule: one of ``BETA_SCHEDULES``.
        rescale_betas_zero_snr: no signal is left at the last timestep (arXiv 2305.08891, algorithm 1).
    """
    power = BETA_SCHEDULES[beta_schedule]
    ends = beta_start ** (1 / power), beta_end ** (1 / power)
    betas = torch.linspace(*ends, num_train_timesteps, dtype=torch.float32, device="cpu") ** power
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    if rescale_betas_zero_snr:
        signal = alphas_cumprod.sqrt()
        alphas_cumprod = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return alphas_cumprod


def origin_timesteps(num_inference_steps: int, original_inference_steps: int = 4) -> list[int]:
    """LCM's timesteps, noisiest first: 1 step [999], 2 [999, 499], 3 [999, 749, 499], 4 [999, 749, 499, 249].

    Raises:
        ValueError: ``num_inference_steps`` is not in 1 .. original_inference_steps.
    """
    if not 1 <= num_inference_steps <= original_inference_steps:
        raise ValueError(f"num_inference_steps must be in 1..{original_inference_steps}, got {num_inference_steps}")
    stride = NUM_TRAIN_TIMESTEPS // original_inference_steps
    grid = [stride * (k + 1) - 1 for k in reversed(range(original_inference_steps))]
    return [grid[i * original_inference_steps // num_inference_steps] for i in range(num_inference_steps)]


def image_timesteps(num_inference_steps: int, strength: float, original_inference_steps: int = 4) -> list[int]:
    """Origin timesteps of image-to-image: the last int(num_inference_steps * strength), as diffusers picks them.

    Where that is none (always for one step below strength 1), one call from where ``original_inference_steps`` steps of
    that strength would begin, at the latest from their last: 1 step at strength 0.6 is [499], at 0.8 [749].
    """
    timesteps = origin_timesteps(num_inference_steps, original_inference_steps)
    if walked := int(num_inference_steps * strength):
        return timesteps[-walked:]
    grid = origin_timesteps(original_inference_steps, original_inference_steps)
    return [grid[-max(1, int(original_inference_steps * strength))]]


def shift_timestep(t: int | torch.Tensor, shifted_timestep: int) -> int | torch.Tensor:
    """The timestep the student is told, one or [B] (paper's timestep shift): floor(t * shifted_timestep / 1000)."""
    return t * shifted_timestep // NUM_TRAIN_TIMESTEPS


def _coefficients(t: torch.Tensor, alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alpha = alphas_cumprod[t]
    return alpha.sqrt(), (1 - alpha).sqrt()


def _per_image(c: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return c.view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """[B, ...] fp32 x_t = sqrt(ab(t)) x0 + sqrt(1 - ab(t)) noise; t [B]."""
    alpha, sigma = _coefficients(t, alphas_cumprod)
    return _per_image(alpha, x0) * x0.float() + _per_image(sigma, x0) * noise.float()


def to_x0(x_t: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """[B, ...] fp32 x0 = (x_t - sqrt(1 - ab(t)) eps) / sqrt(ab(t)); t [B] is the timestep the UNet was told."""
    alpha, sigma = _coefficients(t, alphas_cumprod)
    return (x_t.float() - _per_image(sigma, eps) * eps.float()) / _per_image(alpha, eps)


def to_x0_and_renoise(
    x_t: torch.Tensor,
    eps: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    t_next: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 (fp32) and x_next = add_noise(x0, noise, t_next) in one fused pass; shapes [B, ...], timesteps [B]."""
    eps, noise = eps.to(x_t.dtype), noise.to(x_t.dtype)  # a UNet in half precision
    return renoise(x_t, eps, noise, *_coefficients(t, alphas_cumprod), *_coefficients(t_next, alphas_cumprod))

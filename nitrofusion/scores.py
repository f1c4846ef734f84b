"""What score distillation asks of UNets: re-noised samples, guided predictions, scores beside the teacher's."""

from __future__ import annotations

import torch

import nitrokernels

from . import schedule
from .draws import Draws
from .models import sdxl
from .models.recompute import recompute_

# Timesteps in which two scores are compared: 2 % to 98 %, as DMD2's and SwiftBrush's code has it.
T_RANGE = (20, 981)


def noised(
    x0: torch.Tensor, alphas_cumprod: torch.Tensor, draws: Draws, t_range: tuple[int, int] = (0, 1000), groups: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t [B, ...] fp32 and the noise in it, at timesteps t [B], each drawn from t_range[0] .. t_range[1] - 1.

    Args:
        groups: x0 holds so many times the images of the batch, one after the other.
    """
    t = draws.randint(*t_range, len(x0) // groups, groups, x0.device)
    noise = draws.randn_like(x0, groups)
    return schedule.add_noise(x0, noise, t, alphas_cumprod), noise, t


def guided_eps(
    unet,
    x_t: torch.Tensor,
    t: torch.Tensor,
    cond: sdxl.Conditioning,
    scale: torch.Tensor | float = 1.0,
    away: sdxl.Conditioning | None = None,
) -> torch.Tensor:
    """[B, 4, h, w] fp32 (1 - scale) eps(away) + scale eps(cond); one call for both.

    Args:
        scale: of guidance, one number or [B]; the number 1 asks for the conditional prediction alone.
        away: what guidance leads away from; None is no prompt.
    """
    dtype = unet.conv_in.weight.dtype
    if isinstance(scale, (int, float)):
        if scale == 1:
            return sdxl.denoise(unet, x_t.to(dtype), t, cond).float()
        scale = torch.full((len(x_t),), float(scale), device=x_t.device)
    both = sdxl.Conditioning.cat([cond.null() if away is None else away, cond])
    eps = sdxl.denoise(unet, torch.cat([x_t, x_t]).to(dtype), torch.cat([t, t]), both)
    away_eps, text_eps = eps.float().chunk(2)
    return torch.lerp(away_eps, text_eps, scale.view(-1, 1, 1, 1))


def beside_teacher(config, model: sdxl.SDXL, shared: bool = False) -> torch.nn.Module:
    """Another UNet with the teacher's weights: trainable fp32 copies, or (``shared``) the very same tensors, frozen.

    What is put into the latter, adapters for instance, the teacher never sees; no state of it has to be switched.
    """
    if shared:
        with torch.device("meta"):
            unet = type(model.unet).from_config(model.unet.config)
        unet.load_state_dict(model.unet.state_dict(), assign=True)
        unet.requires_grad_(False)
    else:
        unet = type(model.unet).from_config(model.unet.config)
        unet.load_state_dict(model.unet.state_dict())
        torch.nn.Module.to(unet, model.device, torch.float32)  # diffusers' own would warn of what is not there
    if config.gradient_checkpointing:
        recompute_(unet)
    if config.backend != "ref" and nitrokernels.fusible(model.device):
        nitrokernels.fuse_(unet)
    return unet

"""Paired regression: error of the student's x0 to the teacher's, from the same latents and prompt.

The warm start of adversarial training (the part DMD2's and Hyper-SDXL's one-step weights play in the paper), its anchor
and, at equal compute, its control.
"""

from __future__ import annotations

import torch

from .. import losses, schedule
from ..models import sdxl
from ..student import choose_step, student_optimizer, student_x0, teacher_x0
from . import Batch, Phase, Recipe

_FEATURE_TIMESTEPS = (10, 250)  # where the teacher's encoder sees detail: the two least noisy t* of the paper


def regression_error(config, model, batch: Batch, x0: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """[B] error of x0 [B, 4, h, w], drawn at the last of ``timesteps``: in latents, and in features where asked."""
    target = teacher_x0(config, model, batch, timesteps)
    error = losses.regression_loss(x0, target)
    if config.regression_features:
        error = error + config.regression_features * _feature_error(model, batch, x0, target)
    return error


def _feature_error(model: sdxl.SDXL, batch: Batch, x0: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[B] relative square error of the teacher's encoder features, mean over its taps; both see the same noise.

    In latents the best answer to two possible pictures is their blurred mean; the encoder knows that for no picture.
    """
    choice = torch.randint(len(_FEATURE_TIMESTEPS), (), generator=batch.plan)
    t = torch.full((len(x0),), _FEATURE_TIMESTEPS[choice], device=x0.device)
    noise = torch.randn_like(x0)

    def features(x):
        x_t = schedule.add_noise(x, noise, t, model.alphas_cumprod)
        return [f.float() for f in sdxl.encoder_features(model.unet, x_t.to(model.unet.dtype), t, batch.cond)]

    with torch.no_grad():
        real = features(target)
    each = [losses.regression_loss(f, r) / r.square().mean() for f, r in zip(features(x0), real, strict=True)]
    return torch.stack(each).mean(0)


class Regression(Recipe):
    def __init__(self, config, model, student):
        self.config, self.model, self.student = config, model, student
        self.phases = (Phase("student", student, student_optimizer(config, student)),)

    def loss(self, phase: str, batch: Batch) -> dict[str, torch.Tensor]:
        timesteps = choose_step(self.config, batch)
        x0 = student_x0(self.config, self.student, batch, self.model.alphas_cumprod, timesteps)
        return {"regression": regression_error(self.config, self.model, batch, x0, timesteps)}

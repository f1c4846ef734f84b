"""Paired regression: error of the student's x0 to the teacher's, from the same latents and prompt.

The warm start of adversarial training (the part DMD2's and Hyper-SDXL's one-step weights play in the paper) and,
at equal compute, its control.
"""

from __future__ import annotations

import torch

from ..student import choose_step, regression_error, student_phase, student_x0
from . import Batch, Recipe


class Regression(Recipe):
    needs = ("target",)
    waits = False

    def __init__(self, config, model, student):
        super().__init__(config, model, student)
        self.phases = (student_phase(config, student),)

    def loss(self, phase: str, batch: Batch) -> dict[str, torch.Tensor]:
        timesteps = choose_step(self.config, batch)
        x0 = student_x0(self.config, self.student, batch, self.model.alphas_cumprod, timesteps)
        return {"regression": regression_error(self.config, self.model, batch, x0, timesteps)}

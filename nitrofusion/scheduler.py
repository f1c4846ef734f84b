"""The one-step student's scheduler for plain diffusers pipelines: LCM with NitroFusion's timestep shift."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import LCMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput


class TimestepShiftLCMScheduler(LCMScheduler):
    """Tells the UNet t' = floor(t S / 1000), forms x0 with the alphas of t' and re-noises with those of t.

    Drop-in for the scheduler of any ``StableDiffusionXLPipeline``; use it with ``guidance_scale=0`` and 1 to 4 steps::

        scheduler = TimestepShiftLCMScheduler.from_pretrained(folder, subfolder="scheduler", shifted_timestep=500)

    Everything a pipeline sees (``timesteps``, the argument of ``step`` and ``add_noise``) is in shifted timesteps. A
    pipeline feature that compares them with a fraction of 1000, such as ``denoising_end``, therefore acts early.

    Args:
        shifted_timestep: S, what the UNet is told of t = num_train_timesteps; 250 (Realism) or 500 (Vibrant).
        original_inference_steps: length of the grid that the steps are picked from. The student was trained on 4; LCM's
            own default of 50 moves the timesteps of 3 and 4 steps.

    The other arguments are those of ``LCMScheduler``. Saved and loaded configurations carry all of them.

    Raises:
        ValueError: ``shifted_timestep`` is not in 1 .. num_train_timesteps.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        original_inference_steps: int = 4,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
        shifted_timestep: int = 250,
    ):
        if not 1 <= shifted_timestep <= num_train_timesteps:
            raise ValueError(f"shifted_timestep must be in 1..{num_train_timesteps}, got {shifted_timestep}")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            original_inference_steps=original_inference_steps,
            clip_sample=clip_sample,
            clip_sample_range=clip_sample_range,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            timestep_scaling=timestep_scaling,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self.origin_timesteps = self.shifted_timesteps = self.timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """LCM's timesteps (custom ones are given unshifted), then shifted."""
        super().set_timesteps(num_inference_steps, device, original_inference_steps, timesteps, strength)
        self.origin_timesteps = self.timesteps
        self.shifted_timesteps = self.timesteps * self.config.shifted_timestep // self.config.num_train_timesteps
        self.timesteps = self.shifted_timesteps

    def index_for_timestep(self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The first index: a small S maps several steps to one t', and LCM's rule (the second) would skip a step."""
        schedule_timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return (schedule_timesteps == timestep).nonzero()[0].item()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple:
        """One step from the shifted ``timestep``: (the next x_t, x0), both shaped like ``sample``."""
        if self.num_inference_steps is not None and self.step_index is None:
            self._init_step_index(timestep)
        self.timesteps = self.origin_timesteps  # where LCM looks up the alphas to re-noise with
        try:
            return super().step(model_output, timestep, sample, generator, return_dict)
        finally:
            self.timesteps = self.shifted_timesteps

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t at the noise level t of each t' of the current schedule; other timesteps are taken as they are.

        Image-to-image and inpainting noise their picture here: with the alphas of t' it would keep far more of the
        picture than the student expects at that step.
        """
        shifted = self.shifted_timesteps.to(timesteps.device)
        origin = self.origin_timesteps.to(timesteps.device)
        hit = timesteps[:, None] == shifted
        timesteps = torch.where(hit.any(1), origin[hit.long().argmax(1)], timesteps)
        return super().add_noise(original_samples, noise, timesteps)

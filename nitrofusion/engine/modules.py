"""The networks as plain diffusers and transformers modules: any device, any precision, fused ops where they are in."""

from __future__ import annotations

import torch

from ..errors import InputError
from ..models import lora, sdxl
from ..models.fp8 import Scales
from . import images
from . import negative as negatives
from .bank import Bank
from .source import Source


class Modules:
    """What ``Engine`` asks of an executor, by an ``sdxl.SDXL``.

    Attributes:
        model: its parts.
        device, dtype: of its pictures; noise is drawn in the UNet's precision.
        in_channels: of the latents.
        vae_scale, scaling_factor: pixels per latent, and what latents are multiplied by.
        resolution: of a picture, unless a call says otherwise.
        alphas_cumprod: [1000] fp32.
        loras: one report each.
        fp8: the scales of the UNet's quantised layers; None without any.
    """

    fp8: Scales | None = None

    def __init__(self, model: sdxl.SDXL):
        self.model = model
        self.device, self.dtype = model.device, model.unet.dtype
        self.in_channels, self.vae_scale = model.unet.config.in_channels, model.vae_scale
        self.scaling_factor = model.vae.config.scaling_factor
        self.alphas_cumprod = model.alphas_cumprod
        self._bank: Bank | None = None

    @property
    def resolution(self) -> int:
        return self.model.resolution

    @property
    def loras(self) -> tuple[lora.Report, ...]:
        return self.model.loras

    def become(self, source: Source, now: Source) -> tuple[int, int]:
        """Holds the weights of ``source`` from then on instead of those of ``now``: (written, of how many).

        Raises:
            InputError: they do not fit; then nothing has changed.
        """
        if self.fp8 is not None and source.with_lora(None) != now.with_lora(None):
            raise InputError(f"switch: model must be the one fp8 is calibrated for, {now.name}, got {source.name}")
        self._bank = self._bank or Bank(self.model, now)
        return self._bank.become(source)

    def encode(self, prompt: str) -> sdxl.Conditioning:
        """One prompt's embeddings."""
        return sdxl.encode_prompt(self.model, [prompt])

    def encode_image(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and deviation, if any, [1, 4, h, w] of the unscaled latents of an image [1, 3, H, W] in [-1, 1]."""
        return sdxl.encode_image(self.model, image)

    def denoise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: sdxl.Conditioning, negative: negatives.Negative | None
    ) -> torch.Tensor:
        """eps [B, 4, h, w] for x_t [B, 4, h, w] at the timesteps t [B]; negative prompts act where given."""
        unet = self.model.unet
        x_t = x_t.to(self.dtype)
        if self.fp8 is not None:
            self.fp8.select(t)
        if negative is None:
            return sdxl.denoise(unet, x_t, t, cond)
        return negatives.denoise(unet, x_t, t, cond, negative)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] float32 in [-1, 1] of scaled latents [B, 4, h, w]."""
        return sdxl.decode(self.model, latents)

    def decode_rgb(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool | torch.Tensor]:
        """[B, H, W, 3] uint8 of the same, and whether none of it is NaN: a bool, or a [] tensor on the device."""
        return images.rgb_and_finite(self.decode(latents))

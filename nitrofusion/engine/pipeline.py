"""A student's whole picture as one function of tensors: token ids and noises in, pixels out.

Ordinary code that runs anywhere and waits for no device in between, so that ``graphs.py`` can capture it as it is. It
draws what ``Engine.generate`` draws call by call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import sampling
from ..models import sdxl
from ..models.conditioning import Conditioning
from . import images
from .modules import Modules


class Drawn(NamedTuple):
    """Pictures, and the embeddings they were drawn with.

    Attributes:
        pixels: [B, 3, H, W] float32 in [-1, 1].
        rgb: [B, H, W, 3] uint8 of the same.
        finite: [] bool; False where any pixel is NaN, which ``rgb`` cannot show.
        prompt_embeds, pooled_prompt_embeds: of ``Conditioning``.
    """

    pixels: torch.Tensor
    rgb: torch.Tensor
    finite: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor


def embed(networks: Modules, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt_embeds, pooled_prompt_embeds) of ids [2, B, tokens], one by one as ``Engine`` encodes prompts."""
    each = [sdxl.embed_tokens(networks.model, ids[:, i : i + 1]) for i in range(ids.shape[1])]
    embeds, pooled = zip(*each, strict=True)
    return torch.cat(embeds), torch.cat(pooled)


def draw(
    networks: Modules,
    timesteps: tuple[int, ...],
    shifted_timestep: int,
    noises: torch.Tensor,
    time_ids: torch.Tensor,
    *text: torch.Tensor,
) -> Drawn:
    """Pictures of a batch.

    Args:
        timesteps, shifted_timestep: as ``sampling.student_steps`` takes them.
        noises: [n, B, 4, h, w] float32, one for each of the n timesteps.
        time_ids: [B, 6].
        text: token ids [2, B, tokens], or prompt_embeds [B, tokens, D] and pooled_prompt_embeds [B, P].
    """
    embeds, pooled = embed(networks, *text) if len(text) == 1 else text
    cond, further = Conditioning(embeds, pooled, time_ids), iter(noises[1:])

    def denoise(x_t, t, cond, step):
        return Modules.denoise(networks, x_t, t, cond, None)

    steps = timesteps, shifted_timestep, lambda: next(further)
    *_, x0 = sampling.student_steps(denoise, noises[0], cond, networks.alphas_cumprod, *steps)
    pixels = Modules.decode(networks, x0)
    return Drawn(pixels, images.to_rgb(pixels), images.finite(pixels), embeds, pooled)

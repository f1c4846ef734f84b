"""What a UNet is told besides x_t and t, and telling it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told besides x_t and t.

    Attributes:
        prompt_embeds: [B, tokens, cross_attention_dim].
        pooled_prompt_embeds: [B, pooled].
        time_ids: [B, 6] (original h, w, crop top, left, target h, w) in pixels.
        no_prompt: ([1, tokens, cross_attention_dim], [1, pooled]) of the unconditional prompt; None is zeros.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    time_ids: torch.Tensor
    no_prompt: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index) -> Conditioning:
        rows = (self.prompt_embeds[index], self.pooled_prompt_embeds[index], self.time_ids[index])
        return Conditioning(*rows, self.no_prompt)

    def with_time_ids(self, time_ids: torch.Tensor) -> Conditioning:
        return replace(self, time_ids=time_ids)

    def null(self) -> Conditioning:
        """The unconditional prompt: zeros for sequence and pooled, as SDXL's pipeline has none, or ``no_prompt``."""
        zeros = torch.zeros_like(self.prompt_embeds), torch.zeros_like(self.pooled_prompt_embeds)
        embeds, pooled = self.no_prompt or zeros
        return replace(
            self,
            prompt_embeds=embeds.expand_as(self.prompt_embeds),
            pooled_prompt_embeds=pooled.expand_as(self.pooled_prompt_embeds),
        )

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        if len(parts) == 1:
            return parts[0]
        return Conditioning(
            torch.cat([p.prompt_embeds for p in parts]),
            torch.cat([p.pooled_prompt_embeds for p in parts]),
            torch.cat([p.time_ids for p in parts]),
            parts[0].no_prompt,
        )


def denoise(unet, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
    """eps [B, 4, h, w] of a UNet2DConditionModel for x_t [B, 4, h, w] at the timesteps t [B] it is told."""
    added = {"text_embeds": cond.pooled_prompt_embeds, "time_ids": cond.time_ids}
    return unet(x_t, t, cond.prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]

"""Negative prompts without guidance, hence at one step: NAG (arXiv 2505.21179) and NASA (arXiv 2412.02687).

Both act in cross-attention alone, where the queries of the picture meet the keys and values of two prompts. The
context is [positive; negative] along the batch while everything else is computed once; the pooled embedding stays that
of the positive prompt. One kernel combines the two results, on merged heads and before ``to_out``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from nitrokernels import nag_combine

from ..models.attention import attend, split_heads
from ..models.conditioning import Conditioning
from ..models.conditioning import denoise as plain_denoise


@dataclass(frozen=True)
class Guidance:
    """How a negative prompt acts in attention.

    Attributes:
        method: ``nag`` or ``nasa``.
        scale, tau, alpha: as in ``nitrokernels.nag_combine``.
        steps: acts in the first so many model calls of a picture; None is all. Counted, because a student is told other
            timesteps than a multi-step model and a comparison of timesteps would switch it off at once.
    """

    method: str
    scale: float
    tau: float
    alpha: float
    steps: int | None

    def acts(self, step: int) -> bool:
        """Whether the model call of this index is changed at all."""
        return self.scale > 0 and self.alpha > 0 and (self.steps is None or step < self.steps)

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """scale, tau, alpha and keep of ``nitrokernels.nag_combine``."""
        return self.scale, self.tau, self.alpha, 1.0 if self.method == "nasa" else 1.0 + self.scale

    def combine(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """[B, N, D] attention outputs, heads merged."""
        return nag_combine(positive, negative, *self.numbers)


@dataclass(frozen=True)
class Negative:
    """The negative prompts of a batch.

    Attributes:
        guidance: how they act.
        prompt_embeds: [N, tokens, D] of those pictures that have one.
        rows: [N] rows of x_t they belong to.
    """

    guidance: Guidance
    prompt_embeds: torch.Tensor
    rows: list[int]


def denoise(unet, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning, negative: Negative) -> torch.Tensor:
    """``plain_denoise`` with the negative prompts at work; the UNet is as before when it returns or raises."""
    context = torch.cat([cond.prompt_embeds, negative.prompt_embeds])
    doubled = Conditioning(context, cond.pooled_prompt_embeds, cond.time_ids)
    with _attending(unet, _Processor(negative)):
        return plain_denoise(unet, x_t, t, doubled)


@contextlib.contextmanager
def _attending(unet, processor: _Processor):
    from diffusers.models.attention_processor import Attention

    layers = [m for name, m in unet.named_modules() if name.endswith(".attn2") and isinstance(m, Attention)]
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(processor)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.set_processor(own)


class _Processor:
    """Attention of x [B, N, D] to a context [B + negatives, tokens, C]; the form SDXL's attn2 has, without masks."""

    def __init__(self, negative: Negative):
        self.guidance, self.rows = negative.guidance, negative.rows

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, temb=None):
        batch = len(hidden_states)
        q = split_heads(attn, attn.to_q(hidden_states))
        k, v = (split_heads(attn, to(encoder_hidden_states)) for to in (attn.to_k, attn.to_v))
        out = attend(q, k[:batch], v[:batch])
        if self.rows == list(range(batch)):
            out = self.guidance.combine(out, attend(q, k[batch:], v[batch:]))
        else:
            out[self.rows] = self.guidance.combine(out[self.rows], attend(q[self.rows], k[batch:], v[batch:]))
        return attn.to_out[1](attn.to_out[0](out))

"""NASA (arXiv 2412.02687, section 5.1) in a UNet that trains: cross-attention Z+ - alpha Z-, alpha [B].

While drawing, ``engine.negative`` does the same with one alpha and a fused kernel; here gradients flow, and gradient
checkpointing computes again what was computed.
"""

from __future__ import annotations

import contextlib
import functools

import torch

from .attention import attend, split_heads
from .recompute import recompute_


class Nasa:
    """Processors in the cross-attention layers of ``unet`` that are its own except inside ``negative``."""

    def __init__(self, unet):
        from diffusers.models.attention_processor import Attention

        self._now: tuple[torch.Tensor, torch.Tensor] | None = None
        for name, layer in unet.named_modules():
            if name.endswith(".attn2") and isinstance(layer, Attention):
                layer.set_processor(functools.partial(self._attend, layer.processor))
        if unet.is_gradient_checkpointing:  # what is computed again, outside of ``negative``, must be the same
            recompute_(unet, lambda: self._during(self._now))

    def negative(self, prompt_embeds: torch.Tensor, alpha: torch.Tensor):
        """A context in which images are led away from prompt_embeds [B, tokens, C] by alpha [B]."""
        return self._during((prompt_embeds, alpha))

    @contextlib.contextmanager
    def _during(self, now):
        before, self._now = self._now, now
        try:
            yield
        finally:
            self._now = before

    def _attend(self, plain, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if self._now is None:
            return plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        prompt_embeds, alpha = self._now
        q = split_heads(attn, attn.to_q(hidden_states))
        contexts = (encoder_hidden_states, prompt_embeds.to(encoder_hidden_states.dtype))
        positive, negative = (
            attend(q, split_heads(attn, attn.to_k(context)), split_heads(attn, attn.to_v(context)))
            for context in contexts
        )
        out = positive - alpha.to(positive.dtype).view(-1, 1, 1) * negative
        return attn.to_out[1](attn.to_out[0](out))

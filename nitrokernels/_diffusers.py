"""diffusers' blocks on the fused ops, for ``fuse``. A module of their own, for pickle; imported when first needed."""

from __future__ import annotations

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D

from .nn import hooked
from .ops.geglu import geglu
from .ops.group_norm_silu import group_norm_silu


class FusedResnetBlock2D(ResnetBlock2D):
    def forward(self, input_tensor, temb=None, *args, **kwargs):
        if hooked(self.norm1) or hooked(self.norm2) or hooked(self.nonlinearity):  # they are to see what eager shows
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden = _norm_silu(self.norm1, input_tensor)
        resample = self.upsample or self.downsample
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        shift = None
        if self.time_emb_proj is not None:
            # the embedding has the same activation, and no norm before it
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if shift.shape != hidden.shape[:2]:
                hidden, shift = hidden + shift[:, :, None, None], None  # broadcasts, which the op does not
        elif temb is not None:
            hidden = hidden + temb
        hidden = _norm_silu(self.norm2, hidden, shift)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + hidden) / self.output_scale_factor


class FusedGEGLU(GEGLU):
    def forward(self, hidden_states, *args, **kwargs):
        return geglu(self.proj(hidden_states))


def _norm_silu(norm: torch.nn.GroupNorm, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, shift)

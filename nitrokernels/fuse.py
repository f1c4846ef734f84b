"""Puts the fused ops into a diffusers model and takes them out again.

Only the class of a module changes: parameters, state_dict keys, hooks, LoRA layers and gradient checkpointing stay
where they are, and ``unfuse_`` restores the very same model.
"""

from __future__ import annotations

import functools

import torch

from . import nn
from .ops.geglu import geglu
from .ops.group_norm_silu import OP, group_norm_silu


def fuse_(model: torch.nn.Module) -> torch.nn.Module:
    """Fuses norms, activations and gates of a UNet2DConditionModel, AutoencoderKL or any model built of their blocks.

    Fused are GroupNorm + SiLU with the time embedding's addition (ResnetBlock2D), a model's last GroupNorm + SiLU, all
    other GroupNorm and LayerNorm modules, and GEGLU. A module with a forward hook on what fusion would skip stays as it
    is; so do variants the ops do not know. AutoencoderTiny has no norm and comes back unchanged.

    Returns:
        ``model``, changed in place.
    """
    for module in model.modules():
        norm, act = getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None)
        if type(norm) is torch.nn.GroupNorm and type(act) is torch.nn.SiLU and not (_hooked(norm) or _hooked(act)):
            norm.__class__, act.__class__ = nn.GroupNormSilu, nn.NormalisedSilu
    for module in model.modules():
        fused = _swaps().get(type(module))
        if fused is not None and _fits(module):
            module.__class__ = fused
    return model


def fusible(device: torch.device | str) -> bool:
    """Whether a backend other than the reference would be chosen there: fusing pays."""
    x = torch.empty(1, 8, 1, 1, device=device).expand(1, 8, 512, 512)  # so large that the answer is not "too small"
    return OP.select(x, None, None, 2, 1e-5, None, True)[0] != "ref"


def unfuse_(model: torch.nn.Module) -> torch.nn.Module:
    """The inverse of ``fuse_``."""
    eager = {fused: plain for plain, fused in _swaps().items()}
    eager |= {nn.GroupNormSilu: torch.nn.GroupNorm, nn.NormalisedSilu: torch.nn.SiLU}
    for module in model.modules():
        if type(module) in eager:
            module.__class__ = eager[type(module)]
    return model


def _hooked(module: torch.nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _fits(module: torch.nn.Module) -> bool:
    """Whether the fused class computes what this instance does."""
    if isinstance(module, torch.nn.LayerNorm):
        return len(module.normalized_shape) == 1
    if isinstance(module, torch.nn.GroupNorm) or not hasattr(module, "norm1"):
        return True
    plain = type(module.nonlinearity) is torch.nn.SiLU and module.time_embedding_norm == "default"
    norms = all(type(n) in (torch.nn.GroupNorm, nn.GroupNorm) and not _hooked(n) for n in (module.norm1, module.norm2))
    return plain and norms and not _hooked(module.nonlinearity)


@functools.cache
def _swaps() -> dict[type, type]:
    """Eager class -> fused class. Built at first use: importing this package must not import diffusers."""
    swaps = {torch.nn.GroupNorm: nn.GroupNorm, torch.nn.LayerNorm: nn.LayerNorm}
    try:
        from diffusers.models.activations import GEGLU
        from diffusers.models.resnet import ResnetBlock2D
    except ImportError:
        return swaps

    def norm_silu(norm, x, shift=None):
        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, shift)

    class FusedResnetBlock2D(ResnetBlock2D):
        def forward(self, input_tensor, temb=None, *args, **kwargs):
            hidden = norm_silu(self.norm1, input_tensor)
            resample = self.upsample or self.downsample
            if resample is not None:
                input_tensor, hidden = resample(input_tensor), resample(hidden)
            hidden = self.conv1(hidden)
            if self.time_emb_proj is not None:
                # the embedding has the same activation, and no norm before it
                temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            hidden = norm_silu(self.norm2, hidden, temb)
            hidden = self.conv2(self.dropout(hidden))
            if self.conv_shortcut is not None:
                input_tensor = self.conv_shortcut(input_tensor)
            return (input_tensor + hidden) / self.output_scale_factor

    class FusedGEGLU(GEGLU):
        def forward(self, hidden_states, *args, **kwargs):
            return geglu(self.proj(hidden_states))

    return swaps | {ResnetBlock2D: FusedResnetBlock2D, GEGLU: FusedGEGLU}

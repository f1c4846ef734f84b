"""Puts the fused ops into a diffusers model and takes them out again.

Only the class of a module changes: parameters, state_dict keys, hooks, LoRA layers and gradient checkpointing stay
where they are, and ``unfuse_`` restores the very same model.
"""

from __future__ import annotations

import functools

import torch

from . import nn
from .ops import geglu, group_norm_silu, layer_norm


def fuse_(model: torch.nn.Module) -> torch.nn.Module:
    """Fuses norms, activations and gates of a UNet2DConditionModel, AutoencoderKL or any model built of their blocks.

    Fused are GroupNorm + SiLU with the time embedding's addition (ResnetBlock2D), a model's last GroupNorm + SiLU, all
    other GroupNorm and LayerNorm modules, and GEGLU. While there is a hook on what fusion skips, the module around it
    runs as before; so do variants the ops do not know. AutoencoderTiny has no norm and comes back unchanged.

    Returns:
        ``model``, changed in place.
    """
    for module in model.modules():
        norm, act = getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None)
        if type(norm) is torch.nn.GroupNorm and type(act) is torch.nn.SiLU:
            norm.__class__, act.__class__ = nn.GroupNormSilu, nn.NormalisedSilu
            norm.__dict__["partner"], act.__dict__["partner"] = act, norm  # not as submodules, which have keys
    for module in model.modules():
        fused = _swaps().get(type(module))
        if fused is not None and _fits(module):
            module.__class__ = fused
    return model


def fusible(device: torch.device | str) -> bool:
    """Whether a backend other than the reference would be chosen there: fusing pays.

    Raises:
        RuntimeError: a named backend cannot run one of the ops that ``fuse_`` puts in.
    """
    x = torch.empty(1, 8, 1, 1, device=device).expand(1, 8, 512, 512)  # so large that the answer is not "too small"
    chosen, _ = group_norm_silu.OP.select(x, None, None, 2, 1e-5, None, True)
    layer_norm.OP.select(x, None, None, 1e-5)
    geglu.OP.select(x)
    return chosen != "ref"


def unfuse_(model: torch.nn.Module) -> torch.nn.Module:
    """The inverse of ``fuse_``."""
    eager = {fused: plain for plain, fused in _swaps().items()}
    eager |= {nn.GroupNormSilu: torch.nn.GroupNorm, nn.NormalisedSilu: torch.nn.SiLU}
    for module in model.modules():
        if type(module) in eager:
            module.__dict__.pop("partner", None)
            module.__class__ = eager[type(module)]
    return model


def _fits(module: torch.nn.Module) -> bool:
    """Whether the fused class computes what this instance does."""
    if isinstance(module, torch.nn.LayerNorm):
        return len(module.normalized_shape) == 1
    if isinstance(module, torch.nn.GroupNorm) or not hasattr(module, "norm1"):
        return True
    plain = type(module.nonlinearity) is torch.nn.SiLU and module.time_embedding_norm == "default"
    return plain and all(type(n) in (torch.nn.GroupNorm, nn.GroupNorm) for n in (module.norm1, module.norm2))


@functools.cache
def _swaps() -> dict[type, type]:
    """Eager class -> fused class. Built at first use: importing this package must not import diffusers."""
    swaps = {torch.nn.GroupNorm: nn.GroupNorm, torch.nn.LayerNorm: nn.LayerNorm}
    try:
        from diffusers.models.activations import GEGLU
        from diffusers.models.resnet import ResnetBlock2D
    except ImportError:
        return swaps
    from . import _diffusers

    return swaps | {ResnetBlock2D: _diffusers.FusedResnetBlock2D, GEGLU: _diffusers.FusedGEGLU}

"""Fused ops for one-step diffusion; needs torch only.

Every op has a reference in eager PyTorch and faster backends where they exist; ``explain`` says which one runs and why.
"""

from .dispatch import explain, use
from .ops.geglu import geglu
from .ops.group_norm_silu import group_norm_silu
from .ops.head_pool import head_pool
from .ops.layer_norm import layer_norm
from .ops.renoise import renoise

__all__ = ["explain", "geglu", "group_norm_silu", "head_pool", "layer_norm", "renoise", "use"]

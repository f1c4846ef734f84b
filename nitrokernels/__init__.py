"""Fused ops for one-step diffusion; needs torch only.

Every op has a reference in eager PyTorch and faster backends where they exist; ``explain`` says which one runs and why.
"""

from .dispatch import explain, use
from .ops.group_norm_silu import group_norm_silu
from .ops.head_pool import head_pool
from .ops.renoise import renoise

__all__ = ["explain", "group_norm_silu", "head_pool", "renoise", "use"]

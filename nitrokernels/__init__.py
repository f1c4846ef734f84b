"""Fused ops for one-step diffusion; needs torch only.

Every op has a reference in eager PyTorch and faster backends where they exist; ``explain`` says which one runs and why.
"""

from .dispatch import explain, recomputation, use
from .fuse import fuse_, fusible, unfuse_
from .ops.geglu import geglu
from .ops.group_norm_silu import group_norm_silu
from .ops.head_pool import head_pool
from .ops.indexed_adamw import indexed_adamw_
from .ops.layer_norm import layer_norm
from .ops.nag_combine import nag_combine
from .ops.quantize_e4m3 import quantize_e4m3
from .ops.refresh_rows import refresh_rows_
from .ops.renoise import renoise

__all__ = [
    "explain", "fuse_", "fusible", "geglu", "group_norm_silu", "head_pool", "indexed_adamw_", "layer_norm",
    "nag_combine", "quantize_e4m3", "recomputation", "refresh_rows_", "renoise", "unfuse_", "use",
]  # fmt: skip

"""Fused ops for one-step diffusion; needs torch only.

Every op has a reference in eager PyTorch and faster backends where they exist; ``explain`` says which one runs and why.
"""

from .dispatch import explain, use
from .ops.group_norm_silu import group_norm_silu
from .ops.head_pool import head_pool
from .ops.indexed_adamw import indexed_adamw_
from .ops.nag_combine import nag_combine
from .ops.refresh_rows import refresh_rows_
from .ops.renoise import renoise

__all__ = [
    "explain", "group_norm_silu", "head_pool", "indexed_adamw_", "nag_combine", "refresh_rows_", "renoise", "use",
]  # fmt: skip

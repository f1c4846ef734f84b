"""The only caller of torch.library: define, implement, describe to the tracer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import _triton

_LIBRARY = torch.library.Library("nitrokernels", "DEF")


def register(name: str, schema: str, run: Callable, fake: Callable, *devices: str) -> Callable:
    """Registers ``nitrokernels::name`` for "CPU" or "CUDA", both if none is named, and returns the callable.

    define + impl + register_fake is cheaper per call than ``torch.library.custom_op``; gradients are the business of an
    autograd.Function outside.
    """
    _LIBRARY.define(f"{name}{schema}")
    for device in devices or ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)

    def describe(*args):  # inside _triton.record() the launcher itself runs on meta tensors, and launches nothing
        return (run if _triton.recording() else fake)(*args)

    torch.library.register_fake(f"nitrokernels::{name}", describe, lib=_LIBRARY)
    return getattr(torch.ops.nitrokernels, name)

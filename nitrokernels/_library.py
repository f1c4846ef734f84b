"""The only caller of torch.library: define, implement, describe to the tracer."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("nitrokernels", "DEF")


def register(name: str, schema: str, run: Callable, fake: Callable, device: str) -> Callable:
    """Registers ``nitrokernels::name`` for one device ("CPU" or "CUDA") and returns the callable overload.

    define + impl + register_fake is cheaper per call than ``torch.library.custom_op``; gradients are the business of an
    autograd.Function outside.
    """
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"nitrokernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.nitrokernels, name)

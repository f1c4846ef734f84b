"""Which device to work on."""

from __future__ import annotations

import torch

from .errors import InputError


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The named device, or CUDA where there is one, else the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()  # meta fails here: it holds no numbers
    except (RuntimeError, AssertionError) as error:  # what torch raises for an unknown name, and for a missing device
        reason = str(error).splitlines()[0]
        raise InputError(f"device: must be one this machine has, such as cpu, got {str(name)!r}: {reason}") from error
    return device


def planned_device(name: str | None = None) -> torch.device:
    """``pick_device``, but CUDA where it is named and not here: to plan for another machine."""
    if name is not None and name.split(":")[0] == "cuda" and absent(cuda := torch.device("cuda")):
        return cuda
    return pick_device(name)


def absent(device: torch.device) -> bool:
    """Whether it is one that only plans can be made for."""
    return device.type == "cuda" and not torch.cuda.is_available()

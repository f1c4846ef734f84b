"""The only toucher of pointers: loads the native library and hands it tensors.

Validation happens before this layer, in Python, once; the C side trusts its caller. Tensors stay in named variables
across the call, outputs are allocated by torch, and CUDA work goes to the current stream of the tensor's device.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct

import torch

ABI = 5
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _load():
    """(module, None), or (None, why it cannot be used)."""
    if os.environ.get("NITROKERNELS_NATIVE") == "0":
        return None, "the native library is turned off by NITROKERNELS_NATIVE=0"
    if importlib.util.find_spec(f"{__package__}._C") is None:
        return None, "the native library was not built; reinstall the package where there is a C++ compiler"
    try:
        from . import _C
    except ImportError as error:
        return None, f"the native library cannot be loaded ({error}); reinstall the package"
    if _C.abi != ABI:
        return None, f"the native library must have ABI {ABI}, got {_C.abi}; reinstall the package"
    return _C, None


LIBRARY, MISSING = _load()


def missing(device: str) -> str | None:
    """Why the native library cannot run on ``device`` ("cpu" or "cuda"), or None."""
    if MISSING is not None:
        return MISSING
    if device == "cuda" and not LIBRARY.has_cuda:
        return "the native library was built without CUDA"
    return None


def dense(x: torch.Tensor) -> torch.Tensor:
    """NCHW or NHWC without gaps, which is how the native code reads a map."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def aligned(t: torch.Tensor, bytes: int = 16) -> torch.Tensor:
    """``t``, or a copy if its memory does not begin at a multiple of ``bytes``."""
    return t.clone() if t.data_ptr() % bytes else t


def address(t: torch.Tensor) -> int:
    """Where its first element lies; good as long as the tensor is kept."""
    return t.data_ptr()


def launch(name: str, *fields: torch.Tensor | list[torch.Tensor] | int | float | None) -> None:
    """Calls the native launcher ``name`` on the device of the first tensor among ``fields``.

    Fields are the params struct of csrc/<op>.h in its order, 8 bytes each: a tensor (or None) is its address, a list of
    tensors the address of their addresses, ints and floats themselves.

    Raises:
        RuntimeError: the launcher reports an error; it names the op.
    """
    values, kinds, kept, device = [], [], [], None
    for field in fields:
        kind = "q"
        if isinstance(field, torch.Tensor):
            device = device or field.device
            field = field.data_ptr()
        elif isinstance(field, list):
            kept.append((ctypes.c_int64 * len(field))(*(t.data_ptr() for t in field)))
            field = ctypes.addressof(kept[-1])
        elif isinstance(field, float):
            kind = "d"
        values.append(field or 0)
        kinds.append(kind)
    packed = struct.pack("".join(kinds), *values)
    if device.type == "cuda":
        with torch.cuda.device(device):
            LIBRARY.launch(name, packed, torch.cuda.current_stream().cuda_stream)
    else:
        LIBRARY.launch(name, packed, torch.get_num_threads())

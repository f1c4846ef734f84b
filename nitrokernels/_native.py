"""The only toucher of pointers: loads the native library and hands it tensors.

Validation happens before this layer, in Python, once; the C side trusts its caller. Tensors stay in named variables
across the call, outputs are allocated by torch, and CUDA work goes to the current stream of the tensor's device.
"""

from __future__ import annotations

import os

import torch

ABI = 1
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _load():
    """(module, None), or (None, why it cannot be used)."""
    if os.environ.get("NITROKERNELS_NATIVE") == "0":
        return None, "the native library is turned off by NITROKERNELS_NATIVE=0"
    try:
        from . import _C
    except ImportError as error:
        return None, f"the native library was not built ({error})"
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


def renoise(x_t: torch.Tensor, eps: torch.Tensor, noise: torch.Tensor, coefficients: torch.Tensor):
    """x0 (fp32) and x_next (dtype of x_t) for dense tensors [B, ...]; coefficients [4, B] fp32 contiguous."""
    x0 = torch.empty_like(x_t, dtype=torch.float32)
    x_next = torch.empty_like(x_t)
    if x_t.numel() == 0:
        return x0, x_next
    pointers = [t.data_ptr() for t in (x_t, eps, noise, coefficients, x0, x_next)]
    sizes = (x_t.shape[0], x_t.numel() // x_t.shape[0], DTYPES[x_t.dtype])
    if x_t.is_cuda:
        with torch.cuda.device(x_t.device):
            stream = torch.cuda.current_stream().cuda_stream
            LIBRARY.renoise_cuda(*pointers, *sizes, stream)
    else:
        LIBRARY.renoise_cpu(*pointers, *sizes, torch.get_num_threads())
    return x0, x_next

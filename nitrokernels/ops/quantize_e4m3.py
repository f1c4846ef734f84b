"""An activation as 8-bit floating point in one pass.   y = e4m3(x inverse_scale), saturating at +-448

x: [B, ...]; inverse_scale: [1], read where it lies; y: uint8, the bits of ``torch.float8_e4m3fn``. Rounding is to
nearest, ties to even, after a product in fp32. In eager PyTorch this is four passes over memory.
"""

from __future__ import annotations

import torch

from .. import _library, _native, _triton
from .._triton import tl
from ..dispatch import Op, missing
from ..testing import Case

_BLOCK = 1024
LARGEST = 448.0


def quantize_e4m3_ref(x, inverse_scale):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scaled = (x.to(wide) * inverse_scale.to(wide)).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).contiguous().view(torch.uint8)


@_triton.jit
def _quantize_e4m3_fwd_kernel(x, inverse_scale, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    v = tl.load(x + at, inside, 0.0).to(tl.float32) * tl.load(inverse_scale)
    a = tl.minimum(tl.abs(v), 448.0)
    # In integers, because only parts from sm_89 on convert. Normal numbers: 20 of 23 bits of mantissa are rounded off,
    # ties to even, and the exponent's bias goes from 127 to 7. Below 2^-6: 2^14 + a has a last place of 2^-9.
    bits = a.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (a + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(a < 0.015625, small, normal)
    code = tl.where(v != v, 0x7F, code)
    sign = (v.to(tl.int32, bitcast=True) >> 24) & 0x80
    tl.store(y + at, (code | sign).to(tl.uint8), inside)


def _supports(x, inverse_scale) -> str | None:
    if (reason := missing("triton", x)) is not None:
        return reason
    if x.dtype not in _native.DTYPES or inverse_scale.dtype != torch.float32:
        return f"x must be fp32, fp16 or bf16 and inverse_scale fp32, got {x.dtype} and {inverse_scale.dtype}"
    return None


def _run_triton(x, inverse_scale):
    x = x.contiguous()
    y = torch.empty_like(x, dtype=torch.uint8)
    if size := x.numel():
        args = dict(x=x, inverse_scale=inverse_scale, y=y, size=size)
        _triton.Launch(_quantize_e4m3_fwd_kernel, (-(-size // _BLOCK),), args, dict(BLOCK=_BLOCK)).run()
    return y


def _fake(x, inverse_scale):
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)


_SCHEMA = "(Tensor x, Tensor inverse_scale) -> Tensor"
OP = Op("quantize_e4m3", ref=quantize_e4m3_ref)
OP.impl("triton", _library.register("quantize_e4m3_fwd_triton", _SCHEMA, _run_triton, _fake), _supports)


def quantize_e4m3(x: torch.Tensor, inverse_scale: torch.Tensor) -> torch.Tensor:
    """x times ``inverse_scale`` in 8 bits; not differentiable.

    Args:
        x: [B, ...], fp32, fp16, bf16 (fp64 on the reference).
        inverse_scale: [1] fp32.

    Returns:
        [B, ...] uint8, contiguous; ``.view(torch.float8_e4m3fn)`` gives the numbers.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: a named backend cannot run the call.
    """
    OP.check.tensor("x", x, ("B", ...))
    OP.check.tensor("inverse_scale", inverse_scale, (1,), x)
    return OP.select(x, inverse_scale)[1](x, inverse_scale)


def _case(*shape: int) -> Case:
    def make(dtype, device):
        # from where everything rounds to zero to where it saturates, and halves of the last place
        x = torch.randn(shape, device=device) * torch.exp2(torch.randint(-14, 12, shape, device=device).float())
        x = torch.where(torch.rand(shape, device=device) < 0.3, torch.round(x * 16) / 16, x)
        return x.to(dtype), torch.exp2(torch.randint(-3, 4, (1,), device=device).float())

    return Case(make)


CASES = {
    "world": _case(16, 256, 64),
    "one": _case(1, 1),
    "odd": _case(3, 5, 7, 11),
    "vector": _case(1025),
    "empty": _case(0, 4),
}

AOT = {"sdxl 4096 x 640": _case(4096, 640)}

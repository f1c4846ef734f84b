"""Named rows of a stacked parameter, initialised anew: uniform values, and an optimizer state of zeros.

param, exp_avg, exp_avg_sq: [P, ...]; step [P] int64; rows [k] int64. The values depend on (seed, row, element) alone:
a Philox-4x32-10 stream (Salmon et al., SC 2011) with the seed as key and (element // 4, row) as counter. So every
backend and any number of threads write the same bits, and a row's values do not depend on which others are named.

value = fp32(low + span * (bits >> 8) * 2^-24) with low, high and span = high - low rounded to fp32 first, in fp64 until
the last rounding: the product of 24 by 24 bits is exact there, so fusing it with the addition changes nothing. A value
that rounding takes to high becomes low.
"""

from __future__ import annotations

import struct

import torch

from .. import _library, _native, _triton
from .._triton import tl
from ..dispatch import Op, missing
from ..testing import Case

_BLOCK = 256  # counters per program, four elements each
_MASK = 0xFFFFFFFF
_LARGEST = torch.finfo(torch.float32).max


def philox_ref(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox-4x32-10: four words of any one shape, int64 holding 32 bits each, from a counter of such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits; the sign is one of them
        c0, c1, c2, c3 = b >> 32 & _MASK ^ c1 ^ k0, b & _MASK, a >> 32 & _MASK ^ c3 ^ k1, a & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return [c0, c1, c2, c3]


def refresh_rows_ref(param, exp_avg, exp_avg_sq, step, rows, seed, low, high):
    OP.check.rows("rows", rows, len(param))
    size = _size(param)
    at, row = torch.broadcast_tensors(torch.arange(-(-size // 4), device=rows.device), rows[:, None])
    words = philox_ref([at & _MASK, at >> 32, row & _MASK, row >> 32], (seed & _MASK, seed >> 32))
    bits = torch.stack(words, -1).flatten(1)[:, :size]
    low, high, span = _bounds(low, high)
    value = ((bits >> 8).double() * (span * 2**-24) + low).float()
    param[rows] = torch.where(value < high, value, low).view(len(rows), *param.shape[1:]).to(param.dtype)
    for state in (exp_avg, exp_avg_sq, step):
        if state is not None:
            state[rows] = 0


def _fp32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def _bounds(low: float, high: float) -> tuple[float, float, float]:
    """low, high, high - low, each rounded to fp32."""
    low, high = _fp32(low), _fp32(high)
    return low, high, _fp32(high - low)


def _size(p: torch.Tensor) -> int:
    """Elements of one row."""
    return p[0].numel() if len(p) else 0


@_triton.jit
def _refresh_rows_kernel(param, exp_avg, exp_avg_sq, step, rows, size, blocks, seed, low, high, span,
                         BLOCK: tl.constexpr):  # fmt: skip
    row = tl.load(rows + tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    counter = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.int64)
    c0 = (counter & 0xFFFFFFFF).to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = ((row & 0xFFFFFFFF) + zero).to(tl.uint32)
    c3 = ((row >> 32) + zero).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c3)
    bits = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    bits = (bits >> 8).to(tl.int32).to(tl.float64)
    low = tl.full((4 * BLOCK,), 0.0, tl.float64) + low
    value = (bits * (tl.full((4 * BLOCK,), 5.9604644775390625e-08, tl.float64) * span) + low).to(tl.float32)
    value = tl.where(value < high, value, low.to(tl.float32))
    at = block.to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    inside = at < size
    at = row * size + at
    tl.store(param + at, value, inside)
    if exp_avg is not None:
        tl.store(exp_avg + at, tl.zeros((4 * BLOCK,), tl.float32), inside)
    if exp_avg_sq is not None:
        tl.store(exp_avg_sq + at, tl.zeros((4 * BLOCK,), tl.float32), inside)
    if step is not None:
        if block == 0:
            tl.store(step + row, tl.zeros((), tl.int64))


def _supports(backend: str):
    def supports(param, exp_avg, exp_avg_sq, step, *rest) -> str | None:
        if (reason := missing(backend, param)) is not None:
            return reason
        for name, value in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            if value is not None and not (value.dtype == torch.float32 and value.is_contiguous()):
                return f"{name} must be contiguous fp32, got {value.dtype} with strides {tuple(value.stride())}"
        if step is not None and not step.is_contiguous():
            return "step must be contiguous"
        return None

    return supports


def _run_native(param, exp_avg, exp_avg_sq, step, rows, seed, low, high):
    OP.check.rows("rows", rows, len(param))
    low, high, span = _bounds(low, high)
    rows, size = rows.contiguous(), _size(param)
    _native.launch("refresh_rows_cpu", param, exp_avg, exp_avg_sq, step, rows, len(rows), size, seed, low, high, span)


def _run_triton(param, exp_avg, exp_avg_sq, step, rows, seed, low, high):
    OP.check.rows("rows", rows, len(param))
    low, high, span = _bounds(low, high)
    size = _size(param)
    blocks = -(-size // (4 * _BLOCK))
    args = dict(param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, rows=rows.contiguous())
    args |= dict(size=size, blocks=blocks, seed=seed, low=low, high=high, span=span)
    _triton.Launch(_refresh_rows_kernel, (len(rows) * blocks,), args, dict(BLOCK=_BLOCK)).run()


def _fake(*args):
    return None


_SCHEMA = (
    "(Tensor(a!) param, Tensor(b!)? exp_avg, Tensor(c!)? exp_avg_sq, Tensor(d!)? step, Tensor rows, int seed,"
    " float low, float high) -> ()"
)
OP = Op("refresh_rows_", ref=refresh_rows_ref)
OP.impl("triton", _library.register("refresh_rows_triton", _SCHEMA, _run_triton, _fake), _supports("triton"))
OP.impl("cpu", _library.register("refresh_rows_cpu", _SCHEMA, _run_native, _fake, "CPU"), _supports("cpu"))


@torch.no_grad()
def refresh_rows_(
    param: torch.Tensor,
    exp_avg: torch.Tensor | None,
    exp_avg_sq: torch.Tensor | None,
    step: torch.Tensor | None,
    rows: torch.Tensor,
    seed: int,
    low: float,
    high: float,
) -> None:
    """Fills the named rows of a parameter with fresh uniform values, in place, and forgets their optimizer state.

    Args:
        param: [P, ...] fp32 (other dtypes on the reference, which rounds the same fp32 values).
        exp_avg, exp_avg_sq: [P, ...] moments, or None where there is no optimizer.
        step: [P] int64, or None.
        rows: [k] int64 without repeats, 0 <= k <= P.
        seed: in 0 .. 2^63 - 1.
        low, high: of the interval [low, high); low == high fills a constant.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit, or, on a CPU, a row is out of range. RuntimeError: a
            named backend cannot run the call.
    """
    OP.check.tensor("param", param, ("P", ...))
    for name, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if value is not None:
            OP.check.tensor(name, value, param.shape, param)
    if step is not None:
        OP.check.tensor("step", step, param.shape[:1], param, torch.int64)
    OP.check.tensor("rows", rows, ("k",), param, torch.int64)
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        OP.check.fail("seed", "in 0..2^63 - 1", seed)
    for name, value in (("low", low), ("high", high)):
        OP.check.number(name, value)
    if not (low <= high and max(-low, high, high - low) <= _LARGEST):
        OP.check.fail("low and high", "low <= high, both and high - low finite in fp32", f"{low} and {high}")
    written = [value for value in (param, exp_avg, exp_avg_sq, step) if value is not None]
    args = (param, exp_avg, exp_avg_sq, step, rows, seed, low, high)
    OP.select(*args)[1](*args)
    torch.autograd.graph.increment_version(written)  # autograd cannot see native writes


def _case(*shape: int, rows: int, low: float = -0.3, high: float = 0.7, state: bool = True) -> Case:
    def make(dtype, device):
        param, exp_avg, exp_avg_sq = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        step = torch.randint(0, 50, shape[:1], device=device)
        named = torch.randperm(shape[0], device=device)[:rows]
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        return param, *((exp_avg, exp_avg_sq, step) if state else (None, None, None)), named, seed, low, high

    return Case(make, mutated=(0, 1, 2, 3) if state else (0,), dtypes=(torch.float32,))


CASES = {
    "small": _case(5, 3, 2, rows=2),
    "odd": _case(4, 5, 7, 11, rows=3),
    "vector": _case(6, rows=4),
    "constant": _case(3, 9, rows=2, low=1.0, high=1.0),
    "all rows": _case(4, 9, rows=4, state=False),
    "empty rows": _case(4, 9, rows=0),
    "big row": _case(2, 2, 3001, rows=1),
}
# A head of width 64 on an SDXL tap of 1280 channels: 1 % of 48 rows.
AOT = {"sdxl": _case(48, 64, 1280, 4, 4, rows=1), "sdxl, no state": _case(48, 64, 1280, 4, 4, rows=48, state=False)}

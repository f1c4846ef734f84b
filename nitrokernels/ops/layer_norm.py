"""LayerNorm over the last dimension, statistics in fp32.   y = (x - mean) rstd weight + bias

x, y: [..., C]; weight, bias: [C]; mean, rstd: [rows] fp32. Arithmetic in fp32 (fp64 for fp64 input). Backward saves x,
mean and rstd, and takes dx and a part's share of dweight and dbias in one pass.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .. import _library, _native, _triton
from .._autograd import reference_gradients
from .._triton import tl
from ..dispatch import Op, missing, pays_from
from ..testing import Case

_LARGEST = 8192  # a row is one Triton tile
_PARTS = 264  # programs that add up dweight and dbias: two for each of a large GPU's processors


def layer_norm_ref(x, weight, bias, eps=1e-5):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype)


@_triton.jit
def _layer_norm_fwd_kernel(x, weight, bias, y, mean, rstd, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < size
    at = row.to(tl.int64) * size + i
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    centre = tl.sum(value, 0) / size
    away = tl.where(inside, value - centre, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(away * away, 0) / size + eps)
    out = away * r
    if weight is not None:
        out *= tl.load(weight + i, inside, 0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + i, inside, 0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), inside)
    tl.store(mean + row, centre)
    tl.store(rstd + row, r)


@_triton.jit
def _layer_norm_bwd_kernel(dy, x, weight, mean, rstd, dx, partial, rows, size, per_part, BLOCK: tl.constexpr):
    """dx of a part's rows, and their sums of dy xhat and dy -> partial [parts, 2, size]."""
    part = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < size
    w = tl.full([BLOCK], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + i, inside, 0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for step in range(0, per_part):
        row = part * per_part + step
        if row < rows:
            at = row.to(tl.int64) * size + i
            d = tl.load(dy + at, inside, 0.0).to(tl.float32)
            r = tl.load(rstd + row)
            hat = tl.where(inside, (tl.load(x + at, inside, 0.0).to(tl.float32) - tl.load(mean + row)) * r, 0.0)
            s1 = tl.sum(w * d, 0) / size
            s2 = tl.sum(w * d * hat, 0) / size
            tl.store(dx + at, (r * (w * d - s1 - hat * s2)).to(dx.dtype.element_ty), inside)
            dweight += d * hat
            dbias += d
    to = partial + part.to(tl.int64) * 2 * size + i
    tl.store(to, dweight, inside)
    tl.store(to + size, dbias, inside)


def _supports(backend: str):
    def supports(x, weight, bias, eps=1e-5) -> str | None:
        if (reason := missing(backend, x)) is not None:
            return reason
        if backend == "triton" and x.shape[-1] > _LARGEST:
            return f"rows must be at most {_LARGEST} long, got {x.shape[-1]}"
        for name, value in (("x", x), ("weight", weight), ("bias", bias)):
            if value is not None and value.dtype not in _native.DTYPES:
                return f"{name} must be fp32, fp16 or bf16, got {value.dtype}"
        return None

    return supports


def _rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1] if x.numel() else 0


def _fake_fwd(x, weight, bias, eps):
    stats = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), stats, torch.empty_like(stats)


def _fake_bwd(dy, x, weight, mean, rstd):
    channels = x.new_empty(x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), channels, torch.empty_like(channels)


def _fwd_cpu(x, weight, bias, eps):
    x = x.contiguous()
    y, mean, rstd = _fake_fwd(x, weight, bias, eps)
    if x.numel():
        weight, bias = (None if t is None else t.float().contiguous() for t in (weight, bias))
        dtype = _native.DTYPES[x.dtype]
        _native.launch(
            "layer_norm_fwd_cpu", x, weight, bias, y, mean, rstd, _rows(x), x.shape[-1], float(eps), dtype
        )  # fmt: skip
    return y, mean, rstd


def _bwd_cpu(dy, x, weight, mean, rstd):
    dy, x = dy.contiguous(), x.contiguous()
    dx, dweight, dbias = _fake_bwd(dy, x, weight, mean, rstd)
    if not x.numel():
        return dx, dweight.zero_(), dbias.zero_()
    weight = None if weight is None else weight.float().contiguous()
    sizes = _rows(x), x.shape[-1], _native.DTYPES[x.dtype]
    _native.launch("layer_norm_bwd_cpu", dy, x, weight, mean, rstd, dx, dweight, dbias, *sizes)
    return dx, dweight, dbias


def _sums(partial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dweight, dbias = partial.sum(0)
    return dweight.clone(), dbias.clone()  # an operator's outputs share no memory


def _compile_options(size: int) -> tuple[int, int]:
    """(block, warps): eight elements a thread, up to the 8192 of 16 warps."""
    block = 1 << (size - 1).bit_length()
    return block, max(1, min(16, block // 256))


def _fwd_triton(x, weight, bias, eps):
    x = x.contiguous()
    y, mean, rstd = _fake_fwd(x, weight, bias, eps)
    if x.numel():
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        block, warps = _compile_options(x.shape[-1])
        args = dict(x=x, weight=weight, bias=bias, y=y, mean=mean, rstd=rstd, size=x.shape[-1], eps=float(eps))
        _triton.Launch(_layer_norm_fwd_kernel, (_rows(x),), args, dict(BLOCK=block), num_warps=warps).run()
    return y, mean, rstd


def _bwd_triton(dy, x, weight, mean, rstd):
    dy, x = dy.contiguous(), x.contiguous()
    rows, dx = _rows(x), x.new_empty(x.shape)
    per_part = max(1, -(-rows // _PARTS))
    parts = max(1, -(-rows // per_part))
    partial = x.new_zeros((parts, 2, x.shape[-1]), dtype=torch.float32)
    if rows:
        weight = None if weight is None else weight.contiguous()
        block, warps = _compile_options(x.shape[-1])
        args = dict(dy=dy, x=x, weight=weight, mean=mean, rstd=rstd, dx=dx, partial=partial)
        args |= dict(rows=rows, size=x.shape[-1], per_part=per_part)
        _triton.Launch(_layer_norm_bwd_kernel, (parts,), args, dict(BLOCK=block), num_warps=warps).run()
    return dx, *_sums(partial)


def _slower(x, weight, bias, eps=1e-5) -> str | None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return "eager PyTorch is as fast where gradients are asked for, and often faster"
    return pays_from(1 << 21, 0)(x)  # on some processors from 2^18 on


_SCHEMA = "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)"
_BWD_SCHEMA = "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)"
OP = Op("layer_norm", ref=layer_norm_ref)
OP.impl("triton", _library.register("layer_norm_fwd_triton", _SCHEMA, _fwd_triton, _fake_fwd), _supports("triton"))
OP.impl("cpu", _library.register("layer_norm_fwd_cpu", _SCHEMA, _fwd_cpu, _fake_fwd, "CPU"), _supports("cpu"), _slower)
_BACKWARD = {
    "triton": _library.register("layer_norm_bwd_triton", _BWD_SCHEMA, _bwd_triton, _fake_bwd),
    "cpu": _library.register("layer_norm_bwd_cpu", _BWD_SCHEMA, _bwd_cpu, _fake_bwd, "CPU"),
}


class LayerNormFunction(torch.autograd.Function):
    """Saves x, mean and rstd; a gradient that is itself differentiated is the reference's."""

    @staticmethod
    def forward(ctx, backend, run, x, weight, bias, eps):
        y, mean, rstd = run(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.backend, ctx.eps = backend, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        inputs, wanted = (x, weight, bias), ctx.needs_input_grad[2:5]
        if torch.is_grad_enabled():  # create_graph
            grads = reference_gradients(functools.partial(layer_norm_ref, eps=ctx.eps), inputs, wanted, dy)
        else:
            grads = _BACKWARD[ctx.backend](dy, x, weight, mean, rstd)
            grads = [g.to(t.dtype) if w else None for g, t, w in zip(grads, inputs, wanted, strict=True)]
        return None, None, *grads, None


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float = 1e-5
) -> torch.Tensor:
    """Rows of zero mean and unit variance, scaled and shifted.

    Args:
        x: [..., C], fp32, fp16, bf16 (fp64 on the reference).
        weight, bias: [C] or None, fp32 or x's dtype.
        eps: added to the variance.

    Returns:
        [..., C] in x's dtype. Differentiable in x, weight and bias, to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: a named backend cannot run the call.
    """
    OP.check.tensor("x", x)
    if x.ndim < 1 or x.shape[-1] < 1:
        OP.check.fail("x", "[..., C]", list(x.shape))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            OP.check.tensor(name, value, x.shape[-1:], x)
    OP.check.number("eps", eps, 0)
    backend, run = OP.select(x, weight, bias, eps)
    if backend == "ref":
        return run(x, weight, bias, eps)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return LayerNormFunction.apply(backend, run, x, weight, bias, eps)
    return run(x, weight, bias, eps)[0]


def _case(*shape: int, affine: torch.dtype | None = torch.float32) -> Case:
    """``affine``: dtype of weight and bias, x's if None."""

    def make(dtype, device):
        weight, bias = (torch.randn(shape[-1], device=device).to(affine or dtype) for _ in range(2))
        return torch.randn(shape, device=device).to(dtype), weight, bias

    return Case(make, grads=(0, 1, 2))


CASES = {
    "small": _case(3, 4, 24),
    "sdxl": _case(2, 16, 640),
    "1280": _case(1, 9, 1280, affine=None),
    "odd": _case(3, 5, 7, 77),
    "vector": _case(100),
    "empty": _case(0, 4, 32),
}
AOT = {"4096x640": _case(1, 4096, 640), "1024x1280": _case(1, 1024, 1280), "77x2048": _case(1, 77, 2048)}

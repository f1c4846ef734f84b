"""Half of the features gated by the gelu of the other half, in one pass.   y = a gelu(gate), x = [a, gate]

x: [..., 2D]; y: [..., D]. gelu is the exact one, by erf. Arithmetic in fp32 (fp64 for fp64 input). In eager PyTorch the
gelu goes through memory, and with it everything its gradient needs; here the gradient needs x alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import _library, _native, _triton
from .._autograd import reference_gradients
from .._triton import tl
from ..dispatch import Op, missing, pays_from
from ..testing import Case

_BLOCK = 1024


def geglu_ref(x):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    a, gate = x.to(wide).chunk(2, -1)
    return (a * F.gelu(gate)).to(x.dtype)


@_triton.jit
def _geglu_fwd_kernel(x, y, size, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    a = tl.load(x + 2 * row * size + i, inside, 0.0).to(tl.float32)
    g = tl.load(x + (2 * row + 1) * size + i, inside, 0.0).to(tl.float32)
    out = a * (g * (0.5 + 0.5 * tl.erf(g * 0.7071067811865476)))
    tl.store(y + row * size + i, out.to(y.dtype.element_ty), inside)


@_triton.jit
def _geglu_bwd_kernel(dy, x, dx, size, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    d = tl.load(dy + row * size + i, inside, 0.0).to(tl.float32)
    a = tl.load(x + 2 * row * size + i, inside, 0.0).to(tl.float32)
    g = tl.load(x + (2 * row + 1) * size + i, inside, 0.0).to(tl.float32)
    cdf = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
    pdf = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    tl.store(dx + 2 * row * size + i, (d * (g * cdf)).to(dx.dtype.element_ty), inside)
    tl.store(dx + (2 * row + 1) * size + i, (d * a * (cdf + g * pdf)).to(dx.dtype.element_ty), inside)


def _supports(backend: str):
    def supports(x) -> str | None:
        if (reason := missing(backend, x)) is not None:
            return reason
        return None if x.dtype in _native.DTYPES else f"x must be fp32, fp16 or bf16, got {x.dtype}"

    return supports


def _sizes(y: torch.Tensor) -> tuple[int, int]:
    """Rows, and elements of one; y is not empty."""
    return y.numel() // y.shape[-1], y.shape[-1]


def _fake_fwd(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _fake_bwd(dy, x):
    return x.new_empty(x.shape)


def _fwd_cpu(x):
    x = x.contiguous()
    y = _fake_fwd(x)
    if y.numel():
        _native.launch("geglu_fwd_cpu", x, y, *_sizes(y), _native.DTYPES[x.dtype])
    return y


def _bwd_cpu(dy, x):
    dy, x = dy.contiguous(), x.contiguous()
    dx = _fake_bwd(dy, x)
    if dy.numel():
        _native.launch("geglu_bwd_cpu", dy, x, dx, *_sizes(dy), _native.DTYPES[x.dtype])
    return dx


def _launch(kernel, rows: int, size: int, **tensors: torch.Tensor) -> None:
    blocks = -(-size // _BLOCK)
    _triton.Launch(kernel, (rows * blocks,), tensors | dict(size=size, blocks=blocks), dict(BLOCK=_BLOCK)).run()


def _fwd_triton(x):
    x = x.contiguous()
    y = _fake_fwd(x)
    if y.numel():
        _launch(_geglu_fwd_kernel, *_sizes(y), x=x, y=y)
    return y


def _bwd_triton(dy, x):
    dy, x = dy.contiguous(), x.contiguous()
    dx = _fake_bwd(dy, x)
    if dy.numel():
        _launch(_geglu_bwd_kernel, *_sizes(dy), dy=dy, x=x, dx=dx)
    return dx


_SCHEMA, _BWD_SCHEMA = "(Tensor x) -> Tensor", "(Tensor dy, Tensor x) -> Tensor"
OP = Op("geglu", ref=geglu_ref)
OP.impl("triton", _library.register("geglu_fwd_triton", _SCHEMA, _fwd_triton, _fake_fwd), _supports("triton"))
_CPU = _library.register("geglu_fwd_cpu", _SCHEMA, _fwd_cpu, _fake_fwd, "CPU")
OP.impl("cpu", _CPU, _supports("cpu"), pays_from(0, 1 << 17))
_BACKWARD = {
    "triton": _library.register("geglu_bwd_triton", _BWD_SCHEMA, _bwd_triton, _fake_bwd),
    "cpu": _library.register("geglu_bwd_cpu", _BWD_SCHEMA, _bwd_cpu, _fake_bwd, "CPU"),
}


class GegluFunction(torch.autograd.Function):
    """Saves x; a gradient that is itself differentiated is the reference's."""

    @staticmethod
    def forward(ctx, backend, run, x):
        ctx.save_for_backward(x)
        ctx.backend = backend
        return run(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            return None, None, *reference_gradients(geglu_ref, [x], [True], dy)
        return None, None, _BACKWARD[ctx.backend](dy, x)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """a gelu(gate) of x = [a, gate].

    Args:
        x: [..., 2D], fp32, fp16, bf16 (fp64 on the reference).

    Returns:
        [..., D] in x's dtype. Differentiable to any order.

    Raises:
        ValueError: x is not floating point, or its last dimension is odd. RuntimeError: a named backend cannot run the
            call.
    """
    OP.check.tensor("x", x)
    if x.ndim < 1 or x.shape[-1] % 2:
        OP.check.fail("x", "[..., 2D]", list(x.shape))
    backend, run = OP.select(x)
    if backend != "ref" and torch.is_grad_enabled() and x.requires_grad:
        return GegluFunction.apply(backend, run, x)
    return run(x)


def _case(*shape: int, scale: float = 1.0) -> Case:
    return Case(lambda dtype, device: ((torch.randn(shape, device=device) * scale).to(dtype),), grads=(0,))


CASES = {
    "small": _case(2, 3, 8),
    "sdxl": _case(1, 8, 5120),
    "odd": _case(3, 7, 26),
    "wide": _case(4, 2, 30, scale=8.0),
    "vector": _case(14),
    "empty": _case(0, 4, 16),
}
AOT = {"4096x2560": _case(1, 4096, 5120), "1024x5120": _case(1, 1024, 10240)}

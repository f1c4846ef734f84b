"""AdamW in place on named rows of stacked tensors, every row with a step count of its own, many tensors in one call.

Lists with one entry per stacked tensor: param, grad, exp_avg, exp_avg_sq [P, ...]; step [P] int64; rows [k] int64. Rows
that are not named keep every bit. In eager PyTorch this gathers, updates and scatters rows in two dozen passes.

Every backend does torch.optim.AdamW's operations (foreach=False, fused=False) in its order; the reference and the cpu
backend round where PyTorch rounds on x86-64 with AVX2, the fused multiply-adds of its lerp and addcmul included:

- Moments and step counts are torch.optim.AdamW's bit for bit on both, and so are the reference's parameters.
- The cpu backend's parameters are those of an AdamW whose sqrt is correctly rounded. PyTorch's fp32 sqrt on a CPU is
  MKL's vmsSqrt, which is not (its results are within 1 ulp), so PyTorch's own update may differ by as much, and by
  one ulp for each of the two divisions after it.
- The powers in the bias correction are torch.pow's in the reference and, as in Python, the C library's in the cpu
  backend: a last bit of a double that rounding to fp32 hides.
- The triton backend rounds lr to fp32 first and lets the compiler fuse the weight decay with the update.
"""

from __future__ import annotations

import torch

from .. import _library, _native, _triton
from .._triton import tl
from ..dispatch import Op, missing
from ..testing import Case

_BLOCK = 1024
_ROWS = 64  # rows per program of the kernel that counts steps


def indexed_adamw_ref(param, grad, exp_avg, exp_avg_sq, step, rows, lr, beta1, beta2, eps, weight_decay):
    _check_rows(param, rows)
    for p, g, m, v, count, at in zip(param, grad, exp_avg, exp_avg_sq, step, rows, strict=True):
        n = count[at] + 1
        like = (-1, *[1] * (p.ndim - 1))
        rate = -(lr / (1 - beta1 ** n.double())).to(p.dtype).view(like)
        root = (1 - beta2 ** n.double()).sqrt().to(p.dtype).view(like)
        own_grad = g[at]
        value = p[at].mul_(1 - lr * weight_decay)
        average = m[at].lerp_(own_grad, 1 - beta1)
        square = v[at].mul_(beta2).addcmul_(own_grad, own_grad, value=1 - beta2)
        denominator = (square.sqrt() / root).add_(eps)
        count[at], m[at], v[at] = n, average, square
        p[at] = value.add_((rate * average).div_(denominator))


def _check_rows(param, rows) -> None:
    for i, (p, at) in enumerate(zip(param, rows, strict=True)):
        OP.check.rows(f"rows[{i}]", at, len(p), once=True)  # backends differ in what a row named twice gets


@_triton.jit
def _indexed_adamw_rows_kernel(step, rows, scalars, count, lr, BETA1: tl.constexpr, BETA2: tl.constexpr,
                               BLOCK: tl.constexpr):  # fmt: skip
    """Counts a step of each named row and writes scalars [2, count]: -lr / (1 - beta1^n), sqrt(1 - beta2^n)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = tl.load(rows + at, inside, 0)
    n = tl.load(step + row, inside, 0) + 1
    tl.store(step + row, n, inside)
    power1 = tl.full((BLOCK,), 1.0, tl.float64)
    power2 = tl.full((BLOCK,), 1.0, tl.float64)
    base1 = tl.full((BLOCK,), BETA1, tl.float64)
    base2 = tl.full((BLOCK,), BETA2, tl.float64)
    for _ in range(32):  # powers by squaring
        odd = (n & 1) == 1
        power1 = tl.where(odd, power1 * base1, power1)
        power2 = tl.where(odd, power2 * base2, power2)
        base1 = base1 * base1
        base2 = base2 * base2
        n = n >> 1
    tl.store(scalars + at, (-(lr / (1.0 - power1))).to(tl.float32), inside)
    tl.store(scalars + count + at, tl.sqrt(1.0 - power2).to(tl.float32), inside)


@_triton.jit
def _indexed_adamw_kernel(param, grad, exp_avg, exp_avg_sq, rows, scalars, count, size, blocks, decay, weight, beta2,
                          weight_sq, eps, FROM_GRAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    which = tl.program_id(0) // blocks
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    at = tl.load(rows + which).to(tl.int64) * size + at
    rate = tl.load(scalars + which)
    root = tl.load(scalars + count + which)
    g = tl.load(grad + at, inside, 0.0)
    m = tl.load(exp_avg + at, inside, 0.0)
    v = tl.load(exp_avg_sq + at, inside, 0.0)
    p = tl.load(param + at, inside, 0.0)
    m = tl.fma(g - m, weight, g if FROM_GRAD else m)
    v = tl.fma(g * weight_sq, g, v * beta2)
    p = p * decay + tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(exp_avg + at, m, inside)
    tl.store(exp_avg_sq + at, v, inside)
    tl.store(param + at, p, inside)


def _supports(backend: str):
    def supports(param, grad, exp_avg, exp_avg_sq, *rest) -> str | None:
        if (reason := missing(backend, param[0])) is not None:
            return reason
        for p, g, m, v in zip(param, grad, exp_avg, exp_avg_sq, strict=True):
            if not p.dtype == g.dtype == m.dtype == v.dtype == torch.float32:
                return f"dtypes must be fp32, got {p.dtype}, {g.dtype}, {m.dtype}, {v.dtype}"
            if not (p.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
                return "param, exp_avg and exp_avg_sq must be contiguous"
        if not all(count.is_contiguous() for count in rest[0]):
            return "step must be contiguous"
        return None

    return supports


def _size(p: torch.Tensor) -> int:
    """Elements of one row."""
    return p[0].numel() if len(p) else 0


def _run_native(param, grad, exp_avg, exp_avg_sq, step, rows, lr, beta1, beta2, eps, weight_decay):
    _check_rows(param, rows)
    grad, rows = [g.contiguous() for g in grad], [at.contiguous() for at in rows]
    shapes = torch.tensor([(len(p), _size(p), len(at)) for p, at in zip(param, rows, strict=True)], device="cpu")
    fields = (param, grad, exp_avg, exp_avg_sq, step, rows, shapes, len(param), lr, beta1, beta2, eps, weight_decay)
    _native.launch("indexed_adamw_cpu", *fields)


def _run_triton(param, grad, exp_avg, exp_avg_sq, step, rows, lr, beta1, beta2, eps, weight_decay):
    _check_rows(param, rows)
    small = abs(1 - beta1) < 0.5  # torch.lerp starts from the nearer end
    weight = 1 - beta1 if small else -beta1
    for p, g, m, v, counts, at in zip(param, grad, exp_avg, exp_avg_sq, step, rows, strict=True):
        at, count, size = at.contiguous(), len(at), _size(p)
        blocks = -(-size // _BLOCK)
        scalars = torch.empty(2, count, dtype=torch.float32, device=p.device)
        _triton.Launch(
            _indexed_adamw_rows_kernel, (-(-count // _ROWS),),
            dict(step=counts, rows=at, scalars=scalars, count=count, lr=lr),
            dict(BETA1=beta1, BETA2=beta2, BLOCK=_ROWS), num_warps=2,
        ).run()  # fmt: skip
        args = dict(param=p, grad=g.contiguous(), exp_avg=m, exp_avg_sq=v, rows=at, scalars=scalars)
        args |= dict(count=count, size=size, blocks=blocks, decay=1 - lr * weight_decay, weight=weight)
        args |= dict(beta2=beta2, weight_sq=1 - beta2, eps=eps)
        _triton.Launch(_indexed_adamw_kernel, (count * blocks,), args, dict(FROM_GRAD=not small, BLOCK=_BLOCK)).run()


def _fake(*args):
    return None


_SCHEMA = (
    "(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] step,"
    " Tensor[] rows, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()"
)
OP = Op("indexed_adamw_", ref=indexed_adamw_ref)
OP.impl("triton", _library.register("indexed_adamw_triton", _SCHEMA, _run_triton, _fake), _supports("triton"))
OP.impl("cpu", _library.register("indexed_adamw_cpu", _SCHEMA, _run_native, _fake, "CPU"), _supports("cpu"))


def _check_tensors(param, grad, exp_avg, exp_avg_sq, step, rows) -> None:
    lists = dict(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, rows=rows)
    for name, values in lists.items():
        OP.check.sequence(name, values)
        if len(values) != len(param):
            OP.check.fail(name, f"a list of {len(param)} tensors", len(values))
    for p, *like, count, at in zip(*lists.values(), strict=True):
        OP.check.tensor("param", p, ("P", ...), param[0])
        for name, value in zip(("grad", "exp_avg", "exp_avg_sq"), like, strict=True):
            OP.check.tensor(name, value, p.shape, p, p.dtype)
        OP.check.tensor("step", count, p.shape[:1], p, torch.int64)
        OP.check.tensor("rows", at, ("k",), p, torch.int64)


@torch.no_grad()
def indexed_adamw_(
    param: list[torch.Tensor],
    grad: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    step: list[torch.Tensor],
    rows: list[torch.Tensor],
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW step, in place, of the named rows of every tensor of a list.

    Args:
        param, grad, exp_avg, exp_avg_sq: equally long lists of [P, ...] fp32 (fp64 on the reference); P may differ.
        step: list of [P] int64, the steps each row has taken; those of the named rows are incremented first.
        rows: list of [k] int64 without repeats, 0 <= k <= P.
        lr, beta1, beta2, eps, weight_decay: of torch.optim.AdamW.

    Raises:
        ValueError: shapes, dtypes, devices or settings do not fit, or, on a CPU, a row is out of range or repeated.
            RuntimeError: a named backend cannot run the call.
    """
    _check_tensors(param, grad, exp_avg, exp_avg_sq, step, rows)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        OP.check.number(name, value, 0)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        OP.check.number(name, value, 0)
        if value >= 1:
            OP.check.fail(name, "below 1", value)
    if not param:
        return
    args = (param, grad, exp_avg, exp_avg_sq, step, rows, lr, beta1, beta2, eps, weight_decay)
    OP.select(*args)[1](*args)
    torch.autograd.graph.increment_version([*param, *exp_avg, *exp_avg_sq, *step])  # autograd cannot see native writes


def _case(*tensors: tuple[tuple[int, ...], int], beta1: float = 0.9, weight_decay: float = 0.01) -> Case:
    """``tensors``: (shape, number of named rows) of each."""

    def make(dtype, device):
        def draw(fn):
            return [fn(shape, device=device).to(dtype) for shape, _ in tensors]

        steps = [torch.randint(0, 50, shape[:1], device=device) for shape, _ in tensors]
        rows = [torch.randperm(shape[0], device=device)[:k] for shape, k in tensors]
        lists = draw(torch.randn), draw(torch.randn), draw(torch.randn), draw(torch.rand), steps, rows
        return *lists, 1e-3, beta1, 0.99, 1e-8, weight_decay

    return Case(make, mutated=(0, 2, 3, 4), dtypes=(torch.float32,))


CASES = {
    "small": _case(((5, 3, 2), 2), ((4,), 3)),
    "odd": _case(((7, 37), 3), ((3, 5, 7, 11), 2), beta1=0.5),
    "all rows": _case(((4, 9), 4), beta1=0.0, weight_decay=0.0),
    "empty rows": _case(((4, 9), 0), ((2, 3), 1)),
    "big row": _case(((3, 2100), 2)),
}
# Heads of width 64 on an SDXL tap of 1280 channels: 48 rows, of which one optimizer step trains 12.
AOT = {"sdxl": _case(((48, 64, 1280, 4, 4), 12), ((48, 64, 64, 4, 4), 12), ((48, 64), 12), ((48,), 12))}

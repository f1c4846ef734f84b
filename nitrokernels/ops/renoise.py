"""eps -> x0 and x0 -> x_t* in one pass.   x0 = (x_t - sigma eps) / alpha;   x_next = alpha_next x0 + sigma_next noise

x_t, eps, noise: [B, ...] of one shape; alpha, sigma, alpha_next, sigma_next: [B] fp32. Arithmetic in fp32 (fp64 for
fp64 input). x0 is fp32, x_next has the dtype and layout of x_t. In eager PyTorch this is six passes over memory.
"""

from __future__ import annotations

import torch

from .. import _library, _native, _triton
from .._triton import tl
from ..dispatch import Op, missing
from ..testing import Case

_BLOCK = 1024


def renoise_ref(x_t, eps, noise, alpha, sigma, alpha_next, sigma_next):
    wide = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    like = (-1, *[1] * (x_t.ndim - 1))
    alpha, sigma, alpha_next, sigma_next = (c.to(wide).view(like) for c in (alpha, sigma, alpha_next, sigma_next))
    x0 = (x_t.to(wide) - sigma * eps.to(wide)) / alpha
    return x0, (alpha_next * x0 + sigma_next * noise.to(wide)).to(x_t.dtype)


def _dense(x: torch.Tensor) -> bool:
    """One block of memory with the image index outermost, so that any layout of an image is one run."""
    if x.is_contiguous():
        return True
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


@_triton.jit
def _renoise_fwd_kernel(x_t, eps, noise, coefficients, x0, x_next, batch, size, BLOCK: tl.constexpr):
    image = tl.program_id(1)
    alpha = tl.load(coefficients + image)
    sigma = tl.load(coefficients + batch + image)
    alpha_next = tl.load(coefficients + 2 * batch + image)
    sigma_next = tl.load(coefficients + 3 * batch + image)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    at = image.to(tl.int64) * size + at
    x = tl.load(x_t + at, inside).to(tl.float32)
    e = tl.load(eps + at, inside).to(tl.float32)
    n = tl.load(noise + at, inside).to(tl.float32)
    y = (x - sigma * e) / alpha
    tl.store(x0 + at, y, inside)
    tl.store(x_next + at, (alpha_next * y + sigma_next * n).to(x_next.dtype.element_ty), inside)


def _supports(backend: str):
    def supports(x_t, eps, noise, *coefficients) -> str | None:
        if (reason := missing(backend, x_t)) is not None:
            return reason
        if x_t.dtype not in _native.DTYPES or not x_t.dtype == eps.dtype == noise.dtype:
            return f"dtypes must be one of fp32, fp16, bf16, got {x_t.dtype}, {eps.dtype}, {noise.dtype}"
        if backend == "triton" and len(x_t) > 65535:
            return f"at most 65535 images fit a launch, got {len(x_t)}"
        return None

    return supports


def _aligned(x_t, eps, noise, *coefficients):
    """The three as equally laid out dense tensors, and the coefficients [4, B] fp32."""
    if not _dense(x_t):
        x_t = x_t.contiguous()
    if eps.stride() != x_t.stride():
        eps = torch.empty_like(x_t).copy_(eps)
    if noise.stride() != x_t.stride():
        noise = torch.empty_like(x_t).copy_(noise)
    return x_t, eps, noise, torch.stack(coefficients).float()


def _run_native(x_t, eps, noise, alpha, sigma, alpha_next, sigma_next):
    x_t, eps, noise, coefficients = _aligned(x_t, eps, noise, alpha, sigma, alpha_next, sigma_next)
    x0, x_next = torch.empty_like(x_t, dtype=torch.float32), torch.empty_like(x_t)
    if x_t.numel():
        batch, dtype = len(x_t), _native.DTYPES[x_t.dtype]
        device = x_t.device.type
        _native.launch(
            f"renoise_{device}", x_t, eps, noise, coefficients, x0, x_next, batch, x_t.numel() // batch, dtype
        )
    return x0, x_next


def _run_triton(x_t, eps, noise, alpha, sigma, alpha_next, sigma_next):
    x_t, eps, noise, coefficients = _aligned(x_t, eps, noise, alpha, sigma, alpha_next, sigma_next)
    x0, x_next = torch.empty_like(x_t, dtype=torch.float32), torch.empty_like(x_t)
    if x_t.numel():
        batch, size = len(x_t), x_t.numel() // len(x_t)
        args = dict(x_t=x_t, eps=eps, noise=noise, coefficients=coefficients, x0=x0, x_next=x_next)
        _triton.Launch(
            _renoise_fwd_kernel, (-(-size // _BLOCK), batch), args | dict(batch=batch, size=size), dict(BLOCK=_BLOCK)
        ).run()
    return x0, x_next


def _fake(x_t, eps, noise, alpha, sigma, alpha_next, sigma_next):
    dense = x_t if _dense(x_t) else x_t.contiguous()
    return torch.empty_like(dense, dtype=torch.float32), torch.empty_like(dense)


_SCHEMA = (
    "(Tensor x_t, Tensor eps, Tensor noise, Tensor alpha, Tensor sigma, Tensor alpha_next, Tensor sigma_next)"
    " -> (Tensor, Tensor)"
)
OP = Op("renoise", ref=renoise_ref)
OP.impl("triton", _library.register("renoise_fwd_triton", _SCHEMA, _run_triton, _fake), _supports("triton"))
OP.impl("cpu", _library.register("renoise_fwd_cpu", _SCHEMA, _run_native, _fake, "CPU"), _supports("cpu"))
OP.impl("cuda", _library.register("renoise_fwd_cuda", _SCHEMA, _run_native, _fake, "CUDA"), _supports("cuda"))


class RenoiseFunction(torch.autograd.Function):
    """Linear in x_t, eps and noise, so the backward pass needs the coefficients alone, and so does its own backward."""

    @staticmethod
    def forward(ctx, run, x_t, eps, noise, *coefficients):
        ctx.save_for_backward(*coefficients)
        ctx.dtypes = x_t.dtype, eps.dtype, noise.dtype
        return run(x_t, eps, noise, *coefficients)

    @staticmethod
    def backward(ctx, dx0, dx_next):
        like = (-1, *[1] * (dx0.ndim - 1))
        alpha, sigma, alpha_next, sigma_next = (c.to(dx0.dtype).view(like) for c in ctx.saved_tensors)
        dx_next = dx_next.to(dx0.dtype)
        total = (dx0 + alpha_next * dx_next) / alpha
        grads = (total, -sigma * total, sigma_next * dx_next)
        wanted = ctx.needs_input_grad[1:4]
        return (
            None,
            *(g.to(d) if w else None for g, d, w in zip(grads, ctx.dtypes, wanted, strict=True)),
            *[None] * 4,
        )


def renoise(
    x_t: torch.Tensor,
    eps: torch.Tensor,
    noise: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    alpha_next: torch.Tensor,
    sigma_next: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 from eps, and x0 re-noised, in one pass.

    Args:
        x_t, eps, noise: [B, ...], fp32, fp16, bf16 (fp64 on the reference).
        alpha, sigma: [B] sqrt(ab) and sqrt(1 - ab) of the timestep eps belongs to.
        alpha_next, sigma_next: [B] of the timestep to re-noise to.

    Returns:
        x0 [B, ...] fp32, and x_next [B, ...] in x_t's dtype. Differentiable in x_t, eps and noise, to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: a named backend cannot run the call.
    """
    OP.check.tensor("x_t", x_t, ("B", ...))
    for name, value in (("eps", eps), ("noise", noise)):
        OP.check.tensor(name, value, x_t.shape, x_t)
    coefficients = (alpha, sigma, alpha_next, sigma_next)
    for name, value in zip(("alpha", "sigma", "alpha_next", "sigma_next"), coefficients, strict=True):
        OP.check.tensor(name, value, x_t.shape[:1], x_t)
    backend, run = OP.select(x_t, eps, noise, *coefficients)
    if backend == "ref" or not (
        torch.is_grad_enabled() and (x_t.requires_grad or eps.requires_grad or noise.requires_grad)
    ):
        return run(x_t, eps, noise, *coefficients)
    return RenoiseFunction.apply(run, x_t, eps, noise, *coefficients)


def _case(*shape: int) -> Case:
    def make(dtype, device):
        x_t, eps, noise = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        alpha, alpha_next = torch.rand(2, shape[0], device=device) * 0.9 + 0.07
        return x_t, eps, noise, alpha, (1 - alpha**2).sqrt(), alpha_next, (1 - alpha_next**2).sqrt()

    return Case(make, grads=(0, 1, 2))


CASES = {
    "world": _case(64, 4, 16, 16),
    "sdxl": _case(2, 4, 128, 128),
    "odd": _case(3, 5, 7, 11),
    "vector": _case(5, 13),
    "one": _case(1, 1),
    "empty": _case(0, 4, 8, 8),
}

AOT = {"sdxl 20 latents": _case(20, 4, 128, 128)}

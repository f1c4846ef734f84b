"""Attention of a positive and a negative prompt combined: normalized attention guidance (arXiv 2505.21179), NASA.

positive, negative: [B, N, D], per token over D, arithmetic in fp32 (fp64 for fp64 input):

    guided = keep * positive - scale * negative                    keep = 1 + scale unless given
    ratio  = |guided|_1 / |positive|_1
    out    = alpha * guided * min(ratio, tau) / ratio + (1 - alpha) * positive

NASA (SNOOPI, arXiv 2412.02687), positive - scale * negative, is keep = 1, tau = inf, alpha = 1. ``scale`` is the
paper's phi; the authors' code counts from one, nag_scale = phi + 1. In eager PyTorch this is a dozen passes over
memory.
"""

from __future__ import annotations

import math

import torch

from .. import _library, _triton
from .._autograd import reference_gradients
from .._triton import tl
from ..dispatch import Op
from ..testing import Case

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 8192  # channels of a token that one program holds


def nag_combine_ref(positive, negative, scale, tau, alpha, keep):
    wide = torch.float64 if positive.dtype == torch.float64 else torch.float32
    p, n = positive.to(wide), negative.to(wide)
    guided = keep * p - scale * n
    shrink = 1
    if tau < math.inf:  # min(ratio, tau) / ratio without dividing by the norm of a token that is zero
        norm, limit = guided.abs().sum(-1, keepdim=True), tau * p.abs().sum(-1, keepdim=True)
        above = norm > limit
        shrink = torch.where(above, limit, 1) / torch.where(above, norm, 1)
    return (alpha * shrink * guided + (1 - alpha) * p).to(positive.dtype)


@_triton.jit
def _nag_combine_fwd_kernel(positive, negative, out, channels, scale, tau, alpha, keep, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < channels
    at = tl.program_id(0).to(tl.int64) * channels + at
    p = tl.load(positive + at, inside, 0.0).to(tl.float32)
    n = tl.load(negative + at, inside, 0.0).to(tl.float32)
    guided = keep * p - scale * n
    norm, limit = tl.sum(tl.abs(guided), 0), tau * tl.sum(tl.abs(p), 0)
    above = norm > limit
    shrink = tl.where(above, limit, 1.0) / tl.where(above, norm, 1.0)
    y = alpha * shrink * guided + (1 - alpha) * p
    tl.store(out + at, y.to(out.dtype.element_ty), inside)


@_triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@_triton.jit
def _nag_combine_bwd_kernel(positive, negative, dout, dpositive, dnegative, channels, scale, tau, alpha, keep,
                            BLOCK: tl.constexpr):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < channels
    at = tl.program_id(0).to(tl.int64) * channels + at
    p = tl.load(positive + at, inside, 0.0).to(tl.float32)
    n = tl.load(negative + at, inside, 0.0).to(tl.float32)
    dy = tl.load(dout + at, inside, 0.0).to(tl.float32)
    guided = keep * p - scale * n
    norm, limit = tl.sum(tl.abs(guided), 0), tau * tl.sum(tl.abs(p), 0)
    above = norm > limit
    norm = tl.where(above, norm, 1.0)
    shrink = tl.where(above, limit, 1.0) / norm
    # Of shrink = tau |p|_1 / |guided|_1, where it applies.
    dshrink = tl.where(above, alpha * tl.sum(dy * guided, 0) / norm, 0.0)
    dguided = alpha * shrink * dy - dshrink * shrink * _sign(guided)
    dlimit = dshrink * tl.where(above, tau, 0.0)  # tau may be inf where nothing is above
    dp = keep * dguided + dlimit * _sign(p) + (1 - alpha) * dy
    tl.store(dpositive + at, dp.to(dpositive.dtype.element_ty), inside)
    tl.store(dnegative + at, (-scale * dguided).to(dnegative.dtype.element_ty), inside)


def _supports(positive, negative, *scalars) -> str | None:
    if (reason := _triton.missing(positive)) is not None:
        return reason
    if positive.dtype not in _DTYPES or positive.dtype != negative.dtype:
        return f"dtypes must be one of fp32, fp16, bf16, got {positive.dtype}, {negative.dtype}"
    if not 1 <= positive.shape[-1] <= _WIDEST:
        return f"channels must be in 1..{_WIDEST}, got {positive.shape[-1]}"
    return None


def _launch(kernel, tensors: dict[str, torch.Tensor], scale, tau, alpha, keep) -> None:
    positive = tensors["positive"]
    channels = positive.shape[-1]
    args = tensors | dict(channels=channels, scale=scale, tau=tau, alpha=alpha, keep=keep)
    block = 1 << (channels - 1).bit_length()
    warps = max(1, min(8, block // 256))
    _triton.Launch(kernel, (positive.numel() // channels,), args, dict(BLOCK=block), num_warps=warps).run()


def _run_fwd(positive, negative, scale, tau, alpha, keep):
    positive, negative = positive.contiguous(), negative.contiguous()
    out = torch.empty_like(positive)
    _launch(_nag_combine_fwd_kernel, dict(positive=positive, negative=negative, out=out), scale, tau, alpha, keep)
    return out


def _run_bwd(positive, negative, dout, scale, tau, alpha, keep):
    positive, negative, dout = positive.contiguous(), negative.contiguous(), dout.contiguous()
    tensors = dict(positive=positive, negative=negative, dout=dout)
    tensors |= dict(dpositive=torch.empty_like(positive), dnegative=torch.empty_like(negative))
    _launch(_nag_combine_bwd_kernel, tensors, scale, tau, alpha, keep)
    return tensors["dpositive"], tensors["dnegative"]


def _fake_fwd(positive, *rest):
    return torch.empty_like(positive, memory_format=torch.contiguous_format)


def _fake_bwd(positive, negative, *rest):
    return _fake_fwd(positive), _fake_fwd(negative)


_SCALARS = "float scale, float tau, float alpha, float keep"
_FWD = f"(Tensor positive, Tensor negative, {_SCALARS}) -> Tensor"
_BWD = f"(Tensor positive, Tensor negative, Tensor dout, {_SCALARS}) -> (Tensor, Tensor)"
OP = Op("nag_combine", ref=nag_combine_ref)
OP.impl("triton", _library.register("nag_combine_fwd_triton", _FWD, _run_fwd, _fake_fwd), _supports)
_bwd = _library.register("nag_combine_bwd_triton", _BWD, _run_bwd, _fake_bwd)


class NagCombineFunction(torch.autograd.Function):
    """The forward pass saves its input; norms are cheaper to sum again than to keep."""

    @staticmethod
    def forward(ctx, run, positive, negative, *scalars):
        ctx.save_for_backward(positive, negative)
        ctx.scalars = scalars
        return run(positive, negative, *scalars)

    @staticmethod
    def backward(ctx, dout):
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of a gradient goes through the reference
            ref = lambda p, n: nag_combine_ref(p, n, *ctx.scalars)  # noqa: E731
            grads = reference_gradients(ref, inputs, ctx.needs_input_grad[1:3], dout)
        else:
            grads = _bwd(*inputs, dout, *ctx.scalars)
        return (None, *(g if w else None for g, w in zip(grads, ctx.needs_input_grad[1:3], strict=True)), *[None] * 4)


def nag_combine(
    positive: torch.Tensor,
    negative: torch.Tensor,
    scale: float = 2.0,
    tau: float = 2.5,
    alpha: float = 0.5,
    keep: float | None = None,
) -> torch.Tensor:
    """Guides attention outputs away from a negative prompt.

    Args:
        positive, negative: [B, N, D] fp32, fp16, bf16 (fp64 on the reference), before the output projection.
        scale: how far to extrapolate; 0 changes nothing.
        tau: largest growth of a token's L1 norm; inf for no bound.
        alpha: share of the guided output.
        keep: weight of ``positive`` in the extrapolation; 1 + scale unless given, 1 for NASA.

    Returns:
        [B, N, D] in positive's dtype. Differentiable in positive and negative, to any order.

    Raises:
        ValueError: shapes, dtypes, devices or scalars do not fit. RuntimeError: a named backend cannot run the call.
    """
    OP.check.tensor("positive", positive, ("B", "N", "D"))
    OP.check.tensor("negative", negative, positive.shape, positive)
    for name, value in (("scale", scale), ("tau", tau), ("alpha", alpha), ("keep", 0 if keep is None else keep)):
        OP.check.number(name, value)
    if not tau > 0:
        OP.check.fail("tau", "positive", tau)
    args = (positive, negative, scale, tau, alpha, 1 + scale if keep is None else keep)
    backend, run = OP.select(*args)
    if backend == "ref" or not (torch.is_grad_enabled() and (positive.requires_grad or negative.requires_grad)):
        return run(*args)
    return NagCombineFunction.apply(run, *args)


def _case(*shape: int, scalars: tuple[float, ...] = (2.0, 2.5, 0.5)) -> Case:
    def make(dtype, device):
        positive = torch.randn(shape, device=device)
        apart = 2 * torch.rand(*shape[:-1], 1, device=device)  # so that some tokens reach tau and some do not
        negative = positive + apart * torch.randn(shape, device=device)
        return positive.to(dtype), negative.to(dtype), *scalars

    return Case(make, grads=(0, 1))


CASES = {
    "small": _case(2, 5, 8),
    "odd": _case(3, 7, 37, scalars=(1.5, 1.75, 0.375)),
    "nasa": _case(2, 3, 20, scalars=(0.4, math.inf, 1.0, 1.0)),
    "wide": _case(1, 3, 1280),
    "one channel": _case(1, 2, 1),
    "empty": _case(0, 4, 8),
}
AOT = {"sdxl 64": _case(2, 4096, 640), "sdxl 32": _case(2, 1024, 1280)}

"""A time embedding, GroupNorm and SiLU in one op.   y = silu((x + shift - mean) rstd weight + bias)

x, y: [B, C, ...] channels first or last in memory; weight, bias: [C]; shift: [B, C]; mean, rstd: [B, G] fp32.
Statistics and arithmetic in fp32 (fp64 for fp64 input). In eager PyTorch these are three operators.

On a GPU one launch takes the moments of slices of each channel, so that a single image fills the machine, one merges
them per group (Chan), one applies them. Backward likewise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import _library, _native, _triton
from .._autograd import reference_gradients
from .._triton import tl
from ..dispatch import Op, missing, pays_from
from ..testing import Case

_TILE = 2048  # elements of a Triton program's tile
_PROGRAMS = 1024  # programs that keep a large GPU busy
_HELD = 96 * 1024  # bytes of a group, of x or of x and dy, that one block of the CUDA version holds
_SINGLE = 8192  # elements it holds where they are no packs of 16 bytes; from instructions counted, not yet from times


def group_norm_silu_ref(x, weight, bias, num_groups, eps=1e-5, shift=None, silu=True):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias, shift = (None if t is None else t.to(wide) for t in (weight, bias, shift))
    y = x.to(wide)
    if shift is not None:
        y = y + shift.view(*shift.shape, *[1] * (x.ndim - 2))
    if weight is None and bias is not None:  # PyTorch has no gradient to a bias alone
        weight = torch.ones_like(bias)
    if torch.is_grad_enabled() and not y.requires_grad:  # nor, where channels are last, to the parameters alone
        y = y.contiguous()
    y = torch.group_norm(y, num_groups, weight, bias, eps)
    y = (F.silu(y) if silu else y).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last) if _last(x) else y


def _last(x: torch.Tensor) -> bool:
    """Whether channels are innermost in memory."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


@_triton.jit
def _load_tile(x, shift, tile, splits, positions, channels, per_split, step, LAST: tl.constexpr, P: tl.constexpr,
               C: tl.constexpr):  # fmt: skip
    """Program -> tile: (x + shift [P, C], its offsets, which are inside, channel of each column, image, split)."""
    blocks = tl.cdiv(channels, C)
    split = tile % splits
    image = tile // splits // blocks
    c = (tile // splits % blocks * C + tl.arange(0, C)).to(tl.int64)
    p = (split * per_split + step * P + tl.arange(0, P)).to(tl.int64)
    end = tl.minimum(positions, (split + 1) * per_split)
    inside = (p < end)[:, None] & (c < channels)[None, :]
    base = image.to(tl.int64) * channels * positions
    if LAST:
        at = base + p[:, None] * channels + c[None, :]
    else:
        at = base + c[None, :] * positions + p[:, None]
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if shift is not None:
        value += tl.load(shift + image * channels + c, c < channels, 0.0).to(tl.float32)[None, :]
    return value, at, inside, c, image, split


@_triton.jit
def _columns(tile, split, splits, channels, C: tl.constexpr):
    """The channels of a tile's columns, and their places in [B, splits, channels]."""
    blocks = tl.cdiv(channels, C)
    c = tile // splits % blocks * C + tl.arange(0, C)
    return c, (tile // splits // blocks * splits + split).to(tl.int64) * channels + c


@_triton.jit
def _group_norm_silu_stats_kernel(x, shift, means, m2s, splits, positions, channels, per_split, LAST: tl.constexpr,
                                  P: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Mean and m2 of one split of C channels -> means, m2s [B, splits, channels]."""
    tile = tl.program_id(0)
    split = tile % splits
    size = tl.minimum(positions, (split + 1) * per_split) - split * per_split
    mean = tl.zeros([C], tl.float32)
    m2 = tl.zeros([C], tl.float32)
    for step in range(0, tl.cdiv(per_split, P)):
        count = tl.minimum(size - step * P, P)
        if count > 0:
            value, at, inside, c, image, s = _load_tile(
                x, shift, tile, splits, positions, channels, per_split, step, LAST, P, C
            )
            own = tl.sum(tl.where(inside, value, 0.0), 0) / count
            away = tl.where(inside, value - own[None, :], 0.0)
            rest = tl.sum(away, 0) / count  # what rounding a large mean left
            delta = (own - mean) + rest
            share = count / (step * P + count)
            mean += delta * share
            m2 += tl.sum(away * away, 0) - count * rest * rest + delta * delta * (step * P) * share
    c, to = _columns(tile, split, splits, channels, C)
    tl.store(means + to, mean, c < channels)
    tl.store(m2s + to, m2, c < channels)


@_triton.jit
def _group_norm_silu_merge_kernel(means, m2s, mean, rstd, splits, positions, channels, groups, per_split, eps,
                                  S: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Moments of a group from those of its channels' splits: the mean first, then m2 around it. Few numbers: fp64."""
    program = tl.program_id(0)
    width = channels // groups
    j = tl.arange(0, W)
    c = program % groups * width + j
    size = tl.cast(width * positions, tl.float64)  # of ones it is a constant, which has no .to
    centre = 0.0
    for step in tl.static_range(2):
        total = tl.zeros([S, W], tl.float64)
        for start in range(0, splits, S):
            s = start + tl.arange(0, S)
            count = tl.minimum(positions - s * per_split, per_split).to(tl.float64)[:, None]
            inside = (s < splits)[:, None] & (j < width)[None, :]
            at = (program // groups * splits + s).to(tl.int64)[:, None] * channels + c[None, :]
            away = tl.load(means + at, inside, 0.0) - centre
            term = count * away if step == 0 else tl.load(m2s + at, inside, 0.0) + count * away * away
            total += tl.where(inside, term, 0.0)
        if step == 0:
            centre = tl.sum(total) / size
    tl.store(mean + program, centre.to(tl.float32))
    tl.store(rstd + program, (1.0 / tl.sqrt(tl.sum(total) / size + eps)).to(tl.float32))


@_triton.jit
def _normalised(value, weight, bias, mean, rstd, c, image, channels, groups):
    """xhat, weight xhat + bias, weight and rstd per column."""
    known, group = c < channels, image * groups + c // (channels // groups)
    r = tl.load(rstd + group, known, 0.0)[None, :]
    hat = (value - tl.load(mean + group, known, 0.0)[None, :]) * r
    z = hat
    w = tl.full([1, 1], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + c, known, 0.0).to(tl.float32)[None, :]
        z *= w
    if bias is not None:
        z += tl.load(bias + c, known, 0.0).to(tl.float32)[None, :]
    return hat, z, w, r, group


@_triton.jit
def _group_norm_silu_apply_kernel(x, weight, bias, shift, mean, rstd, y, splits, positions, channels, groups, SILU:
                                  tl.constexpr, LAST: tl.constexpr, P: tl.constexpr, C: tl.constexpr):  # fmt: skip
    value, at, inside, c, image, split = _load_tile(
        x, shift, tl.program_id(0), splits, positions, channels, P, 0, LAST, P, C
    )
    hat, z, w, r, group = _normalised(value, weight, bias, mean, rstd, c, image, channels, groups)
    z = z * tl.sigmoid(z) if SILU else z
    tl.store(y + at, z.to(y.dtype.element_ty), inside)


@_triton.jit
def _gradient(dy, z, at, inside, SILU: tl.constexpr):
    """The gradient of weight xhat + bias."""
    dz = tl.load(dy + at, inside, 0.0).to(tl.float32)
    if SILU:
        s = tl.sigmoid(z)
        dz *= s * (1.0 + z * (1.0 - s))
    return dz


@_triton.jit
def _group_norm_silu_sums_kernel(dy, x, weight, bias, shift, mean, rstd, sums, splits, positions, channels, groups,
                                 per_split, stride, SILU: tl.constexpr, LAST: tl.constexpr, P: tl.constexpr,
                                 C: tl.constexpr):  # fmt: skip
    """Sums of dz, dz xhat and xhat over one split of C channels -> sums [3, B, splits, channels]."""
    tile = tl.program_id(0)
    dzs = tl.zeros([C], tl.float32)
    dots = tl.zeros([C], tl.float32)
    hats = tl.zeros([C], tl.float32)
    for step in range(0, tl.cdiv(per_split, P)):
        value, at, inside, c, image, split = _load_tile(
            x, shift, tile, splits, positions, channels, per_split, step, LAST, P, C
        )
        hat, z, w, r, group = _normalised(value, weight, bias, mean, rstd, c, image, channels, groups)
        dz = _gradient(dy, z, at, inside, SILU)
        dzs += tl.sum(dz, 0)
        dots += tl.sum(dz * hat, 0)
        hats += tl.sum(tl.where(inside, hat, 0.0), 0)
    c, to = _columns(tile, tile % splits, splits, channels, C)
    tl.store(sums + to, dzs, c < channels)
    tl.store(sums + stride + to, dots, c < channels)
    tl.store(sums + 2 * stride + to, hats, c < channels)


@_triton.jit
def _group_norm_silu_finish_kernel(sums, weight, rstd, s1, s2, dweight, dbias, dshift, splits, positions, channels,
                                   groups, stride, S: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """A group's means s1 of weight dz, s2 of weight dz xhat; dweight, dbias, dshift [B, C]. Few numbers: fp64."""
    program = tl.program_id(0)
    width = channels // groups
    j = tl.arange(0, W)
    c = program % groups * width + j
    known = j < width
    dzs = tl.zeros([W], tl.float64)
    dots = tl.zeros([W], tl.float64)
    hats = tl.zeros([W], tl.float64)
    for start in range(0, splits, S):
        s = start + tl.arange(0, S)
        inside = (s < splits)[:, None] & known[None, :]
        at = sums + (program // groups * splits + s).to(tl.int64)[:, None] * channels + c[None, :]
        dzs += tl.sum(tl.load(at, inside, 0.0).to(tl.float64), 0)
        dots += tl.sum(tl.load(at + stride, inside, 0.0).to(tl.float64), 0)
        hats += tl.sum(tl.load(at + 2 * stride, inside, 0.0).to(tl.float64), 0)
    w = tl.full([W], 1.0, tl.float64)
    if weight is not None:
        w = tl.load(weight + c, known, 0.0).to(tl.float64)
    size = tl.cast(width * positions, tl.float64)  # of ones it is a constant, which has no .to
    a = tl.sum(w * dzs) / size
    b = tl.sum(w * dots) / size
    tl.store(s1 + program, a.to(tl.float32))
    tl.store(s2 + program, b.to(tl.float32))
    to = program // groups * channels + c
    tl.store(dbias + to, dzs.to(tl.float32), known)
    tl.store(dweight + to, dots.to(tl.float32), known)
    shifts = tl.load(rstd + program) * (w * dzs - positions * a - b * hats)
    tl.store(dshift + to, shifts.to(tl.float32), known)


@_triton.jit
def _group_norm_silu_bwd_kernel(dy, x, weight, bias, shift, mean, rstd, s1, s2, dx, splits, positions, channels,
                                groups, SILU: tl.constexpr, LAST: tl.constexpr, P: tl.constexpr,
                                C: tl.constexpr):  # fmt: skip
    value, at, inside, c, image, split = _load_tile(
        x, shift, tl.program_id(0), splits, positions, channels, P, 0, LAST, P, C
    )
    hat, z, w, r, group = _normalised(value, weight, bias, mean, rstd, c, image, channels, groups)
    dz = _gradient(dy, z, at, inside, SILU)
    a = tl.load(s1 + group, c < channels, 0.0)[None, :]
    b = tl.load(s2 + group, c < channels, 0.0)[None, :]
    tl.store(dx + at, (r * (w * dz - a - hat * b)).to(dx.dtype.element_ty), inside)


def _supports(device: str):
    def supports(x, weight, bias, num_groups, eps=1e-5, shift=None, silu=True) -> str | None:
        if (reason := missing(device, x)) is not None:
            return reason
        for name, value in (("x", x), ("weight", weight), ("bias", bias), ("shift", shift)):
            if value is not None and value.dtype not in _native.DTYPES:
                return f"{name} must be fp32, fp16 or bf16, got {value.dtype}"
        return None

    return supports


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if _last(x) else x.contiguous()


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    """Images, channels, positions."""
    return len(x), x.shape[1], x.numel() // max(1, len(x) * x.shape[1])


def _outputs(x: torch.Tensor, num_groups: int):
    stats = (len(x), num_groups)
    return torch.empty_like(x), x.new_empty(stats, dtype=torch.float32), x.new_empty(stats, dtype=torch.float32)


def _fake_fwd(x, weight, bias, shift, num_groups, eps, silu):
    return _outputs(_dense(x), num_groups)


def _fake_bwd(dy, x, weight, bias, shift, mean, rstd, num_groups, silu):  # zeros: also what an empty batch gets
    channels = x.new_zeros(x.shape[1], dtype=torch.float32)
    dshift = x.new_zeros(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(_dense(x)), channels, torch.zeros_like(channels), dshift


def _floats(*parameters: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.float().contiguous() for t in parameters]


def _fwd_native(x, weight, bias, shift, num_groups, eps, silu):
    x = _dense(x)
    y, mean, rstd = _outputs(x, num_groups)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    fields = (x, *_floats(weight, bias, shift), y, mean, rstd, *_sizes(x), num_groups, float(eps))
    flags = int(silu), int(_last(x)), _native.DTYPES[x.dtype]
    _native.launch(f"group_norm_silu_fwd_{x.device.type}", *fields, *flags, *_scratch(x, num_groups, 1))
    return y, mean, rstd


def _bwd_native(dy, x, weight, bias, shift, mean, rstd, num_groups, silu):
    x = _dense(x)
    if x.numel() == 0:
        return _fake_bwd(dy, x, weight, bias, shift, mean, rstd, num_groups, silu)
    dx = torch.empty_like(x)
    dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
    dweight, dbias, dshift = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(3))
    fields = (dy, x, *_floats(weight, bias, shift), mean, rstd, dx, dweight, dbias, dshift, *_sizes(x), num_groups)
    flags = int(silu), int(_last(x)), _native.DTYPES[x.dtype]
    _native.launch(f"group_norm_silu_bwd_{x.device.type}", *fields, *flags, *_scratch(x, num_groups, 2))
    dweight, dbias = (t.squeeze_(0) if len(t) == 1 else t.sum(0) for t in (dweight, dbias))
    return dx, dweight, dbias, dshift


def _scratch(x: torch.Tensor, num_groups: int, held: int) -> tuple:
    """What csrc/group_norm_silu.h adds for CUDA: scratch and slices; none if a block holds a group ``held`` times."""
    if not x.is_cuda:
        return ()
    group, run = x[0].numel() // num_groups, x.shape[1] // num_groups if _last(x) else _sizes(x)[2]
    if held * group * x.element_size() <= _HELD and (run * x.element_size() % 16 == 0 or group <= _SINGLE):
        return None, 0
    splits = _tiling(x, _TILE)[2]
    return x.new_empty(len(x) * (3 * splits * x.shape[1] + 2 * num_groups), dtype=torch.float32), splits


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tiling(x: torch.Tensor, tile: int) -> tuple[int, int, int, int]:
    """(P, C, splits, positions per split) of the statistics: a tile is P positions of C channels, a run of memory."""
    batch, channels, positions = _sizes(x)
    if _last(x):
        c = min(64, _power(channels))
        p = min(tile // c, _power(positions))
    else:
        p = min(tile, _power(positions))
        c = min(tile // p, _power(channels))
    splits = -(-_PROGRAMS // (batch * -(-channels // c)))
    per_split = -(-positions // (splits * p)) * p
    return p, c, -(-positions // per_split), per_split


def _lanes(splits: int, width: int) -> dict[str, int]:
    """The tile in which a group's partial results are merged."""
    return dict(S=max(1, min(_power(splits), 512 // _power(width))), W=_power(width))


def _fwd_triton(x, weight, bias, shift, num_groups, eps, silu):
    x = _dense(x)
    y, mean, rstd = _outputs(x, num_groups)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    weight, bias, shift = (None if t is None else t.contiguous() for t in (weight, bias, shift))
    batch, channels, positions = _sizes(x)
    p, c, splits, per_split = _tiling(x, _TILE)
    columns = batch * -(-channels // c)
    means, m2s = x.new_empty((2, batch, splits, channels), dtype=torch.float32)
    shape = dict(positions=positions, channels=channels)
    tile = dict(LAST=_last(x), P=p, C=c)
    counts = dict(splits=splits, per_split=per_split)
    args = dict(x=x, shift=shift, means=means, m2s=m2s) | counts
    _triton.Launch(_group_norm_silu_stats_kernel, (columns * splits,), args | shape, tile).run()
    args = dict(means=means, m2s=m2s, mean=mean, rstd=rstd, eps=float(eps), groups=num_groups) | counts | shape
    lanes = _lanes(splits, channels // num_groups)
    _triton.Launch(_group_norm_silu_merge_kernel, (batch * num_groups,), args, lanes).run()
    args = dict(x=x, weight=weight, bias=bias, shift=shift, mean=mean, rstd=rstd, y=y, groups=num_groups)
    args |= shape | dict(splits=-(-positions // p))
    grid = (columns * args["splits"],)
    _triton.Launch(_group_norm_silu_apply_kernel, grid, args, tile | dict(SILU=silu)).run()
    return y, mean, rstd


def _bwd_triton(dy, x, weight, bias, shift, mean, rstd, num_groups, silu):
    x = _dense(x)
    if x.numel() == 0:
        return _fake_bwd(dy, x, weight, bias, shift, mean, rstd, num_groups, silu)
    dx = torch.empty_like(x)
    dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
    weight, bias, shift = (None if t is None else t.contiguous() for t in (weight, bias, shift))
    batch, channels, positions = _sizes(x)
    p, c, splits, per_split = _tiling(x, _TILE // 2)
    columns = batch * -(-channels // c)
    sums = x.new_empty((3, batch, splits, channels), dtype=torch.float32)
    dweight, dbias, dshift = (x.new_empty((batch, channels), dtype=torch.float32) for _ in range(3))
    s1, s2 = x.new_empty((2, batch, num_groups), dtype=torch.float32)
    shape = dict(positions=positions, channels=channels, groups=num_groups)
    tile = dict(SILU=silu, LAST=_last(x), P=p, C=c)
    inputs = dict(dy=dy, x=x, weight=weight, bias=bias, shift=shift, mean=mean, rstd=rstd)
    args = inputs | shape | dict(sums=sums, splits=splits, per_split=per_split, stride=sums[0].numel())
    _triton.Launch(_group_norm_silu_sums_kernel, (columns * splits,), args, tile).run()
    args = dict(sums=sums, weight=weight, rstd=rstd, s1=s1, s2=s2, dweight=dweight, dbias=dbias, dshift=dshift)
    args |= shape | dict(splits=splits, stride=sums[0].numel())
    lanes = _lanes(splits, channels // num_groups)
    _triton.Launch(_group_norm_silu_finish_kernel, (batch * num_groups,), args, lanes).run()
    args = inputs | shape | dict(s1=s1, s2=s2, dx=dx, splits=-(-positions // p))
    _triton.Launch(_group_norm_silu_bwd_kernel, (columns * args["splits"],), args, tile).run()
    return dx, dweight.sum(0), dbias.sum(0), dshift


_INPUTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? shift"
_SCHEMA = f"({_INPUTS}, int num_groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)"
_TAIL = "Tensor mean, Tensor rstd, int num_groups, bool silu"
_BWD_SCHEMA = f"(Tensor dy, {_INPUTS}, {_TAIL}) -> (Tensor, Tensor, Tensor, Tensor)"
_NATIVE = _fwd_native, _bwd_native
_LAUNCHERS = {"triton": (_fwd_triton, _bwd_triton), "cpu": (*_NATIVE, "CPU"), "cuda": (*_NATIVE, "CUDA")}
OP = Op("group_norm_silu", ref=group_norm_silu_ref)
_BACKWARD = {}
for _name, (_fwd, _bwd, *_devices) in _LAUNCHERS.items():
    _run = _library.register(f"group_norm_silu_fwd_{_name}", _SCHEMA, _fwd, _fake_fwd, *_devices)
    OP.impl(_name, _run, _supports(_name), *[pays_from(1 << 17, 1 << 18)] * (_name == "cpu"))
    _BACKWARD[_name] = _library.register(f"group_norm_silu_bwd_{_name}", _BWD_SCHEMA, _bwd, _fake_bwd, *_devices)


class GroupNormSiluFunction(torch.autograd.Function):
    """Saves x, mean and rstd; a gradient that is itself differentiated is the reference's."""

    @staticmethod
    def forward(ctx, backend, run, x, weight, bias, num_groups, eps, shift, silu):
        y, mean, rstd = run(x, weight, bias, shift, num_groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, shift, mean, rstd)
        ctx.backend, ctx.num_groups, ctx.eps, ctx.silu = backend, num_groups, eps, silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, shift, mean, rstd = ctx.saved_tensors
        inputs = (x, weight, bias, shift)
        wanted = [ctx.needs_input_grad[i] for i in (2, 3, 4, 7)]
        if torch.is_grad_enabled():  # create_graph
            ref = lambda x, w, b, s: group_norm_silu_ref(x, w, b, ctx.num_groups, ctx.eps, s, ctx.silu)  # noqa: E731
            grads = reference_gradients(ref, inputs, wanted, dy)
        else:
            grads = _BACKWARD[ctx.backend](dy, x, weight, bias, shift, mean, rstd, ctx.num_groups, ctx.silu)
            grads = [g.to(t.dtype) if w else None for g, t, w in zip(grads, inputs, wanted, strict=True)]
        dx, dweight, dbias, dshift = grads
        return None, None, dx, dweight, dbias, None, None, dshift, None


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_groups: int,
    eps: float = 1e-5,
    shift: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    """silu(group_norm(x + shift)), the statistics in fp32.

    Args:
        x: [B, C, H, W] or [B, C, L], fp32, fp16, bf16 (fp64 on the reference).
        weight, bias: [C] or None, fp32 or x's dtype.
        num_groups: groups of C / num_groups channels that share mean and variance.
        eps: added to the variance.
        shift: [B, C] or None, added to every position of a channel before the statistics; a time embedding.
        silu: False leaves the activation out.

    Returns:
        Like x, channels last if x is. Differentiable in x, weight, bias and shift, to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: a named backend cannot run the call.
    """
    OP.check.tensor("x", x)
    if x.ndim < 3:
        OP.check.fail("x", "[B, C, ...]", list(x.shape))
    OP.check.divisor("num_groups", num_groups, x.shape[1], f"{x.shape[1]} channels")
    for name, value, axes in (("weight", weight, (1, 2)), ("bias", bias, (1, 2)), ("shift", shift, (0, 2))):
        if value is not None:
            OP.check.tensor(name, value, x.shape[slice(*axes)], x)
    OP.check.number("eps", eps, 0)
    if not isinstance(silu, bool):
        OP.check.fail("silu", "a bool", repr(silu))
    backend, run = OP.select(x, weight, bias, num_groups, eps, shift, silu)
    if backend == "ref":
        return run(x, weight, bias, num_groups, eps, shift, silu)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, shift)):
        return GroupNormSiluFunction.apply(backend, run, x, weight, bias, num_groups, eps, shift, silu)
    return run(x, weight, bias, shift, num_groups, eps, silu)[0]


def _case(shape, num_groups, shift=False, silu=True, last=False, affine=torch.float32) -> Case:  # affine None: as x
    def make(dtype, device):
        x = torch.randn(shape, device=device).to(dtype)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = (torch.randn(shape[1], device=device).to(affine or dtype) for _ in range(2))
        embedding = torch.randn(shape[:2], device=device).to(dtype) if shift else None
        return x, weight, bias, num_groups, 1e-5, embedding, silu

    return Case(make, grads=(0, 1, 2, 5))


CASES = {
    "small": _case((2, 24, 3, 2), 8, shift=True),
    "sdxl": _case((2, 320, 8, 8), 32, shift=True),
    "last": _case((1, 320, 8, 8), 32, shift=True, last=True),
    "960": _case((1, 960, 4, 4), 32, affine=None),
    "1920 last": _case((1, 1920, 2, 4), 32, last=True, affine=None),
    "odd": _case((3, 15, 7, 11), 5, silu=False),
    "odd last": _case((3, 15, 7, 11), 5, shift=True, silu=False, last=True),
    "line": _case((2, 12, 35), 4),
    "large": _case((1, 4, 72, 70), 2, last=True),
    "empty": _case((0, 8, 4, 4), 4, shift=True),
}
AOT = {
    f"{c}x{side}x{side}{' last' if last else ''}": _case((1, c, side, side), 32, shift=True, last=last)
    for c, side in ((320, 128), (640, 64), (960, 64), (1280, 32), (1920, 32), (2560, 32))
    for last in (False, True)
}

"""The triton backend of nitrokernels/ops/head_pool.py: two launches forward, one for either gradient.

A logit is a scalar per (image, head), so every gradient of a head on an image is the incoming grad[b, h] times a unit
gradient that depends on nothing later. The tail kernel computes it along with the logit; what is left for the backward
pass is one grouped GEMM, to the stacks or to the maps.

Sizes and strides of the maps are a small int64 table on the device, made once per set of shapes; maps and stacks are
tuples of pointers, so nothing is copied together.
"""

from __future__ import annotations

import functools

import torch

from .. import _native, _triton
from .._triton import tl
from .conv4x4 import cell_pixels, convolve, correlate, spread

_WIDEST = 128  # channels of a head that one program holds
_POINTERS = 480  # a launch's arguments must fit 4 KB
_POSITIONS, _OUTPUTS = 128, 64  # a tile of the first convolution
_CELLS = 64  # a tile of the gradient to the maps, times _OUTPUTS: with 128 of them Triton 3.6 spills on sm_90
_TAIL_POSITIONS = 32  # a tile of the tail, times all channels of a head
_ELEMENTS = 128  # of every filter of a head, a tile of their gradients
_STEP = 16  # how much of a sum one step of a GEMM takes: a channel of 4x4, or 4 of 2x2


@_triton.jit
def _pick(pointers, which):
    """pointers[which] for a number known at run time only."""
    pointer = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        pointer = tl.where(which == i, pointers[i], pointer)
    return pointer


@_triton.jit
def _owner(table, tile, columns, C: tl.constexpr):
    """The column whose tiles, numbered from its first row on, contain this one, and the tile's place among them."""
    at = tl.arange(0, C)
    first = tl.load(table + at, at < columns, 0)
    column = tl.sum(((first <= tile) & (at < columns)).to(tl.int32), 0) - 1
    return column, (tile - tl.load(table + column)).to(tl.int32)


@_triton.jit
def _describe(entries, entry, count):
    """What ``_entries`` says of a map: level, its first conv, depth, channels, stride from image to image, plane, and
    where its heads are in activations and gradients: offset of the first, size of each. Flat, or Triton 3.6 fails."""
    at = entries + entry
    level = tl.load(at + count).to(tl.int32)
    conv = tl.load(at + 2 * count).to(tl.int32)
    depth = tl.load(at + 3 * count).to(tl.int32)
    channels = tl.load(at + 4 * count).to(tl.int32)
    rows, columns = tl.load(at + 5 * count).to(tl.int32), tl.load(at + 6 * count).to(tl.int32)
    plane = (tl.load(at + 8 * count), tl.load(at + 9 * count), tl.load(at + 10 * count), rows, columns)
    offset, size = tl.load(at + 11 * count), tl.load(at + 12 * count)
    return level, conv, depth, channels, tl.load(at + 7 * count), plane, offset, size


@_triton.jit
def _head_pool_first_kernel(features, conv, index, entries, y, batch, heads, width, count, tiles, E: tl.constexpr,
                            M: tl.constexpr, P: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Persistent: the first convolution of every head on every map, a tile at a time."""
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, place = _owner(entries, tile, count, E)
        level, first, depth, channels, stride, plane, offset, size = _describe(entries, entry, count)
        columns = plane[4] // 2
        positions = plane[3] // 2 * columns
        blocks = (heads * width + M - 1) // M
        o = place % blocks * M + tl.arange(0, M)
        p = place // blocks * P + tl.arange(0, P)
        whole, known = o < heads * width, p < batch * positions
        image, position = p // positions, p % positions
        row = tl.load(index + entry * heads + o // width, whole, 0)
        out = convolve(
            _pick(features, entry), image * stride, plane, position // columns, position % columns, known,
            _pick(conv, first), (row * width + o % width) * channels * 16, whole, channels, M, P, K,
        )  # fmt: skip
        to = offset + (image * heads)[None, :] * size + (o // width)[:, None] * size
        to += (o % width * positions)[:, None] + position[None, :]
        tl.store(y + to, out, whole[:, None] & known[None, :])


@_triton.jit
def _group_sum(value, group, W: tl.constexpr):
    """To each of W channels the sum over its group."""
    at = tl.arange(0, W) // group
    return tl.sum(tl.where(at[:, None] == at[None, :], value[None, :], 0.0), 1)


@_triton.jit
def _normalise(y, out, weight, bias, width, positions, group, W: tl.constexpr, P: tl.constexpr):
    """Stores silu(weight xhat + bias); mean and 1 / deviation of each channel's group, and its mean activation."""
    c, p = tl.arange(0, W)[:, None], tl.arange(0, P)[None, :]
    at = c * positions + p
    total = tl.full([W, P], 0.0, tl.float32)
    for start in range(0, positions, P):
        total += tl.load(y + start + at, (c < width) & (start + p < positions), 0.0)
    mean = _group_sum(tl.sum(total, 1), group, W) / (group * positions)
    total = tl.full([W, P], 0.0, tl.float32)
    for start in range(0, positions, P):
        inside = (c < width) & (start + p < positions)
        away = tl.where(inside, tl.load(y + start + at, inside, 0.0) - mean[:, None], 0.0)
        total += away * away
    rstd = 1.0 / tl.sqrt(_group_sum(tl.sum(total, 1), group, W) / (group * positions) + 1e-5)
    total = tl.full([W, P], 0.0, tl.float32)
    for start in range(0, positions, P):
        inside = (c < width) & (start + p < positions)
        z = (tl.load(y + start + at, inside, 0.0) - mean[:, None]) * rstd[:, None] * weight[:, None] + bias[:, None]
        value = tl.where(inside, z / (1.0 + tl.exp(-z)), 0.0)
        tl.store(out + start + at, value, inside)
        total += value
    return mean, rstd, tl.sum(total, 1) / positions


@_triton.jit
def _slope(y, d, inside, mean, rstd, weight, bias):
    """xhat, and the gradient of weight xhat + bias where d holds the activation's."""
    hat = tl.where(inside, (tl.load(y, inside, 0.0) - mean[:, None]) * rstd[:, None], 0.0)
    z = hat * weight[:, None] + bias[:, None]
    s = 1.0 / (1.0 + tl.exp(-z))
    return hat, tl.load(d, inside, 0.0) * s * (1.0 + z * (1.0 - s))


@_triton.jit
def _normalise_back(y, d, mean, rstd, weight, bias, width, positions, group, W: tl.constexpr, P: tl.constexpr):
    """Turns the gradient of an activation, in place, into that of y; returns those of weight and bias."""
    c, p = tl.arange(0, W)[:, None], tl.arange(0, P)[None, :]
    at = c * positions + p
    dots = tl.full([W, P], 0.0, tl.float32)
    sums = tl.full([W, P], 0.0, tl.float32)
    for start in range(0, positions, P):
        inside = (c < width) & (start + p < positions)
        hat, dz = _slope(y + start + at, d + start + at, inside, mean, rstd, weight, bias)
        dots += dz * hat
        sums += dz
    dweight, dbias = tl.sum(dots, 1), tl.sum(sums, 1)
    a = _group_sum(weight * dbias, group, W) / (group * positions)
    b = _group_sum(weight * dweight, group, W) / (group * positions)
    for start in range(0, positions, P):
        inside = (c < width) & (start + p < positions)
        hat, dz = _slope(y + start + at, d + start + at, inside, mean, rstd, weight, bias)
        dy = rstd[:, None] * (weight[:, None] * dz - a[:, None] - hat * b[:, None])
        tl.store(d + start + at, dy, inside)
    return dweight, dbias


@_triton.jit
def _next_layer(x, rows, columns, weight, filters, y, width, W: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """y: the convolution of a head's activations x [width, rows, columns]."""
    c = tl.arange(0, W)
    wide = columns // 2
    positions = rows // 2 * wide
    for start in range(0, positions, P):
        p = start + tl.arange(0, P)
        out = convolve(
            x, p * 0, (rows * columns, columns, 1, rows, columns), p // wide, p % wide, p < positions, weight, filters,
            c < width, width, W, P, K,
        )  # fmt: skip
        tl.store(y + c[:, None] * positions + p[None, :], out, (c < width)[:, None] & (p < positions)[None, :])


@_triton.jit
def _next_layer_back(dy, weight, dx, rows, columns, width, W: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """dx [width, rows, columns]: the gradient of ``_next_layer`` to x."""
    wide = columns // 2 + 1
    cells = (rows // 2 + 1) * wide
    for first in range(0, 4 * width, W):
        target = first + tl.arange(0, W)
        for start in range(0, cells, P):
            p = start + tl.arange(0, P)
            out = spread(
                tl.full([W, P], 0.0, tl.float32), dy, p * 0, tl.full([P], 1.0, tl.float32), p // wide, p % wide,
                p < cells, rows // 2, columns // 2, width, weight, target, width, K,
            )  # fmt: skip
            r, q, inside = cell_pixels(p // wide, p % wide, p < cells, target, rows, columns, width)
            tl.store(dx + (target // 4 * (rows * columns))[:, None] + r * columns + q, out, inside)


@_triton.jit
def _head_pool_tail_kernel(conv, norm_weight, norm_bias, logit_weight, logit_bias, index, entries, y, activations,
                           gradients, vectors, logits, batch, heads, width, group, count, slots,
                           TRAINING: tl.constexpr, W: tl.constexpr, P: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """One head on one image: from the first convolution's output to the logit, and the unit gradients back to it.

    What one program writes and reads again lies behind barriers. vectors: per layer the mean, 1 / deviation and the
    gradients of norm_weight and norm_bias; then that of logit_weight, the mean of the last activation.
    """
    image, head = tl.program_id(0) % batch, tl.program_id(0) // batch
    row = tl.load(index + head)
    level, first, depth, channels, stride, plane, offset, size = _describe(entries, head // heads, count)
    rows, columns = plane[3], plane[4]
    base = offset + (image * heads + head % heads) * size
    y += base
    activations += base
    gradients += base
    logit_at = tl.cast(image, tl.int64) * count * heads + head
    c = tl.arange(0, W)
    whole = c < width
    vectors += logit_at * slots * width + c
    filters = (row * width + c) * width * 16
    pooled = tl.full([W], 0.0, tl.float32)
    here, before = 0, 0  # where this layer and the one before begin
    for layer in range(0, depth):
        if layer > 0:
            weight = _pick(conv, first + layer)
            _next_layer(
                activations + before, rows >> layer, columns >> layer, weight, filters, y + here, width, W, P, K
            )
            tl.debug_barrier()
        positions = (rows >> layer + 1) * (columns >> layer + 1)
        weight = tl.load(_pick(norm_weight, first + layer) + row * width + c, whole, 0.0)
        bias = tl.load(_pick(norm_bias, first + layer) + row * width + c, whole, 0.0)
        mean, rstd, pooled = _normalise(y + here, activations + here, weight, bias, width, positions, group, W, P)
        if TRAINING:
            tl.store(vectors + 4 * layer * width, mean, whole)
            tl.store(vectors + (4 * layer + 1) * width, rstd, whole)
        tl.debug_barrier()
        before = here
        here += width * positions
    last = tl.load(_pick(logit_weight, level) + row * width + c, whole, 0.0)
    tl.store(logits + logit_at, tl.sum(pooled * last, 0) + tl.load(_pick(logit_bias, level) + row))
    if TRAINING:
        for slot in range(4 * depth, slots):  # the last one counts; those before it are for deeper heads
            tl.store(vectors + slot * width, pooled, whole)
        p = tl.arange(0, P)
        positions = (rows >> depth) * (columns >> depth)
        for start in range(0, positions, P):
            inside = whole[:, None] & (start + p < positions)[None, :]
            value = tl.where(inside, (last / positions)[:, None], 0.0)
            tl.store(gradients + before + start + c[:, None] * positions + p[None, :], value, inside)
        after = here
        for step in range(0, depth):
            layer = depth - 1 - step
            positions = (rows >> layer + 1) * (columns >> layer + 1)
            here -= width * positions
            if step > 0:
                weight = _pick(conv, first + layer + 1) + row * width * width * 16
                _next_layer_back(
                    gradients + after, weight, gradients + here, rows >> layer + 1, columns >> layer + 1, width, W, P, K
                )
            tl.debug_barrier()
            mean = tl.load(vectors + 4 * layer * width, whole, 0.0)
            rstd = tl.load(vectors + (4 * layer + 1) * width, whole, 0.0)
            weight = tl.load(_pick(norm_weight, first + layer) + row * width + c, whole, 0.0)
            bias = tl.load(_pick(norm_bias, first + layer) + row * width + c, whole, 0.0)
            dweight, dbias = _normalise_back(
                y + here, gradients + here, mean, rstd, weight, bias, width, positions, group, W, P
            )
            tl.store(vectors + (4 * layer + 2) * width, dweight, whole)
            tl.store(vectors + (4 * layer + 3) * width, dbias, whole)
            tl.debug_barrier()
            after = here


@_triton.jit
def _head_pool_features_kernel(conv, index, entries, grad, gradients, out, batch, heads, width, count, tiles,
                               E: tl.constexpr, M: tl.constexpr, P: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Persistent: the gradient to every map that wants one, summed over its heads."""
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, place = _owner(entries, tile, count, E)
        level, first, depth, channels, stride, plane, offset, size = _describe(entries, entry, count)
        stride_c, stride_h, stride_w, rows, columns = plane
        wide = columns // 2 + 1
        cells = (rows // 2 + 1) * wide
        blocks = (4 * channels + M - 1) // M
        target = place % blocks * M + tl.arange(0, M)
        p = place // blocks * P + tl.arange(0, P)
        known = p < batch * cells
        image, row, column = p // cells, p % cells // wide, p % cells % wide
        weight = _pick(conv, first)
        total = tl.full([M, P], 0.0, tl.float32)
        for head in range(0, heads):
            slot = entry * heads + head
            scale = tl.load(grad + image.to(tl.int64) * count * heads + slot, known, 0.0)
            total = spread(
                total, gradients, offset + (image * heads + head) * size, scale, row, column, known, rows // 2,
                columns // 2, width, weight + tl.load(index + slot) * width * channels * 16, target, channels, K,
            )  # fmt: skip
        r, q, inside = cell_pixels(row, column, known, target, rows, columns, channels)
        to = _pick(out, entry) + (image * stride)[None, :] + (target // 4 * stride_c)[:, None]
        tl.store(to + r * stride_h + q * stride_w, total.to(to.dtype.element_ty), inside)


@_triton.jit
def _head_pool_rows_kernel(features, index, entries, layers, grad, activations, gradients, vectors, dconv,
                           dnorm_weight, dnorm_bias, dlogit_weight, dlogit_bias, batch, heads, width, count, stacks,
                           slots, L: tl.constexpr, S: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
                           K: tl.constexpr):  # fmt: skip
    """Every row of every stack: N elements of each filter, or all its vectors; zero if nobody sampled the row.

    One program owns its elements and sums over the samples of the row in their order. Idle rows are cheap, so the grid
    is not persistent: the hardware spreads the sampled ones.
    """
    stack, place = _owner(layers, tl.program_id(0), stacks, L)
    level = tl.load(layers + stacks + stack).to(tl.int32)
    layer = tl.load(layers + 2 * stacks + stack).to(tl.int32)
    channels = tl.load(layers + 3 * stacks + stack).to(tl.int32)
    blocks = (channels * 16 + N - 1) // N + 1  # the last one is the vectors
    row, block = (place // blocks).to(tl.int64), place % blocks
    slot = tl.arange(0, S)
    mine = slot < count * heads
    mine &= tl.load(index + slot, mine, -1) == row
    mine &= tl.load(entries + count + slot // heads, mine, -1) == level
    samples = tl.where(tl.sum(mine.to(tl.int32), 0) > 0, count * heads, 0)
    o = tl.arange(0, W)
    whole = o < width
    element = block * N + tl.arange(0, N)
    total = tl.full([W, N], 0.0, tl.float32)
    dweight = tl.full([W], 0.0, tl.float32)
    dbias = tl.full([W], 0.0, tl.float32)
    dlast = tl.full([W], 0.0, tl.float32)
    dlogit = 0.0
    for head in range(0, samples):
        entry = head // heads
        if (tl.load(index + head) == row) & (tl.load(entries + count + entry) == level):
            if block == blocks - 1:
                for image in range(0, batch):
                    at = tl.cast(image, tl.int64) * count * heads + head
                    scale = tl.load(grad + at)
                    v = vectors + at * slots * width + o
                    dweight += scale * tl.load(v + (4 * layer + 2) * width, whole, 0.0)
                    dbias += scale * tl.load(v + (4 * layer + 3) * width, whole, 0.0)
                    dlast += scale * tl.load(v + (slots - 1) * width, whole, 0.0)
                    dlogit += scale
            else:
                _, _, _, own, stride, plane, offset, size = _describe(entries, entry, count)
                rows, columns = plane[3] >> layer, plane[4] >> layer  # of the layer's input
                here = offset + head % heads * size
                before = here
                for earlier in range(1, layer + 1):
                    before = here
                    here += width * (plane[3] >> earlier) * (plane[4] >> earlier)
                if layer == 0:
                    total = correlate(
                        total, _pick(features, entry), stride, plane, channels, gradients + here, heads * size,
                        grad + head, count * heads, batch, width, element, W, K,
                    )  # fmt: skip
                else:
                    within = (rows * columns, columns, 1, rows, columns)
                    total = correlate(
                        total, activations + before, heads * size, within, channels, gradients + here, heads * size,
                        grad + head, count * heads, batch, width, element, W, K,
                    )  # fmt: skip
    if block == blocks - 1:
        at = row * width + o
        tl.store(_pick(dnorm_weight, stack) + at, dweight, whole)
        tl.store(_pick(dnorm_bias, stack) + at, dbias, whole)
        if layer == 0:
            tl.store(_pick(dlogit_weight, level) + at, dlast, whole)
            tl.store(_pick(dlogit_bias, level) + row, dlogit)
    else:
        to = _pick(dconv, stack) + ((row * width + o)[:, None] * channels * 16 + element[None, :])
        tl.store(to, total, whole[:, None] & (element < channels * 16)[None, :])


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _per_head(width: int, depth: int, high: int, wide: int) -> int:
    """Floats of one head's layers on one image."""
    return sum(width * (high >> layer) * (wide >> layer) for layer in range(1, depth + 1))


def _layout(features, levels, index, logit_weight, depths) -> tuple[int, int]:
    """Floats of all layers of all heads, and vectors of a head on an image."""
    width = logit_weight[0].shape[1]
    sizes = (_per_head(width, depths[level], *x.shape[2:]) for x, level in zip(features, levels, strict=True))
    return len(features[0]) * index.shape[1] * sum(sizes), 4 * max(depths) + 1


def workspace_size(features, levels, index, *rest) -> int:
    """Activations; for training also unit gradients and vectors. Arguments like ``forward``."""
    *_, logit_weight, _, depths, _, training = rest
    floats, slots = _layout(features, levels, index, logit_weight, depths)
    return 2 * floats + len(features[0]) * index.numel() * slots * logit_weight[0].shape[1] if training else floats


@functools.cache  # for ever: a captured graph keeps reading it
def _table(columns: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """[fields, columns] on the device, copied once per set of shapes: capture a CUDA graph after a first call."""
    return torch.tensor(columns, device="cpu").t().contiguous().to(device)  # a copy that is waited for, on any stream


def _entries(maps, levels, index, width: int, depths, tiles: list[int]) -> torch.Tensor:
    columns, first, offset = [], 0, 0
    for x, level, count in zip(maps, levels, tiles, strict=True):
        size = _per_head(width, depths[level], *x.shape[2:])
        columns.append((first, level, sum(depths[:level]), depths[level], *x.shape[1:], *x.stride(), offset, size))
        first, offset = first + count, offset + len(x) * index.shape[1] * size
    return _table(tuple(columns), index.device)


def _programs(args: dict) -> tuple[int]:
    """The grid of a persistent kernel: one program on each multiprocessor, whose registers it fills."""
    index = args["index"]
    most = torch.cuda.get_device_properties(index.device).multi_processor_count if index.is_cuda else 2
    return (min(args["tiles"], most),)


def _dense(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def _split(workspace: torch.Tensor, floats: int) -> dict[str, torch.Tensor]:
    gradients, vectors = workspace[floats : 2 * floats], workspace[2 * floats :]  # empty unless training
    return dict(activations=workspace[:floats], gradients=gradients, vectors=vectors)


def forward(
    features, levels, index, conv, norm_weight, norm_bias, logit_weight, logit_bias, depths, num_groups, training
):
    batch, heads, width = len(features[0]), index.shape[1], logit_weight[0].shape[1]
    floats, slots = _layout(features, levels, index, logit_weight, depths)
    size = workspace_size(features, levels, index, logit_weight, logit_bias, depths, num_groups, training)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=index.device)
    workspace, y, logits = empty(size), empty(floats), empty(batch, index.numel())
    blocks = -(-heads * width // _OUTPUTS)
    tiles = [blocks * -(-batch * (x.shape[2] // 2) * (x.shape[3] // 2) // _POSITIONS) for x in features]
    conv, index = _dense(conv), index.contiguous()
    common = dict(conv=conv, index=index, entries=_entries(features, levels, index, width, depths, tiles), y=y)
    common |= dict(batch=batch, heads=heads, width=width, count=len(features))
    tile = dict(M=_OUTPUTS, P=_POSITIONS, K=_STEP, E=_power(len(features)))
    args = common | dict(features=tuple(features), tiles=sum(tiles))
    _triton.Launch(_head_pool_first_kernel, _programs(args), args, tile, num_warps=8).run()
    args = common | _split(workspace, floats) | dict(logits=logits, slots=slots)
    args |= dict(group=width // num_groups, norm_weight=_dense(norm_weight), norm_bias=_dense(norm_bias))
    args |= dict(logit_weight=_dense(logit_weight), logit_bias=_dense(logit_bias))
    tile = dict(TRAINING=training, W=max(16, _power(width)), P=_TAIL_POSITIONS, K=_STEP)
    _triton.Launch(_head_pool_tail_kernel, (batch * index.numel(),), args, tile, num_warps=8).run()
    return logits, workspace


def gradients_to_rows(
    grad, workspace, features, levels, index, conv, norm_weight, norm_bias, logit_weight, logit_bias, depths, num_groups
):
    """Launches once; unsampled rows are written, as zeros, by the same kernel."""
    batch, heads, width = len(features[0]), index.shape[1], logit_weight[0].shape[1]
    floats, slots = _layout(features, levels, index, logit_weight, depths)
    stacks = (conv, norm_weight, norm_bias, logit_weight, logit_bias)
    names = ("dconv", "dnorm_weight", "dnorm_bias", "dlogit_weight", "dlogit_bias")
    out = {
        name: tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)
        for name, tensors in zip(names, stacks, strict=True)
    }
    columns, tiles = [], 0
    for level, depth in enumerate(depths):
        for layer in range(depth):
            rows, _, channels = conv[len(columns)].shape[:3]
            columns.append((tiles, level, layer, channels))
            tiles += rows * (-(-channels * 16 // _ELEMENTS) + 1)
    entries = _entries(features, levels, index, width, depths, [0] * len(features))
    args = _split(workspace, floats) | out | dict(features=tuple(features), entries=entries, slots=slots)
    args |= dict(layers=_table(tuple(columns), index.device), stacks=len(columns), index=index.contiguous())
    args |= dict(grad=grad.contiguous(), batch=batch, heads=heads, width=width, count=len(features))
    tile = dict(L=_power(len(columns)), S=_power(index.numel()), W=max(16, _power(width)), N=_ELEMENTS, K=_STEP)
    _triton.Launch(_head_pool_rows_kernel, (tiles,), args, tile, num_warps=8).run()
    return [t for tensors in out.values() for t in tensors]


def gradients_to_features(grad, workspace, features, levels, index, conv, *rest):
    """Launches once; ``wanted``, the last argument, names the maps."""
    _, _, logit_weight, _, depths, _, wanted = rest
    batch, heads, width = len(features[0]), index.shape[1], logit_weight[0].shape[1]
    floats, _ = _layout(features, levels, index, logit_weight, depths)
    out = tuple(torch.empty_like(x) if w else x for x, w in zip(features, wanted, strict=True))
    tiles = []
    for x, w in zip(out, wanted, strict=True):
        cells = batch * (x.shape[2] // 2 + 1) * (x.shape[3] // 2 + 1)
        tiles.append(-(-4 * x.shape[1] // _OUTPUTS) * -(-cells // _CELLS) if w else 0)
    args = dict(conv=_dense(conv), index=index.contiguous(), grad=grad.contiguous(), out=out)
    args |= dict(entries=_entries(out, levels, index, width, depths, tiles), tiles=sum(tiles), batch=batch)
    args |= dict(gradients=_split(workspace, floats)["gradients"], heads=heads, width=width, count=len(features))
    tile = dict(E=_power(len(features)), M=_OUTPUTS, P=_CELLS, K=_STEP)
    _triton.Launch(_head_pool_features_kernel, _programs(args), args, tile, num_warps=8).run()
    return [x for x, w in zip(out, wanted, strict=True) if w]


def supports(features, index, params: list[torch.Tensor], width: int) -> str | None:
    """``params``: all of them, flat."""
    if (reason := _triton.missing(index)) is not None:
        return reason
    dtypes = {x.dtype for x in features}
    if len(dtypes) > 1 or not all(d in _native.DTYPES for d in dtypes):
        return f"features must be all fp32, all fp16 or all bf16, got {', '.join(sorted(map(str, dtypes)))}"
    for t in params:
        if t.dtype != torch.float32:
            return f"parameters must be fp32, got {t.dtype}"
    if width > _WIDEST:
        return f"the width must be at most {_WIDEST}, got {width}"
    if len(features) + len(params) > _POINTERS:
        return f"maps and parameters must be at most {_POINTERS} tensors, got {len(features) + len(params)}"
    for x in features:
        if max(len(x), width) * x.shape[2] * x.shape[3] >= 2**31:
            return f"batch or width, times the positions of a map, must be below 2**31, got a map {list(x.shape)}"
    return None

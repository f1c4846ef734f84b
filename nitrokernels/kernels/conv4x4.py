"""A 4x4 convolution of stride 2 and padding 1 as three GEMMs for Triton kernels: outputs, input and filter gradients.

A plane is (channel stride, row stride, column stride, rows, columns) of a map. Operands are gathered as they are
loaded, positions innermost. fp32 goes through the tensor cores as three TF32 products, which keeps fp32 accuracy.
"""

from __future__ import annotations

from .. import _triton
from .._triton import tl


@_triton.jit
def convolve(x, shift, plane, row, column, known, weight, filters, whole, channels, M: tl.constexpr, P: tl.constexpr,
             K: tl.constexpr):  # fmt: skip
    """[M, P] outputs at positions (row, column) of the images at x + shift; filters begin at weight + filters."""
    stride_c, stride_h, stride_w, rows, columns = plane
    k = tl.arange(0, K)
    r = 2 * row[None, :] - 1 + (k % 16 // 4)[:, None]
    q = 2 * column[None, :] - 1 + (k % 4)[:, None]
    inside = known[None, :] & (r >= 0) & (r < rows) & (q >= 0) & (q < columns)
    x_at = x + (shift[None, :] + r * stride_h + q * stride_w + (k // 16)[:, None] * stride_c)
    w_at = weight + (filters[:, None] + k[None, :])
    out = tl.full([M, P], 0.0, tl.float32)
    for channel in range(0, channels, K // 16):
        there = channel + k // 16 < channels
        value = tl.load(x_at, inside & there[:, None], 0.0).to(tl.float32)
        tap = tl.load(w_at, whole[:, None] & there[None, :], 0.0)
        out = tl.dot(tap, value, out, input_precision="tf32x3")
        x_at += K // 16 * stride_c
        w_at += K
    return out


@_triton.jit
def spread(out, dy, shift, scale, row, column, known, rows, columns, width, weight, target, channels, K: tl.constexpr):
    """Adds to out [M, P] the gradient to the input of the outputs' gradient dy + shift [width, rows, columns] scale.

    Each of P cells is the 2x2 block of input pixels that begins at (2 row - 1, 2 column - 1); it reads the outputs at
    (row, column) and one up and left of it. target: 4 channel + 2 (row in the cell) + (column in the cell).
    """
    k = tl.arange(0, K)
    r = row[None, :] - (k % 4 // 2)[:, None]
    q = column[None, :] - (k % 2)[:, None]
    inside = known[None, :] & (r >= 0) & (r < rows) & (q >= 0) & (q < columns)
    d_at = dy + (shift[None, :] + (k // 4)[:, None] * (rows * columns) + r * columns + q)
    tap = target // 4 * 16 + target % 4 // 2 * 4 + target % 2
    w_at = weight + ((k // 4 * channels * 16 + k % 4 // 2 * 8 + k % 2 * 2)[:, None] + tap[None, :])
    exists = target < 4 * channels
    for output in range(0, width, K // 4):
        there = (output + k // 4 < width)[:, None]
        value = tl.load(d_at, inside & there, 0.0) * scale[None, :]
        taps = tl.load(w_at, exists[None, :] & there, 0.0)
        out = tl.dot(taps.T, value, out, input_precision="tf32x3")
        d_at += K // 4 * rows * columns
        w_at += K // 4 * channels * 16
    return out


@_triton.jit
def cell_pixels(row, column, known, target, rows, columns, channels):
    """Row and column of each pixel of ``spread``'s result, and which exist."""
    r = (2 * row - 1)[None, :] + (target % 4 // 2)[:, None]
    q = (2 * column - 1)[None, :] + (target % 2)[:, None]
    exists = known[None, :] & (target < 4 * channels)[:, None]
    return r, q, exists & (r >= 0) & (r < rows) & (q >= 0) & (q < columns)


@_triton.jit
def correlate(out, x, stride_b, plane, channels, dy, step, grad, grads, batch, width, element, W: tl.constexpr,
              K: tl.constexpr):  # fmt: skip
    """Adds to out [W, N] the gradient to elements (channel, 4, 4) of one head's filters, summed over images.

    dy: unit gradients of the outputs, ``step`` apart from image to image; grad: of the logits, ``grads`` apart.
    """
    stride_c, stride_h, stride_w, rows, columns = plane
    wide = columns // 2
    positions = rows // 2 * wide
    o = tl.arange(0, W)
    x += (element // 16)[:, None] * stride_c
    for start in range(0, batch * positions, K):
        k = start + tl.arange(0, K)
        known = k < batch * positions
        image, position = k // positions, k % positions
        scale = tl.load(grad + image * grads, known, 0.0)
        d_at = dy + (image * step + position)[None, :] + (o * positions)[:, None]
        d = tl.load(d_at, (o < width)[:, None] & known[None, :], 0.0) * scale[None, :]
        r = (2 * (position // wide) - 1)[None, :] + (element % 16 // 4)[:, None]
        q = (2 * (position % wide) - 1)[None, :] + (element % 4)[:, None]
        inside = (element < channels * 16)[:, None] & known[None, :]
        inside &= (r >= 0) & (r < rows) & (q >= 0) & (q < columns)
        value = tl.load(x + ((image * stride_b)[None, :] + r * stride_h + q * stride_w), inside, 0.0)
        out = tl.dot(d, value.to(tl.float32).T, out, input_precision="tf32x3")
    return out

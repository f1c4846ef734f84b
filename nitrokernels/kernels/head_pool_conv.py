"""The first convs of ``head_pool`` on CUDA: one persistent launch of csrc/head_pool_conv.cu for all maps and heads.

Weights are read where they lie in the stacks, through the device's own index. Backward passes are PyTorch's.
"""

from __future__ import annotations

import torch

from .. import _library, _native


def _gpu(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory a block may have."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _tile(columns: int, shared: int) -> int:
    """Columns of a tile of csrc/head_pool_conv.cu: the least padding, then the widest; two buffers must fit."""
    fitting = [n for n in (128, 96, 64) if 512 * (128 + n) + 16 <= shared]
    return min(fitting, key=lambda n: -(-columns // n) * n)


def _conv_cuda(features, conv, index):
    """``conv``: the stack that each map's heads are rows of."""
    features, index = [_native.dense(x) for x in features], index.contiguous()
    out = _conv_fake(features, conv, index)
    heads, width = index.shape[1], conv[0].shape[1]
    if index.numel() and len(features[0]):
        conv = [_native.aligned(t.contiguous()) for t in conv]
        rows = [
            [*x.shape[1:], len(w), _native.DTYPES[x.dtype], int(not x.is_contiguous())]
            for x, w in zip(features, conv, strict=True)
        ]
        entries = torch.tensor(rows, device="cpu")
        blocks, shared = _gpu(index.device)
        tile = _tile(heads * width, shared)
        tiles = sum(-(-y[:, 0].numel() // 128) for y in out) * -(-heads * width // tile)
        partial = out[0].new_empty(2 * blocks * 128 * tile)
        arrived = index.new_zeros(tiles, dtype=torch.int32)
        sizes = len(features), len(features[0]), heads, width, tile, blocks
        _native.launch("head_pool_conv_cuda", index, features, entries, conv, out, partial, arrived, *sizes)
    return out


def _conv_fake(features, conv, index):
    return [
        torch.empty(
            (len(x), index.shape[1] * w.shape[1], x.shape[2] // 2, x.shape[3] // 2),
            dtype=torch.float32, device=x.device, memory_format=torch.channels_last,
        )
        for x, w in zip(features, conv, strict=True)
    ]  # fmt: skip


_CONV_SCHEMA = "(Tensor[] features, Tensor[] conv, Tensor index) -> Tensor[]"
_CONV_CUDA = _library.register("head_pool_conv_cuda", _CONV_SCHEMA, _conv_cuda, _conv_fake, "CUDA")


class HeadPoolConvFunction(torch.autograd.Function):
    """The first conv of every map's heads; tensors: features, then the first conv of every level."""

    @staticmethod
    def forward(ctx, levels, index, *tensors):
        ctx.save_for_backward(index, *tensors)
        ctx.levels = levels
        features, conv = tensors[: len(levels)], tensors[len(levels) :]
        return tuple(_CONV_CUDA(list(features), [conv[level] for level in levels], index))

    @staticmethod
    def backward(ctx, *grads):  # by differentiable operators, for gradients of gradients
        index, *tensors = ctx.saved_tensors
        levels, wanted = ctx.levels, ctx.needs_input_grad[2:]
        out = [None] * len(tensors)
        for at, stack in enumerate(tensors[len(levels) :], len(levels)):
            entries = [e for e, level in enumerate(levels) if level == at - len(levels)]
            found = []
            for e in entries:
                x, weight = tensors[e].to(stack.dtype), stack.index_select(0, index[e]).flatten(0, 1)
                sizes = (None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [wanted[e], wanted[at], False])
                dx, dweight, _ = torch.ops.aten.convolution_backward(grads[e], x, weight, *sizes)
                out[e] = dx.to(tensors[e].dtype) if wanted[e] else None
                found.append(dweight.unflatten(0, (-1, stack.shape[1])) if wanted[at] else None)
            if wanted[at] and entries:
                out[at] = torch.zeros_like(stack).index_add(0, torch.cat([index[e] for e in entries]), torch.cat(found))
        return None, None, *out

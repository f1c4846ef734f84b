"""All sampled discriminator heads at once: [conv 4x4 stride 2 -> GroupNorm -> SiLU] repeated -> mean logit.

features: one map per entry, [B, C_e, H_e, W_e], any dtype; a pool keeps the heads of a level (equal C) stacked,
[P, ...], and ``index`` [E, n] names the n rows that read each entry, so sampling and refreshing move no weights.
Logits [B, E * n] fp32, entry-major. Differentiable in the features and the stacks, to any order.

On a CPU an entry's images are cut into blocks and each conv's output and its statistics are kept in one workspace; the
triton version is nitrokernels/kernels/head_pool.py. The backward pass of either is two operators, as training asks for
one or the other: gradients to the stacks, to the features. On CUDA the first convs, nearly all of the arithmetic, are
one launch for all maps and heads (nitrokernels/kernels/head_pool_conv.py); the rest is PyTorch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .. import _library, _native
from .._autograd import reference_gradients
from ..dispatch import Op
from ..kernels import head_pool as _kernels
from ..kernels.head_pool_conv import HeadPoolConvFunction
from ..testing import DTYPES, Case

_LAYERED = ("conv", "norm_weight", "norm_bias")


@dataclass(frozen=True)
class LevelParams:
    """The stacked heads of one level; P rows, width w, depth d.

    Attributes:
        conv: d tensors, [P, w, C, 4, 4] then [P, w, w, 4, 4].
        norm_weight, norm_bias: d tensors [P, w] each.
        logit_weight: [P, w]; logit_bias: [P].
    """

    conv: tuple[torch.Tensor, ...]
    norm_weight: tuple[torch.Tensor, ...]
    norm_bias: tuple[torch.Tensor, ...]
    logit_weight: torch.Tensor
    logit_bias: torch.Tensor

    def rows(self, index: torch.Tensor) -> LevelParams:
        """The named rows, differentiable back to the stack."""
        pick = lambda tensors: tuple(t.index_select(0, index) for t in tensors)  # noqa: E731
        return LevelParams(
            pick(self.conv),
            pick(self.norm_weight),
            pick(self.norm_bias),
            self.logit_weight.index_select(0, index),
            self.logit_bias.index_select(0, index),
        )

    def split(self, size: int) -> list[LevelParams]:
        """Consecutive groups of ``size`` rows."""
        cut = lambda t: t.split(size)  # noqa: E731
        columns = [map(cut, self.conv), map(cut, self.norm_weight), map(cut, self.norm_bias)]
        conv, weight, bias = (list(zip(*c, strict=True)) for c in columns)
        return [
            LevelParams(*parts)
            for parts in zip(conv, weight, bias, cut(self.logit_weight), cut(self.logit_bias), strict=True)
        ]


def _heads(x: torch.Tensor, p: LevelParams, num_groups: int, first: torch.Tensor | None = None) -> torch.Tensor:
    """[B, n] logits of n heads on one map: the first conv is dense over n * w outputs, the rest are grouped.

    Args:
        first: the result of the first conv, if it is known.
    """
    n, width = p.logit_weight.shape
    x = x.to(p.logit_weight.dtype)  # the heads' own precision, fp32 unless a test asks for fp64
    for depth, (conv, weight, bias) in enumerate(zip(p.conv, p.norm_weight, p.norm_bias, strict=True)):
        if depth == 0 and first is not None:
            x = first
        else:
            x = F.conv2d(x, conv.flatten(0, 1), stride=2, padding=1, groups=1 if depth == 0 else n)
        x = F.silu(torch.group_norm(x, n * num_groups, weight.flatten(), bias.flatten()))
    # The 1x1 conv to the logit map commutes with the mean over positions.
    pooled = x.mean((2, 3)).view(len(x), n, width)
    return (pooled * p.logit_weight).sum(-1) + p.logit_bias


def head_pool_ref(
    features: Sequence[torch.Tensor],
    levels: Sequence[int],
    index: torch.Tensor,
    params: Sequence[LevelParams],
    num_groups: int,
    first: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    logits: list[torch.Tensor | None] = [None] * len(features)
    for level in sorted(set(levels)):
        entries = [e for e, at in enumerate(levels) if at == level]
        rows = params[level].rows(torch.cat([index[e] for e in entries]))  # one gather a level, however many tasks
        for entry, group in zip(entries, rows.split(index.shape[1]), strict=True):
            logits[entry] = _heads(features[entry], group, num_groups, first[entry] if first else None)
    return torch.cat(logits, 1)


def _flatten(params: Sequence[LevelParams]) -> tuple[list[torch.Tensor], ...]:
    """conv, norm_weight, norm_bias of all layers, logit_weight, logit_bias of all levels."""
    conv, norm_weight, norm_bias = ([t for p in params for t in getattr(p, name)] for name in _LAYERED)
    return conv, norm_weight, norm_bias, [p.logit_weight for p in params], [p.logit_bias for p in params]


def _unflatten(conv, norm_weight, norm_bias, logit_weight, logit_bias, depths: Sequence[int]) -> list[LevelParams]:
    layers = [iter(conv), iter(norm_weight), iter(norm_bias)]
    return [
        LevelParams(*(tuple(next(it) for _ in range(depth)) for it in layers), weight, bias)
        for depth, weight, bias in zip(depths, logit_weight, logit_bias, strict=True)
    ]


def _plan(shapes, depths, heads: int, width: int, num_groups: int) -> tuple[list[list[int]], int]:
    """HeadPoolEntry of csrc/head_pool.h per map, and the floats that workspace and scratch need.

    A block holds enough images for some 512 columns, so that what is done once per block to the filters is cheap. With
    14 images of 16 or more the columns of a block are 16 images side by side, which needs no gathering at all.

    Args:
        shapes: (batch, channels, height, width, dtype code, channels last, level) of each map.
    """
    entries, total = [], 0
    for batch, channels, rows, columns, dtype, channels_last, level in shapes:
        lanes = batch > 0 and 8 * batch >= 7 * _round_up(batch)
        wanted = -(-512 // ((rows // 2) * (columns // 2)))
        block = min(_round_up(wanted), _round_up(batch)) if lanes else max(1, min(wanted, batch))
        size, depth = 0, depths[level]
        for layer in range(1, depth + 1):
            count = block * (rows >> layer) * (columns >> layer)
            size += heads * width * (count if lanes else _round_up(count))
        size = _round_up(size + 2 * depth * heads * num_groups * block + (2 * depth + 1) * heads * width)
        entries.append([level, channels, rows, columns, dtype, channels_last, block, int(lanes), total, size])
        total += size * -(-batch // block)
    return entries, total


@functools.lru_cache(maxsize=64)
def _planned(shapes, depths, *sizes: int) -> tuple[torch.Tensor, int]:
    entries, total = _plan(shapes, depths, *sizes)
    return torch.tensor(entries, device="cpu"), total


def _shapes(features, levels) -> tuple[tuple[int, ...], ...]:
    """For dense maps."""
    return tuple(
        (*x.shape, _native.DTYPES[x.dtype], int(not x.is_contiguous()), level)
        for x, level in zip(features, levels, strict=True)
    )


def _round_up(n: int) -> int:
    return -(-n // 16) * 16


def _sizes(index, logit_weight, num_groups: int) -> tuple[int, int, int]:
    return index.shape[1], logit_weight[0].shape[1], num_groups


def _launch(name, common, workspace, scratch, logits, grad, out, wanted) -> None:
    features, levels, index, *params, depths, num_groups = common
    params = [[t if t.is_contiguous() else t.contiguous() for t in tensors] for tensors in params]
    conv, logit_weight = params[0], params[3]
    sizes = _sizes(index, logit_weight, num_groups)
    entries, _ = _planned(_shapes(features, levels), tuple(depths), *sizes)
    first = [sum(depths[:level]) for level in range(len(depths))]
    stacks = [[at, depth, len(w), conv[at].shape[2]] for at, depth, w in zip(first, depths, logit_weight, strict=True)]
    stacks, index = torch.tensor(stacks, device="cpu"), index.contiguous()
    inputs = features, entries, stacks, index, *params
    sizes = len(features), len(depths), len(features[0]), *sizes
    _native.launch(name, *inputs, workspace, scratch, logits, grad, out, wanted, *sizes)


def _forward_cpu(features, levels, index, *rest):
    features, rest = [_native.dense(x) for x in features], rest[:-1]  # for training or not, it keeps the same
    *params, depths, num_groups = rest
    _, size = _planned(_shapes(features, levels), tuple(depths), *_sizes(index, params[3], num_groups))
    workspace = torch.empty(size, dtype=torch.float32)
    logits = torch.empty(len(features[0]), index.numel(), dtype=torch.float32)
    if logits.numel():
        _launch("head_pool_cpu", (features, levels, index, *rest), workspace, None, logits, None, [], None)
    return logits, workspace


def _described(features, index, size: int):
    logits = features[0].new_empty(len(features[0]), index.numel(), dtype=torch.float32)
    return logits, features[0].new_empty(size, dtype=torch.float32)


def _forward_fake(features, levels, index, *rest):
    *params, depths, num_groups, _ = rest
    features = [_native.dense(x) for x in features]
    _, size = _plan(_shapes(features, levels), depths, *_sizes(index, params[3], num_groups))
    return _described(features, index, size)


def _forward_fake_triton(features, levels, index, *rest):
    return _described(features, index, _kernels.workspace_size(features, levels, index, *rest))


def _rows_cpu(grad, workspace, features, levels, index, *rest):
    make = torch.empty_like if len(grad) else torch.zeros_like
    out = [make(t, memory_format=torch.contiguous_format) for tensors in rest[:-2] for t in tensors]
    if len(grad):
        features, scratch, grad = [_native.dense(x) for x in features], torch.empty_like(workspace), grad.contiguous()
        common = (features, levels, index, *rest)
        _launch("head_pool_rows_cpu", common, workspace, scratch, None, grad, out, None)
    return out


def _rows_fake(grad, workspace, features, levels, index, *rest):
    return [t.new_empty(t.shape) for tensors in rest[:-2] for t in tensors]


def _features_cpu(grad, workspace, features, levels, index, *rest):
    *rest, wanted = rest
    features = [_native.dense(x) for x in features]
    out = [torch.empty_like(x) if w else x.new_empty(0) for x, w in zip(features, wanted, strict=True)]
    if len(grad):
        scratch, grad, chosen = torch.empty_like(workspace), grad.contiguous(), torch.tensor(wanted, device="cpu")
        common = (features, levels, index, *rest)
        _launch("head_pool_features_cpu", common, workspace, scratch, None, grad, out, chosen)
    return [x for x, w in zip(out, wanted, strict=True) if w]


def _features_fake(grad, workspace, features, levels, index, *rest):
    return [torch.empty_like(_native.dense(x)) for x, w in zip(features, rest[-1], strict=True) if w]


def _features_fake_triton(grad, workspace, features, levels, index, *rest):
    return [torch.empty_like(x) for x, w in zip(features, rest[-1], strict=True) if w]


def _supports(device: str, features, levels, index, params, num_groups) -> str | None:
    if (reason := _native.missing(device)) is not None:
        return reason
    flat = [t for tensors in _flatten(params) for t in tensors]
    for x in (*features, index, *flat):
        if x.device.type != device:
            return f"a tensor is on {x.device.type}"
    for x in features:
        if x.dtype not in _native.DTYPES:
            return f"features must be fp32, fp16 or bf16, got {x.dtype}"
    for t in flat:
        if t.dtype != torch.float32:
            return f"parameters must be fp32, got {t.dtype}"
    width = params[0].logit_weight.shape[1]
    if width % 8 or any(p.logit_weight.shape[1] != width for p in params):
        return f"the width must be one multiple of 8, got {sorted({p.logit_weight.shape[1] for p in params})}"
    return None


def _supports_triton(features, levels, index, params, num_groups) -> str | None:
    widths = {p.logit_weight.shape[1] for p in params}
    if len(widths) > 1:
        return f"the width must be the same on every level, got {sorted(widths)}"
    flat = [t for tensors in _flatten(params) for t in tensors]
    return _kernels.supports(features, index, flat, widths.pop())


_COMMON = (
    "Tensor[] features, int[] levels, Tensor index, Tensor[] conv, Tensor[] norm_weight, Tensor[] norm_bias, "
    "Tensor[] logit_weight, Tensor[] logit_bias, int[] depths, int num_groups"
)
_BACKWARD = f"Tensor grad, Tensor workspace, {_COMMON}"
_SCHEMAS = {
    "fwd": f"({_COMMON}, bool training) -> (Tensor logits, Tensor workspace)",
    "rows_bwd": f"({_BACKWARD}) -> Tensor[]",
    "features_bwd": f"({_BACKWARD}, int[] wanted) -> Tensor[]",
}


def _register(backend: str, described: dict[str, tuple[Callable, Callable]], *devices: str) -> dict[str, Callable]:
    return {
        name: _library.register(f"head_pool_{name}_{backend}", _SCHEMAS[name], run, fake, *devices)
        for name, (run, fake) in described.items()
    }


_OPERATORS = {
    "cpu": _register(
        "cpu",
        {
            "fwd": (_forward_cpu, _forward_fake),
            "rows_bwd": (_rows_cpu, _rows_fake),
            "features_bwd": (_features_cpu, _features_fake),
        },
        "CPU",
    ),
    "triton": _register(
        "triton",
        {
            "fwd": (_kernels.forward, _forward_fake_triton),
            "rows_bwd": (_kernels.gradients_to_rows, _rows_fake),
            "features_bwd": (_kernels.gradients_to_features, _features_fake_triton),
        },
    ),
}


class HeadPoolFunction(torch.autograd.Function):
    """Tensors come flat: features, then ``_flatten(params)``. Higher orders go through the reference."""

    @staticmethod
    def forward(ctx, backend, levels, depths, num_groups, index, *tensors):
        features, params = _regroup(tensors, len(levels), depths)
        logits, workspace = _OPERATORS[backend]["fwd"](features, levels, index, *params, depths, num_groups, True)
        ctx.save_for_backward(workspace, index, *tensors)
        ctx.backend, ctx.levels, ctx.depths, ctx.num_groups = backend, levels, depths, num_groups
        return logits

    @staticmethod
    def backward(ctx, grad):
        workspace, index, *tensors = ctx.saved_tensors
        operators, levels, depths, wanted = _OPERATORS[ctx.backend], ctx.levels, ctx.depths, ctx.needs_input_grad[5:]
        features, params = _regroup(tensors, len(levels), depths)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def ref(*tensors):
                features, params = _regroup(tensors, len(levels), depths)
                return head_pool_ref(features, levels, index, _unflatten(*params, depths), ctx.num_groups)

            return *[None] * 5, *reference_gradients(ref, tensors, wanted, grad)
        common = (grad, workspace, features, levels, index, *params, depths, ctx.num_groups)
        grads = [None] * len(tensors)
        if any(wanted[: len(features)]):
            flags = [int(w) for w in wanted[: len(features)]]
            found = iter(operators["features_bwd"](*common, flags))
            grads[: len(features)] = [next(found) if w else None for w in flags]
        if any(wanted[len(features) :]):
            rows = operators["rows_bwd"](*common)
            grads[len(features) :] = [g if w else None for g, w in zip(rows, wanted[len(features) :], strict=True)]
        return *[None] * 5, *grads


def _regroup(tensors, entries: int, depths) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """(features, the five lists of ``_flatten``) out of one flat sequence."""
    flat, groups = list(tensors), []
    for size in (entries, sum(depths), sum(depths), sum(depths), len(depths), len(depths)):
        groups.append(flat[:size])
        flat = flat[size:]
    return groups[0], groups[1:]


def _runner(backend: str) -> Callable:
    def run(features, levels, index, params, num_groups):
        levels, depths, flat = list(levels), [len(p.conv) for p in params], _flatten(params)
        tensors = [*features, *(t for group in flat for t in group)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return HeadPoolFunction.apply(backend, levels, depths, num_groups, index, *tensors)
        return _OPERATORS[backend]["fwd"](list(features), levels, index, *flat, depths, num_groups, False)[0]

    return run


def _run_cuda(features, levels, index, params, num_groups):
    first = HeadPoolConvFunction.apply(list(levels), index, *features, *(p.conv[0] for p in params))
    rest = [replace(p, conv=(p.conv[0][:, :0], *p.conv[1:])) for p in params]  # gathers nothing of the first conv
    return head_pool_ref(features, levels, index, rest, num_groups, first)


OP = Op("head_pool", ref=head_pool_ref)
OP.impl("triton", _runner("triton"), _supports_triton)
OP.impl("cpu", _runner("cpu"), functools.partial(_supports, "cpu"))
OP.impl("cuda", _run_cuda, functools.partial(_supports, "cuda"))


def _check(features, levels, index, params, num_groups) -> None:
    check = OP.check
    for name, values in (("features", features), ("levels", levels), ("params", params)):
        check.sequence(name, values)
    if not features or len(features) != len(levels):
        check.fail("levels", f"one int per feature map, at least one ({len(features)})", len(levels))
    if not params:
        check.fail("params", "one stack per level, at least one", 0)
    first = features[0]
    check.tensor(f"features of level {levels[0]}", first, ("B", "C", "H", "W"))
    check.tensor("index", index, (len(features), "n"), first, torch.int64)
    if not index.shape[1]:
        check.fail("index", "of at least one row per map", list(index.shape))
    for level, p in enumerate(params):
        _check_stack(f"params[{level}]", p, num_groups, first)
    lowest = highest = None  # unknown on a GPU, where reading them would wait for it
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        lowest, highest = (bound.tolist() for bound in index.aminmax(dim=1))
    for entry, (x, level) in enumerate(zip(features, levels, strict=True)):
        if not (isinstance(level, int) and 0 <= level < len(params)):
            check.fail("levels", f"in 0..{len(params) - 1}", repr(level))
        p, name = params[level], f"features of level {level}"
        rows, side = len(p.logit_weight), 2 ** len(p.conv)
        check.tensor(name, x, (len(first), p.conv[0].shape[2], "H", "W"), first)
        if not x.shape[1]:
            check.fail(name, "of at least one channel", list(x.shape))
        if min(x.shape[2:]) < side:
            check.fail(name, f"at least {side}x{side}", f"{x.shape[2]}x{x.shape[3]}")
        if lowest is not None and not (0 <= lowest[entry] and highest[entry] < rows):
            check.fail(f"index of level {level}", f"in 0..{rows - 1}", index[entry].tolist())


def _check_stack(name: str, p: LevelParams, num_groups: int, beside: torch.Tensor) -> None:
    check = OP.check
    if not isinstance(p, LevelParams):
        check.fail(name, "LevelParams", type(p).__name__)
    for field in _LAYERED:
        check.sequence(f"{name}.{field}", getattr(p, field))
    depth = len(p.conv)
    check.tensor(f"{name}.logit_weight", p.logit_weight, ("P", "w"), beside)
    (rows, width), dtype = p.logit_weight.shape, p.logit_weight.dtype
    check.divisor("num_groups", num_groups, width, f"the width {width}")
    check.tensor(f"{name}.logit_bias", p.logit_bias, (rows,), beside, dtype)
    if depth < 1 or not depth == len(p.norm_weight) == len(p.norm_bias):
        got = f"{depth}, {len(p.norm_weight)} and {len(p.norm_bias)}"
        check.fail(name, "as many conv, norm_weight and norm_bias, at least one", got)
    for i in range(depth):
        channels = width if i else "C"
        check.tensor(f"{name}.conv[{i}]", p.conv[i], (rows, width, channels, 4, 4), beside, dtype)
        check.tensor(f"{name}.norm_weight[{i}]", p.norm_weight[i], (rows, width), beside, dtype)
        check.tensor(f"{name}.norm_bias[{i}]", p.norm_bias[i], (rows, width), beside, dtype)


def head_pool(
    features: Sequence[torch.Tensor],
    levels: Sequence[int],
    index: torch.Tensor,
    params: Sequence[LevelParams],
    num_groups: int = 8,
) -> torch.Tensor:
    """Logits of the sampled heads.

    Args:
        features: E maps [B, C_e, H_e, W_e].
        levels: E ints, the level (so the stack of ``params``) each map belongs to.
        index: [E, n] int64, rows of that stack.
        params: one stack per level.
        num_groups: GroupNorm groups of each head.

    Returns:
        [B, E * n] fp32, entry-major.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or, on a CPU, a row is out of range. RuntimeError: a named
            backend cannot run the call.
    """
    _check(features, levels, index, params, num_groups)
    return OP.select(features, levels, index, params, num_groups)[1](features, levels, index, params, num_groups)


def _case(batch: int, maps, tasks: int, heads: int, sampled: int, width: int, dtypes=DTYPES) -> Case:
    """``maps``: (channels, height, width) of each level; every task reads every level."""

    def make(dtype, device):
        def stack(*shape, scale=1.0, shift=0.0):
            return torch.randn(tasks * heads, *shape, device=device) * scale + shift

        params, levels = [], []
        for c, *sides in maps:
            depth = max(1, min(3, min(sides).bit_length() - 2))
            ins = [c] + [width] * (depth - 1)
            params.append(
                LevelParams(
                    tuple(stack(width, n, 4, 4, scale=(16 * n) ** -0.5) for n in ins),
                    tuple(stack(width, scale=0.1, shift=1.0) for _ in ins),
                    tuple(stack(width, scale=0.1) for _ in ins),
                    stack(width, scale=width**-0.5),
                    stack(),
                )
            )
        features, index = [], []
        for task in range(tasks):
            for level, shape in enumerate(maps):
                features.append(torch.randn(batch, *shape, device=device).to(dtype))
                levels.append(level)
                index.append(task * heads + torch.randperm(heads)[:sampled])
        return features, levels, torch.stack(index).to(device), params, max(1, width // 8)

    return Case(make, grads=(0, 3), dtypes=dtypes)


CASES = {
    "small": _case(2, [(3, 8, 8), (5, 4, 4)], tasks=2, heads=3, sampled=2, width=8),
    "one head": _case(3, [(16, 16, 16)], tasks=1, heads=1, sampled=1, width=16),
    "wide": _case(2, [(9, 16, 16)], tasks=1, heads=3, sampled=3, width=64),
    "odd": _case(2, [(3, 9, 14), (1, 3, 4), (2, 5, 9)], tasks=1, heads=2, sampled=1, width=8),
    "lanes": _case(15, [(3, 8, 8), (5, 5, 4), (2, 2, 2)], tasks=1, heads=2, sampled=2, width=8),
    "many images": _case(32, [(4, 16, 16)], tasks=1, heads=2, sampled=1, width=16, dtypes=(torch.float32,)),
    "empty": _case(0, [(3, 8, 8)], tasks=1, heads=1, sampled=1, width=8),
}

_SDXL = [(320, 128)] * 3 + [(320, 64)] + [(640, 64)] * 2 + [(640, 32)] + [(1280, 32)] * 3  # the ten taps at 1024 px
AOT = {"sdxl 3 heads": _case(5, [(c, side, side) for c, side in _SDXL], tasks=1, heads=48, sampled=3, width=64)}

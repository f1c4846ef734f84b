"""The blocks that diffusers' UNets and autoencoders share, as instructions.

What there is and how wide it is comes from the configuration; a weight of another shape is ``Unsupported``.
"""

from __future__ import annotations

from collections.abc import Callable

from nitrokernels.plan import Builder, Map

from .weights import StateDict, Unsupported


def positive(config, *names: str) -> None:
    """Raises Unsupported unless these are whole numbers, each above zero, or lists of them."""
    for name in names:
        value = config[name]
        for n in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise Unsupported(f"its {name} is {value!r}")


def linear(
    b: Builder, w: StateDict, x: Map, channels: int, kernel: tuple[int, ...] = (), biased: bool = True, **options
) -> Map:
    """A linear layer to ``channels``, or a conv whose map has the border it needs."""
    weight = w("weight", channels, x.channels, *kernel)
    if biased:
        own = w("bias", channels)
        options.setdefault("bias", own)
    return b.matmul(x, weight, name=w.prefix + "weight", **options)


def conv3(b: Builder, w: StateDict, x: Map, channels: int, **options) -> Map:
    """A conv 3x3; ``x`` without a border is given one."""
    return linear(b, w, x if x.border else b.copy(x, border=True), channels, (3, 3), **options)


def conv1(b: Builder, w: StateDict, x: Map, channels: int, **options) -> Map:
    return linear(b, w, x, channels, (1, 1), **options)


def layer_norm(b: Builder, w: StateDict, x: Map, eps: float = 1e-5) -> Map:
    return b.layer_norm(x, w("weight", x.channels), w("bias", x.channels), eps)


def group_norm(b: Builder, w: StateDict, x: Map, groups: int, eps: float, **options) -> Map:
    return b.group_norm(x, w("weight", x.channels), w("bias", x.channels), groups, eps, **options)


def norm_silu_conv(
    b: Builder, norm: StateDict, conv: StateDict, x: Map, channels: int, groups: int, eps: float, **options
) -> Map:
    return conv3(b, conv, group_norm(b, norm, x, groups, eps, silu=True, border=True), channels, **options)


def resnet(b: Builder, w: StateDict, x: Map, channels: int, groups: int, eps: float, bias: Map | None = None) -> Map:
    """ResnetBlock2D. ``bias`` is the time embedding's projection with the first conv's bias in it."""
    given = {} if bias is None else {"bias": bias}
    hidden = norm_silu_conv(b, w.at("norm1"), w.at("conv1"), x, channels, groups, eps, **given)
    skip = conv1(b, w.at("conv_shortcut"), x, channels) if x.channels != channels else x
    return norm_silu_conv(b, w.at("norm2"), w.at("conv2"), hidden, channels, groups, eps, residual=skip)


def self_attention(b: Builder, w: StateDict, x: Map, heads: int, residual: Map, biased: bool) -> Map:
    """Queries, keys and values, as wide as ``x``, in one product, the residual in the last one."""
    names, inner = ("to_q", "to_k", "to_v"), x.channels
    bias = w.cat({f"{n}.bias": (inner,) for n in names}) if biased else None
    weights = w.cat_when_asked({f"{n}.weight": (inner, inner) for n in names})
    qkv = b.matmul(x, weights, bias, name=w.prefix + "to_qkv")
    keys = b.keys(qkv.columns(inner, inner), qkv.columns(2 * inner, inner), heads)
    return linear(b, w.at("to_out.0"), b.attention(qkv.columns(0, inner), keys, heads), inner, residual=residual)


def transformer(
    b: Builder,
    w: StateDict,
    x: Map,
    depth: int,
    heads: int,
    groups: int,
    kernel: tuple[int, ...],
    attend: Callable[[str, Map], Map],
) -> Map:
    """Transformer2DModel; ``attend(name, queries)`` is what the cross-attention of that name sees of the prompts.

    Args:
        depth: how many transformer blocks.
        kernel: (1, 1) where its projections are convs, () where they are linear layers.
    """
    inner = x.channels // heads * heads
    hidden = linear(b, w.at("proj_in"), group_norm(b, w.at("norm"), x, groups, 1e-6), inner, kernel)
    for i in range(depth):
        block = w.at(f"transformer_blocks.{i}")
        normed = layer_norm(b, block.at("norm1"), hidden)
        hidden = self_attention(b, block.at("attn1"), normed, heads, hidden, biased=False)
        cross = block.at("attn2")
        q = linear(b, cross.at("to_q"), layer_norm(b, block.at("norm2"), hidden), inner, biased=False)
        hidden = linear(b, cross.at("to_out.0"), attend(cross.prefix[:-1], q), inner, residual=hidden)
        normed = layer_norm(b, block.at("norm3"), hidden)
        gated = linear(b, block.at("ff.net.0.proj"), normed, 8 * inner, activation="geglu")
        hidden = linear(b, block.at("ff.net.2"), gated, inner, residual=hidden)
    return linear(b, w.at("proj_out"), hidden, x.channels, kernel, residual=x)

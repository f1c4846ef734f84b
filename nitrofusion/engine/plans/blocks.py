"""The blocks that diffusers' UNets and autoencoders share, as instructions."""

from __future__ import annotations

from collections.abc import Callable

from nitrokernels.plan import Builder, Map

from .weights import StateDict


def conv3(b: Builder, w: StateDict, x: Map, **options) -> Map:
    """A conv 3x3; ``x`` without a border is given one."""
    return linear(b, w, x if x.border else b.copy(x, border=True), **options)


def linear(b: Builder, w: StateDict, x: Map, **options) -> Map:
    """A linear layer, or a conv whose map has the border it needs."""
    bias = options.pop("bias", None)
    return b.matmul(x, w("weight"), w.get("bias") if bias is None else bias, name=w.prefix + "weight", **options)


def layer_norm(b: Builder, w: StateDict, x: Map, eps: float = 1e-5) -> Map:
    return b.layer_norm(x, w("weight"), w("bias"), eps)


def norm_silu_conv(b: Builder, norm: StateDict, conv: StateDict, x: Map, groups: int, eps: float, **options) -> Map:
    x = b.group_norm(x, norm("weight"), norm("bias"), groups, eps, silu=True, border=True)
    return linear(b, conv, x, **options)


def resnet(b: Builder, w: StateDict, x: Map, groups: int, eps: float, bias: Map | None = None) -> Map:
    """ResnetBlock2D. ``bias`` is the time embedding's projection with the first conv's bias in it."""
    if bias is not None:
        w("conv1.bias")
    hidden = norm_silu_conv(b, w.at("norm1"), w.at("conv1"), x, groups, eps, bias=bias)
    skip = linear(b, w.at("conv_shortcut"), x) if w.has("conv_shortcut") else x
    return norm_silu_conv(b, w.at("norm2"), w.at("conv2"), hidden, groups, eps, residual=skip)


def self_attention(b: Builder, w: StateDict, x: Map, heads: int, residual: Map) -> Map:
    """Queries, keys and values in one product, the residual in the last one."""
    names = ("to_q", "to_k", "to_v")
    bias = w.cat(*(f"{n}.bias" for n in names)) if w.get("to_q.bias") is not None else None
    qkv = b.matmul(x, w.cat_when_asked(*(f"{n}.weight" for n in names)), bias, name=w.prefix + "to_qkv")
    inner = qkv.channels // 3
    keys = b.keys(qkv.columns(inner, inner), qkv.columns(2 * inner, inner), heads)
    return linear(b, w.at("to_out.0"), b.attention(qkv.columns(0, inner), keys, heads), residual=residual)


def transformer(b: Builder, w: StateDict, x: Map, heads: int, groups: int, attend: Callable[[str, Map], Map]) -> Map:
    """Transformer2DModel; ``attend(name, queries)`` is what the cross-attention of that name sees of the prompts."""
    hidden = b.group_norm(x, w("norm.weight"), w("norm.bias"), groups, 1e-6)
    hidden = linear(b, w.at("proj_in"), hidden)
    for i in range(w.count("transformer_blocks")):
        block = w.at(f"transformer_blocks.{i}")
        hidden = self_attention(b, block.at("attn1"), layer_norm(b, block.at("norm1"), hidden), heads, hidden)
        cross = block.at("attn2")
        q = linear(b, cross.at("to_q"), layer_norm(b, block.at("norm2"), hidden))
        hidden = linear(b, cross.at("to_out.0"), attend(cross.prefix[:-1], q), residual=hidden)
        gated = linear(b, block.at("ff.net.0.proj"), layer_norm(b, block.at("norm3"), hidden), activation="geglu")
        hidden = linear(b, block.at("ff.net.2"), gated, residual=hidden)
    return linear(b, w.at("proj_out"), hidden, residual=x)

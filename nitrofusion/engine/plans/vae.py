"""Autoencoders' decoders as plans: AutoencoderKL's and the small AutoencoderTiny's (TAESD)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nitrokernels.plan import Builder, Map

from .blocks import conv3, linear, norm_silu_conv, resnet, self_attention
from .weights import StateDict, Unsupported


class DecoderPlan:
    """Pictures [3, 8 height, 8 width], one at a time, from latents [4, height, width] already divided by the scale.

    Args:
        config: of an AutoencoderKL.
        tensors: its state dict; weights are copied, the encoder's are ignored.
        height, width: of the latents.
        packed: as for ``UNetPlan``.

    Raises:
        Unsupported: the network has parts that plans do not cover.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, torch.Tensor], height: int, width: int, packed=None):
        if config.get("act_fn", "silu") != "silu" or set(config["up_block_types"]) != {"UpDecoderBlock2D"}:
            raise Unsupported("its decoder is not made of UpDecoderBlock2D with SiLU")
        b = Builder(packed)
        w = StateDict(tensors)
        groups, eps = config["norm_num_groups"], 1e-6
        self._latents = b.map(height, width, config["latent_channels"], keep=True)
        x = linear(b, w.at("post_quant_conv"), self._latents) if w.has("post_quant_conv") else self._latents
        w_all, w = w, w.at("decoder")
        x = conv3(b, w.at("conv_in"), x)
        x = resnet(b, w.at("mid_block.resnets.0"), x, groups, eps)
        if w.has("mid_block.attentions.0"):
            at = w.at("mid_block.attentions.0")
            normed = b.group_norm(x, at("group_norm.weight"), at("group_norm.bias"), groups, eps)
            x = self_attention(b, at, normed, 1, x)
        x = resnet(b, w.at("mid_block.resnets.1"), x, groups, eps)
        for i in range(w.count("up_blocks")):
            block = w.at(f"up_blocks.{i}")
            for j in range(block.count("resnets")):
                x = resnet(b, block.at(f"resnets.{j}"), x, groups, eps)
            if block.has("upsamplers.0"):
                x = conv3(b, block.at("upsamplers.0.conv"), b.copy(x, zoom=2, border=True))
        self._image = b.keep(norm_silu_conv(b, w.at("conv_norm_out"), w.at("conv_out"), x, groups, eps))
        self._rgb, self._wrong = map(b.keep, b.levels(self._image))
        w_all.check_all_used("decoder.", "post_quant_conv.")
        self._plan = b.finish()

    @property
    def nbytes(self) -> int:
        return self._plan.nbytes

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """[3, H, W] fp32, not clamped (a view of the plan's memory, good until the next call)."""
        self._plan.read(self._latents).copy_(latents.permute(1, 2, 0))
        self._plan.run()
        return self._plan.read(self._image).permute(2, 0, 1)

    def rgb(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """[H, W, 3] uint8 of the same (a view of the plan's memory, good until the next call); whether none is NaN."""
        self(latents)
        shape = self._image.height, self._image.width, self._image.channels
        return self._plan.read_bytes(self._rgb, *shape), not self._plan.read(self._wrong).any()


class TinyDecoderPlan:
    """As ``DecoderPlan``, of an AutoencoderTiny."""

    def __init__(self, config: Mapping, tensors: Mapping[str, torch.Tensor], height: int, width: int, packed=None):
        if config.get("act_fn", "relu") != "relu" or config.get("upsampling_scaling_factor", 2) != 2:
            raise Unsupported("its decoder is not made of ReLU and doublings")
        b, w_all = Builder(packed), StateDict(tensors)
        w = w_all.at("decoder.layers")
        self._latents = x = b.map(height, width, config.get("latent_channels", 4), keep=True)
        last = max(int(key.split(".")[2]) for key in tensors if key.startswith("decoder.layers."))
        for i in range(last + 1):
            if w.has(f"{i}.conv.0"):
                x = _tiny_block(b, w.at(str(i)), x)
            elif w.has(str(i)):  # what has no weights is a ReLU behind the first conv, or a doubling before the others
                first = i == 0
                if not first and i < last:
                    x = b.copy(x, zoom=2, border=True)
                x = conv3(b, w.at(str(i)), x, activation="relu" if first else None)
        self._image = b.keep(x)
        w_all.check_all_used("decoder.")
        self._plan = b.finish()

    @property
    def nbytes(self) -> int:
        return self._plan.nbytes

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """[3, H, W] fp32, not clamped (a view of the plan's memory, good until the next call)."""
        self._plan.read(self._latents).copy_(torch.tanh(latents / 3).mul_(3).permute(1, 2, 0))
        self._plan.run()
        return self._plan.read(self._image).mul_(2).sub_(1).permute(2, 0, 1)


def _tiny_block(b: Builder, w: StateDict, x: Map) -> Map:
    hidden = conv3(b, w.at("conv.0"), x, activation="relu")
    hidden = conv3(b, w.at("conv.2"), hidden, activation="relu")
    skip = linear(b, w.at("skip"), x) if w.has("skip") else x
    return b.copy(conv3(b, w.at("conv.4"), hidden, residual=skip), activation="relu")

"""Autoencoders as plans, decoders and encoders: AutoencoderKL's and the small AutoencoderTiny's (TAESD)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from nitrokernels.plan import Builder, Map

from .blocks import conv1, conv3, group_norm, norm_silu_conv, positive, resnet, self_attention
from .weights import StateDict, Unsupported

# What diffusers takes where a configuration is silent.
_SILENT = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_TINY_SILENT = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (64, 64, 64, 64),
    "num_encoder_blocks": (1, 3, 3, 3),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "num_decoder_blocks": (3, 3, 3, 1),
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "latent_channels": 4,
    "upsampling_scaling_factor": 2,
}
_SIZES = "in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups"
_TINY_SIZES = "out_channels", "decoder_block_out_channels", "num_decoder_blocks", "latent_channels"
_TINY_ENCODER_SIZES = "in_channels", "encoder_block_out_channels", "num_encoder_blocks", "latent_channels"
_EPS = 1e-6


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
        config = _SILENT | dict(config)
        positive(config, *_SIZES)
        if config["act_fn"] != "silu" or set(config["up_block_types"]) != {"UpDecoderBlock2D"}:
            raise Unsupported("its decoder is not made of UpDecoderBlock2D with SiLU")
        b, w_all = Builder(packed), StateDict(tensors)
        w, groups, eps = w_all.at("decoder"), config["norm_num_groups"], _EPS
        widths = config["block_out_channels"][::-1]
        x = self._latents = b.map(height, width, config["latent_channels"], keep=True)
        if config["use_post_quant_conv"]:
            x = conv1(b, w_all.at("post_quant_conv"), x, x.channels)
        x = conv3(b, w.at("conv_in"), x, widths[0])
        x = _middle(b, w.at("mid_block"), x, groups, config["mid_block_add_attention"])
        for i, (channels, _) in enumerate(zip(widths, config["up_block_types"], strict=True)):
            block = w.at(f"up_blocks.{i}")
            for j in range(config["layers_per_block"] + 1):
                x = resnet(b, block.at(f"resnets.{j}"), x, channels, groups, eps)
            if i < len(widths) - 1:
                x = conv3(b, block.at("upsamplers.0.conv"), b.copy(x, zoom=2, border=True), channels)
        last = w.at("conv_norm_out"), w.at("conv_out")
        self._image = b.keep(norm_silu_conv(b, *last, x, config["out_channels"], groups, eps))
        self._rgb, self._wrong = map(b.keep, b.levels(self._image))
        w_all.check_all_used("decoder.", "post_quant_conv.")
        self._plan = b.finish()

    @property
    def nbytes(self) -> int:
        return self._plan.nbytes

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """[3, H, W] fp32, not clamped (a view of the plan's memory, good until the next call)."""
        self._plan.image(self._latents).copy_(latents)
        self._plan.run()
        return self._plan.image(self._image)

    def rgb(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """[H, W, 3] uint8 of the same (a view of the plan's memory, good until the next call); whether none is NaN."""
        self(latents)
        shape = self._image.height, self._image.width, self._image.channels
        return self._plan.read_bytes(self._rgb, *shape), not self._plan.read(self._wrong).any()


def _middle(b: Builder, w: StateDict, x: Map, groups: int, attends: bool) -> Map:
    x = resnet(b, w.at("resnets.0"), x, x.channels, groups, _EPS)
    if attends:
        at = w.at("attentions.0")
        x = self_attention(b, at, group_norm(b, at.at("group_norm"), x, groups, _EPS), 1, x, biased=True)
    return resnet(b, w.at("resnets.1"), x, x.channels, groups, _EPS)


class EncoderPlan:
    """Mean and deviation [1, 4, height, width] of the unscaled latents of pictures [1, 3, 8 height, 8 width].

    Args:
        config, tensors, height, width, packed: as for ``DecoderPlan``; the decoder's weights are ignored.

    Raises:
        Unsupported: the network has parts that plans do not cover.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, torch.Tensor], height: int, width: int, packed=None):
        config = _SILENT | dict(config)
        positive(config, *_SIZES)
        if config["act_fn"] != "silu" or set(config["down_block_types"]) != {"DownEncoderBlock2D"}:
            raise Unsupported("its encoder is not made of DownEncoderBlock2D with SiLU")
        b, w_all = Builder(packed), StateDict(tensors)
        w, groups, widths = w_all.at("encoder"), config["norm_num_groups"], config["block_out_channels"]
        scale, moments = 2 ** (len(widths) - 1), 2 * config["latent_channels"]
        self._image = b.map(height * scale, width * scale, config["in_channels"], keep=True)
        x = conv3(b, w.at("conv_in"), self._image, widths[0])
        for i, (channels, _) in enumerate(zip(widths, config["down_block_types"], strict=True)):
            block = w.at(f"down_blocks.{i}")
            for j in range(config["layers_per_block"]):
                x = resnet(b, block.at(f"resnets.{j}"), x, channels, groups, _EPS)
            if i < len(widths) - 1:
                x = conv3(b, block.at("downsamplers.0.conv"), x, channels, stride=2, padding=0)
        x = _middle(b, w.at("mid_block"), x, groups, config["mid_block_add_attention"])
        x = norm_silu_conv(b, w.at("conv_norm_out"), w.at("conv_out"), x, moments, groups, _EPS)
        if config["use_quant_conv"]:
            x = conv1(b, w_all.at("quant_conv"), x, moments)
        self._moments = b.keep(x)
        w_all.check_all_used("encoder.", "quant_conv.")
        self._plan = b.finish()

    @property
    def nbytes(self) -> int:
        return self._plan.nbytes

    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.moments(image[0])[None].chunk(2, 1)
        return mean.clone(), (0.5 * log_variance.clamp(-30, 20)).exp()  # limits of DiagonalGaussianDistribution

    def moments(self, image: torch.Tensor) -> torch.Tensor:
        """[8, height, width], means and log variances, of [3, H, W] (a view of the plan's memory)."""
        self._plan.image(self._image).copy_(image)
        self._plan.run()
        return self._plan.image(self._moments)


class TinyDecoderPlan:
    """As ``DecoderPlan``, of an AutoencoderTiny."""

    def __init__(self, config: Mapping, tensors: Mapping[str, torch.Tensor], height: int, width: int, packed=None):
        config = _TINY_SILENT | dict(config)
        positive(config, *_TINY_SIZES)
        if [config[k] for k in ("act_fn", "upsample_fn", "upsampling_scaling_factor")] != ["relu", "nearest", 2]:
            raise Unsupported("its decoder is not made of ReLU and doublings")
        widths, counts = config["decoder_block_out_channels"], config["num_decoder_blocks"]
        b, w_all = Builder(packed), StateDict(tensors)
        w, at = w_all.at("decoder.layers"), 2  # behind the first conv and its ReLU
        self._latents = b.map(height, width, config["latent_channels"], keep=True)
        x = conv3(b, w.at("0"), self._latents, widths[0], activation="relu")
        for level, (channels, count) in enumerate(zip(widths, counts, strict=True)):
            for i in range(count):
                x = _tiny_block(b, w.at(str(at + i)), x, channels)
            at += count
            if level < len(widths) - 1:  # a doubling, and a conv without a bias
                x = conv3(b, w.at(str(at + 1)), b.copy(x, zoom=2, border=True), channels, biased=False)
                at += 2
        x = conv3(b, w.at(str(at)), x, config["out_channels"])
        self._image = b.keep(x)
        w_all.check_all_used("decoder.")
        self._plan = b.finish()

    @property
    def nbytes(self) -> int:
        return self._plan.nbytes

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """[3, H, W] fp32, not clamped (a view of the plan's memory, good until the next call)."""
        self._plan.image(self._latents).copy_(torch.tanh(latents / 3).mul_(3))
        self._plan.run()
        image = self._plan.image(self._image).mul_(2).sub_(1)
        return image.fill_(math.nan) if latents.isnan().any() else image  # a plan's ReLU makes zeros of NaN


def _tiny_block(b: Builder, w: StateDict, x: Map, channels: int) -> Map:
    hidden = conv3(b, w.at("conv.0"), x, channels, activation="relu")
    hidden = conv3(b, w.at("conv.2"), hidden, channels, activation="relu")
    skip = conv1(b, w.at("skip"), x, channels, biased=False) if x.channels != channels else x
    return b.copy(conv3(b, w.at("conv.4"), hidden, channels, residual=skip), activation="relu")


class TinyEncoderPlan:
    """As ``EncoderPlan``, of an AutoencoderTiny, whose latents have no deviation."""

    def __init__(self, config: Mapping, tensors: Mapping[str, torch.Tensor], height: int, width: int, packed=None):
        config = _TINY_SILENT | dict(config)
        positive(config, *_TINY_ENCODER_SIZES)
        if config["act_fn"] != "relu":
            raise Unsupported("its encoder is not made of ReLU")
        widths, counts = config["encoder_block_out_channels"], config["num_encoder_blocks"]
        b, w_all, scale = Builder(packed), StateDict(tensors), 2 ** (len(widths) - 1)
        w, at = w_all.at("encoder.layers"), 0
        x = self._image = b.map(height * scale, width * scale, config["in_channels"], keep=True)
        for level, (channels, count) in enumerate(zip(widths, counts, strict=True)):
            halves = {"stride": 2, "biased": False} if level else {}
            if level and channels != x.channels:
                raise Unsupported(f"its encoder_block_out_channels are {list(widths)}, not of one width")
            x = conv3(b, w.at(str(at)), x, channels, **halves)
            for i in range(count):
                x = _tiny_block(b, w.at(str(at + 1 + i)), x, channels)
            at += 1 + count
        self._latents = b.keep(conv3(b, w.at(str(at)), x, config["latent_channels"]))
        w_all.check_all_used("encoder.")
        self._plan = b.finish()

    @property
    def nbytes(self) -> int:
        return self._plan.nbytes

    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, None]:
        self._plan.image(self._image).copy_(image[0]).add_(1).div_(2)  # [0, 1] is TAESD's convention
        self._plan.run()
        return self._plan.image(self._latents)[None].clone(), None

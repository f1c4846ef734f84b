"""A UNet2DConditionModel as a plan: what a prompt or a timestep makes constant is run once for it, not at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nitrokernels.plan import Builder, Map, Packed

from .blocks import conv3, linear, norm_silu_conv, positive, resnet, transformer
from .weights import StateDict, Unsupported

# What UNet2DConditionModel does when these are at their defaults is what a plan does.
_DEFAULTS = {
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "resnet_out_scale_factor": 1.0,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "dual_cross_attention": False,
    "center_input_sample": False,
    "resnet_skip_time_act": False,
    "class_embeddings_concat": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "cross_attention_norm": None,
}
# What diffusers takes where a configuration is silent.
_SILENT = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "use_linear_projection": False,
    "num_attention_heads": None,
    "time_embedding_dim": None,
    "addition_embed_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
}
_SIZES = "in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups"
_BLOCKS = {
    *("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    *("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
}


@dataclass(frozen=True)
class _Block:
    """Resnets of one width, behind each a transformer of that many blocks, or none."""

    name: str
    channels: int
    heads: int
    depths: list[int | None]
    resamples: bool = False

    def resnets(self) -> list[str]:
        return [f"{self.name}.resnets.{j}" for j in range(len(self.depths))]

    def cross_attentions(self) -> list[str]:
        of = [(j, depth) for j, depth in enumerate(self.depths) if depth is not None]
        return [f"{self.name}.attentions.{j}.transformer_blocks.{k}.attn2" for j, depth in of for k in range(depth)]


def blocks_of(config: Mapping) -> tuple[list[_Block], _Block | None, list[_Block]]:
    """Down, middle and up, as UNet2DConditionModel makes them of its configuration."""
    widths, kinds = config["block_out_channels"], (config["down_block_types"], config["up_block_types"])
    levels = len(widths)

    def each(value) -> list:
        return list(value) if isinstance(value, list | tuple) else [value] * levels

    # What the configuration calls attention_head_dim is the number of heads.
    heads = each(config["num_attention_heads"] or config["attention_head_dim"])
    layers, depths = each(config["layers_per_block"]), each(config["transformer_layers_per_block"])
    back = config["reverse_transformer_layers_per_block"]
    if back is None and any(isinstance(depth, list | tuple) for depth in depths):
        raise Unsupported("its reverse_transformer_layers_per_block is None, and depths differ within a block")
    last = depths[-1]
    middle = {
        None: None,
        "UNetMidBlock2D": [None],
        "UNetMidBlock2DCrossAttn": [last[0] if isinstance(last, list | tuple) else last, None],
    }[config["mid_block_type"]]

    def made(side: str, kinds, widths, heads, counts, depths) -> list[_Block]:
        blocks = []
        for i, (kind, width, head, count, depth) in enumerate(zip(kinds, widths, heads, counts, depths, strict=True)):
            of = depth if isinstance(depth, list | tuple) else [depth] * count
            of = [of[j] if kind.startswith("CrossAttn") else None for j in range(count)]
            blocks.append(_Block(f"{side}_blocks.{i}", width, head, of, i < levels - 1))
        return blocks

    down = made("down", kinds[0], widths, heads, layers, depths)
    counts = [n + 1 for n in layers[::-1]]
    up = made("up", kinds[1], widths[::-1], heads[::-1], counts, depths[::-1] if back is None else back)
    return down, None if middle is None else _Block("mid_block", widths[-1], heads[-1], middle), up


def check_config(config: Mapping) -> None:
    """Raises Unsupported, with the reason, unless the configuration is of a kind that plans cover."""
    for name, value in _DEFAULTS.items():
        if config.get(name, value) not in (value, None if value is False else value):
            raise Unsupported(f"its {name} is {config[name]!r}, not {value!r}")
    if config.get("addition_embed_type") not in ("text_time", None):
        raise Unsupported(f"its addition_embed_type is {config['addition_embed_type']!r}")
    kinds = {*config["down_block_types"], *config["up_block_types"], config.get("mid_block_type")}
    if kinds - _BLOCKS:
        raise Unsupported(f"it has a {next(iter(kinds - _BLOCKS))}")


class UNetPlan:
    """eps of one image at a time, [4, height, width], from latents, timestep and prompt.

    Args:
        config: of a UNet2DConditionModel.
        tensors: its state dict; weights are copied.
        height, width: of the latents.
        tokens: of a prompt.
        packed: shared by the plans of one network for several sizes, which then hold its weights once.

    Raises:
        Unsupported: the network has parts that plans do not cover.
    """

    def __init__(
        self,
        config: Mapping,
        tensors: Mapping[str, torch.Tensor],
        height: int,
        width: int,
        tokens: int,
        packed: Packed | None = None,
    ):
        config = _SILENT | dict(config)
        check_config(config)
        positive(config, *_SIZES)
        self.config, self._inputs, self._seen_negative = config, None, None
        self._blocks = down, mid, up = blocks_of(config)
        every = [*down, *([mid] if mid else []), *up]
        b, w = Builder(packed), StateDict(tensors)
        channels, context_dim = config["block_out_channels"][0], config["cross_attention_dim"]
        self._x = b.map(height, width, config["in_channels"], keep=True)
        self._context = b.map(tokens, 1, context_dim, keep=True)
        self._time = b.map(1, 1, channels, keep=True)
        self._added = None
        if config["addition_embed_type"]:
            self._added = b.map(1, 1, config["projection_class_embeddings_input_dim"], keep=True)

        self._negative, self._how = b.map(tokens, 1, context_dim, keep=True), b.map(1, 1, 4, keep=True)
        b.segment("prompt")
        positives = self._keys(b, w, every, self._context)
        b.segment("negative prompt")
        negatives = self._keys(b, w, every, self._negative)
        b.segment("time")
        biases = self._biases(b, w, every)

        def attend(name: str, q: Map) -> Map:
            return b.attention(q, *positives[name])

        def attend_both(name: str, q: Map) -> Map:
            return b.combine(attend(name, q), b.attention(q, *negatives[name]), self._how)

        b.segment("step")
        self._eps = b.keep(self._step(b, w, attend, biases))
        b.segment("step with negative prompt")
        self._guided_eps = b.keep(self._step(b, w, attend_both, biases))
        w.check_all_used()
        self._plan = b.finish()

    @property
    def nbytes(self) -> int:
        return self._plan.nbytes

    def __call__(
        self,
        x_t: torch.Tensor,
        timestep: int,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        guidance: tuple[float, float, float, float] = (0.0, math.inf, 0.0, 1.0),
    ) -> torch.Tensor:
        """eps [C, height, width] fp32 (a view of the plan's memory, good until the next call).

        Args:
            x_t: [C, height, width].
            timestep: what the UNet is told.
            prompt_embeds: [tokens, cross_attention_dim].
            pooled_prompt_embeds: [pooled], time_ids: [6]; of a UNet with ``text_time`` embeddings.
            negative_prompt_embeds: [tokens, cross_attention_dim]; acts in cross-attention by ``guidance``, the scale,
                tau, alpha and keep of ``nitrokernels.nag_combine``.
        """
        plan, told = self._plan, (prompt_embeds, pooled_prompt_embeds, time_ids)
        plan.image(self._x).copy_(x_t)
        last = self._inputs or (None, None, None, None)
        new_prompt = not _same(last[0], prompt_embeds)
        new_time = last[3] != timestep or not all(map(_same, last[1:3], told[1:]))
        if new_prompt or new_time:
            self._inputs = None  # an error in between leaves nothing to be taken for done
            if new_prompt:
                plan.read(self._context)[:, 0].copy_(prompt_embeds)
                plan.run("prompt")
            if new_time:
                self._embed_time(timestep, pooled_prompt_embeds, time_ids)
                plan.run("time")
            self._inputs = (*(None if p is None else p.clone() for p in told), timestep)
        if negative_prompt_embeds is None:
            plan.run("step")
            return plan.image(self._eps)
        if not _same(self._seen_negative, negative_prompt_embeds):
            self._seen_negative = None
            plan.read(self._negative)[:, 0].copy_(negative_prompt_embeds)
            plan.run("negative prompt")
            self._seen_negative = negative_prompt_embeds.clone()
        plan.read(self._how)[0, 0].copy_(_floats(guidance))
        plan.run("step with negative prompt")
        return plan.image(self._guided_eps)

    def _embed_time(self, timestep, pooled, time_ids) -> None:
        def sinusoid(t: torch.Tensor, dim: int) -> torch.Tensor:
            return timestep_embedding(t, dim, self.config["flip_sin_to_cos"], self.config["freq_shift"])

        time = self._plan.read(self._time)[0]
        time.copy_(sinusoid(_floats([timestep]), time.shape[1]))
        if self._added is not None:
            ids = sinusoid(time_ids.float(), self.config["addition_time_embed_dim"])
            self._plan.read(self._added)[0, 0].copy_(torch.cat([pooled.float(), ids.flatten()]))

    def _keys(
        self, b: Builder, w: StateDict, blocks: list[_Block], prompt: Map
    ) -> dict[str, tuple[tuple[Map, Map], int]]:
        """Keys and values, and the number of heads, of all cross-attentions, by name, from one product."""
        sizes = {name: (x.channels // x.heads * x.heads, x.heads) for x in blocks for name in x.cross_attentions()}
        if not sizes:
            return {}
        shapes = {f"{name}.to_{p}.weight": (n, prompt.channels) for name, (n, _) in sizes.items() for p in "kv"}
        both, first, context = b.matmul(prompt, w.cat_when_asked(shapes), name="every to_kv"), 0, {}
        for name, (inner, heads) in sizes.items():
            k, v = both.columns(first, inner), both.columns(first + inner, inner)
            context[name] = b.keys(k, v, heads), heads
            first += 2 * inner
        return context

    def _biases(self, b: Builder, w: StateDict, blocks: list[_Block]) -> dict[str, Map]:
        """Each resnet's share of the time embedding, from one product; the first conv's bias is in it."""
        dim = self.config["time_embedding_dim"] or 4 * self.config["block_out_channels"][0]

        def mlp(x, name, **options):
            hidden = linear(b, w.at(f"{name}.linear_1"), x, dim, activation="silu")
            return linear(b, w.at(f"{name}.linear_2"), hidden, dim, **options)

        emb = mlp(self._time, "time_embedding")
        if self._added is not None:
            emb = mlp(self._added, "add_embedding", residual=emb)
        emb = b.copy(emb, activation="silu")
        widths = {name: x.channels for x in blocks for name in x.resnets()}
        weight = w.cat({f"{name}.time_emb_proj.weight": (n, dim) for name, n in widths.items()})
        bias = w.cat({f"{name}.time_emb_proj.bias": (n,) for name, n in widths.items()}).float()
        # In fp32: a sum of two halves would be rounded to half precision.
        bias = bias + w.cat({f"{name}.conv1.bias": (n,) for name, n in widths.items()}).float()
        every, first, biases = b.matmul(emb, weight, bias), 0, {}
        for name, count in widths.items():
            biases[name] = every.columns(first, count)
            first += count
        return biases

    def _step(self, b: Builder, w: StateDict, attend: Callable[[str, Map], Map], biases: dict[str, Map]) -> Map:
        groups, eps = self.config["norm_num_groups"], self.config["norm_eps"]
        kernel = () if self.config["use_linear_projection"] else (1, 1)
        down, mid, up = self._blocks

        def layer(block: _Block, j: int, x: Map) -> Map:
            name, depth = block.resnets()[j], block.depths[j]
            x = resnet(b, w.at(name), x, block.channels, groups, eps, biases[name])
            if depth is None:
                return x
            return transformer(b, w.at(f"{block.name}.attentions.{j}"), x, depth, block.heads, groups, kernel, attend)

        x = conv3(b, w.at("conv_in"), self._x, down[0].channels)
        skips = [x]
        for block in down:
            for j in range(len(block.depths)):
                x = layer(block, j, x)
                skips.append(x)
            if block.resamples:
                x = conv3(b, w.at(f"{block.name}.downsamplers.0.conv"), x, block.channels, stride=2)
                skips.append(x)
        if mid is not None:
            for j in range(len(mid.depths)):
                x = layer(mid, j, x)
        for block in up:
            for j in range(len(block.depths)):
                x = layer(block, j, b.concat(x, skips.pop()))
            if block.resamples:
                x = b.copy(x, zoom=2, size=(skips[-1].height, skips[-1].width), border=True)
                x = conv3(b, w.at(f"{block.name}.upsamplers.0.conv"), x, block.channels)
        last = w.at("conv_norm_out"), w.at("conv_out")
        return norm_silu_conv(b, *last, x, self.config["out_channels"], groups, eps)


def timestep_embedding(t: torch.Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> torch.Tensor:
    """[len(t), dim] sinusoids of timesteps, as in diffusers."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    exponent = -math.log(10000) * steps / (half - freq_shift)
    angles = t[:, None].float() * torch.exp(exponent)[None]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.nn.functional.pad(torch.cat(parts, -1), (0, dim % 2))


def _floats(values) -> torch.Tensor:
    """Where plans are and as they count, whatever PyTorch's defaults were set to."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))

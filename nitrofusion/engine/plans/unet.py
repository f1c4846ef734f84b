"""A UNet2DConditionModel as a plan: what a prompt or a timestep makes constant is run once for it, not at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from nitrokernels.plan import Builder, Map, Packed

from .blocks import conv3, norm_silu_conv, resnet, transformer
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
    "encoder_hid_dim_type": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "cross_attention_norm": None,
}
# What diffusers takes where a configuration is silent.
_SILENT = {
    "in_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
}
_BLOCKS = {
    *("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    *("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
}


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
        if height % (step := 2 ** (len(config["block_out_channels"]) - 1)) or width % step:
            raise Unsupported(f"height and width are not multiples of {step}")
        self.config, self._inputs, self._seen_negative = config, None, None
        b, w = Builder(packed), StateDict(tensors)
        channels, context_dim = config["block_out_channels"][0], config["cross_attention_dim"]
        self._x = b.map(height, width, config["in_channels"], keep=True)
        self._context = b.map(tokens, 1, context_dim, keep=True)
        self._time = b.map(1, 1, channels, keep=True)
        self._added = None
        if config.get("addition_embed_type"):
            self._added = b.map(1, 1, w("add_embedding.linear_1.weight").shape[1], keep=True)

        self._negative, self._how = b.map(tokens, 1, context_dim, keep=True), b.map(1, 1, 4, keep=True)
        b.segment("prompt")
        positive = self._keys(b, w, self._context)
        b.segment("negative prompt")
        negative = self._keys(b, w, self._negative)
        b.segment("time")
        biases = self._biases(b, w)

        def attend(name: str, q: Map) -> Map:
            return b.attention(q, positive[name], self._heads(name))

        def attend_both(name: str, q: Map) -> Map:
            return b.combine(attend(name, q), b.attention(q, negative[name], self._heads(name)), self._how)

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
        plan.read(self._x).copy_(x_t.permute(1, 2, 0))
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
            return plan.read(self._eps).permute(2, 0, 1)
        if not _same(self._seen_negative, negative_prompt_embeds):
            self._seen_negative = None
            plan.read(self._negative)[:, 0].copy_(negative_prompt_embeds)
            plan.run("negative prompt")
            self._seen_negative = negative_prompt_embeds.clone()
        plan.read(self._how)[0, 0].copy_(torch.tensor(guidance))
        plan.run("step with negative prompt")
        return plan.read(self._guided_eps).permute(2, 0, 1)

    def _embed_time(self, timestep, pooled, time_ids) -> None:
        def sinusoid(t: torch.Tensor, dim: int) -> torch.Tensor:
            return timestep_embedding(t, dim, self.config["flip_sin_to_cos"], self.config["freq_shift"])

        time = self._plan.read(self._time)[0]
        time.copy_(sinusoid(torch.tensor([float(timestep)]), time.shape[1]))
        if self._added is not None:
            ids = sinusoid(time_ids.float(), self.config["addition_time_embed_dim"])
            self._plan.read(self._added)[0, 0].copy_(torch.cat([pooled.float(), ids.flatten()]))

    def _keys(self, b: Builder, w: StateDict, prompt: Map) -> dict[str, tuple[Map, Map]]:
        """Keys and values of all cross-attentions, by name, from one product."""
        names = w.ending("attn2.to_k.weight")
        if not names:
            return {}
        every = [f"{n}.attn2.to_{p}.weight" for n in names for p in "kv"]
        both, first, context = b.matmul(prompt, w.cat_when_asked(*every), name="every to_kv"), 0, {}
        for name in names:
            inner = len(w(f"{name}.attn2.to_k.weight"))
            k, v = both.columns(first, inner), both.columns(first + inner, inner)
            context[f"{name}.attn2"] = b.keys(k, v, self._heads(name))
            first += 2 * inner
        return context

    def _biases(self, b: Builder, w: StateDict) -> dict[str, Map]:
        """Each resnet's share of the time embedding, from one product; the first conv's bias is in it."""

        def mlp(x, name, **options):
            hidden = b.matmul(x, w(f"{name}.linear_1.weight"), w(f"{name}.linear_1.bias"), activation="silu")
            return b.matmul(hidden, w(f"{name}.linear_2.weight"), w(f"{name}.linear_2.bias"), **options)

        emb = mlp(self._time, "time_embedding")
        if self._added is not None:
            emb = mlp(self._added, "add_embedding", residual=emb)
        emb = b.copy(emb, activation="silu")
        names = w.ending("time_emb_proj.weight")
        weight = torch.cat([w(f"{n}.time_emb_proj.weight") for n in names])
        # In fp32: a sum of two halves would be rounded to half precision.
        bias = torch.cat([w(f"{n}.time_emb_proj.bias").float() + w(f"{n}.conv1.bias").float() for n in names])
        every, first, biases = b.matmul(emb, weight, bias), 0, {}
        for name in names:
            count = len(w(f"{name}.conv1.bias"))
            biases[name] = every.columns(first, count)
            first += count
        return biases

    def _heads(self, name: str) -> int:
        """Of the attention at ``name``. What the configuration calls attention_head_dim is the number of heads."""
        heads = self.config.get("num_attention_heads") or self.config["attention_head_dim"]
        levels = len(self.config["down_block_types"])
        if isinstance(heads, int):
            return heads
        where, index = name.split(".")[0], name.split(".")[1]
        return {"down_blocks": list(heads), "up_blocks": list(heads)[::-1]}.get(where, [heads[-1]] * levels)[
            int(index) if where != "mid_block" else 0
        ]

    def _step(self, b: Builder, w: StateDict, attend: Callable[[str, Map], Map], biases: dict[str, Map]) -> Map:
        groups, eps = self.config["norm_num_groups"], self.config["norm_eps"]

        def res(at: StateDict, x):
            return resnet(b, at, x, groups, eps, biases.get(at.prefix[:-1]))

        def transform(at: StateDict, i: int, x):
            at = at.at(f"attentions.{i}")
            return transformer(b, at, x, self._heads(at.prefix), groups, attend) if at.has("norm") else x

        x = conv3(b, w.at("conv_in"), self._x)
        skips = [x]
        for i in range(w.count("down_blocks")):
            block = w.at(f"down_blocks.{i}")
            for j in range(block.count("resnets")):
                x = transform(block, j, res(block.at(f"resnets.{j}"), x))
                skips.append(x)
            if block.has("downsamplers.0"):
                x = conv3(b, block.at("downsamplers.0.conv"), x, stride=2)
                skips.append(x)
        if w.has("mid_block"):
            block = w.at("mid_block")
            x = res(block.at("resnets.0"), x)
            for j in range(1, block.count("resnets")):
                x = res(block.at(f"resnets.{j}"), transform(block, j - 1, x))
        for i in range(w.count("up_blocks")):
            block = w.at(f"up_blocks.{i}")
            for j in range(block.count("resnets")):
                x = transform(block, j, res(block.at(f"resnets.{j}"), b.concat(x, skips.pop())))
            if block.has("upsamplers.0"):
                x = conv3(b, block.at("upsamplers.0.conv"), b.copy(x, zoom=2, border=True))
        return norm_silu_conv(b, w.at("conv_norm_out"), w.at("conv_out"), x, groups, eps)


def timestep_embedding(t: torch.Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> torch.Tensor:
    """[len(t), dim] sinusoids of timesteps, as in diffusers."""
    half = dim // 2
    exponent = -torch.log(torch.tensor(10000.0)) * torch.arange(half, dtype=torch.float32) / (half - freq_shift)
    angles = t[:, None].float() * torch.exp(exponent)[None]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.nn.functional.pad(torch.cat(parts, -1), (0, dim % 2))


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))

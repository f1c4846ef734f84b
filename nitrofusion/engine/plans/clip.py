"""CLIP's text encoders as plans."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nitrokernels.plan import Builder

from .blocks import layer_norm, linear
from .weights import StateDict, Unsupported


class TextPlan:
    """The penultimate layer's states and the pooled projection of one prompt.

    Args:
        config: of a CLIPTextModel or CLIPTextModelWithProjection.
        tensors: its state dict; weights are copied.
        pooled: whether the pooled projection is wanted. Without it the last layer is never run.

    Raises:
        Unsupported: the network has parts that plans do not cover.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, torch.Tensor], pooled: bool):
        act = config["hidden_act"]
        if act not in ("quick_gelu", "gelu"):
            raise Unsupported(f"its hidden_act is {act!r}")
        b = Builder()
        w_all = StateDict(tensors)
        w = w_all.at("text_model") if w_all.has("text_model") else w_all
        self._embedding = w("embeddings.token_embedding.weight")
        self._positions = w("embeddings.position_embedding.weight").float()
        tokens, width = self._positions.shape
        heads, eps, layers = config["num_attention_heads"], config["layer_norm_eps"], config["num_hidden_layers"]
        self._eos = config.get("eos_token_id", 2)
        self._x = x = b.map(tokens, 1, width, keep=True)
        for i in range(layers):
            if i == layers - 1:
                self._penultimate = b.keep(x)
                b.segment("last")
            at = w.at(f"encoder.layers.{i}")
            if i == layers - 1 and not pooled:
                break
            normed = layer_norm(b, at.at("layer_norm1"), x, eps)
            names = [f"self_attn.{n}_proj" for n in "qkv"]
            qkv = b.matmul(normed, at.cat(*(f"{n}.weight" for n in names)), at.cat(*(f"{n}.bias" for n in names)))
            keys = b.keys(qkv.columns(width, width), qkv.columns(2 * width, width), heads)
            attended = b.attention(qkv.columns(0, width), keys, heads, causal=True)
            x = linear(b, at.at("self_attn.out_proj"), attended, residual=x)
            normed = layer_norm(b, at.at("layer_norm2"), x, eps)
            x = linear(b, at.at("mlp.fc2"), linear(b, at.at("mlp.fc1"), normed, activation=act), residual=x)
        self._pooled = None
        if pooled:
            normed = layer_norm(b, w.at("final_layer_norm"), x, eps)
            projected = b.matmul(normed, w_all("text_projection.weight")) if w_all.has("text_projection") else normed
            self._pooled = b.keep(projected)
        self._plan = b.finish()

    @property
    def nbytes(self) -> int:
        return self._plan.nbytes

    def __call__(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([tokens, width] states before the last layer, [pooled] projection or None), fp32 copies."""
        rows = self._embedding[torch.tensor(ids)]
        self._plan.read(self._x)[:, 0].copy_(rows.float() + self._positions)
        self._plan.run()
        states = self._plan.read(self._penultimate)[:, 0].clone()
        if self._pooled is None:
            return states, None
        # CLIPTextModel: configurations from before eos_token_id was right (2) meant the largest id.
        ends = [i for i, token in enumerate(ids) if token == (max(ids) if self._eos == 2 else self._eos)]
        end = ends[0] if ends else 0  # as transformers has it
        return states, self._plan.read(self._pooled)[end, 0].clone()

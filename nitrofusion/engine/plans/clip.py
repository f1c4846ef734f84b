"""CLIP's text encoders as plans."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nitrokernels.plan import Builder

from .blocks import layer_norm, linear, positive
from .weights import StateDict, Unsupported

# What transformers takes where a configuration is silent.
_SILENT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_SIZES = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"


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
        config = _SILENT | dict(config)
        positive(config, *_SIZES)
        act, self._eos = config["hidden_act"], config["eos_token_id"]
        if act not in ("quick_gelu", "gelu"):
            raise Unsupported(f"its hidden_act is {act!r}")
        if not isinstance(self._eos, int):
            raise Unsupported(f"its eos_token_id is {self._eos!r}")
        if not isinstance(config["layer_norm_eps"], float):  # transformers takes no integer
            raise Unsupported(f"its layer_norm_eps is {config['layer_norm_eps']!r}")
        width, inner, tokens = config["hidden_size"], config["intermediate_size"], config["max_position_embeddings"]
        heads, eps, layers = config["num_attention_heads"], config["layer_norm_eps"], config["num_hidden_layers"]
        b, w_all = Builder(), StateDict(tensors)
        w_all.used.update(name for name in tensors if name.endswith("position_ids"))  # were stored once, and not needed
        w = w_all.at("text_model") if w_all.has("text_model") else w_all
        self._embedding = w("embeddings.token_embedding.weight", config["vocab_size"], width)
        self._positions = w("embeddings.position_embedding.weight", tokens, width).float()
        self._x = x = b.map(tokens, 1, width, keep=True)
        for i in range(layers):
            at = w.at(f"encoder.layers.{i}")
            _check_layer(at, width, inner)
            if i == layers - 1:
                self._penultimate = b.keep(x)
                b.segment("last")
                if not pooled:
                    break
            normed = layer_norm(b, at.at("layer_norm1"), x, eps)
            names = [f"self_attn.{n}_proj" for n in "qkv"]
            weight = at.cat({f"{n}.weight": (width, width) for n in names})
            qkv = b.matmul(normed, weight, at.cat({f"{n}.bias": (width,) for n in names}))
            keys = b.keys(qkv.columns(width, width), qkv.columns(2 * width, width), heads)
            attended = b.attention(qkv.columns(0, width), keys, heads, causal=True)
            x = linear(b, at.at("self_attn.out_proj"), attended, width, residual=x)
            normed = layer_norm(b, at.at("layer_norm2"), x, eps)
            hidden = linear(b, at.at("mlp.fc1"), normed, inner, activation=act)
            x = linear(b, at.at("mlp.fc2"), hidden, width, residual=x)
        for name in ("weight", "bias"):
            w(f"final_layer_norm.{name}", width)
        self._pooled = None
        if pooled:
            normed = layer_norm(b, w.at("final_layer_norm"), x, eps)
            projected = linear(b, w_all.at("text_projection"), normed, config["projection_dim"], biased=False)
            self._pooled = b.keep(projected)
        w_all.check_all_used()
        self._plan = b.finish()

    @property
    def nbytes(self) -> int:
        return self._plan.nbytes

    def __call__(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([tokens, width] states before the last layer, [pooled] projection or None), fp32 copies."""
        rows = self._embedding[torch.tensor(ids, device="cpu")]
        self._plan.read(self._x)[:, 0].copy_(rows.float() + self._positions)
        self._plan.run()
        states = self._plan.read(self._penultimate)[:, 0].clone()
        if self._pooled is None:
            return states, None
        # CLIPTextModel: configurations from before eos_token_id was right (2) meant the largest id.
        ends = [i for i, token in enumerate(ids) if token == (max(ids) if self._eos == 2 else self._eos)]
        end = ends[0] if ends else 0  # as transformers has it
        return states, self._plan.read(self._pooled)[end, 0].clone()


def _check_layer(w: StateDict, width: int, inner: int) -> None:
    """Raises Unsupported unless all its weights are there: of the last layer, which may not run, too."""
    shapes = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner), "layer_norm1": (width,), "layer_norm2": (width,)}
    for name, shape in shapes.items():
        w(f"{name}.weight", *shape)
        w(f"{name}.bias", shape[0])

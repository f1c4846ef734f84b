"""LoRA files merged into weights: diffusers', PEFT's and kohya's layouts, as diffusers' own converters read them.

``engine/lora_by_svd.py`` makes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)

from ..errors import InputError
from .weights import Weights, is_finite, short

PARTS = ("text_encoder_2", "text_encoder", "unet")
_FOREIGN = {"hada_w1": "LoHa", "lokr_w1": "LoKr", "oft_": "OFT", "dora_scale": "DoRA", "lora_magnitude": "DoRA"}
_SCALES = ("lora_alpha", "alpha_pattern", "use_rslora")  # of LoraConfig, as the header has them


@dataclass(frozen=True)
class Report:
    """What became of a LoRA file.

    Attributes:
        applied, total: tensors that were merged, and that the file holds.
        unused: names of layers this model lacks.
    """

    path: Path
    scale: float
    applied: int
    total: int
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path.name} x {self.scale:g}: {self.applied} of {self.total} keys applied"


@dataclass(frozen=True)
class Delta:
    """scale * up @ down, to be added to one weight; down [rank, in, ...], up [out, rank, ...]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum in fp32, shaped like ``weight`` and on its device."""
        up, down = (side.to(weight.device).flatten(1).float() for side in (self.up, self.down))
        return weight.float() + self.scale * (up @ down).reshape(weight.shape)


@dataclass(frozen=True)
class Merge:
    """A LoRA that fits a model.

    Attributes:
        origin: of its file, as ``Weights`` says.
        deltas: which weights it changes, by (part, name).
    """

    origin: tuple
    deltas: Mapping[tuple[str, str], Delta]
    report: Report


def plan(path: Path, scale: float, modules: Mapping[str, torch.nn.Module]) -> Merge:
    """Which weights a LoRA changes; changes nothing.

    Args:
        scale: of the whole file, beside the alphas in it.
        modules: the parts of the model by their names; on the meta device or not.

    Raises:
        InputError: it is no LoRA, of another architecture, or of a kind that cannot be merged so.
    """
    weights = Weights(path)
    for piece, name in _FOREIGN.items():
        if any(piece in key for key in weights):
            raise InputError(f"load: {path} must be a plain LoRA, got {name}")
    if not any("lora" in key for key in weights):
        raise InputError(f"load: {path} must be a LoRA, got {len(weights)} tensors without one")
    _check_tensors(weights, path)
    pairs, alphas = _pairs(weights, modules["unet"].config, path)
    names = {part: {_plain(name): name for name in modules[part].state_dict()} for part in PARTS}
    deltas, applied, unused = {}, 0, []
    for (part, layer), (down, up) in pairs.items():
        name = names[part].get(_plain(f"{layer}.weight"))
        if name is None:
            unused.append(f"{part}.{layer}")
            continue
        target = modules[part].get_parameter(name).shape
        if up.shape[0] != target[0] or up.shape[1] != down.shape[0] or down[0].numel() != target[1:].numel():
            raise InputError(
                f"load: {path} must fit this model, got {list(up.shape)} x {list(down.shape)} for {part}.{layer}, "
                f"whose weight is {list(target)}"
            )
        # Of a layer without one it is the rank, as in kohya's programs; diffusers takes the file's commonest alpha.
        alpha = alphas.get((part, layer))
        deltas[part, name] = Delta(down, up, scale * (1.0 if alpha is None else alpha / down.shape[0]))
        applied += 2 + any(k.endswith(".alpha") for k in weights) * (alpha is not None)
    if not deltas:
        raise InputError(f"load: {path} must fit this model, got 0 of {len(weights)} keys applied (first: {unused[0]})")
    return Merge(weights.origin, deltas, Report(path, scale, applied, len(weights), tuple(unused)))


def _check_tensors(weights: Weights, path: Path) -> None:
    """Raises InputError for what could not be merged, or would spoil what it is merged into."""
    for key, value in weights.items():
        if "lora" in key and key.endswith(".bias"):  # most of the layers have no bias that it could be added to
            raise InputError(f"load: {path} must be a LoRA without biases, got {short(key)}")
        if key.endswith(".alpha") and value.numel() != 1:
            raise InputError(f"load: {path} must have one number as {short(key)}, got {short(list(value.shape))}")
        if "lora" in key and key.endswith(".weight") and not (value.ndim >= 2 and value.numel()):
            got = f"{short(list(value.shape))} in {short(key)}"
            raise InputError(f"load: {path} must have matrices or kernels of rank 1 or more, got {got}")
        if not is_finite(value.float()):
            raise InputError(f"load: {path} must hold finite weights, got NaN or infinity in {short(key)}")
    weights.release()


def _pairs(weights: Weights, unet_config, path: Path):
    """{(part, layer): (down, up)} and {(part, layer): alpha}, layers named as in the model."""
    state = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    state = {f"unet.{k.removeprefix('diffusion_model.')}" if k[:10] == "diffusion_" else k: v for k, v in state.items()}
    try:
        state, network_alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(state, unet_config=unet_config)
    except (ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"load: {path} must be a LoRA in a layout diffusers reads, got {reason}") from error
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    alphas: dict[tuple[str, str], float] = {}
    for key, value in _peft(state).items():
        part, name = _part(key)
        if name.endswith(".alpha"):
            alphas[part, name.removesuffix(".alpha")] = float(value)
            continue
        layer, _, rest = name.partition(".lora_")
        found.setdefault((part, layer), {})[rest[:1]] = value
    for key, value in _peft(network_alphas or {}).items():
        part, name = _part(key.removesuffix(".alpha"))
        alphas[part, name.partition(".lora_")[0]] = float(value)
    broken = [f"{part}.{layer}" for (part, layer), sides in found.items() if sides.keys() != {"A", "B"}]
    if broken:
        raise InputError(f"load: {path} must have a down and an up for every layer, got one or neither for {broken[0]}")
    pairs = {place: (sides["A"], sides["B"]) for place, sides in found.items()}
    return pairs, _adapter_alphas(weights.metadata, pairs, path) | alphas


def _peft(state: dict) -> dict:
    """Keys as PEFT writes them, whichever of diffusers' layouts they were in."""
    text = {key: value for key, value in state.items() if _part(key)[0] != "unet"}
    rest = {key: value for key, value in state.items() if key not in text}
    # The oldest layout's table has all of a text encoder's names but x.lora.down, which the UNet's has.
    text = convert_state_dict_to_peft(text, original_type=StateDictType.DIFFUSERS_OLD)
    return convert_unet_state_dict_to_peft(rest | text)


def _part(key: str) -> tuple[str, str]:
    for part in PARTS:
        if key.startswith(f"{part}."):
            return part, key.removeprefix(f"{part}.")
    return "unet", key


def _plain(name: str) -> str:
    """transformers stores a text encoder's names with or without this prefix, by version."""
    return name.removeprefix("text_model.")


def _adapter_alphas(metadata: dict[str, str], pairs, path: Path) -> dict[tuple[str, str], float]:
    """Alphas that diffusers stores as JSON in the header instead of as tensors; of a UNet alone without its name."""
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        values = json.loads(metadata["lora_adapter_metadata"])
        alphas = {}
        for part, layer in pairs:
            rank = pairs[part, layer][0].shape[0]
            told = {name: values.get(f"{part}.{name}", values.get(name)) for name in _SCALES}
            alpha = float(rank if told["lora_alpha"] is None else told["lora_alpha"])
            pattern = told["alpha_pattern"] or {}
            alpha = float(next((v for k, v in pattern.items() if layer == k or layer.endswith(f".{k}")), alpha))
            if not math.isfinite(alpha):
                raise ValueError(f"an alpha of {alpha}")
            alphas[part, layer] = alpha * rank**0.5 if told["use_rslora"] else alpha
        return alphas
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"load: {path} must have a readable lora_adapter_metadata, got {error}") from error

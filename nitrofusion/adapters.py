"""LoRA adapters on a UNet, by PEFT: what trains when the weights under them stay as they are."""

from __future__ import annotations

import torch
from torch import nn

from .errors import InputError

# Every matrix and convolution that depends on the picture, as the published few-step LoRAs adapt them.
STUDENT_LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
)  # fmt: skip


class Adapters(nn.Module):
    """The adapters of one name in a UNet, as a module of their own.

    Its parameters and state are theirs alone, the state named as diffusers stores a LoRA:
    ``unet.<layer>.lora_A.weight`` [rank, in, ...] and ``unet.<layer>.lora_B.weight`` [out, rank, ...], scale 1.

    Args:
        unet: a diffusers UNet; it gets the adapters, frozen weights stay where they are.
        rank: of each adapter.
        layers: ends of the names of the modules that get one.
        scale: of what the adapters add; a stored LoRA has 1.
        name: of the adapter in the UNet.
    """

    def __init__(
        self, unet, rank: int, layers: tuple[str, ...] = STUDENT_LAYERS, scale: float = 1.0, name: str = "default"
    ):
        super().__init__()
        from peft import LoraConfig

        unet.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=list(layers), init_lora_weights=True)
        unet.add_adapter(config, adapter_name=name)
        found = {}
        for layer, module in unet.named_modules():
            for side in ("lora_A", "lora_B"):
                if name in getattr(module, side, {}):
                    found[f"unet.{layer}.{side}.weight"] = getattr(module, side)[name].weight
        self.names = list(found)
        self.weights = nn.ParameterList(found.values())

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        return {name: weight.detach() for name, weight in zip(self.names, self.weights, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, state, strict: bool = True, assign: bool = False):
        if strict and state.keys() != set(self.names):
            odd = sorted(state.keys() ^ set(self.names))
            raise RuntimeError(f"adapters: {len(odd)} names must agree, got a difference at {odd[0]}")
        for name, weight in zip(self.names, self.weights, strict=True):
            if name in state:
                weight.copy_(state[name])


def count_parameters(unet, rank: int, layers: tuple[str, ...] = STUDENT_LAYERS) -> int:
    """Of ``Adapters`` of those layers."""
    ends = tuple(f".{layer}" for layer in layers)
    found = [m for name, m in unet.named_modules() if f".{name}".endswith(ends) and hasattr(m, "weight")]
    return rank * sum(m.weight.shape[0] + m.weight[0].numel() for m in found)


def check_installed(why: str) -> None:
    """Raises InputError where PEFT is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InputError(f"config: {why} needs peft, got {error} (pip install 'nitrofusion[lora]')") from error

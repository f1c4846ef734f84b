"""``accelerate(pipe)``: a diffusers pipeline, faster in place; ``restore(pipe)``: as it was.

On a CPU in fp32 the UNet and the decoder run as static plans, a whole network in one native call; elsewhere, and for
what plans do not cover, on nitrokernels' fused ops. Only classes change: parameters, keys, hooks and adapters stay.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

import nitrokernels
from nitrokernels import plan as plans
from nitrokernels._native import address

from ..errors import InputError
from .plans.unet import UNetPlan
from .plans.vae import DecoderPlan
from .plans.weights import Unsupported

log = logging.getLogger(__name__)
_PLANS = 4  # sizes kept for each network; they share its packed weights


def accelerate(pipe):
    """Speeds up a StableDiffusionXLPipeline, or any pipeline with its UNet and VAE, in place; results stay within 1e-5.

    Adapters (LoRA), image-to-image, batches and guidance work as before. Calls that a plan does not cover (gradients,
    ControlNet's residuals, other attention processors, hooks inside the network) run as they would without it.

    Returns:
        ``pipe``.

    Raises:
        InputError: the pipeline has no UNet2DConditionModel and no AutoencoderKL.
    """
    parts = _parts(pipe)
    for module in parts:
        device = next(module.parameters()).device
        if nitrokernels.fusible(device):
            nitrokernels.fuse_(module)
        if device.type == "cuda":
            module.to(memory_format=torch.channels_last)
        if plans.missing() is None:
            module.__class__ = _planned().get(type(module), type(module))
    return pipe


def restore(pipe):
    """Undoes ``accelerate``; returns ``pipe``."""
    for module in _parts(pipe):
        nitrokernels.unfuse_(module)
        module.__class__ = {planned: plain for plain, planned in _planned().items()}.get(type(module), type(module))
        _made.pop(module, None)
    return pipe


def _parts(pipe) -> list[torch.nn.Module]:
    parts = [getattr(pipe, name, None) for name in ("unet", "vae")]
    parts = [p for p in parts if isinstance(p, (UNet2DConditionModel, AutoencoderKL))]
    if not parts:
        got = type(pipe).__name__
        raise InputError(f"accelerate: pipe must have a UNet2DConditionModel or an AutoencoderKL, got {got}")
    return parts


def _planned() -> dict[type, type]:
    return {UNet2DConditionModel: PlannedUNet, AutoencoderKL: PlannedVAE}


class _Made:
    """The plans of one module: (size) -> plan, for as long as its weights stay what they were."""

    def __init__(self):
        self.lock, self.weights, self.by_size, self.packed, self.reason = threading.Lock(), None, {}, {}, None


_made: weakref.WeakKeyDictionary[torch.nn.Module, _Made] = weakref.WeakKeyDictionary()


def _plan(module: torch.nn.Module, size: tuple, make):
    """The plan for ``size``, or None; the reason why not is logged once. Call it with the lock held."""
    made = _made[module]
    weights = fingerprint(module)
    if weights != made.weights:
        made.weights, made.by_size, made.packed, made.reason = weights, {}, {}, None
    if made.reason is None and size not in made.by_size:
        try:
            plan = make(effective_state(module), made.packed)
        except Unsupported as error:
            made.reason = str(error)
            log.info("accelerate: %s runs without a plan: %s", type(module).__name__, error)
            return None
        if len(made.by_size) == _PLANS:
            made.by_size.pop(next(iter(made.by_size)))
        made.by_size[size] = plan
    return made.by_size.get(size)


class PlannedUNet(UNet2DConditionModel):
    """A UNet2DConditionModel that runs as a plan where it may."""

    def forward(self, sample, timestep, encoder_hidden_states, *args, return_dict: bool = True, **kwargs):
        added = kwargs.get("added_cond_kwargs") or {}
        extra = {k for k, v in kwargs.items() if v is not None and v != {} and k != "added_cond_kwargs"}
        if not args and not extra and set(added) <= {"text_embeds", "time_ids"} and _plain(self, sample):
            made = _made.setdefault(self, _Made())
            with made.lock:
                size = (*sample.shape[2:], encoder_hidden_states.shape[1])
                plan = _plan(self, size, lambda state, packed: UNetPlan(self.config, state, *size, packed))
                if plan is not None:
                    eps = self._run(plan, sample, timestep, encoder_hidden_states, added)
                    return UNet2DConditionOutput(eps) if return_dict else (eps,)
        return super().forward(sample, timestep, encoder_hidden_states, *args, return_dict=return_dict, **kwargs)

    @staticmethod
    def _run(plan: UNetPlan, sample, timestep, context, added) -> torch.Tensor:
        times = torch.as_tensor(timestep).reshape(-1).expand(len(sample)).tolist()
        eps = torch.empty(len(sample), plan.config["out_channels"], *sample.shape[2:])
        for i in range(len(sample)):
            extra = (added["text_embeds"][i], added["time_ids"][i]) if added else ()
            eps[i] = plan(sample[i], times[i], context[i], *extra)
        return eps


class PlannedVAE(AutoencoderKL):
    """An AutoencoderKL whose decoder runs as a plan where it may."""

    def decode(self, z, return_dict: bool = True, generator=None):
        if not (self.use_slicing or self.use_tiling) and _plain(self, z):
            made = _made.setdefault(self, _Made())
            with made.lock:
                size = tuple(z.shape[2:])
                plan = _plan(self, size, lambda state, packed: DecoderPlan(self.config, state, *size, packed))
                if plan is not None:
                    pictures = torch.stack([plan(latents).clone() for latents in z]) if len(z) else z.new_empty(0)
                    return DecoderOutput(sample=pictures) if return_dict else (pictures,)
        return super().decode(z, return_dict=return_dict, generator=generator)


def _plain(module: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether this is inference in fp32 on the CPU, with nothing attached that a plan would pass by."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled() or not len(x):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    for inner in module.modules():
        if inner is not module and (inner._forward_hooks or inner._forward_pre_hooks):
            return False
        if isinstance(inner, Attention) and type(inner.processor) not in (AttnProcessor, AttnProcessor2_0):
            return False
    return next(module.parameters()).dtype == torch.float32


def fingerprint(module: torch.nn.Module) -> tuple:
    """Changes whenever a weight, an adapter or its scale does."""
    weights = tuple((address(p), p._version) for p in module.parameters())
    adapters = tuple(
        (tuple(layer.active_adapters), layer.disable_adapters, layer.merged, *sorted(layer.scaling.items()))
        for layer in _lora_layers(module).values()
    )
    return weights, adapters


def effective_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as it would be with all active adapters merged, under the keys of a model without adapters."""
    layers = _lora_layers(module)
    state = {}
    for name, tensor in module.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if any(owner.startswith(f"{layer}.") and not owner.startswith(f"{layer}.base_layer") for layer in layers):
            continue  # an adapter's own
        state[name.replace(".base_layer.", ".")] = tensor
    for name, layer in layers.items():
        if layer.disable_adapters or layer.merged:
            continue
        for adapter in layer.active_adapters:
            if adapter not in getattr(layer, "lora_A", {}):
                continue
            if getattr(layer, "lora_bias", {}).get(adapter) or getattr(layer, "use_dora", {}).get(adapter):
                raise Unsupported(f"its adapter {adapter} is more than a product of two matrices")
            key = f"{name}.weight"
            state[key] = state[key] + layer.get_delta_weight(adapter).to(state[key].dtype)
    return state


def _lora_layers(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kind = _lora_layer()
    return {} if kind is None else {name: m for name, m in module.named_modules() if isinstance(m, kind)}


@functools.cache
def _lora_layer():
    """PEFT's base class of LoRA layers, None where it is not installed."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return None
    return LoraLayer

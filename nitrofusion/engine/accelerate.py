"""``accelerate(pipe)``: a diffusers pipeline, faster in place; ``restore(pipe)``: as it was.

On a CPU in fp32 UNet and VAE run as static plans, a whole network in one native call; elsewhere, and for
what plans do not cover, on nitrokernels' fused ops. Parameters, keys, hooks and adapters stay; so do the classes of
UNet and VAE, which diffusers compares and saves by name.
"""

from __future__ import annotations

import functools
import logging
import threading
import types
import weakref

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models import activations, attention, embeddings, resnet
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, DiagonalGaussianDistribution, Encoder
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

import nitrokernels
from nitrokernels import nn as fused
from nitrokernels import plan as plans
from nitrokernels._diffusers import FusedGEGLU, FusedResnetBlock2D
from nitrokernels._native import address

from ..errors import InputError
from .plans.unet import UNetPlan
from .plans.vae import DecoderPlan, EncoderPlan
from .plans.weights import Unsupported

log = logging.getLogger(__name__)
_PLANS = 4  # sizes kept for each network; they share its packed weights

# What a plan knows how to run, as these very classes: a subclass may do something else.
_KNOWN = {
    *(torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.SiLU, torch.nn.Dropout),
    *(torch.nn.Identity, torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterDict),
    *(blocks.DownBlock2D, blocks.CrossAttnDownBlock2D, blocks.UpBlock2D, blocks.CrossAttnUpBlock2D),
    *(blocks.UNetMidBlock2D, blocks.UNetMidBlock2DCrossAttn, blocks.UpDecoderBlock2D, blocks.DownEncoderBlock2D),
    *(Decoder, Encoder),
    *(resnet.ResnetBlock2D, resnet.Upsample2D, resnet.Downsample2D, Transformer2DModel, Attention),
    *(attention.BasicTransformerBlock, attention.FeedForward, activations.GEGLU),
    *(embeddings.Timesteps, embeddings.TimestepEmbedding),
    *(fused.GroupNorm, fused.LayerNorm, fused.GroupNormSilu, fused.NormalisedSilu, FusedResnetBlock2D, FusedGEGLU),
}

_UP = (blocks.UpBlock2D, blocks.CrossAttnUpBlock2D)


def accelerate(pipe):
    """Speeds up a StableDiffusionXLPipeline, or any pipeline with its UNet and VAE, in place; results stay within 1e-5.

    Adapters (LoRA), image-to-image, batches and guidance work as before. Calls that a plan does not cover (gradients,
    autocast, ControlNet's residuals, other attention processors, FreeU, hooks or patches inside the network) run as
    they would without it. A changed weight is seen, unless ``.data`` is written to in a few places only (see
    ``_samples``).

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
        for planned in _PLANNED.get(type(module), ()) if plans.missing() is None else ():
            if planned.method not in vars(module):
                setattr(module, planned.method, planned(module))
    return pipe


def restore(pipe):
    """Undoes ``accelerate``; returns ``pipe``."""
    for module in _parts(pipe):
        nitrokernels.unfuse_(module)
        for name, value in list(vars(module).items()):
            if isinstance(value, _Planned):
                delattr(module, name)
                if name != value.method:  # where a hook of the accelerate package keeps what it wraps
                    setattr(module, name, types.MethodType(getattr(type(module), value.method), module))
        _made.pop(module, None)
    return pipe


def _parts(pipe) -> list[torch.nn.Module]:
    parts = [getattr(pipe, name, None) for name in ("unet", "vae")]
    parts = [p for p in parts if isinstance(p, (UNet2DConditionModel, AutoencoderKL))]
    if not parts:
        got = type(pipe).__name__
        raise InputError(f"accelerate: pipe must have a UNet2DConditionModel or an AutoencoderKL, got {got}")
    return parts


class _Made:
    """The plans of one module's method: (size) -> plan, for as long as its weights stay what they were."""

    def __init__(self):
        self.lock, self.weights, self.views, self.sample = threading.Lock(), None, [], None
        self.forget()

    def forget(self) -> None:
        self.by_size, self.packed, self.reason = {}, {}, None


_made: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, _Made]] = weakref.WeakKeyDictionary()


class _Planned:
    """What stands, as an attribute of one module, before its method of that name; a copy is of the copied module."""

    method: str
    plan: type

    def __init__(self, module: torch.nn.Module):
        self._module = weakref.ref(module)  # or no module would go before the garbage collector comes

    def __getstate__(self) -> torch.nn.Module:
        return self._module()

    def __setstate__(self, module: torch.nn.Module) -> None:
        self.__init__(module)

    def _own(self) -> _Made:
        methods = _made.setdefault(self._module(), {})
        return methods[self.method] if self.method in methods else methods.setdefault(self.method, _Made())

    def _plan_for(self, made: _Made, module: torch.nn.Module, inner: list[torch.nn.Module], size: tuple):
        """The plan for ``size``, or None; the reason why not is logged once. Call it with the lock held."""
        try:
            _look(made, inner)
            if size in made.by_size:
                made.by_size[size] = made.by_size.pop(size)  # the one used longest ago goes first
            elif made.reason is None:
                plan = self.plan(module.config, effective_state(module), *size, made.packed)
                if len(made.by_size) == _PLANS:
                    made.by_size.pop(next(iter(made.by_size)))
                made.by_size[size] = plan
        except Unsupported as error:
            made.reason = str(error)
            log.info("accelerate: %s runs without a plan: %s", type(module).__name__, error)
        return made.by_size.get(size)


class PlannedUNet(_Planned):
    """A UNet2DConditionModel's forward, as a plan where it may."""

    method, plan = "forward", UNetPlan

    def __call__(self, sample, timestep, encoder_hidden_states, *args, return_dict: bool = True, **kwargs):
        unet = self._module()
        added = kwargs.get("added_cond_kwargs") or {}
        extra = {k for k, v in kwargs.items() if v is not None and v != {} and k != "added_cond_kwargs"}
        fits = not args and not extra and _told(unet, len(sample), encoder_hidden_states, **added)
        if fits and _inference(unet, sample, unet.config.in_channels):
            inner = list(unet.modules())[1:]
            if _plain(inner):
                made = self._own()
                with made.lock:
                    size = (*sample.shape[2:], encoder_hidden_states.shape[1])
                    plan = self._plan_for(made, unet, inner, size)
                    if plan is not None:
                        eps = self._run(plan, sample, timestep, encoder_hidden_states, added)
                        return UNet2DConditionOutput(eps) if return_dict else (eps,)
        plain = type(unet).forward
        return plain(unet, sample, timestep, encoder_hidden_states, *args, return_dict=return_dict, **kwargs)

    @staticmethod
    def _run(plan: UNetPlan, sample, timestep, context, added) -> torch.Tensor:
        times = torch.as_tensor(timestep, device="cpu").reshape(-1).expand(len(sample)).tolist()
        eps = sample.new_empty(len(sample), plan.config["out_channels"], *sample.shape[2:])
        for i in range(len(sample)):
            extra = (added["text_embeds"][i], added["time_ids"][i]) if added else ()
            eps[i] = plan(sample[i], times[i], context[i], *extra)
        return eps


class _PlannedVAE(_Planned):
    """A half of an AutoencoderKL as a plan where it may."""

    def _run(self, x: torch.Tensor, channels: int, size: tuple[int, int], parts: tuple, run) -> torch.Tensor | None:
        """run(plan, each of x), stacked; or None.

        Args:
            size: of the latents.
            parts: modules that the plan stands for.
        """
        vae = self._module()
        if vae.use_slicing or vae.use_tiling or "_hf_hook" in vars(vae) or not _inference(vae, x, channels):
            return None
        inner = [m for part in parts if part is not None for m in part.modules()]
        if not _plain(inner):
            return None
        made = self._own()
        with made.lock:
            plan = self._plan_for(made, vae, inner, size)
            return None if plan is None else torch.stack([run(plan, one).clone() for one in x])


class PlannedDecoder(_PlannedVAE):
    method, plan = "decode", DecoderPlan

    def __call__(self, z, return_dict: bool = True, generator=None):
        vae = self._module()
        parts = vae.decoder, vae.post_quant_conv
        pictures = self._run(z, vae.config.latent_channels, tuple(z.shape[2:]), parts, DecoderPlan.__call__)
        if pictures is None:
            return type(vae).decode(vae, z, return_dict=return_dict, generator=generator)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)


class PlannedEncoder(_PlannedVAE):
    method, plan = "encode", EncoderPlan

    def __call__(self, x, return_dict: bool = True):
        vae = self._module()
        scale, moments = 2 ** (len(vae.config.block_out_channels) - 1), None
        if not any(side % scale for side in x.shape[2:]):
            size = tuple(side // scale for side in x.shape[2:])
            moments = self._run(x, vae.config.in_channels, size, (vae.encoder, vae.quant_conv), EncoderPlan.moments)
        if moments is None:
            return type(vae).encode(vae, x, return_dict=return_dict)
        drawn_from = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=drawn_from) if return_dict else (drawn_from,)


_PLANNED = {UNet2DConditionModel: (PlannedUNet,), AutoencoderKL: (PlannedDecoder, PlannedEncoder)}


def _told(unet: UNet2DConditionModel, count: int, context, /, text_embeds=None, time_ids=None, **others) -> bool:
    """Whether a UNet is told what a plan takes: any other shape is diffusers' to refuse, or to make sense of."""
    own = unet.config
    if others or not torch.is_tensor(context) or context.ndim != 3 or context.dtype != torch.float32:
        return False
    if (len(context), context.shape[2]) != (count, own.cross_attention_dim):
        return False
    if own.addition_embed_type is None:
        return text_embeds is None and time_ids is None
    if not all(torch.is_tensor(x) and x.ndim == 2 and len(x) == count for x in (text_embeds, time_ids)):
        return False
    width = text_embeds.shape[1] + time_ids.shape[1] * own.addition_time_embed_dim
    return width == own.projection_class_embeddings_input_dim


def _inference(module: torch.nn.Module, x: torch.Tensor, channels: int) -> bool:
    """Whether this is inference in fp32 on the CPU, of maps of so many channels."""
    if x.device.type != "cpu" or next(module.parameters()).dtype != torch.float32:
        _made.pop(module, None)  # it has moved, or is of another precision now: let go of the memory it left
        return False
    if x.dtype != torch.float32 or torch.is_grad_enabled() or x.ndim != 4 or not x.numel() or x.shape[1] != channels:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    return forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()


def _plain(inner: list[torch.nn.Module]) -> bool:
    """Whether the modules of a network do what their classes do, with nothing attached that a plan would pass by."""
    known = _KNOWN | _lora_classes()
    if _has_any_global_hook():
        return False
    for module in inner:
        kind, own = type(module), module.__dict__
        if kind not in known or "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return False
        if kind is Attention and type(module.processor) not in (AttnProcessor, AttnProcessor2_0):
            return False
        if kind is torch.nn.Conv2d and module.padding_mode != "zeros":
            return False
        if kind is torch.nn.Dropout and module.training and module.p:
            return False
        if kind in _UP and any(own.get(name) for name in ("s1", "s2", "b1", "b2")):  # FreeU
            return False
    return True


def _look(made: _Made, inner: list[torch.nn.Module]) -> None:
    """Forgets the plans if a weight, an adapter or its scale has changed."""
    tensors = [t for m in inner for own in (m._parameters, m._buffers) for t in own.values() if t is not None]
    weights = fingerprint(inner, tensors)
    if weights != made.weights:
        made.forget()
        made.weights, made.views, made.sample = weights, [], None  # not half of each, if there is no sample
        made.views = _samples(tensors)
    sample = torch.cat(made.views).view(torch.uint8)  # NaN equals NaN
    if made.sample is None or not torch.equal(sample, made.sample):
        made.forget()
        made.sample = sample


def fingerprint(inner: list[torch.nn.Module], tensors: list[torch.Tensor]) -> tuple:
    """Changes whenever a tensor is written to, but not by ``.data``, and whenever an adapter or its scale changes."""
    weights = tuple((address(t), 0 if t.is_inference() else t._version) for t in tensors)
    kinds = _lora_classes()
    adapters = tuple(
        (tuple(layer.active_adapters), layer.disable_adapters, layer.merged, *sorted(layer.scaling.items()))
        for layer in inner
        if type(layer) in kinds
    )
    return weights, adapters


def _samples(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views of some elements of each: about one of every row of a matrix, in ever other columns, and whole vectors.

    No version counts what is written through ``.data``: by fused adapters, by averages of weights. Reading all weights
    at every call would be too slow; this misses a write to a few elements only.
    """
    views = []
    for tensor in tensors:
        tensor = tensor.detach()
        dense = tensor.permute(sorted(range(tensor.ndim), key=lambda d: -tensor.stride(d)))
        if not dense.is_contiguous():
            raise Unsupported("one of its weights has gaps in memory")
        columns = dense.numel() // max(1, len(dense)) if dense.ndim > 1 else 1
        views.append(dense.view(-1)[:: columns + 1 if columns > 1 else 1])
    return views


def effective_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as it would be with all active adapters merged, under the keys of a model without adapters."""
    kinds = _lora_classes()
    layers = {name: m for name, m in module.named_modules() if type(m) in kinds}
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


@functools.cache
def _lora_classes() -> frozenset[type]:
    """PEFT's LoRA layers, none where it is not installed."""
    try:
        from peft.tuners import lora
    except ImportError:
        return frozenset()
    return frozenset({lora.Linear, lora.Conv2d})

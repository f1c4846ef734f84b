"""The SDXL family: load, denoise, encode_prompt, and the encoder taps the discriminator heads read.

Any ``StableDiffusionXLPipeline`` folder whose UNet predicts epsilon from four latent channels fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import nitrokernels

from ..errors import InputError
from ..schedule import make_alphas_cumprod
from . import layouts, lora, vaes
from .conditioning import Conditioning, denoise
from .folder import PARTS, check_folder, check_unet_config, config_of, unet_files
from .weights import Weights, check, fill_, weight_files

__all__ = ["Conditioning", "SDXL", "check_folder", "check_unet_config", "decode", "decode_with_gradient", "denoise",
           "encode_image", "encode_prompt", "encoder_features", "feature_shapes", "load", "load_unet_",
           "pooled_width", "unet_files"]  # fmt: skip


@dataclass
class SDXL:
    """A loaded pipeline folder; the parts are the plain diffusers and transformers modules."""

    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    alphas_cumprod: torch.Tensor
    loras: tuple[lora.Report, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def latent_size(self) -> int:
        """Side of a full picture's latents."""
        return self.unet.config.sample_size

    @property
    def vae_scale(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        return self.latent_size * self.vae_scale

    def time_ids(self, batch: int, top=0, left=0, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """[batch, 6] micro-conditioning of a crop given in latents; no arguments mean the whole picture."""
        full, scale = self.resolution, self.vae_scale
        rows = torch.zeros(batch, 6)
        rows[:, 0] = rows[:, 1] = full
        rows[:, 2], rows[:, 3] = torch.as_tensor(top) * scale, torch.as_tensor(left) * scale
        rows[:, 4] = full if height is None else height * scale
        rows[:, 5] = full if width is None else width * scale
        return rows.to(self.device)


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    unet: str | Path | None = None,
    fused: bool = False,
    vae: str | Path | None = None,
    checkpoint: str | Path | None = None,
    loras: tuple[tuple[Path, float], ...] = (),
    allow_pickle: bool = False,
) -> SDXL:
    """Loads a pipeline folder, or other weights with its configuration and tokenizers; nothing is fetched.

    Every header is checked before the first weight is read. Weights are mapped: those that keep their precision on
    the CPU stay so, others are converted one at a time. A decoder that overflows in float16 is loaded in float32.

    Args:
        unet: file or folder of a UNet that replaces the folder's own.
        fused: puts nitrokernels' ops into UNet and VAE where the device has a proven one.
        vae: file or folder of an AutoencoderKL or AutoencoderTiny that replaces the folder's own.
        checkpoint: single file of UNet, text encoders and VAE in LDM's layout, instead of the folder's weights.
        loras: (file, scale), merged in fp32 in this order.
        allow_pickle: reads ``.bin`` files too, tensors only; otherwise they are refused.
    """
    folder = Path(folder)
    replaced = {"unet": unet is not None, "vae": vae is not None}
    own = tuple(part for part in PARTS if checkpoint is None and not replaced.get(part))
    check_folder(folder, own)
    configs = {part: config_of(folder, f"{part}/config.json") for part in PARTS}
    whole = Weights(Path(checkpoint), allow_pickle) if checkpoint is not None else None
    stored = {part: Weights(weight_files(folder / part)) for part in own}
    if unet is not None:
        stored["unet"] = Weights(unet_files(unet), allow_pickle)
    modules = {}
    if vae is not None:
        modules["vae"], stored["vae"] = vaes.open_vae(Path(vae), configs["vae"], allow_pickle)
    for part in PARTS:
        modules[part] = modules.get(part) or _on_meta(part, configs[part], folder)
    tensors = {part: _named(part, modules[part], stored.get(part, whole)) for part in PARTS}
    where = {part: getattr(stored.get(part, whole), "where", folder) for part in PARTS}
    for part in PARTS:
        check(modules[part], tensors[part], where[part], "UNet" if part == "unet" else part)
    deltas, reports = [], []
    for file, scale in loras:
        targets = {part: modules[part] for part in lora.PARTS}
        delta, report = lora.plan(file, scale, targets, modules["unet"].config)
        deltas.append(delta)
        reports.append(report)
    tokenizers = tuple(_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2"))

    for part in PARTS:
        precise = part == "vae" and dtype == torch.float16 and modules[part].config.force_upcast

        def edit(name: str, tensor: torch.Tensor, part=part) -> torch.Tensor:
            for delta in deltas:
                if (part, name) in delta:
                    tensor = delta[part, name].add_to(tensor)
            return tensor

        source = stored.get(part, whole)
        wanted = torch.float32 if precise else dtype
        fill_(modules[part], tensors[part], where[part], device, wanted, edit, source.release)
        if fused and part in ("unet", "vae") and nitrokernels.fusible(device):
            nitrokernels.fuse_(modules[part])
    scheduler = config_of(folder, "scheduler/scheduler_config.json")
    return SDXL(
        folder=folder,
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=(modules["text_encoder"], modules["text_encoder_2"]),
        tokenizers=tokenizers,
        alphas_cumprod=make_alphas_cumprod(scheduler["beta_start"], scheduler["beta_end"]).to(device),
        loras=tuple(reports),
    )


_TEXT = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def _on_meta(part: str, config: dict, folder: Path) -> torch.nn.Module:
    try:
        with torch.device("meta"):
            if part in _TEXT:
                return _TEXT[part](CLIPTextConfig.from_dict(config))
            return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(config)
    except Exception as error:  # a wrong value fails wherever it is used first, and transformers has types of its own
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"model: {folder / part} must have a configuration diffusers accepts, got {reason}") from error


def _named(part: str, module: torch.nn.Module, stored: Weights) -> Mapping[str, torch.Tensor]:
    """The part's tensors by the names its module has."""
    if part == "unet":
        return layouts.unet(stored, module.config, stored.where)
    if part == "vae":
        return vaes.named(module, stored)
    if any(name.startswith("conditioner.") for name in stored):
        stored_names = layouts.text_encoder(stored, int(part.endswith("_2")), module, stored.where)
    else:
        stored_names = stored
    # transformers names and stores these with or without the prefix, by version; the positions were once stored too.
    names = {name.removeprefix("text_model."): name for name in module.state_dict()}
    plain = {name.removeprefix("text_model."): value for name, value in stored_names.items()}
    return {names.get(k, k): v for k, v in plain.items() if not k.endswith("position_ids") or k in names}


def _tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        raise InputError(f"model: {folder} must hold a readable tokenizer, got {error}") from error


def load_unet_(unet: UNet2DConditionModel, path: str | Path) -> UNet2DConditionModel:
    """Fills ``unet`` from a file or a folder that holds one (diffusers' or LDM's layout); shapes must match."""
    stored = Weights(unet_files(path))
    tensors = layouts.unet(stored, unet.config, stored.where)
    check(unet, tensors, stored.where, "UNet")
    unet.load_state_dict(tensors)
    return unet


@torch.no_grad()
def encode_prompt(model: SDXL, prompts: list[str]) -> Conditioning:
    """Embeds prompts for whole pictures; the penultimate layers of both encoders, pooled from the second."""
    embeds, pooled = [], None
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        ids = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        out = encoder(ids.to(model.device), output_hidden_states=True)
        embeds.append(out.hidden_states[-2])
        pooled = out[0]
    return Conditioning(torch.cat(embeds, -1), pooled, model.time_ids(len(prompts)))


def encoder_features(
    unet: UNet2DConditionModel, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning
) -> list[torch.Tensor]:
    """The backbone's taps: conv_in, every down-block residual, and the mid block (ten maps for SDXL).

    The decoder is never run. Equal to what diffusers' own UNet hands from encoder to decoder.
    """
    emb = unet.time_embedding(unet.get_time_embed(sample=x_t, timestep=t))
    added = {"text_embeds": cond.pooled_prompt_embeds, "time_ids": cond.time_ids}
    emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=cond.prompt_embeds, added_cond_kwargs=added)
    x = unet.conv_in(x_t)
    taps = [x]
    for block in unet.down_blocks:
        context = {"encoder_hidden_states": cond.prompt_embeds} if getattr(block, "has_cross_attention", False) else {}
        x, residuals = block(hidden_states=x, temb=emb, **context)
        taps.extend(residuals)
    context = (
        {"encoder_hidden_states": cond.prompt_embeds} if getattr(unet.mid_block, "has_cross_attention", False) else {}
    )
    return [*taps, unet.mid_block(x, emb, **context)]


def feature_shapes(unet: UNet2DConditionModel, size: int) -> list[tuple[int, int]]:
    """(channels, side) of each tap for latents of side ``size``, from the configuration alone."""
    channels = unet.config.block_out_channels
    shapes = [(channels[0], size)]
    for i, width in enumerate(channels):
        shapes += [(width, size)] * unet.config.layers_per_block
        if i < len(channels) - 1:
            size //= 2
            shapes.append((width, size))
    return [*shapes, (channels[-1], size)]


def pooled_width(unet: UNet2DConditionModel) -> int:
    """Size of the pooled prompt embedding, from the configuration alone."""
    return unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim


@torch.no_grad()
def encode_image(model: SDXL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [B, 4, h, w] of the unscaled latents of images [B, 3, 8h, 8w] in [-1, 1]."""
    latents = model.vae.encode(images.to(model.device, model.vae.dtype)).latent_dist
    return latents.mean, latents.std


def decode_with_gradient(model: SDXL, latents: torch.Tensor) -> torch.Tensor:
    """``decode`` that carries gradients to the latents, and does not clamp, which would end them."""
    latents = latents.to(model.vae.dtype) / model.vae.config.scaling_factor
    return model.vae.decode(latents, return_dict=False)[0].float()


@torch.no_grad()
def decode(model: SDXL, latents: torch.Tensor) -> torch.Tensor:
    """[B, 3, 8h, 8w] float32 in [-1, 1] from scaled latents [B, 4, h, w]."""
    return decode_with_gradient(model, latents).clamp(-1, 1)

"""The SDXL family: load, denoise, encode_prompt, and the encoder taps the discriminator heads read.

Any ``StableDiffusionXLPipeline`` folder whose UNet predicts epsilon from four latent channels fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import nitrokernels

from . import layouts, lora
from .conditioning import Conditioning, denoise
from .folder import check_folder, check_unet_config, unet_files
from .stored import open_stored
from .weights import Weights, check, fill_

__all__ = ["Conditioning", "SDXL", "check_folder", "check_unet_config", "decode", "decode_each",
           "decode_with_gradient", "denoise", "embed_tokens", "encode_image", "encode_prompt", "encoder_features",
           "feature_shapes", "load", "load_unet_", "pooled_width", "tokenize", "unet_files"]  # fmt: skip


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
    origins: dict[str, tuple] = field(default_factory=dict)  # of each part, ``Weights.origin`` when it was read
    no_prompt: tuple[torch.Tensor, torch.Tensor] | None = None  # ``Conditioning.no_prompt`` of what it encodes

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        encoders = {"text_encoder": self.text_encoders[0], "text_encoder_2": self.text_encoders[1]}
        return {"unet": self.unet, "vae": self.vae, **encoders}

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

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
    stored = open_stored(folder, unet, vae, checkpoint, loras, allow_pickle)
    for part, module in stored.modules.items():
        precise = part == "vae" and dtype == torch.float16 and module.config.force_upcast

        def edit(name: str, tensor: torch.Tensor, part=part) -> torch.Tensor:
            return stored.tensor(part, name, device)

        wanted = torch.float32 if precise else dtype
        fill_(module, stored.tensors[part], stored.where[part], device, wanted, edit, stored.files[part].release)
        if fused and part in ("unet", "vae") and nitrokernels.fusible(device):
            nitrokernels.fuse_(module)
    return SDXL(
        folder=stored.folder,
        unet=stored.modules["unet"],
        vae=stored.modules["vae"],
        text_encoders=(stored.modules["text_encoder"], stored.modules["text_encoder_2"]),
        tokenizers=stored.tokenizers,
        alphas_cumprod=stored.alphas_cumprod.to(device),
        loras=stored.loras,
        origins={part: file.origin for part, file in stored.files.items()},
    )


def load_unet_(unet: UNet2DConditionModel, path: str | Path) -> UNet2DConditionModel:
    """Fills ``unet`` from a file or a folder that holds one (diffusers' or LDM's layout); shapes must match."""
    stored = Weights(unet_files(path))
    tensors = layouts.unet(stored, unet.config, stored.where)
    check(unet, tensors, stored.where, "UNet")
    unet.load_state_dict(tensors)
    return unet


def tokenize(model: SDXL, prompts: list[str]) -> torch.Tensor:
    """[2, B, tokens] int64 on the CPU: what either text encoder reads, cut and padded to its length."""
    ids = [
        tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in model.tokenizers
    ]
    return torch.stack(ids)


@torch.no_grad()
def embed_tokens(model: SDXL, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt_embeds, pooled_prompt_embeds) of ids [2, B, tokens] on the model's device.

    The penultimate layers of both encoders, pooled from the second.
    """
    embeds, pooled = [], None
    for tokens, encoder in zip(ids, model.text_encoders, strict=True):
        out = encoder(tokens, output_hidden_states=True)
        embeds.append(out.hidden_states[-2])
        pooled = out[0]
    return torch.cat(embeds, -1), pooled


def encode_prompt(model: SDXL, prompts: list[str]) -> Conditioning:
    """Embeds prompts for whole pictures."""
    embeds, pooled = embed_tokens(model, tokenize(model, prompts).to(model.device))
    return Conditioning(embeds, pooled, model.time_ids(len(prompts)), model.no_prompt)


def encoder_features(
    unet: UNet2DConditionModel, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning
) -> list[torch.Tensor]:
    """The backbone's taps: conv_in, every down-block residual, and the mid block (ten maps for SDXL).

    The decoder is never run. Equal to what diffusers' own UNet hands from encoder to decoder.
    """
    x_t = x_t.to(unet.conv_in.weight.dtype)  # ``unet.dtype`` walks all modules, on every call
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
def encode_image(model: SDXL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation [B, 4, h, w] of the unscaled latents of images [B, 3, 8h, 8w] in [-1, 1].

    An AutoencoderTiny knows its latents: there is no deviation then.
    """
    encoded = model.vae.encode(images.to(model.device, model.vae.dtype))
    if isinstance(model.vae, AutoencoderTiny):
        return encoded.latents, None
    return encoded.latent_dist.mean, encoded.latent_dist.std


def decode_with_gradient(model: SDXL, latents: torch.Tensor) -> torch.Tensor:
    """``decode`` that carries gradients to the latents, and does not clamp, which would end them."""
    latents = latents.to(model.vae.dtype) / model.vae.config.scaling_factor
    return model.vae.decode(latents, return_dict=False)[0].float()


def decode_each(model: SDXL, latents: torch.Tensor) -> torch.Tensor:
    """``decode``, a picture at a time: the decoder of SDXL takes more than a GB for each of 1024 x 1024."""
    return torch.cat([decode(model, one) for one in latents.split(1)])


@torch.no_grad()
def decode(model: SDXL, latents: torch.Tensor) -> torch.Tensor:
    """[B, 3, 8h, 8w] float32 in [-1, 1] from scaled latents [B, 4, h, w]."""
    return decode_with_gradient(model, latents).clamp(-1, 1)

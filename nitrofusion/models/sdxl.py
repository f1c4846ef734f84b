"""The SDXL family: load, denoise, encode_prompt, and the encoder taps the discriminator heads read.

Any ``StableDiffusionXLPipeline`` folder whose UNet predicts epsilon from four latent channels fits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import nitrokernels

from ..errors import InputError
from ..schedule import make_alphas_cumprod


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told besides x_t and t.

    Attributes:
        prompt_embeds: [B, tokens, cross_attention_dim].
        pooled_prompt_embeds: [B, pooled].
        time_ids: [B, 6] (original h, w, crop top, left, target h, w) in pixels.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    time_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index) -> Conditioning:
        return Conditioning(self.prompt_embeds[index], self.pooled_prompt_embeds[index], self.time_ids[index])

    def with_time_ids(self, time_ids: torch.Tensor) -> Conditioning:
        return replace(self, time_ids=time_ids)

    def null(self) -> Conditioning:
        """The unconditional task's prompt: zeros for sequence and pooled, as SDXL's pipeline encodes no prompt."""
        return replace(
            self,
            prompt_embeds=torch.zeros_like(self.prompt_embeds),
            pooled_prompt_embeds=torch.zeros_like(self.pooled_prompt_embeds),
        )

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        return Conditioning(
            torch.cat([p.prompt_embeds for p in parts]),
            torch.cat([p.pooled_prompt_embeds for p in parts]),
            torch.cat([p.time_ids for p in parts]),
        )


@dataclass
class SDXL:
    """A loaded pipeline folder; the parts are the plain diffusers and transformers modules."""

    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    alphas_cumprod: torch.Tensor

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


def _config(folder: Path, part: str) -> dict:
    path = folder / part
    if not path.is_file():
        raise InputError(f"model: {folder} must be a StableDiffusionXLPipeline folder, got no {part}")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"model: {path} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"model: {path} must be a JSON object, got {type(values).__name__}")
    return values


def check_folder(folder: str | Path) -> Path:
    """Raises InputError, before any weight is read, unless the folder holds an epsilon, 4-channel SDXL pipeline."""
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing"
        raise InputError(f"model: {folder} must be a diffusers folder, got {got}")
    name = _config(folder, "model_index.json").get("_class_name")
    if not str(name).startswith("StableDiffusionXL"):
        raise InputError(f"model: {folder} must hold a StableDiffusionXLPipeline, got {name}")
    check_unet_config(_config(folder, "unet/config.json"), folder)
    scheduler = _config(folder, "scheduler/scheduler_config.json")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise InputError(f"model: {folder} must predict epsilon, got prediction_type {prediction}")
    for key in ("beta_start", "beta_end"):
        if not isinstance(scheduler.get(key), float):
            raise InputError(f"model: {folder} must have a scheduler with {key}, got {scheduler.get(key)!r}")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        _config(folder, f"{part}/config.json")
        _check_weights(folder / part)
    for part in ("tokenizer", "tokenizer_2"):
        if not any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise InputError(f"model: {folder / part} must hold a tokenizer, got none")
    return folder


def _check_weights(folder: Path) -> None:
    """Reads the headers, which also tell whether the files are whole."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"model: {folder} must hold safetensors weights, got none")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"model: {file} must be a readable safetensors file, got {error}") from error


def check_unet_config(config: dict, where: str | Path) -> None:
    if config.get("in_channels", 4) != 4:
        raise InputError(f"model: {where} must have a UNet of 4 input channels, got {config['in_channels']}")
    if config.get("addition_embed_type") != "text_time":
        raise InputError(f"model: {where} must have an SDXL UNet (text_time), got {config.get('addition_embed_type')}")
    size, step = config.get("sample_size"), 2 ** (len(config.get("block_out_channels", ())) - 1)
    if not isinstance(size, int) or size < 1 or size % step:
        raise InputError(f"model: {where} must have a UNet whose sample_size is a multiple of {step}, got {size!r}")


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    unet: str | Path | None = None,
    fused: bool = False,
) -> SDXL:
    """Loads a pipeline folder; safetensors only, nothing is unpickled, nothing is fetched.

    Args:
        unet: file or folder of a UNet that replaces the folder's own.
        fused: puts nitrokernels' ops into UNet and VAE where the device has a proven one.
    """
    folder = check_folder(folder)
    options = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True}
    text_options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    scheduler = _config(folder, "scheduler/scheduler_config.json")
    try:
        model = SDXL(
            folder=folder,
            unet=UNet2DConditionModel.from_pretrained(folder / "unet", **options),
            vae=AutoencoderKL.from_pretrained(folder / "vae", **options),
            text_encoders=(
                CLIPTextModel.from_pretrained(folder / "text_encoder", **text_options),
                CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **text_options),
            ),
            tokenizers=tuple(CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")),
            alphas_cumprod=make_alphas_cumprod(scheduler["beta_start"], scheduler["beta_end"]).to(device),
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model: {folder} must be a complete safetensors pipeline, got {error}") from error
    for module in (model.unet, model.vae, *model.text_encoders):
        module.requires_grad_(False).eval().to(device)
    if unet is not None:
        load_unet_(model.unet, unet)
    if fused and nitrokernels.fusible(device):
        for module in (model.unet, model.vae):
            nitrokernels.fuse_(module)
    return model


def load_unet_(unet: UNet2DConditionModel, path: str | Path) -> UNet2DConditionModel:
    """Fills ``unet`` from a safetensors file or a folder that holds one (diffusers layout); shapes must match."""
    path = Path(path)
    for inner in ("unet", "."):
        if path.is_dir() and (path / inner / "diffusion_pytorch_model.safetensors").is_file():
            path = path / inner / "diffusion_pytorch_model.safetensors"
    if not path.is_file() or path.suffix != ".safetensors":
        raise InputError(f"model: {path} must be a UNet .safetensors file or a folder with one")
    try:
        state = load_file(path)
    except Exception as error:  # safetensors raises its own type, which has no public base class
        raise InputError(f"model: {path} must be a readable safetensors file, got {error}") from error
    expected = unet.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    if missing or extra or wrong:
        first = (missing or extra or wrong)[0]
        raise InputError(
            f"model: {path} must hold this UNet's {len(expected)} tensors, got {len(missing)} missing, "
            f"{len(extra)} unknown, {len(wrong)} of another shape (first: {first})"
        )
    unet.load_state_dict(state)
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


def denoise(unet: UNet2DConditionModel, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
    """eps [B, 4, h, w] for x_t [B, 4, h, w] at the timesteps t [B] the UNet is told."""
    added = {"text_embeds": cond.pooled_prompt_embeds, "time_ids": cond.time_ids}
    return unet(x_t, t, cond.prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]


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


@torch.no_grad()
def encode_image(model: SDXL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [B, 4, h, w] of the unscaled latents of images [B, 3, 8h, 8w] in [-1, 1]."""
    latents = model.vae.encode(images.to(model.device, model.vae.dtype)).latent_dist
    return latents.mean, latents.std


@torch.no_grad()
def decode(model: SDXL, latents: torch.Tensor) -> torch.Tensor:
    """[B, 3, 8h, 8w] float32 in [-1, 1] from scaled latents [B, 4, h, w]."""
    latents = latents.to(model.vae.dtype) / model.vae.config.scaling_factor
    return model.vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)

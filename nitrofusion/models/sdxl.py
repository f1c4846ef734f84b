"""The SDXL family: load, denoise, encode_prompt, and the encoder taps the discriminator heads read.

Any ``StableDiffusionXLPipeline`` folder whose UNet predicts epsilon from four latent channels fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import nitrokernels

from ..errors import InputError
from ..schedule import make_alphas_cumprod
from . import layouts, lora, vaes
from .weights import PICKLES, Weights, check, fill_, read_json, weight_files

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


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


def check_folder(folder: str | Path, weights: tuple[str, ...] = PARTS) -> Path:
    """Raises InputError, before any weight is read, unless the folder holds an epsilon, 4-channel SDXL pipeline.

    Args:
        weights: the parts whose weights must be there; of the others the configuration is enough.
    """
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
    for part in PARTS:
        _config(folder, f"{part}/config.json")
        if part in weights:
            Weights(weight_files(folder / part))  # reads the headers, which also tell whether the files are whole
    for part in ("tokenizer", "tokenizer_2"):
        if not any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise InputError(f"model: {folder / part} must hold a tokenizer, got none")
    return folder


def _config(folder: Path, part: str) -> dict:
    if not (folder / part).is_file():
        raise InputError(f"model: {folder} must be a StableDiffusionXLPipeline folder, got no {part}")
    return read_json(folder / part)


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
    configs = {part: _config(folder, f"{part}/config.json") for part in PARTS}
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
    scheduler = _config(folder, "scheduler/scheduler_config.json")
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


def unet_files(path: str | Path) -> list[Path]:
    """The files of a UNet given as a file, or as a folder that holds one or a pipeline."""
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors" and path.suffix not in PICKLES:
            raise InputError(f"load: {path} must be a UNet .safetensors file or a folder with one, got another file")
        return [path]
    if not path.is_dir():
        raise InputError(f"load: {path} must be a UNet .safetensors file or a folder with one, got nothing")
    return weight_files(path / "unet" if (path / "unet").is_dir() else path)


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
def decode(model: SDXL, latents: torch.Tensor) -> torch.Tensor:
    """[B, 3, 8h, 8w] float32 in [-1, 1] from scaled latents [B, 4, h, w]."""
    latents = latents.to(model.vae.dtype) / model.vae.config.scaling_factor
    return model.vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)

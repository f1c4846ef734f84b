"""A model's weights on disk: opened, named as its modules name them, checked; LoRAs planned. No payload is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import InputError
from ..schedule import make_alphas_cumprod
from . import layouts, lora, vaes
from .folder import PARTS, betas, check_folder, config_of, scheduler_config, unet_files
from .weights import Weights, check, short, weight_files

_TEXT = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@dataclass
class Stored:
    """What a model is read from.

    Attributes:
        modules: its parts on the meta device.
        files: of each part, the mapped files.
        tensors: of each part, the stored tensors by its module's names.
        where: of each part, for messages.
        merges: of each LoRA, in order: its file, the weights it changes, the report.
    """

    folder: Path
    modules: dict[str, torch.nn.Module]
    files: dict[str, Weights]
    tensors: dict[str, Mapping[str, torch.Tensor]]
    where: dict[str, str | Path]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    alphas_cumprod: torch.Tensor
    merges: list[lora.Merge] = field(default_factory=list)

    @property
    def loras(self) -> tuple[lora.Report, ...]:
        return tuple(merge.report for merge in self.merges)

    def tensor(self, part: str, name: str, device: torch.device | str) -> torch.Tensor:
        """One weight on ``device``: as stored, or the fp32 sum with what the LoRAs add to it."""
        tensor = self.tensors[part][name].to(device)
        for merge in self.merges:
            if (part, name) in merge.deltas:
                tensor = merge.deltas[part, name].add_to(tensor)
        return tensor

    def origin(self, part: str, name: str) -> tuple:
        """What that weight is made of: where two are equal, so are the weights."""
        changes = tuple((m.origin, m.report.scale) for m in self.merges if (part, name) in m.deltas)
        return self.files[part].origin, changes


def open_stored(
    folder: str | Path,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    checkpoint: str | Path | None = None,
    loras: tuple[tuple[Path, float], ...] = (),
    allow_pickle: bool = False,
) -> Stored:
    """The weights ``sdxl.load`` reads, which describes the arguments; every header is checked.

    Raises:
        InputError: something is missing or does not fit.
    """
    folder = Path(folder)
    replaced = {"unet": unet is not None, "vae": vae is not None}
    own = tuple(part for part in PARTS if checkpoint is None and not replaced.get(part))
    check_folder(folder, own)
    configs = {part: config_of(folder, f"{part}/config.json") for part in PARTS}
    whole = Weights(Path(checkpoint), allow_pickle) if checkpoint is not None else None
    files = {part: Weights(weight_files(folder / part)) for part in own}
    if unet is not None:
        files["unet"] = Weights(unet_files(unet), allow_pickle)
    decoder = None
    if vae is not None:
        decoder, files["vae"] = vaes.open_vae(Path(vae), configs["vae"], allow_pickle)
    files = {part: files.get(part, whole) for part in PARTS}
    where = {part: files[part].where for part in PARTS}
    modules, tensors = {}, {}
    for part in PARTS:  # one that does not fit is refused before the next is built
        modules[part] = decoder if part == "vae" and decoder else on_meta(part, configs[part], folder)
        tensors[part] = _named(part, modules[part], files[part])
        check(modules[part], tensors[part], where[part], "UNet" if part == "unet" else part)
    merges = [lora.plan(file, scale, modules) for file, scale in loras]
    words = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    tokenizers = tuple(_tokenizer(folder / name, modules[part].config.vocab_size) for name, part in words)
    alphas = make_alphas_cumprod(**betas(scheduler_config(folder)))
    return Stored(folder, modules, files, tensors, where, tokenizers, alphas, merges)


def on_meta(part: str, config: dict, folder: Path) -> torch.nn.Module:
    """A part of a checked pipeline folder without weights, or InputError."""
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


def _tokenizer(folder: Path, vocab_size: int) -> CLIPTokenizer:
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        raise InputError(f"model: {folder} must hold a readable tokenizer, got {error}") from error
    pad = tokenizer.pad_token_id
    if pad is None or pad >= vocab_size:
        got = short(repr(tokenizer.pad_token))
        raise InputError(f"model: {folder} must pad with one of its text encoder's {vocab_size:,} tokens, got {got}")
    return tokenizer

"""Finding a model: a preset's name, a diffusers folder or a training run becomes one ``Source``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from .. import checkpoint
from ..errors import InputError
from ..models import sdxl
from ..presets import MODELS, ModelPreset, resolve_folder, suggest

TEACHER_STEPS, TEACHER_GUIDANCE = 25, 5.0  # of a folder that no preset describes
_PIPELINE_FILES = [
    "model_index.json",
    "*/*.json",
    "tokenizer*/*.txt",
    "text_encoder*/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
]


@dataclass(frozen=True)
class Source:
    """Where a model's parts lie and how it is drawn with.

    Attributes:
        name: as it was asked for; goes into the pictures' settings.
        folder: StableDiffusionXLPipeline folder.
        unet: safetensors file of another UNet; None means the folder's own.
        shifted_timestep: S of a student; None is a multi-step teacher.
        num_inference_steps, guidance_scale: used when a call names none.
    """

    name: str
    folder: Path
    unet: Path | None
    shifted_timestep: int | None
    num_inference_steps: int
    guidance_scale: float

    @property
    def is_student(self) -> bool:
        return self.shifted_timestep is not None

    @property
    def unet_files(self) -> list[Path]:
        """The files that hold the UNet's weights, in order."""
        return [self.unet] if self.unet else sorted((self.folder / "unet").glob("diffusion_pytorch_model*.safetensors"))


def find(model: str | Path) -> Source:
    """The source of a preset name, a diffusers folder or a run folder; no weights are read.

    A preset's name wins over a folder of the same name (``./name`` is the folder). Presets on the hub are looked up in
    the local cache and downloaded if absent.

    Raises:
        InputError: there is no such model, or its files are not what they should be.
    """
    if not isinstance(model, (str, Path)) or not str(model):
        raise InputError(f"model: must be a preset name, a diffusers folder or a run folder, got {model!r}")
    if model in MODELS:
        return _from_preset(MODELS[model])
    path = Path(model).expanduser()
    if (path / "model_index.json").is_file():
        return _from_folder(str(model), path)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        return _from_run(str(model), path)
    got = f"a folder without model_index.json or checkpoints: {path}" if path.is_dir() else repr(str(model))
    hint = "" if path.exists() else suggest(str(model), MODELS)
    raise InputError(f"model: must be a preset name, a diffusers folder or a run folder, got {got}{hint}")


def _from_preset(preset: ModelPreset) -> Source:
    unet = None
    if preset.unet is not None:
        unet = Path(preset.unet)
        if not unet.is_absolute():
            repo, name = preset.unet.rsplit("/", 1)
            unet = Path(_fetch(hf_hub_download, preset.name, repo, filename=name))
    folder = Path(preset.folder)
    if not folder.is_absolute():
        folder = Path(_fetch(snapshot_download, preset.name, preset.folder, allow_patterns=_PIPELINE_FILES))
    shift, steps, guidance = preset.shifted_timestep, preset.num_inference_steps, preset.guidance_scale
    return Source(preset.name, folder, unet, shift, steps, guidance)


def _fetch(get, name: str, repo: str, **options) -> str:
    try:
        return get(repo, **options)
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's types
        line = " ".join(str(error).split())
        raise InputError(f"model: preset {name} must be on the hub or in its cache as {repo}, got {line}") from error


def _from_folder(name: str, folder: Path) -> Source:
    sdxl.check_folder(folder)
    shift = _read_json(folder / "scheduler" / "scheduler_config.json").get("shifted_timestep")
    if shift is None:
        return Source(name, folder, None, None, TEACHER_STEPS, TEACHER_GUIDANCE)
    return Source(name, folder, None, _checked_shift(shift, folder), 1, 0.0)


def _from_run(name: str, run: Path) -> Source:
    config = _read_json(run / "config.json")
    teacher = config.get("teacher")
    if not isinstance(teacher, str):
        raise InputError(f"model: {run / 'config.json'} must name the run's teacher, got {teacher!r}")
    newest, refused = checkpoint.latest(run)
    if newest is None:
        damaged = f", and {len(refused)} damaged" if refused else ""
        raise InputError(f"model: {run} must hold a finished checkpoint, got none{damaged}")
    # Only the averaged student is read: the optimizer states beside it are many times its size.
    shift = _checked_shift(config.get("shifted_timestep"), run)
    folder = find(teacher).folder if teacher in MODELS else Path(resolve_folder(teacher))
    return Source(name, folder, newest / "ema.safetensors", shift, 1, 0.0)


def _checked_shift(shift, where: Path) -> int:
    if not isinstance(shift, int) or isinstance(shift, bool) or not 1 <= shift <= 1000:
        raise InputError(f"model: {where} must have a shifted_timestep in 1..1000, got {shift!r}")
    return shift


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model: {path} must be a readable JSON file, got {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"model: {path} must be a JSON object, got {type(values).__name__}")
    return values

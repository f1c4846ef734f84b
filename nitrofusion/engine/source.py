"""Finding a model: a name, a folder, a file or a hub id becomes one ``Source``, with everything it is drawn with."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import checkpoint
from ..errors import InputError
from ..models import folder as folders
from ..models.weights import CONVERT, PICKLES, Weights, read_json, short, weight_files
from ..presets import MODELS, WORLD, ModelPreset, Sampler, resolve_folder, resolve_unet, suggest
from ..published import SDXL, VAES
from .hub import fetch_file, fetch_folder

TEACHER_STEPS, TEACHER_GUIDANCE = 25, 5.0  # of a folder that no preset describes
STUDENT_STEPS = (1, 2, 3, 4)
# The pipelines around a UNet that comes without one: its first width, its added embedding's, and where they lie.
_BASES = ((320, 2816, SDXL), (48, 160, str(WORLD / "teacher")))


@dataclass(frozen=True)
class Source:
    """Where a model's parts lie and how it is drawn with.

    Attributes:
        name: as it was asked for; goes into the pictures' settings.
        folder: StableDiffusionXLPipeline folder; of parts that another file replaces it gives the configuration.
        unet: file or folder of another UNet; None means the folder's own.
        shifted_timestep: S of a student; None is a model that a diffusers scheduler draws with.
        num_inference_steps, guidance_scale: used when a call names none.
        steps: the numbers of steps it may be drawn with; None means any.
        sampler: None means the folder's own scheduler.
        vae: file or folder of another decoder.
        checkpoint: single file of all weights in LDM's layout.
        loras: (file, scale), merged in this order.
        preset_loras: how many of them belong to the model itself.
        license: of the weights, or ``unknown``.
        sha256: the digest the model's file should have, where it is known.
        allow_pickle: the user trusts a ``.bin`` file.
        force_zeros_for_empty_prompt: guidance without a negative prompt leads away from zeros, else from the prompt "".
    """

    name: str
    folder: Path
    unet: Path | None
    shifted_timestep: int | None
    num_inference_steps: int
    guidance_scale: float
    steps: tuple[int, ...] | None = None
    sampler: Sampler | None = None
    vae: Path | None = None
    checkpoint: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    preset_loras: int = 0
    license: str = "unknown"
    sha256: str | None = None
    allow_pickle: bool = False
    force_zeros_for_empty_prompt: bool = True

    @property
    def is_student(self) -> bool:
        return self.shifted_timestep is not None

    def files(self, part: str) -> list[Path]:
        """The files that hold a part's weights, in order."""
        if part == "vae" and self.vae is not None:
            inner = self.vae / "vae"
            return [self.vae] if self.vae.is_file() else weight_files(inner if inner.is_dir() else self.vae)
        if self.checkpoint is not None:
            return [self.checkpoint]
        return folders.unet_files(self.unet) if part == "unet" and self.unet else weight_files(self.folder / part)

    @property
    def unet_files(self) -> list[Path]:
        return self.files("unet")

    def digest(self) -> str | None:
        """``known`` when the model's file has the published SHA-256, ``altered`` when another, None without one."""
        if self.sha256 is None:
            return None
        digest = hashlib.sha256()
        for path in self.unet_files:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return "known" if digest.hexdigest() == self.sha256 else "altered"

    def notice(self) -> str:
        """One line: name, licence, whether the file is the published one."""
        words = {"known": "the published file", "altered": "not the published file"}
        digest = words.get(self.digest(), "unverified, no digest to compare with")
        return f"{self.name}: licence {self.license}; {digest}"

    def scheduler(self):
        """A fresh diffusers scheduler, None for a student: ours draws with pure functions of t."""
        if self.is_student:
            return None
        if self.sampler is None:
            from ..data import teacher_scheduler

            return teacher_scheduler(self.folder)
        from diffusers import schedulers as diffusers_schedulers

        values = folders.scheduler_config(self.folder)
        cls = getattr(diffusers_schedulers, self.sampler.scheduler)
        taken = inspect.signature(cls.__init__).parameters  # of the rest diffusers warns, and ignores it
        return cls.from_config({k: v for k, v in values.items() if k in taken} | self.sampler.options)

    def timesteps(self, num_inference_steps: int) -> list[int] | None:
        """The published timesteps of that many steps; None means the scheduler's own."""
        found = self.sampler.timesteps.get(num_inference_steps) if self.sampler else None
        return None if found is None else list(found)

    @property
    def eta(self) -> float:
        return self.sampler.eta if self.sampler else 0.0

    def with_lora(self, lora: Loras) -> Source:
        """The same model with these LoRAs and no others but its own."""
        return replace(self, loras=self.loras[: self.preset_loras] + _loras(lora))

    def open(self):
        """Its weights on disk, checked and not read, a ``models.stored.Stored``."""
        from ..models.stored import open_stored

        return open_stored(self.folder, **self._weights)

    def read(self, device: torch.device | str, dtype: torch.dtype, fused: bool = False):
        """The model with its weights, an ``sdxl.SDXL``."""
        from ..models import sdxl

        return sdxl.load(self.folder, device, dtype, fused=fused, **self._weights)

    @property
    def _weights(self) -> dict:
        names = ("unet", "vae", "checkpoint", "loras", "allow_pickle")
        return {name: getattr(self, name) for name in names}


Loras = str | Path | Iterable[tuple[str | Path, float]] | None


def find(model: str | Path, lora: Loras = None, vae: str | Path | None = None, allow_pickle: bool = False) -> Source:
    """The source of a name, folder, file or hub id; no weights are read.

    A preset's name wins over a folder of the same name (``./name`` is the folder). What lies on the hub is looked up
    in the local cache and downloaded if absent.

    Raises:
        InputError: there is no such model, or its files are not what they should be.
    """
    if not isinstance(model, (str, Path)) or not str(model):
        raise InputError(f"model: must be a preset name, a folder, a file or a hub id, got {model!r}")
    loras = _loras(lora)
    decoder = None if vae is None else _find_vae(vae)
    if model in MODELS:
        source = _from_preset(MODELS[model], decoder, allow_pickle)
    else:
        source = replace(_from_path(str(model), _path("model:", model), allow_pickle), vae=decoder)
    own = len(source.loras)
    return replace(source, loras=source.loras + loras, preset_loras=own, allow_pickle=allow_pickle)


def _from_path(name: str, path: Path, allow_pickle: bool) -> Source:
    if path.is_file():
        return _from_file(name, path, allow_pickle)
    if (path / "model_index.json").is_file():
        return _from_folder(name, path)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        return _from_run(name, path)
    if (path / "config.json").is_file():
        if str(read_json(path / "config.json").get("_class_name")).startswith("UNet2D"):
            return _around(name, path, Weights(weight_files(path)))
    if not path.exists() and (parts := re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w./-]+\.safetensors))?", name)):
        if parts[2]:
            return _from_file(name, fetch_file(name, parts[1], parts[2]), allow_pickle)
        return _from_folder(name, fetch_folder(name, parts[1], folders.PARTS))
    got = f"a folder without model_index.json or checkpoints: {path}" if path.is_dir() else repr(name)
    hint = "" if path.exists() else suggest(name, MODELS)
    raise InputError(f"model: must be a preset name, a folder, a file or a hub id, got {got}{hint}")


def _from_preset(preset: ModelPreset, decoder: Path | None, allow_pickle: bool) -> Source:
    for file in (preset.unet, preset.lora):
        if file and file.endswith(PICKLES) and not allow_pickle:
            other = " or use dmd2-lora," if preset.name == "dmd2" else ""
            raise InputError(
                f"load: {preset.name} must be read from {file}, got no leave to open a pickle, which can run code "
                f"(say allow_pickle=True or --allow_pickle, which reads tensors only,{other} or convert it)"
            )
    unet, lora = (_preset_file(preset.name, file) for file in (preset.unet, preset.lora))
    if decoder is None and preset.vae is not None:
        decoder = _find_vae(preset.vae)
    needed = tuple(p for p in folders.PARTS if not (p == "unet" and unet) and not (p == "vae" and decoder))
    folder = Path(preset.folder)
    if not folder.is_absolute():
        folder = fetch_folder(f"preset {preset.name}", preset.folder, needed)
    loras = () if lora is None else ((lora, 1.0),)
    return _drawn_as(preset, Source(preset.name, folder, unet, None, 1, 0.0, vae=decoder, loras=loras))


def _drawn_as(preset: ModelPreset, source: Source) -> Source:
    return replace(
        source,
        shifted_timestep=preset.shifted_timestep,
        num_inference_steps=preset.num_inference_steps,
        guidance_scale=preset.guidance_scale,
        steps=preset.steps or (STUDENT_STEPS if preset.shifted_timestep is not None else None),
        sampler=preset.sampler,
        license=preset.license,
        sha256=preset.sha256,
    )


def _preset_file(name: str, file: str | None) -> Path | None:
    if file is None or Path(file).is_absolute():
        return None if file is None else Path(file)
    repo, filename = file.rsplit("/", 1)
    return fetch_file(f"preset {name}", repo, filename)


def _find_vae(vae: str | Path) -> Path:
    name = VAES.get(str(vae), str(vae))
    path = _path("load: vae", name)
    if path.exists():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return fetch_folder(f"vae {vae}", name, (".",))
    hint = suggest(name, VAES)
    raise InputError(f"load: vae must be a name, a folder, a file or a hub id, got {name!r}{hint}")


def _path(what: str, given: str | Path) -> Path:
    """What the user calls a path, or InputError where the system cannot look there."""
    try:
        path = Path(given).expanduser()
        (path / "model_index.json").exists()
    except (OSError, RuntimeError) as error:  # a name that is too long; the home of nobody
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{what} must be a path this system has, got {short(repr(str(given)))}: {reason}") from error
    return path


def _loras(lora: Loras) -> tuple[tuple[Path, float], ...]:
    if not isinstance(lora, Iterable | Path | None):
        raise InputError(f"load: lora must be a file, or a list of (file, scale), got {lora!r}")
    pairs = [] if lora is None else [(lora, 1.0)] if isinstance(lora, (str, Path)) else list(lora)
    out = []
    for pair in pairs:
        pair = (pair, 1.0) if isinstance(pair, (str, Path)) else pair
        named = isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], (str, Path))
        if not named or isinstance(pair[1], bool):
            raise InputError(f"load: lora must be a file, or a list of (file, scale), got {pair!r}")
        path, scale = pair
        if not isinstance(scale, (int, float)) or not abs(scale) < 1e3:
            raise InputError(f"load: a LoRA's scale must be a number in -1000..1000, got {scale!r}")
        path = _path("load: lora", path)
        if not path.is_file() or path.suffix != ".safetensors":
            got = "another file" if path.is_file() else "a folder" if path.is_dir() else "nothing"
            got = f"a pickle, which can run code ({CONVERT})" if path.suffix in PICKLES and path.is_file() else got
            raise InputError(f"load: lora must be a .safetensors file, got {got}: {str(path)!r}")
        out.append((path, float(scale)))
    return tuple(out)


def _from_file(name: str, file: Path, allow_pickle: bool) -> Source:
    if file.suffix != ".safetensors" and file.suffix not in PICKLES:
        raise InputError(f"load: {file} must be a .safetensors file, a folder or a preset's name, got another file")
    return _around(name, file, Weights(file, allow_pickle))


def _around(name: str, path: Path, weights: Weights) -> Source:
    """A UNet's or a checkpoint's weights in the pipeline their shapes belong to.

    How to draw follows from the header's ``nitrofusion.shifted_timestep``, else from a published file name; any other
    is a multi-step teacher.
    """
    from ..models import layouts

    layout = layouts.kind(weights, path)
    conv_in, embedding = layouts.first_shapes(weights)
    bases = [folder for width, added, folder in _BASES if (conv_in[0], embedding[1]) == (width, added)]
    if not bases:
        raise InputError(
            f"load: {path} must have SDXL's shapes, conv_in of 320 channels and an added embedding of 2816, "
            f"got {conv_in[0]} and {embedding[1]}"
        )
    base, whole = bases[0], layout == "checkpoint"
    needed = () if whole else tuple(p for p in folders.PARTS if p != "unet")
    folder = Path(base) if Path(base).is_absolute() else fetch_folder(name, base, needed)
    source = Source(name, folder, None if whole else path, None, TEACHER_STEPS, TEACHER_GUIDANCE)
    if whole:
        source = replace(source, checkpoint=path)
    shift = weights.metadata.get("nitrofusion.shifted_timestep")
    if shift is not None:
        shift = _checked_shift(int(shift) if shift.isdecimal() else shift, path)
        source = replace(source, shifted_timestep=shift, num_inference_steps=1, guidance_scale=0.0, steps=STUDENT_STEPS)
    else:
        for preset in MODELS.values():
            if path.name in (preset.comfyui, (preset.unet or "/").rsplit("/", 1)[1]) and preset.lora is None:
                source = _drawn_as(preset, source)
    stated = weights.metadata.get("modelspec.license")
    return replace(source, license=stated, sha256=None) if stated else source


def _from_folder(name: str, folder: Path) -> Source:
    folders.check_folder(folder)
    shift = folders.scheduler_config(folder).get("shifted_timestep")
    if shift is None:
        zeros = folders.zeros_for_no_prompt(folder)
        return Source(name, folder, None, None, TEACHER_STEPS, TEACHER_GUIDANCE, force_zeros_for_empty_prompt=zeros)
    return Source(name, folder, None, _checked_shift(shift, folder), 1, 0.0, STUDENT_STEPS)


def _from_run(name: str, run: Path) -> Source:
    config = read_json(run / "config.json")
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
    unet, loras = newest / "ema.safetensors", ()
    if config.get("lora_rank"):
        unet, loras = config.get("init") or config.get("teacher_unet"), ((unet, 1.0),)
        unet = None if unet is None else Path(resolve_unet(unet))
    return Source(name, folder, unet, shift, 1, 0.0, STUDENT_STEPS, loras=loras)


def _checked_shift(shift, where: Path) -> int:
    if not isinstance(shift, int) or isinstance(shift, bool) or not 1 <= shift <= 1000:
        raise InputError(f"model: {where} must have a shifted_timestep in 1..1000, got {shift!r}")
    return shift

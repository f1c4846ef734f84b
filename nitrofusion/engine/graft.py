"""A student's one-step ability on another SDXL checkpoint: W_new = W_custom + s (W_student - W_base).

Paper section 4.6: what distillation changed is added to weights it never saw. Everything is read, computed in fp32 and
written a tensor at a time, so the memory it takes does not grow with the model.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..errors import InputError
from ..models import layouts
from ..models.folder import TOKENIZER, check_folder, scheduler_config
from ..models.layouts import Tensors
from ..models.weights import Weights, is_finite, weight_files
from ..models.writing import DTYPES, cast, name_as_published, write
from ..presets import MODELS
from . import to_ldm
from .card import model_card, model_spec
from .export import folders_unet, free_folder, new_folder, real_path, scheduler
from .hub import is_hub_id
from .source import Source, find

REPORT = "graft_report.json"
_STRONGEST = torch.finfo(torch.float32).max  # what the sum is computed in
_UNET = "diffusion_pytorch_model.safetensors"
# Tensors whose shapes tell SDXL's UNet from others: latents, prompt width, pooled prompt.
_SIGNATURE = ("conv_in.weight", "conv_out.weight", "add_embedding.linear_1.weight")
_PARTS = {"vae": _UNET, "text_encoder": "model.safetensors", "text_encoder_2": "model.safetensors"}


@dataclass(frozen=True)
class Layer:
    """What became of one tensor of the custom UNet.

    Attributes:
        change: |s (W_student - W_base)| / |W_custom|, Frobenius norms (1 where W_custom is zero); 0 where it was kept.
        distance: |W_custom - W_base| / |W_base|: how far the checkpoint itself went from the base.
        kept: None, or why the custom tensor was kept as it is.
    """

    name: str
    shape: tuple[int, ...]
    change: float
    distance: float
    kept: str | None = None


@dataclass
class Report:
    """Every tensor, and the sums over all; ``str(report)`` is a short table."""

    strength: float
    layers: list[Layer] = field(default_factory=list)
    change: float = 0.0
    distance: float = 0.0

    def blocks(self) -> dict[str, tuple[int, float, float]]:
        """Block of the UNet to (tensors, greatest change, greatest distance)."""
        found: dict[str, tuple[int, float, float]] = {}
        for layer in self.layers:
            parts = layer.name.split(".")
            block = ".".join(parts[:2]) if parts[0] in ("down_blocks", "up_blocks") else parts[0]
            count, change, distance = found.get(block, (0, 0.0, 0.0))
            found[block] = count + 1, max(change, layer.change), max(distance, layer.distance)
        return found

    def __str__(self) -> str:
        lines = [f"{'block':16} {'tensors':>8} {'most changed':>13} {'most off base':>14}"]
        for block, (count, change, distance) in self.blocks().items():
            lines.append(f"{block:16} {count:8} {change:13.4f} {distance:14.4f}")
        lines.append(f"{'all':16} {len(self.layers):8} {self.change:13.4f} {self.distance:14.4f}")
        kept = [layer for layer in self.layers if layer.kept]
        lines += [f"kept as it is: {layer.name}: {layer.kept}" for layer in kept[:8]]
        lines += [f"... and {len(kept) - 8} more" for _ in kept[8:9]]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        values = {name: getattr(self, name) for name in ("strength", "change", "distance")}
        kept = sum(layer.kept is not None for layer in self.layers)
        values |= {"tensors": len(self.layers), "kept": kept, "layers": [asdict(layer) for layer in self.layers]}
        path.write_text(json.dumps(values, indent=1) + "\n")


def graft(
    custom: str | Path,
    output: str | Path,
    student: str | Path = "nitrosd-realism",
    base: str | Path | None = None,
    strength: float = 1.0,
    dtype: str | None = None,
    shifted_timestep: int | None = None,
) -> Report:
    """Writes the custom checkpoint as a one-step student.

    Every UNet may be a preset, a pipeline or UNet folder, or a safetensors file in diffusers' or LDM's (ComfyUI's)
    layout, with or without prefix.

    Args:
        custom: the checkpoint to adapt; SDXL's form, epsilon prediction, four latent channels.
        output: a ``.safetensors`` file for the UNet alone (diffusers' layout), or a new folder for the whole pipeline
            with the text encoders and VAE of ``custom`` (a pipeline folder or a full single file) and the student's
            scheduler.
        student: the one-step UNet.
        base: what the student was distilled from; None is the UNet of the folder around the student's.
        strength: s.
        dtype: of the result: float16, bfloat16 or float32; None is each tensor's in ``custom``.
        shifted_timestep: S; None is the student's own, where it is known (presets, exported folders, runs).

    Returns:
        What became of every tensor; a folder holds it as ``graft_report.json``, beside ``x.safetensors`` it is
        ``x.graft.json``.

    Raises:
        InputError: an argument is not as above; v-prediction, inpainting and other architectures are refused.
    """
    for name, model in (("custom", custom), ("student", student), ("base", base)):
        if not isinstance(model, str | Path) and (name != "base" or model is not None):
            raise InputError(f"graft: {name} must be a preset, a folder or a safetensors file, got {model!r}")
    numeric = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not numeric or not -_STRONGEST <= strength <= _STRONGEST:
        raise InputError(f"graft: strength must be a finite number, got {str(strength)[:20]}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"graft: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    whole = Path(output).suffix != ".safetensors"
    output = free_folder(output, "graft") if whole else real_path(output, "graft")
    if output.exists() and not whole:
        raise InputError(f"graft: output must be a new file, got {output}, which is there")
    giver = _source(student)
    shift = _shift(shifted_timestep, giver, student)
    parts = _pipeline(custom)
    form = (parts or giver).folder if parts or giver else None  # a single file has none; all SDXL share theirs
    if whole and form is None:
        raise InputError(f"graft: output must be a .safetensors file for UNets without a pipeline folder, got {output}")
    adapt = _checked("custom", custom, parts)
    new = _checked("student", student, None)
    old = _unet("base", _weights("base", _base_files(base, giver, student)))
    _same_form(new, old, "student", "base")
    _same_form(adapt, old, "custom", "base")

    if not whole:
        report = _write(output, adapt, new, old, strength, dtype, _spec(giver, output.stem, shift))
        report.save(output.with_suffix(".graft.json"))
        return report
    with new_folder(output, "graft") as partial:
        _copy_configurations(form, partial)
        if parts:
            _copy_parts(parts, partial)
        else:
            _unpack(_weights("custom", _files("custom", custom)), form, partial)
        name_as_published(partial / "text_encoder")
        (partial / "scheduler").mkdir()
        scheduler(form, shift).save_pretrained(partial / "scheduler")
        spec = _spec(giver, output.name, shift)
        report = _write(partial / "unet" / _UNET, adapt, new, old, strength, dtype, spec)
        report.save(partial / REPORT)
        _describe(partial, output.name, shift, f"{Path(str(custom)).name} + {strength:g} ({student} - its base)")
    return report


def _write(path: Path, custom: Tensors, new: Tensors, old: Tensors, s: float, dtype: str | None, spec) -> Report:
    report, sums, shapes = Report(s), [0.0, 0.0, 0.0, 0.0], {}
    for name in sorted(custom):
        stored = custom[name].dtype
        shapes[name] = tuple(custom[name].shape), DTYPES[dtype] if dtype and stored.is_floating_point else stored

    def make(name: str) -> torch.Tensor:
        weight, reason = custom[name], _mismatch(name, custom, new, old)
        if not is_finite(weight.float() if weight.dtype.itemsize == 1 else weight):
            raise InputError(f"graft: custom must hold finite weights, got NaN or infinity in {name}")
        if reason:
            report.layers.append(Layer(name, shapes[name][0], 0.0, 0.0, reason))
            return cast(weight, shapes[name][1], name)
        wide, before = weight.float(), old[name].float()
        # Out of place: fp32 tensors are views of the mapped files, and writing to them would copy page after page.
        step = (new[name].float() - before).mul_(s)
        squares = [float(x.double().square().sum()) for x in (step, wide, wide - before, before)]
        sums[:] = [a + b for a, b in zip(sums, squares, strict=True)]
        report.layers.append(Layer(name, shapes[name][0], _ratio(*squares[:2]), _ratio(*squares[2:])))
        result = step.add_(wide)
        if not bool(torch.isfinite(result).all()):
            raise InputError(f"graft: {name} must stay finite, got a number that is not in custom, student or base")
        return cast(result, shapes[name][1], name)

    write(path, shapes, make, spec)
    report.change, report.distance = _ratio(*sums[:2]), _ratio(*sums[2:])
    return report


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else float(part > 0)


def _mismatch(name: str, custom: Tensors, new: Tensors, old: Tensors) -> str | None:
    for what, other in (("student", new), ("base", old)):
        if name not in other:
            return f"the {what} has no such tensor"
        if other[name].shape != custom[name].shape:
            return f"{list(custom[name].shape)} here, {list(other[name].shape)} in the {what}"
    return None if custom[name].dtype.is_floating_point else f"stored as {custom[name].dtype}"


def _same_form(one: Tensors, other: Tensors, name: str, beside: str) -> None:
    """Refuses another architecture; a few odd tensors are the report's business."""
    for key in _SIGNATURE:
        shapes = [list(t[key].shape) if key in t else "none" for t in (one, other)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"graft: {name} must have the form of {beside}, got {key} {shapes[0]} instead of {shapes[1]}"
            )
    same = sum(key in one and one[key].shape == other[key].shape for key in other)
    if same < 0.9 * len(other):
        raise InputError(f"graft: {name} must have the form of {beside}, got {same} of its {len(other)} tensors")


def _unet(name: str, stored: Weights) -> Tensors:
    """The UNet's tensors by diffusers' names; its first ones have sides to look at."""
    tensors = layouts.unet_of_any_size(stored, f"graft: {name}")
    for key, sides in zip(_SIGNATURE, (4, 4, 2), strict=True):
        if key in tensors and tensors[key].ndim != sides:
            raise InputError(f"graft: {name} must have {sides} sides in {key}, got {list(tensors[key].shape)}")
    return tensors


def _checked(name: str, model: str | Path, parts: Source | None) -> Tensors:
    """The UNet's tensors, refused where they could not work: inpainting, v-prediction, not SDXL."""
    stored = _weights(name, _files(name, model))
    tensors = _unet(name, stored)
    channels = tensors["conv_in.weight"].shape[1]
    if channels != 4:
        kind = " (an inpainting model)" if channels == 9 else ""
        raise InputError(f"graft: {name} must have 4 input channels, got {channels}{kind}")
    if "add_embedding.linear_1.weight" not in tensors:
        raise InputError(f"graft: {name} must be SDXL's UNet, got one without its embedding of sizes and pooled prompt")
    said = stored.metadata.get("modelspec.prediction_type", "epsilon")
    if parts is not None:
        said = scheduler_config(parts.folder).get("prediction_type", said)
    # Single files of v-prediction models carry an empty tensor of this name, which ComfyUI and others look for.
    marked = "v_pred" in stored
    if marked or said not in ("epsilon", "eps"):
        raise InputError(f"graft: {name} must predict epsilon, got {'v_prediction' if marked else said}")
    return tensors


def _weights(name: str, files: list[Path]) -> Weights:
    return Weights(files, what=f"graft: {name}")


def _pipeline(model: str | Path) -> Source | None:
    """The pipeline that ``model`` is or names, its folder checked; None for anything less."""
    path = _path(model)
    on_hub = not path.exists() and is_hub_id(str(model))
    if model not in MODELS and not on_hub and not (path / "model_index.json").is_file():
        return None
    source = find(model)
    replaced = {"unet": source.unet, "vae": source.vae}
    check_folder(source.folder, tuple(part for part in ("unet", *_PARTS) if replaced.get(part) is None))
    return source


def _path(model: str | Path) -> Path:
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long; the home of nobody
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"graft: {str(model)[:60]!r} must be a path this system has, got {reason}") from error
    return path


def _source(model: str | Path) -> Source | None:
    """What ``load`` takes; None for a UNet's own file or folder."""
    path = _path(model)
    unet = (path / "unet").is_dir() and not (path / "model_index.json").is_file()
    return None if path.suffix == ".safetensors" or (path / _UNET).is_file() or unet else find(model)


def _files(name: str, model: str | Path) -> list[Path]:
    source = _source(model)
    if source is not None:
        if source.loras:
            raise InputError(f"graft: {name} must be whole weights, got {model} with a LoRA (export it first)")
        return source.unet_files
    path = _path(model)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise InputError(f"graft: {name} must be a preset, a folder or a safetensors file, got no {path}")
        return [path]
    folder = path / "unet" if (path / "unet").is_dir() else path
    files = [folder / _UNET] if (folder / _UNET).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"graft: {name} must hold safetensors weights, got none in {folder}")
    return files


def _base_files(base: str | Path | None, giver: Source | None, student: str | Path) -> list[Path]:
    if base is not None:
        return _files("base", base)
    if giver is None or giver.unet is None:
        raise InputError(f"graft: base must be given: {student} does not say what it was distilled from")
    return folders_unet(giver)


def _shift(asked: int | None, giver: Source | None, student: str | Path) -> int:
    shift = asked if asked is not None else giver.shifted_timestep if giver else None
    if shift is None:
        said = _said(student).get("nitrofusion.shifted_timestep")
        shift = int(said) if said is not None and said.isdecimal() and len(said) < 9 else said
    if shift is None or isinstance(shift, bool) or not isinstance(shift, int) or not 1 <= shift <= 1000:
        got = "none" if shift is None else repr(shift)
        raise InputError(f"graft: shifted_timestep must be given in 1..1000 (250 Realism, 500 Vibrant), got {got}")
    return shift


def _said(model: str | Path) -> dict[str, str]:
    return _weights("student", _files("student", model)).metadata


def _spec(giver: Source | None, title: str, shift: int) -> dict[str, str]:
    spec = model_spec(giver, title, "diffusers") if giver else {}
    # What the result is licensed under follows from two models; that is for its maker to say.
    spec = {key: value for key, value in spec.items() if key != "modelspec.license"}
    return spec | {"modelspec.title": title, "nitrofusion.shifted_timestep": str(shift)}


def _copy_configurations(folder: Path, partial: Path) -> None:
    """A pipeline folder's configurations and tokenizers."""
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    partial.joinpath("model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for part in ("tokenizer", "tokenizer_2"):
        (partial / part).mkdir()
        for file in TOKENIZER:
            if (folder / part / file).is_file():
                shutil.copyfile(folder / part / file, partial / part / file)
    for part in ("unet", *_PARTS):
        (partial / part).mkdir()
        shutil.copyfile(folder / part / "config.json", partial / part / "config.json")


def _copy_parts(source: Source, partial: Path) -> None:
    """A pipeline's VAE and text encoders as they are stored, whatever their files are called, each in one file."""
    for part, name in _PARTS.items():
        files = source.files(part)
        if len(files) == 1:
            shutil.copyfile(files[0], partial / part / name)
        else:
            weights = Weights(files)
            shapes = {key: (tuple(weight.shape), weight.dtype) for key, weight in weights.items()}
            write(partial / part / name, shapes, weights.__getitem__)
        if part == "vae" and source.vae is not None and source.vae.is_dir():  # a preset's, which is not the folder's
            shutil.copyfile(files[0].parent / "config.json", partial / part / "config.json")


def _unpack(single: Tensors, form: Path, partial: Path) -> None:
    """Writes a single file's VAE and text encoders in diffusers' layout; ``form`` is a folder of the same shapes."""
    for part, file in _PARTS.items():
        names = Weights(weight_files(form / part))
        entries = {
            "vae": lambda names=names: to_ldm.vae_entries(
                names, json.loads((form / "vae" / "config.json").read_text())
            ),
            "text_encoder": lambda names=names: to_ldm.text_entries(names),
            "text_encoder_2": lambda names=names: to_ldm.text_2_entries(names),
        }[part]()
        where = {name: (key, i) for key, entry in entries.items() for i, name in enumerate(entry.parts)}
        missing = [key for key in entries if key not in single]
        if missing:
            raise InputError(
                f"graft: custom must be a full checkpoint when output is a folder, got no {part} (first: {missing[0]})"
            )

        def read(name: str, entries=entries, where=where) -> torch.Tensor:
            key, i = where[name]
            return entries[key].split(single[key])[i].contiguous()

        shapes = {name: (tuple(read(name).shape), single[where[name][0]].dtype) for name in where}
        write(partial / part / file, shapes, read, {})


def _describe(partial: Path, title: str, shift: int, formula: str) -> None:
    source = Source(title, partial, None, shift, 1, 0.0)
    note = f"Made by adding weights: {formula}. `{REPORT}` has every layer."
    files = {"unet/": "the adapted UNet", "vae/, text_encoder/, text_encoder_2/": "the checkpoint's own"}
    card = model_card(source, title, "diffusers", files, note)
    (partial / "README.md").write_text(card, encoding="utf-8")

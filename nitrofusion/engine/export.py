"""Writing any model we draw with in the forms others read: a diffusers folder, ComfyUI's single file, a LoRA."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from safetensors import SafetensorError

from ..data import teacher_scheduler
from ..errors import InputError, StorageError
from ..models import layouts
from ..models.folder import TOKENIZER, betas, scheduler_config
from ..models.weights import Weights, is_finite, weight_files
from ..models.writing import DTYPES, cast, name_as_published, write
from ..presets import MODELS
from ..storage import sync
from . import lora_by_svd, to_ldm
from .card import model_card, model_spec
from .hub import fetch_folder
from .source import Source, find

FORMATS = ("diffusers", "comfyui", "lora")
LORA_FILE, LORA_REPORT = "pytorch_lora_weights.safetensors", "lora_report.json"
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Names of an attention's layers in VAE files of early diffusers, which its own loader still reads.
_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # by the disk


def export(
    model: str | Path,
    output: str | Path,
    format: str = "diffusers",
    dtype: str | None = None,
    rank: int = 64,
    base: str | Path | None = None,
    full: bool = False,
) -> Path:
    """Writes a folder with the model and its card; it appears under its name when complete, or not at all.

    ``diffusers`` is a complete pipeline folder. A student's scheduler is written as an ``LCMScheduler`` that carries
    ``shifted_timestep`` and ``original_inference_steps``; ``TimestepShiftLCMScheduler.from_pretrained(output,
    subfolder="scheduler")`` reads both. ``load(output)`` draws the same pictures as ``load(model)``.

    ``comfyui`` is one file in LDM's layout, ``NAME_comfyui.safetensors``: the UNet alone, or all parts (``full``).

    ``lora`` is the UNet's difference to ``base`` at ``rank`` in diffusers' PEFT layout, for ``load_lora_weights``, and
    ``lora_report.json``: what each layer keeps. Of a run that trained adapters it is those, as they are.

    Args:
        model: what ``load`` takes.
        output: folder to make; an empty one may exist.
        format: ``diffusers``, ``comfyui`` or ``lora``.
        dtype: precision of the weights: float16, bfloat16 or float32; None keeps each part as it is stored.
        rank: of the LoRA.
        base: what the LoRA will be loaded into: a preset, a folder or a UNet file, with the LoRAs it has; None is the
            pipeline folder whose UNet the model's replaces.
        full: text encoders and VAE too (comfyui).

    Returns:
        ``output`` as a path.

    Raises:
        InputError: the model cannot be found, an argument is not as above, or ``output`` is not empty; a weight is not
            finite, or not in ``dtype``. StorageError: the disk is full or cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"export: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"export: rank must be an integer >= 1, got {rank!r}")
    if (base is not None and format != "lora") or (full and format != "comfyui"):
        option, belongs = ("full", "comfyui") if full else ("base", "lora")
        raise InputError(f"export: {option} must be given with format {belongs}, got {format}")
    made = free_folder(output)
    source = find(model)
    trained = format == "lora" and base is None and _is_adapters(source)
    against = _base(source, base) if format == "lora" and not trained else {}
    with new_folder(made) as partial:
        stem = Path(source.name).name.removesuffix(".safetensors")
        name = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "model"
        if format == "comfyui":
            _write_comfyui(source, partial, name, dtype, full)
        elif trained:
            _write_trained_lora(source, partial, name, dtype)
        elif format == "lora":
            _write_lora(source, partial, name, dtype, rank, against)
        else:
            _write_diffusers(source, partial, name, dtype)
    return Path(output).expanduser()


def real_path(output: str | Path, command: str = "export") -> Path:
    """Where ``output`` is, whatever links lead there; InputError where it can be nowhere."""
    try:
        path = Path(output).expanduser().resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError, TypeError) as error:  # too long; the home of nobody; a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{command}: output must be a path this system has, got {str(output)!r}: {reason}") from error
    return path


def free_folder(output: str | Path, command: str = "export") -> Path:
    """The ``real_path`` of a folder that is new or empty."""
    path = real_path(output, command)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{command}: output must be a new or empty folder, got {output}, which is not empty")
    if path == Path.cwd():  # another folder takes its place, and whoever stands in it would stand nowhere
        raise InputError(f"{command}: output must be another folder than the current one, got {str(output)!r}")
    return path


@contextlib.contextmanager
def new_folder(output: Path, command: str = "export") -> Iterator[Path]:
    """A partial folder beside a free one that takes its place when the block ends, and is removed when it fails."""
    partial = output.with_name(f".{output.name[:50]}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)  # first, so that an impossible output fails before gigabytes are read
    except OSError as error:
        kind = StorageError if error.errno in _REFUSED else InputError
        reason = error.strerror
        raise kind(f"{command}: output must be a folder that can be made, got {output}: {reason}") from error
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        os.rename(partial, output)
        sync(output.parent)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{command}: {output} must be a folder with room for the model, got {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_diffusers(source: Source, partial: Path, name: str, dtype: str | None) -> None:
    dtypes = {part: DTYPES[dtype] if dtype else _stored_dtype(source, part) for part in _PARTS}
    # One file per part whatever its size: that is what load_unet_ and most other programs read.
    _pipeline(source, dtypes).save_pretrained(partial, safe_serialization=True, max_shard_size="1TB")
    name_as_published(partial / "text_encoder")
    for tokenizer in ("tokenizer", "tokenizer_2"):
        # transformers 5 writes tokenizer.json alone; earlier ones need the vocabulary files of the source.
        for file in TOKENIZER:  # by name: whatever else lies there is not ours to pass on
            if (source.folder / tokenizer / file).is_file():
                shutil.copyfile(source.folder / tokenizer / file, partial / tokenizer / file)
    for weights in partial.rglob("*.safetensors"):
        weights.chmod((partial / "model_index.json").stat().st_mode)  # safetensors writes for the owner alone
    files = {"unet/": "the UNet", "vae/, text_encoder/, text_encoder_2/": "the other parts", "scheduler/": "its steps"}
    (partial / "README.md").write_text(model_card(source, name, "diffusers", files), encoding="utf-8")


def _write_comfyui(source: Source, partial: Path, name: str, dtype: str | None, full: bool) -> None:
    made: dict[str, tuple[to_ldm.Entry, layouts.Tensors]] = {}
    for tensors, entries in _single_file(source, full):
        made |= {key: (entry, tensors) for key, entry in entries.items()}
    shapes = {}
    for key, (entry, tensors) in made.items():
        shape = entry.shape([tensors[p].shape for p in entry.parts])
        stored = tensors[entry.parts[0]].dtype
        shapes[key] = shape, DTYPES[dtype] if dtype and stored.is_floating_point else stored

    def make(key: str) -> torch.Tensor:
        entry, tensors = made[key]
        return _fitting(source, entry.make([tensors[p] for p in entry.parts]), shapes[key][1], key)

    file = f"{name}_comfyui.safetensors"
    write(partial / file, shapes, make, model_spec(source, name, "comfyui"))
    what = "UNet, text encoders and VAE" if full else "the UNet alone, as a diffusion model"
    card = model_card(source, name, "full" if full else "comfyui", {file: what + ", in LDM's layout"})
    (partial / "README.md").write_text(card, encoding="utf-8")


def _fitting(source: Source, tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """``cast`` of a weight that is finite."""
    if not is_finite(tensor.float() if tensor.dtype.itemsize == 1 else tensor):
        raise InputError(f"export: {source.name} must hold finite weights, got NaN or infinity in {name}")
    return cast(tensor, dtype, name)


def _single_file(source: Source, full: bool) -> Iterator[tuple[layouts.Tensors, dict[str, to_ldm.Entry]]]:
    if not full:
        unet = _merged(source)
        yield unet, to_ldm.unet_entries(unet)
        return
    stored = source.open()  # every part from where this model has it, which need not be its folder
    changed = {place for merge in stored.merges for place in merge.deltas}
    parts = {
        part: {
            name: cast(stored.tensor(part, name, "cpu"), weight.dtype, name) if (part, name) in changed else weight
            for name, weight in tensors.items()
        }
        for part, tensors in stored.tensors.items()
    }
    vae = {_modern(name): tensor for name, tensor in parts["vae"].items()}
    yield parts["unet"], to_ldm.unet_entries(parts["unet"])
    yield vae, to_ldm.vae_entries(vae, stored.modules["vae"].config)
    yield parts["text_encoder"], to_ldm.text_entries(parts["text_encoder"])
    yield parts["text_encoder_2"], to_ldm.text_2_entries(parts["text_encoder_2"])


def _unet(files: list[Path], what: str = "model") -> dict[str, torch.Tensor]:
    return layouts.unet_of_any_size(Weights(files, what=what), what)


def _merged(source: Source) -> dict[str, torch.Tensor]:
    """The UNet's weights, with its LoRAs in them."""
    if not source.loras:
        return _unet(source.unet_files)
    return dict(source.read("cpu", _stored_dtype(source, "unet")).unet.state_dict())


def _modern(name: str) -> str:
    return re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)", lambda m: _OLD_VAE[m[1]], name)


def _write_lora(source: Source, partial: Path, name: str, dtype: str | None, rank: int, base: layouts.Tensors) -> None:
    unet = _merged(source)
    stored = unet["conv_in.weight"].dtype  # of less than 16 bits there is no LoRA that others read
    own = stored if stored in (torch.float16, torch.bfloat16) else torch.float32
    state, layers = lora_by_svd.extract(unet, base, rank, DTYPES[dtype] if dtype else own)
    if not state:
        raise InputError(f"export: base must be another UNet than the model's, got one equal to {source.name}")
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
    write(partial / LORA_FILE, shapes, state.__getitem__, model_spec(source, f"{name} LoRA", "lora", rank))
    kept = lora_by_svd.kept(layers)
    report = {"rank": rank, "energy_kept": kept, "layers": [vars(layer) for layer in layers]}
    (partial / LORA_REPORT).write_text(json.dumps(report, indent=1) + "\n")
    note = (
        f"At rank {rank} it keeps {kept:.1%} of the squared norm of the difference to its base; norms and biases, "
        f"which a LoRA cannot hold, count as lost. `{LORA_REPORT}` has every layer."
    )
    files = {LORA_FILE: f"linear layers and convolutions at rank {rank}", LORA_REPORT: "what each layer keeps"}
    (partial / "README.md").write_text(model_card(source, f"{name} LoRA", "lora", files, note), encoding="utf-8")


def _is_adapters(source: Source) -> bool:
    """Whether the model is a LoRA as we train and diffusers stores them; published ones have other names and alphas."""
    return any(all(".lora_A." in key or ".lora_B." in key for key in Weights(file)) for file, _ in source.loras[:1])


def _write_trained_lora(source: Source, partial: Path, name: str, dtype: str | None) -> None:
    (file, _), *others = source.loras
    if others:
        raise InputError(f"export: a LoRA must come from one file, got {len(source.loras)} in {source.name}")
    weights = Weights(file)
    shapes = {key: (tuple(w.shape), DTYPES[dtype] if dtype else w.dtype) for key, w in weights.items()}
    rank = next(shape[0] for key, (shape, _) in shapes.items() if "lora_A" in key)
    made = lambda key: _fitting(source, weights[key], shapes[key][1], key)  # noqa: E731
    write(partial / LORA_FILE, shapes, made, model_spec(source, f"{name} LoRA", "lora", rank))
    files = {LORA_FILE: f"adapters of rank {rank}, as they were trained"}
    (partial / "README.md").write_text(model_card(source, f"{name} LoRA", "lora", files), encoding="utf-8")


def _base(source: Source, base: str | Path | None) -> layouts.Tensors:
    if base is None:
        if source.unet is None:
            raise InputError(f"export: base must be given for a LoRA of {source.name}, whose folder has one UNet only")
        return _unet(folders_unet(source), "base")
    if str(base).endswith(".safetensors"):
        path = real_path(base)
        if not path.is_file():
            raise InputError(f"export: base must be a preset, a folder or a UNet file, got {base}, which is not there")
        return _unet([path], "base")
    return _merged(find(base))


def folders_unet(source: Source) -> list[Path]:
    """Files of the folder's UNet, which the model's replaces; a preset's are fetched, as drawing does without them."""
    preset, folder = MODELS.get(source.name), source.folder
    if preset is not None and not Path(preset.folder).is_absolute():
        folder = fetch_folder(f"preset {preset.name}", preset.folder, ("unet",))
    return weight_files(folder / "unet")


def _stored_dtype(source: Source, part: str) -> torch.dtype:
    """Of a part's first tensor; parts of mixed precision do not occur."""
    first = next(iter(Weights(source.files(part), source.allow_pickle).values()))
    return first.dtype if first.dtype in (torch.float16, torch.bfloat16) else torch.float32


def _pipeline(source: Source, dtypes: dict[str, torch.dtype]) -> StableDiffusionXLPipeline:
    # Float32 holds every stored precision exactly; where all have and want another one, it does in half the memory.
    common = set(dtypes.values()) | {_stored_dtype(source, part) for part in _PARTS}
    loaded = source.read("cpu", common.pop() if len(common) == 1 else torch.float32)
    parts = dict(zip(_PARTS, (loaded.unet, loaded.vae, *loaded.text_encoders), strict=True))
    for name, module in parts.items():
        for key, weight in module.state_dict().items():
            cast(weight, dtypes[name] if weight.is_floating_point() else weight.dtype, f"{name}.{key}")
        torch.nn.Module.to(module, dtypes[name])  # diffusers' own ``to`` warns of every cast
    return StableDiffusionXLPipeline(
        **parts,
        tokenizer=loaded.tokenizers[0],
        tokenizer_2=loaded.tokenizers[1],
        scheduler=scheduler(source.folder, source.shifted_timestep) if source.is_student else source.scheduler(),
        force_zeros_for_empty_prompt=source.force_zeros_for_empty_prompt,
        add_watermarker=False,
    )


def scheduler(folder: Path, shifted_timestep: int | None):
    """A student's LCM with the folder's betas and the shift beside them; without a shift the folder's own."""
    if shifted_timestep is None:
        return teacher_scheduler(folder)
    made = LCMScheduler(**betas(scheduler_config(folder)), original_inference_steps=4)
    made.register_to_config(shifted_timestep=shifted_timestep)
    return made

"""Sealed checkpoints: safetensors and JSON, staged, synced, hashed, renamed. What is not sealed does not exist.

``checkpoints/step-NNNNNN/`` holds one ``<component>.safetensors`` per component, ``state.json``, and, written last,
``manifest.json`` = ``{"files": {name: sha256}}``. safetensors itself does not notice a flipped payload bit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_bytes

from .errors import CheckpointError, StorageError

MANIFEST = "manifest.json"
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def save(run_folder: str | Path, step: int, components: dict[str, dict[str, torch.Tensor]], state: dict) -> Path:
    """Seals one checkpoint; when this returns it survives a crash.

    Args:
        components: name to tensors, one safetensors file each.
        state: anything JSON can hold.

    Raises:
        StorageError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    root = Path(run_folder) / "checkpoints"
    final = root / f"step-{step:06d}"
    needed = int(1.05 * sum(t.numel() * t.element_size() for part in components.values() for t in part.values()))
    staged = root / f".tmp-step-{step:06d}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        if free < needed:
            raise StorageError(f"checkpoint: {root} must have {needed:,} bytes free, got {free:,}")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        digests = {}
        for name, tensors in components.items():
            data = to_bytes({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
            digests[f"{name}.safetensors"] = _write(staged / f"{name}.safetensors", data)
        digests["state.json"] = _write(staged / "state.json", json.dumps(state, indent=1).encode())
        _write(staged / MANIFEST, json.dumps({"files": digests}, indent=1).encode())
        _sync_folder(staged)
        if final.exists():
            shutil.rmtree(final)  # a refused or repeated save of the same step
        os.rename(staged, final)
        _sync_folder(root)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        if error.errno not in _STORAGE_ERRORS:
            raise
        raise StorageError(
            f"checkpoint: {root} must be writable with {needed:,} bytes free, got {error.strerror or error}"
        ) from error
    return final


def verify(folder: str | Path) -> None:
    """Raises CheckpointError naming the file that is missing, unknown or altered."""
    load(folder)


def load(folder: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """(components, state) of one sealed checkpoint; the bytes that were hashed are the bytes that are parsed."""
    folder = Path(folder)
    listed = _manifest(folder)
    present = {p.name for p in folder.iterdir()} - {MANIFEST}
    for name in sorted(listed.keys() ^ present):
        what = "is missing" if name in listed else "is not in its manifest"
        raise CheckpointError(f"checkpoint: {folder} must be as it was sealed, but {name} {what}")
    components, state = {}, {}
    for name in sorted(listed):
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != listed[name]:
            raise CheckpointError(f"checkpoint: {folder} must be as it was sealed, but {name} was altered")
        try:
            if name.endswith(".safetensors"):
                components[name.removesuffix(".safetensors")] = parse_safetensors(data)
            else:
                state = json.loads(data)
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"checkpoint: {folder}/{name} must be readable, got {error}") from error
    return components, state


def latest(run_folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that does not."""
    refused = []
    for folder in reversed(_sealed(run_folder)):
        try:
            verify(folder)
            return folder, refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, refused


def prune(run_folder: str | Path, keep: int) -> None:
    """Deletes the oldest checkpoints beyond the newest ``keep``; never the only good one."""
    if keep < 1:
        raise ValueError(f"prune: keep must be >= 1, got {keep}")
    folders = _sealed(run_folder)
    good, _ = latest(run_folder)
    for folder in folders[:-keep]:
        if folder != good:
            # Out of sight first: a half-deleted folder must not look like a checkpoint.
            grave = folder.with_name(f".tmp-old-{folder.name}")
            shutil.rmtree(grave, ignore_errors=True)
            os.rename(folder, grave)
            shutil.rmtree(grave, ignore_errors=True)


def sweep(run_folder: str | Path) -> None:
    """Removes what killed runs left half-written."""
    for orphan in (Path(run_folder) / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(orphan, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The per-parameter state as flat tensors, ``<index>.<key>``; hyper-parameters come from the configuration."""
    return {
        f"{index}.{key}": value if torch.is_tensor(value) else torch.tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of ``pack_optimizer``; dtypes and devices follow what is stored and the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        param = params[int(index)]
        device = param.device if value.ndim else value.device  # fused AdamW keeps step counts beside the parameters
        if key == "step" and param.is_cuda:
            device = param.device
        optimizer.state[param][key] = value.to(device)


def pack_rng() -> dict[str, torch.Tensor]:
    """The state of torch's generators: CPU, and every CUDA device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def unpack_rng(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["cpu"])
    for name, state in tensors.items():
        if name.startswith("cuda.") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))


def _sealed(run_folder: str | Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = (Path(run_folder) / "checkpoints").glob("step-*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def _manifest(folder: Path) -> dict[str, str]:
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint: {folder} must be sealed, but {MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {folder} must be as it was sealed, but {MANIFEST} was altered") from error
    if not isinstance(files, dict) or any("/" in name or name.startswith(".") for name in files):
        raise CheckpointError(f"checkpoint: {folder} must be as it was sealed, but {MANIFEST} was altered")
    return files


def _write(path: Path, data: bytes) -> str:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)

"""Sealed checkpoints: safetensors and JSON, staged, synced, hashed, renamed. What is not sealed does not exist.

``checkpoints/step-NNNNNN/`` holds one ``<component>.safetensors`` per component, ``state.json``, and, written last,
``manifest.json`` = ``{"files": {name: sha256}}``. safetensors itself does not notice a flipped payload bit.
``Saver`` does it while training goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors

from . import storage
from .errors import CheckpointError, StorageError
from .models.weights import header_size, short
from .models.writing import header, raw

MANIFEST = "manifest.json"
STATE = "state.json"
_NUMBER = "#"  # ends the name of what is a plain number in the optimizer


def save(run_folder: str | Path, step: int, components: dict[str, dict[str, torch.Tensor]], state: dict) -> Path:
    """Seals one checkpoint; when this returns it survives a crash.

    A step that is already sealed and verifies is kept as it is; one that does not verify is replaced.

    Args:
        components: name to tensors, one safetensors file each.
        state: anything JSON can hold.

    Raises:
        StorageError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    return _seal(Path(run_folder), step, components, _encode(components, state))


class Saver:
    """The checkpoints of one run: each save with retention, in the background unless told otherwise.

    In the background ``save`` copies the tensors to host memory and returns; a thread writes, syncs and seals. One at
    a time: the next save waits for it. What failed there is raised by the next call of any method. As a context it
    waits at the end; there a failure gives way to the exception that ended the block, whose note it becomes.

    Attributes:
        sealed: the newest step that was sealed; None before the first.
    """

    def __init__(self, run_folder: str | Path, keep: int, background: bool = True):
        self.run_folder, self.keep, self.background = Path(run_folder), keep, background
        self.sealed: int | None = None
        self._under_way: Future | None = None

    def save(self, step: int, components: dict[str, dict[str, torch.Tensor]], state: dict) -> None:
        """As ``checkpoint.save`` and ``prune``; afterwards tensors and state may change."""
        self.wait()
        encoded = _encode(components, state)
        if not self.background:
            self._seal(step, components, encoded)
            return
        copies = {
            name: {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
            for name, tensors in components.items()
        }
        pool = ThreadPoolExecutor(1, "checkpoint")
        self._under_way = pool.submit(self._seal, step, copies, encoded)
        pool.shutdown(wait=False)  # the thread ends with its work

    def check(self) -> None:
        """Raises what a save that has ended failed with; waits for none."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is under way."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _seal(self, step: int, components: dict, encoded: bytes) -> None:
        _seal(self.run_folder, step, components, encoded)
        self.sealed = step
        prune(self.run_folder, self.keep)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except StorageError as failed:
            if error is None:
                raise
            error.add_note(str(failed))


def _encode(components: dict, state: dict) -> bytes:
    if odd := [name for name in components if "/" in name or name.startswith(".")]:
        raise ValueError(f"checkpoint: components must have plain names, got {odd}")
    return json.dumps(state, indent=1).encode()


def _seal(run_folder: Path, step: int, components: dict[str, dict[str, torch.Tensor]], encoded: bytes) -> Path:
    root = run_folder / "checkpoints"
    final = root / f"step-{step:06d}"
    with contextlib.suppress(CheckpointError):
        verify(final)
        return final  # the same step of the same run: it holds the same
    needed = int(1.05 * (len(encoded) + sum(t.nbytes for part in components.values() for t in part.values())))
    staged = storage.temporary(final)
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        if free < needed:
            raise StorageError(f"checkpoint: {root} must have {needed:,} bytes free, got {free:,}")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        digests = {
            f"{name}.safetensors": _write(staged / f"{name}.safetensors", _pieces(tensors))
            for name, tensors in components.items()
        }
        digests[STATE] = _write(staged / STATE, [encoded])
        _write(staged / MANIFEST, [json.dumps({"files": digests}, indent=1).encode()])
        storage.sync(staged)
        if final.exists():
            _discard(final)
        os.rename(staged, final)
        storage.sync(root)
        storage.sync(root.parent)  # the first save made root itself
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"checkpoint: {root} must be writable with {needed:,} bytes free, got {reason}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # nothing is left there after a success
    return final


def _pieces(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, a tensor at a time; tensors may share memory, which safetensors refuses."""
    # Wider types first, so that every tensor begins at a multiple of its type's width.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    yield header({name: (tuple(tensors[name].shape), tensors[name].dtype) for name in names})
    for name in names:
        yield raw(tensors[name].detach())


def verify(folder: str | Path) -> None:
    """Raises CheckpointError naming the file that is missing, unknown or altered; reads in small pieces."""
    folder = Path(folder)
    for name, digest in _listed(folder).items():
        with _readable(folder / name), open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise _altered(folder, f"{name} does not match its digest in {MANIFEST}")


def load(folder: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """(components, state), verified: the bytes that were hashed are the bytes that are parsed."""
    folder = Path(folder)
    components, state = {}, {}
    for name, digest in _listed(folder).items():
        with _readable(folder / name):
            data = storage.read_small(folder / name) if name == STATE else (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise _altered(folder, f"{name} does not match its digest in {MANIFEST}")
            if name.endswith(".safetensors"):
                components[name.removesuffix(".safetensors")] = _parsed(data)
            elif name == STATE:
                state = json.loads(data)
    return components, state


def _parsed(data: bytes) -> dict[str, torch.Tensor]:
    header_size(data[:9], len(data))
    try:
        return parse_safetensors(data)
    except (TypeError, RuntimeError) as error:  # torch's, of shapes it cannot compute with
        raise ValueError(short(str(error).partition("\n")[0])) from error


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
    """Deletes the oldest checkpoints beyond the newest ``keep``; never the newest one that verifies."""
    if keep < 1:
        raise ValueError(f"prune: keep must be >= 1, got {keep}")
    surplus = _sealed(run_folder)[:-keep]
    good, _ = latest(run_folder) if surplus else (None, [])  # hashing a checkpoint is not free
    try:
        for folder in surplus:
            if folder != good:
                _discard(folder)
    except OSError as error:
        raise StorageError(f"checkpoint: {run_folder} must be writable, got {error.strerror or error}") from error


def sweep(run_folder: str | Path) -> None:
    """Removes what killed runs left half-written, not what another live process of this machine is writing."""
    storage.sweep(Path(run_folder) / "checkpoints", lambda orphan, name: True)  # a run is on one machine at a time


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The per-parameter state as flat tensors, ``<index>.<key>``; hyper-parameters come from the configuration."""
    return {
        f"{index}.{key}" if torch.is_tensor(value) else f"{index}.{key}{_NUMBER}": torch.as_tensor(value)
        for index, param in enumerate(p for group in optimizer.param_groups for p in group["params"])
        for key, value in optimizer.state.get(param, {}).items()
        if value is not None
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of ``pack_optimizer``; keeps stored dtypes, which ``load_state_dict`` would cast."""
    owners = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    restored: dict[torch.Tensor, dict] = defaultdict(dict)  # the type torch.optim uses
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(owners):
            raise CheckpointError(f"checkpoint: the optimizer must have {len(owners)} parameters, got state {name}")
        param, group = owners[int(index)]
        if key.endswith(_NUMBER):
            restored[param][key.removesuffix(_NUMBER)] = value.item()
            continue
        # A scalar step count lives on the CPU unless a fused or captured kernel reads it.
        on_device = value.ndim or group.get("fused") or group.get("capturable")
        on_device = on_device and not getattr(optimizer, "offload", False)
        restored[param][key] = value.to(param.device if on_device else "cpu", copy=True)
    optimizer.state = restored


def pack_rng() -> dict[str, torch.Tensor]:
    """The state of torch's generators: CPU, and every CUDA device."""
    devices = enumerate(torch.cuda.get_rng_state_all())  # none without CUDA
    return {"cpu": torch.get_rng_state()} | {f"cuda.{i}": state for i, state in devices}


def unpack_rng(tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of ``pack_rng``; states of devices this machine lacks are skipped."""
    torch.set_rng_state(tensors["cpu"])
    for name, state in tensors.items():
        if name.startswith("cuda.") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))


@contextlib.contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Around restoring from a checkpoint: one that holds something else is a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        lines = (str(error) or type(error).__name__).splitlines()
        raise CheckpointError(f"checkpoint: {folder} must hold this run's state, got {' '.join(lines[:2])}") from error


def _sealed(run_folder: str | Path) -> list[Path]:
    """Checkpoint folders, oldest first. A folder that cannot be listed is not one without any."""
    root = Path(run_folder) / "checkpoints"
    try:
        found = [root / name for name in os.listdir(root) if name.startswith("step-") and name[5:].isdecimal()]
    except FileNotFoundError:
        return []
    except OSError as error:
        if os.path.isfile(run_folder):  # a UNet's, which may stand where a run may
            return []
        raise CheckpointError(f"checkpoint: {root} must be a folder that can be read, got {error.strerror}") from error
    return sorted(found, key=lambda path: int(path.name[5:]))


def _listed(folder: Path) -> dict[str, str]:
    """File name to digest, as sealed; the folder holds exactly these files and the manifest."""
    with _readable(folder / MANIFEST):
        for path in sorted(folder.iterdir()):
            if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would be waited for, a device read without end
                raise _altered(folder, f"{path.name} is no file")
        manifest = json.loads(storage.read_small(folder / MANIFEST))
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or STATE not in files or any("/" in n or n.startswith(".") for n in files):
        raise _altered(folder, f"{MANIFEST} was altered")
    for name in sorted(files.keys() ^ present):
        what = f"is listed in {MANIFEST} and missing" if name in files else f"is not listed in {MANIFEST}"
        raise _altered(folder, f"{name} {what}")
    return files


def _altered(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint: {folder} must be as it was sealed, but {what}")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"checkpoint: {path} must be readable, got {reason}") from error


def _discard(folder: Path) -> None:
    # Out of sight first: a half-deleted folder must not look like a checkpoint.
    grave = storage.temporary(folder.with_name(f"old-{folder.name}"))
    shutil.rmtree(grave, ignore_errors=True)
    os.rename(folder, grave)
    shutil.rmtree(grave, ignore_errors=True)


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()

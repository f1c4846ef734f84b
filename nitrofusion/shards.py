"""Files of teacher samples: POSIX tars that webdataset reads, each with an index by which any sample is one pread.

``shard-NNNNNN.tar`` holds, for each sample of global index i, ``<i>.json`` (index, prompt, noise_seed) and, right
behind it, ``<i>.safetensors`` (``latents`` [4, h, w] bfloat16). ``shard-NNNNNN.json`` is written after it and makes it
count: sizes, the tar's SHA-256, and of each sample where its two files lie and their CRC-32. ``samples.json`` says what
all of them are samples of. Each shard has an index of its own, so that any number of machines may write.

Whole digests are compared when asked (``prepare --verify``): hashing the 133 GB of a million samples at every start
would take minutes. Sizes and the index's own digest are compared whenever a folder is opened, and a sample's CRC
whenever it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_bytes

from . import storage
from .errors import InputError, StorageError

FORMAT = 1
SETTINGS = "samples.json"
_OPEN_FILES = 64  # of a reader: a million samples lie in four thousand shards
_HEADER = 512  # bytes of a tar's
_ABANDONED = 3600.0  # seconds since a writer of another machine wrote last


class AlteredShard(InputError):
    """A shard is not as it was written; drawing it again mends it."""


@dataclass(frozen=True)
class Sample:
    """What the teacher drew.

    Attributes:
        index: global.
        latents: [4, h, w] x0; stored as bfloat16.
    """

    index: int
    prompt: str
    noise_seed: int
    latents: torch.Tensor


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def finished(folder: Path) -> set[int]:
    """Numbers of the shards that have an index, by their names alone; one listing, however many they are."""
    try:
        names = os.listdir(folder)
    except OSError:  # nothing yet, or what claiming the folder will tell
        return set()
    return {int(found[1]) for name in names if (found := re.fullmatch(r"shard-(\d{6,12})\.json", name, re.ASCII))}


def stored_bytes(numbers: int, about: int = 512) -> int:
    """Bytes of a tar for a sample of that many latent numbers; ``about`` is its JSON's, in whole blocks of 512."""
    content = 2 * numbers + 88  # safetensors' header
    return 2 * _HEADER + about + -(-content // 512) * 512


def settings_digest(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def claim_folder(folder: Path, settings: dict) -> None:
    """Makes ``folder`` the place of samples of ``settings``, or accepts it as such.

    Raises:
        InputError: it holds others; says what differs. StorageError: it cannot be written.
    """
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = set(os.listdir(folder))  # at once: another process may write both between two looks
    path = folder / SETTINGS
    if SETTINGS not in names:
        if any(name.startswith("shard-") for name in names):
            raise InputError(f"prepare: {folder} must have {SETTINGS} beside its shards, got none")
        _write(path, json.dumps(settings, indent=1).encode())
    found = read_settings(folder)
    for key, value in settings.items():
        if found.get(key) != value:
            raise InputError(f"prepare: {folder} must hold samples of {key} {value}, got {found.get(key)}")


def read_settings(folder: Path) -> dict:
    """What the folder's shards are samples of."""
    path = folder / SETTINGS
    try:
        found = json.loads(storage.read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"prepare: {path} must be readable JSON, got {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        older = isinstance(found, dict) and "prompts_list" in found
        got = "an older version's: remove the folder and prepare again" if older else "another"
        raise InputError(f"prepare: {folder} must hold samples of format {FORMAT}, got {got}")
    return found


def write_shard(path: Path, samples: list[Sample], settings: dict) -> str:
    """Writes a shard and then its index; equal samples give equal bytes. Returns the tar's SHA-256.

    Raises:
        StorageError: the disk is full or cannot be written; no shard is there then.
    """
    data, rows = _encode(samples)
    digest = hashlib.sha256(data).hexdigest()
    index = {"settings": settings_digest(settings), "bytes": len(data), "sha256": digest, "samples": rows}
    index["self"] = _self_digest(index)
    _write(path, data)
    _write(index_path(path), json.dumps(index).encode())
    return digest


def read_index(path: Path, settings: dict, count: int, whole: bool = False) -> list[list[int]] | None:
    """[json offset, json size, latents offset, latents size, crc] of each of ``count`` samples; None: no shard yet.

    Args:
        whole: also reads the tar and compares its digest.

    Raises:
        AlteredShard: it is not as it was written. InputError: it holds other samples.
    """
    try:
        index = json.loads(storage.read_small(index_path(path)))
        rows, size = index["samples"], index["bytes"]
        if index["self"] != _self_digest(index):
            raise _altered(index_path(path), "its own digest differs")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _altered(index_path(path), f"{type(error).__name__} {error}") from error
    if index["settings"] != settings_digest(settings):
        raise InputError(f"prepare: {path} must hold samples of {path.parent / SETTINGS}, got other settings")
    if len(rows) != count:
        raise _altered(path, f"it has {len(rows)} samples of {count}")
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise _altered(path, f"it has {found} bytes of {size}")
    if whole:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != index["sha256"]:
                raise _altered(path, "its digest differs")
    return rows


class Shards:
    """Samples 0 .. len - 1 of a folder, in any order, a pread each.

    Args:
        folder: of finished shards.

    Raises:
        InputError: a shard is missing or not as it was written.
    """

    def __init__(self, folder: str | Path):
        self._files: OrderedDict[int, int] = OrderedDict()  # shard to open file, the least recent first
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        self._count, self._size = self.settings["num_samples"], self.settings["shard_size"]
        self._rows = torch.empty(self._count, 5, dtype=torch.int64)  # as lists they would take six times as much
        for number in range(-(-self._count // self._size)):
            path, count = shard_path(self.folder, number), _count(self.settings, number)
            found = read_index(path, self.settings, count)
            if found is None:
                raise InputError(f"prepare: {self.folder} must hold {self._count} samples, got no {path.name}")
            self._rows[number * self._size :][:count] = torch.tensor(found)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        """Raises InputError where the sample's bytes are not those that were written."""
        number, path = index // self._size, shard_path(self.folder, index // self._size)
        start, json_size, latents_at, latents_size, crc = self._rows[index].tolist()
        data = os.pread(self._file(number), latents_at + latents_size - start, start)
        about, latents = data[:json_size], data[latents_at - start :]
        if zlib.crc32(latents, zlib.crc32(about)) != crc:
            raise _altered(path, f"sample {index} differs")
        values = json.loads(about)
        return Sample(values["index"], values["prompt"], values["noise_seed"], parse_safetensors(latents)["latents"])

    def _file(self, number: int) -> int:
        handle = self._files.pop(number, None)
        if handle is None:
            handle = os.open(shard_path(self.folder, number), os.O_RDONLY)
        self._files[number] = handle
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return handle

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self):
        self.close()


def sweep(folder: Path, everyone: bool = False) -> None:
    """Removes what killed writers left: of this machine, and of others where the shard was finished by somebody else.

    Args:
        everyone: all that writers of other machines left, for who knows that none of them is at work.
    """
    storage.sweep(folder, lambda orphan, name: everyone or _is_abandoned(orphan, name))


def _is_abandoned(orphan: Path, name: str) -> bool:
    """Whether nobody writes ``name`` any more, as it is there, and was not touched for long."""
    try:
        settings, finished = read_settings(orphan.parent), name == SETTINGS
        if number := re.fullmatch(r"shard-(\d+)\.(?:tar|json)", name):
            path, count = orphan.parent / f"{Path(name).stem}.tar", _count(settings, int(number[1]))
            finished = read_index(path, settings, count) is not None
        return finished and time.time() - orphan.stat().st_mtime > _ABANDONED
    except (InputError, OSError):  # altered, or swept by another one meanwhile
        return False


def _count(settings: dict, number: int) -> int:
    """Samples of that shard."""
    return min(settings["shard_size"], settings["num_samples"] - number * settings["shard_size"])


def _encode(samples: list[Sample]) -> tuple[bytes, list[list[int]]]:
    """(tar, rows of its index); nothing of the moment, the machine or the user is in it."""
    stream, rows = io.BytesIO(), []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            about = {"index": sample.index, "prompt": sample.prompt, "noise_seed": sample.noise_seed}
            latents = sample.latents.to("cpu", torch.bfloat16).contiguous()
            files = {"json": json.dumps(about).encode(), "safetensors": to_bytes({"latents": latents})}
            row, crc = [], 0
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{sample.index:09d}.{ending}")
                info.size, info.mode = len(content), 0o644
                row += [tar.offset + _HEADER, len(content)]
                tar.addfile(info, io.BytesIO(content))
                crc = zlib.crc32(content, crc)
            rows.append([*row, crc])
    return stream.getvalue(), rows


def _self_digest(index: dict) -> str:
    """Of everything in an index but this digest."""
    rest = {key: value for key, value in index.items() if key != "self"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """The file appears whole or not at all, and stays when this returns."""
    staged = storage.temporary(path)
    try:
        with _writable(path.parent, len(data)):
            with open(staged, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
            storage.sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # of a disk that can only be read, which was said already
            staged.unlink(missing_ok=True)


@contextlib.contextmanager
def _writable(folder: Path, size: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        room = f" with {size:,} bytes free" if size else ""
        reason = error.strerror or error
        raise StorageError(f"prepare: {folder} must be writable{room}, got {reason}") from error


def _altered(path: Path, what: str) -> AlteredShard:
    return AlteredShard(f"prepare: {path} must be as it was written, but {what} (prepare --verify draws it again)")

"""Weights on disk: safetensors files mapped into memory, checked, and put into models one tensor at a time.

``writing.py`` writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .. import storage
from ..errors import InputError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
STORED = {  # safetensors' names of types
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CONVERT = "convert it: python -m nitrofusion.evaluate.weights convert FILE FILE.safetensors"
_LARGEST_HEADER = 4 << 20  # bytes, parsed in half a second; SDXL's is 0.3 MB, and trainers add some of their own
_MOST_TENSORS = 10_000  # a full SDXL checkpoint has 2,515, a LoRA for all its layers 6,500
_MOST_SIDES = 8  # of a tensor; a convolution over time has 5
_MOST_NUMBERS = 1 << 40  # in a tensor, its empty sides counted as 1: what torch computes from them must not overflow
_RELEASE = 256 << 20  # bytes of converted tensors after which the mapped pages are given back


class Weights(dict):
    """The tensors of one or several files by name; nothing is read from disk before a tensor is used.

    The mapping is private: writing to a tensor never reaches the file.

    Args:
        files: safetensors files; a pickle only where ``allow_pickle`` says so, and then with ``weights_only``.
        what: begins the messages.

    Attributes:
        where: the file, or the folder of several, for messages.
        origin: ``origin_of`` each file.
        metadata: of the safetensors headers.

    Raises:
        InputError: a file is missing, truncated, no safetensors file, or a pickle.
    """

    def __init__(self, files: Path | Iterable[Path], allow_pickle: bool = False, what: str = "load"):
        super().__init__()
        files = [files] if isinstance(files, Path) else list(files)
        self.where = files[0] if len(files) == 1 else files[0].parent
        self.origin: tuple = ()
        self.metadata: dict[str, str] = {}
        self._maps: list[mmap.mmap] = []
        for file in files:
            self.update(_unpickle(file, allow_pickle, what) if file.suffix in PICKLES else self._map(file, what))
            self.origin += (origin_of(file),)

    def _map(self, file: Path, what: str) -> dict[str, torch.Tensor]:
        try:
            storage.check_is_file(file)
            with open(file, "rb") as stream:
                size = header_size(stream.read(9), file.stat().st_size)
                with safe_open(file, "pt") as checked:  # that header and size belong together
                    if (count := len(checked.keys())) > _MOST_TENSORS:
                        raise ValueError(f"{count:,} tensors, more than {_MOST_TENSORS:,}")
                    self.metadata |= checked.metadata() or {}
                stream.seek(8)
                header = json.loads(stream.read(size))
                header.pop("__metadata__", None)
                _check_shapes(header)
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise InputError(f"{what}: {file} must be a readable safetensors file, got {error}") from error
        self._maps.append(mapped)
        tensors = {}
        for name, entry in header.items():
            dtype, shape = STORED.get(entry["dtype"]), entry["shape"]
            if dtype is None:
                raise InputError(f"{what}: {file} must hold numbers torch knows, got {entry['dtype']} in {short(name)}")
            count = torch.Size(shape).numel()
            begin = 8 + size + entry["data_offsets"][0]
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin) if count else torch.empty(0)
            tensors[name] = flat.view(shape) if count else flat.to(dtype).reshape(shape)
        return tensors

    def release(self) -> None:
        """Takes the pages read so far out of this process's memory; they are read again when used again."""
        for mapped in self._maps:
            if hasattr(mapped, "madvise"):  # not on Windows
                mapped.madvise(mmap.MADV_DONTNEED)


def _check_shapes(header: dict) -> None:
    for name, entry in header.items():
        shape = entry["shape"]
        if len(shape) > _MOST_SIDES:
            raise ValueError(f"{len(shape):,} sides of {short(name)}, more than {_MOST_SIDES}")
        if math.prod(max(1, side) for side in shape) > _MOST_NUMBERS:
            raise ValueError(f"the shape {short(shape)} of {short(name)}")


def short(text) -> str:
    """A stranger's words or numbers as a message shows them."""
    text = str(text)
    return text if len(text) <= 60 else f"{text[:60]}..."


def header_size(start: bytes, file_size: int) -> int:
    """Of a safetensors file whose first 9 bytes are these; refused before a parser takes many times that size."""
    size = int.from_bytes(start[:8], "little")
    # The length of a header may begin with the very bytes that a pickle does: 640 is b"\x80\x02".
    begun = start[8:9] == b"{" and size <= min(_LARGEST_HEADER, file_size - 8)
    if not begun and (start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")):
        raise ValueError(f"a pickle, which can run code ({CONVERT})")
    if size > _LARGEST_HEADER:
        raise ValueError(f"a header of {size:,} bytes, more than {_LARGEST_HEADER:,}")
    return size


def origin_of(file: Path) -> tuple:
    """Path, time and size of a file: where two are equal, so is what they hold."""
    status = file.stat()
    return file.resolve(), status.st_mtime_ns, status.st_size


def digest(files: Iterable[Path]) -> str:
    """SHA-256, in hex, of what the files hold, one after the other; of the same files it is computed once."""
    files = list(files)
    for file in files:
        if not file.is_file():
            raise InputError(f"model: {file} must be a file, got {'something else' if file.exists() else 'nothing'}")
    return _digest_once(tuple(origin_of(file) for file in files))


@lru_cache(maxsize=16)
def _digest_once(origins: tuple[tuple, ...]) -> str:
    total = hashlib.sha256()
    for path, _, _ in origins:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()


def _unpickle(file: Path, allowed: bool, what: str) -> dict[str, torch.Tensor]:
    if not allowed:
        raise InputError(
            f"{what}: {file} must be a safetensors file, got a pickle, which can run code ({CONVERT}; or, if "
            "you trust its source, say allow_pickle=True or --allow_pickle, which reads tensors only)"
        )
    return read_pickle(file, what, mmap=True)


def read_pickle(file: Path, what: str, mmap: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a pickle that somebody vouched for, of a training checkpoint its state_dict; nothing else is read.

    Args:
        mmap: leaves them on the disk; files from before torch 1.6 cannot be.
    """
    try:
        storage.check_is_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises RuntimeError, pickle's, zip's and the system's types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{what}: {file} must be a pickle of tensors only, got {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{what}: {file} must be a dictionary of tensors, got {type(state).__name__}")
    return state


def weight_files(folder: Path, stem: str | None = None) -> list[Path]:
    """The safetensors files of one model in ``folder``: a single file, its fp16 variant, or the shards of an index.

    Args:
        stem: ``diffusion_pytorch_model`` or ``model``; None tries both.

    Raises:
        InputError: there are none, a shard is missing, or the index is no index.
    """
    stems = (stem,) if stem else ("diffusion_pytorch_model", "model")
    for name in stems:
        for variant in ("", ".fp16"):
            if (single := folder / f"{name}{variant}.safetensors").is_file():
                return [single]
            for index in (
                folder / f"{name}.safetensors.index{variant}.json",
                folder / f"{name}{variant}.safetensors.index.json",
            ):
                if index.is_file():
                    return _shards(index)
    pickles = sorted(file for suffix in PICKLES for file in folder.glob(f"*{suffix}"))
    got = f"the pickle {pickles[0].name} ({CONVERT})" if pickles else "none"
    raise InputError(f"load: {folder} must hold safetensors weights, got {got}")


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise InputError(f"load: {index} must map tensors to safetensors files beside it, got {names[:1] or shards!r}")
    for name in names:
        if not (index.parent / name).is_file():
            raise InputError(f"load: {index.parent / name} must be there, one of {len(names)} shards, got nothing")
    return [index.parent / name for name in names]


def read_json(path: Path, what: str = "model") -> dict:
    """A JSON object, or InputError that begins with ``what``."""
    try:
        values = json.loads(storage.read_small(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what}: {path} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{what}: {path} must be a JSON object, got {type(values).__name__}")
    return values


def check(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], where: str | Path, what: str) -> None:
    """Raises InputError unless names and shapes are those of ``module``; reads no weight."""
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = [k for k in expected if k in tensors and expected[k].shape != tensors[k].shape]
    if not (missing or extra or wrong):
        return
    first = (wrong or missing or extra)[0]
    shapes = f", {short(list(tensors[first].shape))} instead of {list(expected[first].shape)}" if wrong else ""
    raise InputError(
        f"load: {where} must hold this {what}'s {len(expected)} tensors, got {len(missing)} missing, {len(extra)} "
        f"unknown, {len(wrong)} of another shape (first: {short(first)}{shapes})"
    )


def fill_(
    module: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    where: str | Path,
    device: torch.device | str,
    dtype: torch.dtype,
    edit: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    release: Callable[[], None] = lambda: None,
) -> torch.nn.Module:
    """Gives a module on the meta device its weights.

    A tensor that already has the device and dtype stays mapped; the others are converted one by one, so memory holds
    the result and one tensor. Each is looked at once for NaN and infinity (``aminmax``, which runs at memory speed).

    Args:
        edit: called with each name and stored tensor; what it returns is used instead.
        release: gives back pages of the file that were read.

    Raises:
        InputError: a weight is NaN or infinite.
    """
    state, passed = {}, 0
    for name in module.state_dict():
        tensor = tensors[name]
        tensor = (tensor if edit is None else edit(name, tensor)).to(device, dtype)
        if not is_finite(tensor):
            raise InputError(f"load: {where} must hold finite weights, got NaN or infinity in {name} (fetch it again)")
        state[name] = tensor
        passed += tensor.numel() * tensor.element_size()
        if passed > _RELEASE:
            release()
            passed = 0
    release()
    module.load_state_dict(state, assign=True)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:  # not stored: the text encoders' position_ids are the only ones
            owner, _, leaf = name.rpartition(".")
            assert leaf == "position_ids", name
            values = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape).clone()
            module.get_submodule(owner).register_buffer(leaf, values, persistent=False)
    return module.requires_grad_(False).eval()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinity, in one pass at memory speed."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))

"""The published weight files that metrics need: where from, their digests, and how they are read.

Nothing is fetched: a folder holds what a person put there. A published pickle is read only if its SHA-256 is the one
its authors' file is known by, and then as tensors only; anything else must be safetensors with the same names in it,
which cannot run code. ``python -m nitrofusion.evaluate.weights convert SOURCE TARGET`` makes one.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ..errors import InputError
from ..models.weights import PICKLES, Weights, read_pickle, weight_files


@dataclass(frozen=True)
class WeightFile:
    """A published file, or a folder of files.

    Attributes:
        name: in ``WEIGHTS``.
        file: where it lies in the weights folder; a name without a suffix is a folder.
        url: where it is from.
        sha256: of the published file; None where no digest is known to us.
        bytes: its size, where known.
        note: what needs it, and what else there is to say.
    """

    name: str
    file: str
    url: str
    sha256: str | None
    bytes: int | None
    note: str

    @property
    def is_folder(self) -> bool:
        return not Path(self.file).suffix


_HUB = "https://huggingface.co"
_CLIP_FILES = "config.json, preprocessor_config.json, tokenizer.json or vocab.json with merges.txt, and the weights"

WEIGHTS = {
    weight.name: weight
    for weight in (
        WeightFile(
            "inception",
            "pt_inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            95_628_359,
            "fid, kid, precision, recall, patch_fid; torch-fidelity's weights-inception file is the same",
        ),
        WeightFile(
            "clip-vit-base-patch32",
            "clip-vit-base-patch32",
            f"{_HUB}/openai/clip-vit-base-patch32",
            None,
            None,
            f"clip_score; {_CLIP_FILES} (model.safetensors, or the published pytorch_model.bin)",
        ),
        WeightFile(
            "clip-vit-large-patch14",
            "clip-vit-large-patch14",
            f"{_HUB}/openai/clip-vit-large-patch14",
            None,
            None,
            f"aesthetic; {_CLIP_FILES} (model.safetensors)",
        ),
        WeightFile(
            "aesthetic",
            "sac+logos+ava1-l14-linearMSE.pth",
            "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth",
            "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
            3_714_759,
            "aesthetic",
        ),
        WeightFile(
            "image-reward",
            "ImageReward.pt",
            f"{_HUB}/THUDM/ImageReward/resolve/main/ImageReward.pt",
            None,
            None,
            "image_reward; its digest is not known to us, so it is read as safetensors only (convert it)",
        ),
        WeightFile(
            "bert-vocabulary",
            "bert-base-uncased/vocab.txt",
            f"{_HUB}/google-bert/bert-base-uncased/resolve/main/vocab.txt",
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            231_508,
            "image_reward",
        ),
        WeightFile(
            "hpsv2",
            "HPS_v2.1_compressed.pt",
            f"{_HUB}/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt",
            None,
            None,
            "hpsv2; its digest is not known to us, so it is read as safetensors only (convert it)",
        ),
        WeightFile(
            "clip-tokenizer",
            "clip-vit-base-patch32/tokenizer.json",
            f"{_HUB}/openai/clip-vit-base-patch32/resolve/main/tokenizer.json",
            None,
            None,
            "hpsv2; every CLIP of OpenAI and LAION has this one",
        ),
    )
}
# What openai/clip-vit-base-patch32 publishes beside no safetensors.
_CLIP_PICKLES = {
    "clip-vit-base-patch32": ("a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f", 605_247_071)
}
_PICKLE = "pytorch_model.bin"
_FOLDER_SUFFIXES = (".json", ".txt", ".safetensors")


def locate(name: str, folder: Path, allow_unknown_digest: bool = False) -> Path:
    """Where the weights ``name`` lie in ``folder``, checked: the published file, or its safetensors form.

    Args:
        allow_unknown_digest: also takes a published pickle whose digest is not known to us. It is read as tensors
            only, but nobody has vouched for the numbers in it.

    Raises:
        InputError: nothing is there (the message says what to fetch from where), or something else than was published.
    """
    if name not in WEIGHTS:
        raise InputError(f"evaluate: weights must be one of {', '.join(WEIGHTS)}, got {name!r}")
    weight, path = WEIGHTS[name], Path(folder) / WEIGHTS[name].file
    if weight.is_folder:
        return _check_folder(weight, path)
    if not path.is_file():
        converted = path.with_suffix(".safetensors")
        if path.suffix in PICKLES and converted.is_file():
            return converted
        other = f" or as {converted.name}" if path.suffix in PICKLES else ""
        raise InputError(f"evaluate: {path} must be there{other}, got nothing (fetch {weight.url})")
    if weight.sha256 is not None:
        _check_digest(path, weight.sha256, weight.bytes, weight.url)
    elif path.suffix in PICKLES and not allow_unknown_digest:
        raise InputError(
            f"evaluate: {path} must be a safetensors file, got a pickle whose published digest is not known "
            f"(python -m nitrofusion.evaluate.weights convert {path} {path.with_suffix('.safetensors')})"
        )
    return path


def digest(path: Path) -> str:
    """SHA-256, in hex: of a file, or of the names and digests of a model folder's JSON, vocabulary and weight files."""
    path = Path(path)
    if not path.is_dir():
        return _file_digest(path)
    total = hashlib.sha256()
    for file in _folder_files(path):
        total.update(f"{file.name} {_file_digest(file)}\n".encode())
    return total.hexdigest()


def list_weights(folder: Path | None = None) -> str:
    """The table of all files: what for, where from, size, digest, and whether they are in ``folder``."""
    lines = []
    for weight in WEIGHTS.values():
        size = "size not recorded" if weight.bytes is None else f"{weight.bytes:,} bytes"
        kind = "a folder, its digest is recorded with each result" if weight.is_folder else "digest not known to us"
        lines += [f"{weight.name}: {_state(weight, folder)}", f"  file    {weight.file} ({size})"]
        lines += [f"  from    {weight.url}", f"  sha256  {weight.sha256 or kind}", f"  for     {weight.note}"]
    return "\n".join(lines)


def tensors(name: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of weights that ``locate`` found, by their published names; of a folder those of its model.

    Raises:
        InputError: the file is no such file, or a pickle with another digest than the published one.
    """
    if path.is_dir():
        pickled = not (path / "model.safetensors").is_file() and (path / _PICKLE).is_file()
        files = [path / _PICKLE] if pickled else weight_files(path, "model")
        pinned = _CLIP_PICKLES.get(name)
        if pickled and pinned is None:
            raise InputError(f"evaluate: {files[0]} must be a safetensors file, got a pickle")
    else:
        files, pinned = [path], (WEIGHTS[name].sha256, WEIGHTS[name].bytes)
    if files[0].suffix not in PICKLES:
        return Weights(files, what="evaluate")
    if pinned[0] is not None:
        _check_digest(files[0], *pinned, WEIGHTS[name].url)
    return read_pickle(files[0], "evaluate")


def convert(source: Path, target: Path) -> None:
    """Writes the tensors of a pickle as safetensors under the same names; of a training checkpoint its state_dict.

    The pickle is read with ``weights_only``. Its numbers are taken as they are: fetch it from where its authors put it.
    """
    from safetensors.torch import save_file

    source, target = Path(source), Path(target)
    if not source.is_file() or target.suffix != ".safetensors":
        raise InputError(f"evaluate: convert must be given a file and a .safetensors name, got {source} and {target}")
    save_file({name: value.clone().contiguous() for name, value in read_pickle(source, "evaluate").items()}, target)


def _check_folder(weight: WeightFile, path: Path) -> Path:
    fetch = f"(fetch {weight.url}: {_CLIP_FILES})"
    if not path.is_dir():
        raise InputError(f"evaluate: {path} must be a folder with {weight.name}, got nothing {fetch}")
    tokenizer = ["tokenizer.json"] if not (path / "vocab.json").is_file() else ["vocab.json", "merges.txt"]
    missing = [name for name in ("config.json", "preprocessor_config.json", *tokenizer) if not (path / name).is_file()]
    if missing:
        raise InputError(f"evaluate: {path} must hold {weight.name}, got no {missing[0]} {fetch}")
    if weight.name in _CLIP_PICKLES and (path / _PICKLE).is_file() and not (path / "model.safetensors").is_file():
        _check_digest(path / _PICKLE, *_CLIP_PICKLES[weight.name], weight.url)
    else:
        Weights(weight_files(path, "model"), what="evaluate")  # the headers say whether the files are whole
    return path


def _check_digest(path: Path, expected: str, size: int | None, url: str) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise InputError(f"evaluate: {path} must have the published {size:,} bytes, got {found:,} (fetch {url})")
    if (sha256 := _file_digest(path)) != expected:
        raise InputError(f"evaluate: {path} must have the published SHA-256 {expected}, got {sha256} (fetch {url})")


def _state(weight: WeightFile, folder: Path | None) -> str:
    if folder is None:
        return "no folder given"
    path = Path(folder) / weight.file
    try:
        found = locate(weight.name, folder)
    except InputError as error:
        return "missing" if not path.exists() else f"not usable: {error}"
    if found.suffix == ".safetensors":
        return f"present as {found.name}"
    return "present" if weight.sha256 is None else "present, as published"


def _folder_files(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in _FOLDER_SUFFIXES]
    if not any(file.suffix == ".safetensors" for file in files) and (folder / _PICKLE).is_file():
        files.append(folder / _PICKLE)
    return files


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _digest_once(str(path.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest_once(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "convert":
        raise SystemExit("usage: python -m nitrofusion.evaluate.weights convert SOURCE TARGET.safetensors")
    try:
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    except InputError as error:
        raise SystemExit(str(error)) from None

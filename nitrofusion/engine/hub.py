"""Files of the Hugging Face hub: the local cache first, the network where something is missing."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError
from ..models.weights import weight_files

_TEXTS = (".json", ".txt")


def is_hub_id(name: str) -> bool:
    return len(name) < 200 and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII) is not None


def fetch_file(name: str, repo: str, filename: str) -> Path:
    """One file of a repository; ``name`` is what the user asked for."""
    from huggingface_hub import hf_hub_download  # imported late: most models are local, and it takes a while

    return Path(_fetch(hf_hub_download, name, repo, f"{repo} {filename}", filename=filename))


def cached_folder(repo: str, parts: tuple[str, ...]) -> Path | None:
    """A repository's folder in the local cache, with the weights of ``parts``; None where they are not all there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
        for part in parts:
            weight_files(folder / part)
        return folder
    except (LocalEntryNotFoundError, InputError):
        return None


def fetch_folder(name: str, repo: str, parts: tuple[str, ...]) -> Path:
    """A repository's configurations and tokenizers, with the weights of ``parts`` (the folder's own for ``.``)."""
    from huggingface_hub import list_repo_files, snapshot_download

    if (folder := cached_folder(repo, parts)) is not None:
        return folder
    files = wanted(_fetch(list_repo_files, name, repo, repo), parts)
    return Path(_fetch(snapshot_download, name, repo, repo, allow_patterns=files))


def wanted(files: list[str], parts: tuple[str, ...]) -> list[str]:
    """Of a repository's files those that loading reads: no pickles, and one of several precisions."""
    chosen = [f for f in files if f.endswith(_TEXTS) and f.count("/") <= 1]
    for part in parts:
        prefix = "" if part == "." else f"{part}/"
        weights = [
            f for f in files if f.endswith(".safetensors") and f.startswith(prefix) and "/" not in f[len(prefix) :]
        ]
        weights = [f for f in weights if "non_ema" not in f and Path(f).name.startswith(("diffusion_pytorch", "model"))]
        half = [f for f in weights if ".fp16." in f]
        chosen += half or weights
    return chosen


def _fetch(get, name: str, repo: str, files: str, **options):
    try:
        return get(repo, **options)
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's types
        line = " ".join(str(error).split())
        raise InputError(
            f"model: {name} must be on the hub or in its cache as {repo}, got {line} "
            f"(fetch it with: hf download {files})"
        ) from error

"""The files that a loaded model's weights came from, while they are what they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError
from ..models.folder import PARTS
from .source import Source


class LoadedFiles:
    """The files of a source's weights as they were when they were loaded.

    A file that has been replaced since is refused where it would be read again: else pictures, and what is said of
    them, would be another model's.

    Args:
        before: of what was loaded until then; where only LoRAs differ, the model's own files are not read again.

    Attributes:
        parts: the files of each part, in order.
        loras: those of the LoRAs.
    """

    def __init__(self, source: Source, before: LoadedFiles | None = None):
        self._base = source.with_lora(None)
        if before is not None and before._base == self._base:
            self.parts = before.parts
            self._origins = {file: before._origins[file] for files in self.parts.values() for file in files}
        else:
            self.parts = {part: tuple(source.files(part)) for part in PARTS}
            self._origins = {file: _origin(file) for files in self.parts.values() for file in files}
        self.loras = tuple(file for file, _ in source.loras)
        self._origins |= {file: _origin(file) for file in self.loras}
        self._digests: dict[tuple[Path, ...], str] = {}

    def check(self, files: Iterable[Path] | None = None) -> None:
        """Raises InputError unless ``files``, by default all, are those that were loaded."""
        for file in self._origins if files is None else files:
            if (now := _origin(file)) != self._origins[file]:
                got = "nothing" if now is None else "a file that changed since"
                raise InputError(f"load: {file} must be what was loaded, got {got} (load the model again)")

    def digest(self, *files: Path) -> str:
        """First 12 hex digits of the SHA-256 of files, as ``cat files | sha256sum`` prints it; computed once.

        Raises:
            InputError: they are not what was loaded, and their digest was not asked for before.
        """
        if files not in self._digests:
            self.check(files)
            digest = hashlib.sha256()
            for path in files:
                with open(path, "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            self.check(files)  # nor replaced meanwhile
            self._digests[files] = digest.hexdigest()[:12]
        return self._digests[files]


def _origin(file: Path) -> tuple | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size

"""Prompt files: text, CSV, JSONL, Parquet."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from .errors import InputError

COLUMNS = ("prompt", "caption", "text", "TEXT")


def read_prompts(path: str | Path, column: str | None = None) -> list[str]:
    """Non-empty prompts of a .txt (one a line), .csv, .jsonl or .parquet file.

    Args:
        column: which column; None takes the first of prompt, caption, text, TEXT.

    Raises:
        InputError: the file cannot be read, has no such column, or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing"
        raise InputError(f"prompts: {path} must be a .txt, .csv, .jsonl or .parquet file, got {got}")
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"prompts: {path} must be a .txt, .csv, .jsonl or .parquet file, got {path.suffix or 'none'}")
    try:
        found = reader(path, column)
    except UnicodeDecodeError as error:
        raise InputError(f"prompts: {path} must be UTF-8 text, got byte {error.start}: {error.reason}") from error
    except OSError as error:
        raise InputError(f"prompts: {path} must be readable, got {error.strerror or error}") from error
    prompts = [text for text in (_text(path, value) for value in found if value is not None) if text]
    if not prompts:
        raise InputError(f"prompts: {path} must hold at least one prompt, got none")
    return prompts


def _text(path: Path, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"prompts: {path} must hold text, got {type(value).__name__} {str(value)[:40]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, and a tokenizer would fail on it much later
        raise InputError(f"prompts: {path} must hold valid Unicode, got {value[:40]!a}") from error
    return value.strip()


def _pick(path: Path, columns: list[str], column: str | None) -> str:
    for name in (column,) if column else COLUMNS:
        if name in columns:
            return name
    wanted = column or " or ".join(COLUMNS)
    raise InputError(f"prompts: {path} must have a column {wanted}, got {', '.join(columns) or 'none'}")


def _read_txt(path: Path, column: str | None) -> list[str]:
    with open(path, encoding="utf-8-sig") as file:  # str.splitlines would also split at U+2028 and U+0085
        return list(file)


def _read_csv(path: Path, column: str | None) -> list[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)  # strict: an open quote would swallow the rows after it
        try:
            name = _pick(path, list(rows.fieldnames or []), column)
            return [row[name] for row in rows]
        except csv.Error as error:
            raise InputError(f"prompts: {path} must be CSV, got {error} after line {rows.line_num}") from error


def _read_jsonl(path: Path, column: str | None) -> list[str]:
    found, name = [], column
    for number, line in enumerate(_read_txt(path, column), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"prompts: {path} must hold JSON lines, got line {number}: {error}") from error
        if isinstance(row, str):
            found.append(row)
            continue
        if not isinstance(row, dict):
            raise InputError(f"prompts: {path} must hold JSON objects, got line {number}: {type(row).__name__}")
        name = _pick(path, list(row), name)
        found.append(row[name])
    return found


def _read_parquet(path: Path, column: str | None) -> list[str]:
    try:
        import pyarrow.parquet as parquet
        from pyarrow.lib import ArrowException
    except ImportError as error:
        raise InputError(f"prompts: {path} must be read with pyarrow (pip install nitrofusion[train])") from error
    try:
        with parquet.ParquetFile(path) as file:  # read_table would add columns from folder names like a=b
            name = _pick(path, file.schema_arrow.names, column)
            return file.read(columns=[name]).column(name).to_pylist()
    except ArrowException as error:
        line = str(error).splitlines()[0]
        raise InputError(f"prompts: {path} must be a Parquet file, got {line}") from error

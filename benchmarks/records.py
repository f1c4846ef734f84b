"""What benchmarks are asked for and write, also when something ends them or one variant fails."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

_PACKAGES = ("diffusers", "transformers", "openvino", "xformers", "numpy")


def write(path: str | Path | None, record: dict) -> None:
    """Whole or not at all: whatever ends the process leaves the record of before. Nothing without a path."""
    if path:
        beside = Path(f"{path}.part")
        beside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(beside, path)


def read(path: str | Path) -> dict:
    """The record that more parts go into; a new one where there is no file."""
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} must be a benchmark's record, got {error}") from error
    if not isinstance(found, dict):
        raise SystemExit(f"{path} must be a benchmark's record, got {type(found).__name__}")
    return found


def output(text: str) -> Path:
    """Type of an option: a file that can be written, which is looked at before the work whose result it is to hold."""
    path = Path(text)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that can be written, got {text!r}")
    return path


def count(text: str) -> int:
    """Type of an option: an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def failure(error: Exception) -> str:
    """What a record says of a variant that failed."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None


def machine(threads: int) -> dict:
    """Where figures come from. How threads wait is part of it: PyTorch's many small regions depend on it."""
    import torch

    versions = {"torch": str(torch.__version__)}  # names its CUDA, which its metadata may not
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = [li for li in Path("/proc/cpuinfo").read_text().splitlines() if li.startswith(("model name", "flags"))]
        cpu = lines[0].split(":", 1)[1].strip()
        flags = lines[1].split() if len(lines) > 1 else []
        cpu += next((f" ({f})" for f in ("avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return {
        "cpu": cpu,
        "gpu": _gpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
    }

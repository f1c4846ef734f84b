"""Collects what the package ships: fp16 weights, digests, and the record of how they were made.

python -m nitrofusion.world.ship --world runs/world --start runs/world/start-{1,2} --student runs/world/student
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .. import checkpoint

WEIGHTS = Path(__file__).parent / "weights"
TOTAL_LIMIT, FILE_LIMIT = 40 << 20, 12 << 20


def ship(world: Path, starts: list[Path], student: Path, output: Path = WEIGHTS) -> dict:
    """Copies teacher, judge and features, halves the runs' averaged students, writes record.json; returns the record.

    Args:
        starts: the runs that led to the start, in order; the last is it.
    """
    output.mkdir(parents=True, exist_ok=True)
    for part in ("teacher", "features"):
        shutil.rmtree(output / part, ignore_errors=True)
        shutil.copytree(world / part, output / part)
    judge = {k: v.half().contiguous() for k, v in load_file(world / "judge.safetensors").items()}
    save_file(judge, output / "judge.safetensors")
    stages = {name: _history(world / name) for name in ("vae", "judge", "features_state", "teacher_state")}
    runs = {f"start {i}": run for i, run in enumerate(starts, 1)} | {"student": student}
    for name, run in runs.items():
        folder, _ = checkpoint.latest(run)
        parts, state = checkpoint.load(folder)
        if run in (starts[-1], student):
            file = output / f"{name.split()[0]}.safetensors"
            save_file({k: v.half().contiguous() for k, v in parts["ema"].items()}, file)
        config = json.loads((run / "config.json").read_text())
        paths = ("output", "cache", "teacher", "init")  # where it ran is nobody's business
        stages[name] = {"config": {k: v for k, v in config.items() if k not in paths}, "state": state}
    files = {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name != "record.json"
    }
    for path in output.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files only their owner can read
    sizes = [(output / name).stat().st_size for name in files]
    if sum(sizes) > TOTAL_LIMIT or max(sizes) > FILE_LIMIT:
        raise SystemExit(f"ship: weights must be <= 40 MB in all and 12 MB a file, got {sum(sizes)} and {max(sizes)}")
    record = {"torch": torch.__version__.split("+")[0], "stages": stages, "files": files}
    (output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _history(folder: Path) -> dict:
    read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]  # noqa: E731
    return {"last": read("log.jsonl")[-1], "evaluations": read("eval.jsonl")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("world", "start", "student"):
        parser.add_argument(f"--{name}", type=Path, required=True, nargs="+" if name == "start" else None)
    args = parser.parse_args()
    for file, digest in ship(args.world, args.start, args.student)["files"].items():
        print(digest[:12], file)

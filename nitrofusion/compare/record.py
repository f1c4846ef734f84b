"""The record of a comparison: rows of numbers, the protocol that made them, and what failed."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import __version__
from ..config import TrainConfig
from ..doctor import cpu_name
from ..errors import InputError
from ..evaluate.world import JUDGE, judge_digest, load_judge
from ..presets import resolve_folder, resolve_unet
from . import runs
from .worker import read_result

TOLERANCE = 0.15  # of the median training time; a run further off is flagged
_COPIED = (
    "accuracy", "accuracy_interval", "frechet", "frechet_interval", "sharpness", "sharpness_interval", "diversity",
    "diversity_interval", "grain_rate", "grain_rate_interval", "structure_rate", "structure_rate_interval",
    "per_attribute", "seconds_per_image",
)  # fmt: skip
_REAL = ("accuracy_real", "frechet_floor", "sharpness_real", "structure_rate_real")


def collect(folder: Path, settings: dict, plan: dict, planned: dict[tuple[str, int], TrainConfig]) -> dict:
    """{rows, protocol, errors} from the result files; the caller knows the errors.

    Args:
        planned: (run, seed) to its configuration.

    Returns:
        rows: of each run and seed one per number of inference steps; those of teacher and start, which were not trained
            here, are of the prompts that the runs of that seed drew.
    """
    seeds = sorted({seed for _, seed in planned})
    rows, real = [], {name: [] for name in _REAL}
    for name in runs.REFERENCES:
        for seed in seeds:
            rows += _rows(folder, name, seed, real)
    median = _median_seconds(folder, planned)
    for run, seed in planned:
        for row in _rows(folder, run, seed, real):
            row["seconds_off"] = round(row["seconds"] / median - 1, 4)
            rows.append(row)
    means = {name: statistics.fmean(values) for name, values in real.items() if values}
    return {"rows": rows, "protocol": _protocol(folder, settings, plan, planned) | means, "errors": []}


def add_errors(result: dict, errors: dict[str, str], planned, probes: dict[str, str]) -> None:
    """Puts failed jobs into ``result["errors"]``, and those of a run into its rows as {run, seed, error}.

    Args:
        errors: job to reason. planned: (run, seed) of all runs. probes: job to run, of probes that failed; such a run
            is lost with every seed.
    """
    for job, error in errors.items():
        keys = [(run, seed) for run, seed in planned if job == f"{run}-{seed}"]
        if job in probes:
            keys = [(probes[job], seed) for seed in sorted({seed for _, seed in planned})]
        lost = [{"run": run, "seed": seed, "error": error} for run, seed in keys]
        result["rows"] += lost
        result["errors"] += lost or [{"run": job, "seed": None, "error": error}]


def _rows(folder: Path, run: str, seed: int, real: dict[str, list[float]]) -> list[dict]:
    """The rows of one result file, none where there is no such file; ``real`` learns what real pictures score."""
    path = folder / "results" / f"{run}-{seed}.json"
    result = read_result(path)
    if result is None:
        return []
    about = {k: v for k, v in result.items() if k != "rows"}
    rows = []
    for row in result["rows"]:
        for name in _REAL:
            real[name].append(row[name])
        copied = {name: row[name] for name in _COPIED}
        rows.append({"run": run, "seed": seed, "steps": row["num_inference_steps"], **copied, **about})
    return rows


def _median_seconds(folder: Path, planned) -> float:
    results = [folder / "results" / f"{run}-{seed}.json" for run, seed in planned]
    seconds = [result["seconds"] for path in results if (result := read_result(path))]
    return statistics.median(seconds) if seconds else 1.0


def _protocol(folder: Path, settings: dict, plan: dict, planned: dict[tuple[str, int], TrainConfig]) -> dict:
    parts = map(read_result, (folder / "samples").glob("seed-*-part-*.json"))
    drawn = [part for part in parts if part]
    config = next(iter(planned.values()), None)
    models = {}
    if config is not None:
        teacher = Path(config.teacher_unet or Path(resolve_folder(config.teacher)) / "unet")
        models = {
            "teacher_sha256": runs.digest_of(teacher),
            "start_sha256": runs.digest_of(Path(resolve_unet(config.init))),
            "teacher_steps": config.teacher_steps,
            "guidance_scale": config.guidance_scale,
        }
    return {
        **settings,
        "seconds_budget": 60 * settings["minutes"],
        "tolerance": TOLERANCE,
        "control": runs.CONTROL,
        "seeds": sorted({seed for _, seed in planned}),
        "plan": plan["runs"],
        "num_teacher_samples": plan["num_teacher_samples"],
        "teacher_sample_seconds": round(sum(part["seconds"] for part in drawn), 1),
        "teacher_samples_drawn": sum(part["images"] for part in drawn),
        **models,
        "judge_sha256": runs.digest_of(JUDGE),
        "judge_digest": judge_digest(load_judge()),
        "threads_per_run": 1,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "version": __version__,
    }


def pictures(folder: Path, names, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Run to number of steps to pictures [16, 3, 32, 32] of the report's prompts; runs without any are left out."""
    found = {}
    for name in (*runs.REFERENCES, *names):
        path = folder / "results" / f"{name}-{seed}.safetensors"
        if path.exists():
            try:
                found[name] = load_file(path)
            except SafetensorError as error:
                again = f"remove {path.with_suffix('.json').name} beside it and compare again"
                raise InputError(f"compare: {path} must be a safetensors file, got {error}; {again}") from error
    return found

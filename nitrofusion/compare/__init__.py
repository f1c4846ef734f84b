"""Recipes and ablations against each other on the embedded world: same start, same samples, equal wall-clock.

>>> compare("runs/compare", recipes=("nitrofusion", "regression"), seeds=3, minutes=5)

Everything lies in one folder: ``plan.json`` (seconds per step and steps of each run), ``samples/`` (one teacher cache
per seed, read by all runs of that seed), ``runs/``, ``results/``, ``logs/``, and at the end ``compare-world.json`` and
``report.html``. What is there is kept, so the same call resumes; more recipes, runs or seeds extend it.
Record and page are of the recipes and seeds that the last call named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import IO

from ..config import TrainConfig
from ..errors import InputError, StorageError, TrainingError
from ..models.weights import read_json
from ..options import check_output
from ..presets import resolve_unet
from ..report.page import finite
from ..report.pictures import write_atomic
from ..storage import hold_alone
from . import plan as planning
from . import record, runs
from .jobs import Job, run_jobs
from .worker import read_log, read_result

__all__ = ["compare"]

SUITES = ("world",)
EVALUATION_SEED = 777  # of prompts and noises that nothing else was ever measured on
_FIRST_SEED = 100  # of training: others than those the start was fitted to
_PROBE_SAMPLES = 64
_SHARD = 256  # teacher samples are drawn by whole shards


def compare(
    output: str | Path = "runs/compare",
    suite: str = "world",
    recipes: tuple[str, ...] = ("all",),
    seeds: int = 3,
    minutes: float = 5.0,
    num_images: int = 2000,
    jobs: int | None = None,
    steps: tuple[int, ...] = (1, 2, 4),
    evaluation_seed: int = EVALUATION_SEED,
    start: str | None = None,
    json_path: str | Path | None = None,
) -> Path:
    """Trains every run with every seed for the same time, evaluates all on the same fresh prompts, writes a report.

    Every training seed has prompts and noises of its own, on which teacher and start are measured too: differences
    paired by seed then spread by what was drawn as well as by what was learned.

    Each run is a process of one thread. Its seconds per step are measured by a probe that runs alone; the plan turns
    them into optimizer steps, and the schedules follow those. Drawing teacher samples counts for no run.

    Args:
        output: folder of everything; the same call resumes.
        suite: of evaluation; ``world``.
        recipes: names of ``runs.configs()``, ablations included, or ``all``.
        seeds: training seeds of each run.
        minutes: training time of each run and seed.
        num_images: pictures of each evaluation.
        jobs: processes side by side; None is the number of cores.
        steps: numbers of inference steps to evaluate at, in 1..4.
        evaluation_seed: of the prompts and noises of the first training seed; the next has the next.
        start: what all runs begin from, in place of the presets' own: a student's preset, UNet file or run folder.
        json_path: also writes the record here.

    Returns:
        ``output/report.html``; ``compare-world.json`` beside it holds the numbers.

    Raises:
        InputError, StorageError: before any work. TrainingError: at the end, if a run failed; all others are in the
            report, and the same call tries the failed ones again.
    """
    folder, cores = Path(output), os.cpu_count() or 1
    jobs = cores if jobs is None else jobs
    chosen = _check(suite, recipes, seeds, minutes, num_images, jobs, steps, evaluation_seed)
    if json_path is not None:
        check_output("compare", Path(json_path))
    start = None if start is None else str(start)
    if start is not None:
        chosen = {name: _started(config, start) for name, config in chosen.items()}
    settings = {
        "suite": suite,
        "minutes": float(minutes),
        "num_images": num_images,
        "steps": list(steps),
        "evaluation_seed": evaluation_seed,
        "start": start,
    }
    if start is not None:  # the file may be another one when the call is made again
        settings["start_sha256"] = runs.digest_of(Path(resolve_unet(start)))
    with _claim(folder, settings) or contextlib.nullcontext():
        budget = 60 * minutes
        errors = run_jobs([_probe(folder, name, config) for name, config in chosen.items()], folder, 1, "probes")
        failed = [name for name in chosen if f"probe-{name}" in errors]
        planned = _plan(folder, settings, {name: chosen[name] for name in chosen if name not in failed}, budget)
        seed_numbers = [_FIRST_SEED + k for k in range(seeds)]
        planned_runs = {
            (name, seed): _run_config(folder, name, chosen[name], seed, planned)
            for seed in seed_numbers
            for name in planned["runs"]
            if name in chosen
        }
        errors |= run_jobs(_sample_jobs(folder, planned_runs, jobs), folder, jobs, "teacher samples")
        measured = [_measure(folder, key, config, planned, settings) for key, config in planned_runs.items()]
        errors |= run_jobs([*_references(folder, settings, chosen, seed_numbers), *measured], folder, jobs, "runs")
        result = record.collect(folder, settings, planned, planned_runs)
        record.add_errors(result, errors, planned_runs, {f"probe-{name}": name for name in failed})
        result = finite(result)
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        for path in [folder / "compare-world.json", *([Path(json_path)] if json_path else [])]:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
        from ..report.compare import write_comparison

        logs = {name: _log(folder, name, seed_numbers[0]) for name in chosen}
        report = write_comparison(folder, result, record.pictures(folder, chosen, seed_numbers[0]), logs)
        if errors:
            name, error = next(iter(errors.items()))
            raise TrainingError(
                f"compare: all jobs must end well, got {len(errors)} that failed, first {name} ({error}); the others "
                f"are in {report}; the same command tries again"
            )
        return report


def _check(suite, recipes, seeds, minutes, num_images, jobs, steps, evaluation_seed) -> dict[str, TrainConfig]:
    """The chosen runs, or InputError."""
    from ..evaluate.world import check_sample

    def expect(ok: bool, name: str, wanted: str, got) -> None:
        if not ok:
            raise InputError(f"compare: {name} must be {wanted}, got {got!r}")

    whole = lambda value: isinstance(value, int) and not isinstance(value, bool)  # noqa: E731
    listed = lambda value: isinstance(value, (list, tuple))  # noqa: E731
    expect(suite in SUITES, "suite", f"one of {', '.join(SUITES)}", suite)
    expect(listed(recipes) and all(isinstance(name, str) for name in recipes), "recipes", "a list of names", recipes)
    expect(whole(seeds) and 1 <= seeds <= 1000, "seeds", "in 1..1000", seeds)
    expect(isinstance(minutes, (int, float)) and 0 < minutes <= 10_000, "minutes", "above 0 and at most 10000", minutes)
    expect(whole(jobs) and jobs >= 1, "jobs", ">= 1", jobs)
    fits = listed(steps) and bool(steps) and all(whole(n) and 1 <= n <= 4 for n in steps)
    told = list(steps) if listed(steps) else steps
    expect(fits and len(set(steps)) == len(steps), "steps", "different numbers in 1..4", told)
    check_sample(num_images, evaluation_seed)
    check_sample(num_images, evaluation_seed + seeds - 1)
    return runs.select(tuple(recipes))


def _started(config: TrainConfig, start: str) -> TrainConfig:
    """The run from there, or InputError where that is no student of its teacher's form."""
    from ..engine.source import find
    from ..train.plan import check_teacher, check_unet_file

    check_unet_file("start", check_teacher(config)[1], resolve_unet(start))
    if (shift := find(start).shifted_timestep) != config.shifted_timestep:
        wanted = f"a student of shifted_timestep {config.shifted_timestep}"
        raise InputError(f"compare: start must be {wanted}, got {start} of {shift or 'none'}")
    return dataclasses.replace(config, init=start)


def _claim(folder: Path, settings: dict) -> IO | None:
    """Creates the folder or accepts the one of a comparison with these settings; what keeps others out of it."""
    path = folder / "plan.json"
    if path.exists():
        found = _read_plan(folder)["settings"]
        for name, wanted in settings.items():
            if found.get(name) != wanted:
                raise InputError(
                    f"compare: output must be a new folder or this comparison's own, got {folder} with {name} "
                    f"{found.get(name)!r} instead of {wanted!r}"
                )
        return hold_alone(folder, "compare")
    if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
        raise InputError(f"compare: output must be a new folder or a comparison's own, got {folder} with other files")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_plan(folder, {"settings": settings, "num_teacher_samples": None, "runs": {}})
    except OSError as error:
        raise StorageError(f"compare: {folder} must be a folder that can be written, got {error.strerror}") from error
    return hold_alone(folder, "compare")


def _read_plan(folder: Path) -> dict:
    plan = read_json(folder / "plan.json", "compare")
    plan = {"num_teacher_samples": None, "runs": {}} | plan
    if not all(isinstance(plan.get(name), dict) for name in ("settings", "runs")):
        raise InputError(f"compare: {folder / 'plan.json'} must be a comparison's plan, got other JSON")
    return plan


def _write_plan(folder: Path, plan: dict) -> None:
    write_atomic(folder / "plan.json", (json.dumps(plan, indent=1) + "\n").encode())


def _probe(folder: Path, name: str, config: TrainConfig) -> Job:
    cache = {"cache": str(folder / "samples" / "probes"), "num_teacher_samples": _PROBE_SAMPLES}
    probe = dataclasses.replace(
        planning.probe_config(config), **cache, seed=_FIRST_SEED, output=str(folder / "probes" / name)
    )
    result = folder / "probes" / f"{name}.json"
    return Job(f"probe-{name}", {"kind": "probe", "config": probe.to_json(), "result": str(result)}, seconds=30)


def _plan(folder: Path, settings: dict, chosen: dict[str, TrainConfig], budget: float) -> dict:
    """The plan with every probed run in it; what it already says stays."""
    plan = _read_plan(folder)
    for name, config in chosen.items():
        if name not in plan["runs"]:
            rates = json.loads((folder / "probes" / f"{name}.json").read_text())["rates"]
            steps = planning.steps_within(config, rates, budget)
            seconds = planning.seconds(planning.scaled(config, steps), rates)
            plan["runs"][name] = {"steps": steps, "seconds": round(seconds, 3), "rates": rates}
    if plan["num_teacher_samples"] is None and plan["runs"]:
        # No more than the longest run reads once, and no more than the presets say.
        read = max(plan["runs"][name]["steps"] * config.images_per_step for name, config in chosen.items())
        most = max(config.num_teacher_samples for config in chosen.values())
        plan["num_teacher_samples"] = min(most, -(-read // _SHARD) * _SHARD)
    _write_plan(folder, plan)
    return plan


def _run_config(folder: Path, name: str, config: TrainConfig, seed: int, plan: dict) -> TrainConfig:
    return dataclasses.replace(
        planning.scaled(config, plan["runs"][name]["steps"]),
        seed=seed,
        output=str(folder / "runs" / f"{name}-{seed}"),
        cache=str(folder / "samples" / f"seed-{seed}"),
        num_teacher_samples=plan["num_teacher_samples"],
    )


def _sample_jobs(folder: Path, planned_runs: dict, parallel: int) -> list[Job]:
    """One cache per seed, each drawn in as many parts as it has shards, up to the processes there are."""
    cached = {seed: c for (_, seed), c in planned_runs.items() if c.teacher_samples == "cache"}
    jobs = []
    for seed, config in cached.items():
        parts = min(parallel, -(-config.num_teacher_samples // _SHARD))
        known = sorted((folder / "samples").glob(f"seed-{seed}-part-*-of-*.json"))
        if known:  # of an earlier call, perhaps with another number of jobs
            parts = int(known[0].stem.rpartition("-")[2])
        for part in range(parts):
            result = folder / "samples" / f"seed-{seed}-part-{part}-of-{parts}.json"
            spec = {"kind": "samples", "config": config.to_json(), "part": [part, parts], "result": str(result)}
            seconds = 0.1 * config.num_teacher_samples / parts
            jobs.append(Job(f"samples-{seed}-{part}-of-{parts}", spec, seconds))
    return jobs


def _measure(folder: Path, key: tuple[str, int], config: TrainConfig, plan: dict, settings: dict) -> Job:
    name = f"{key[0]}-{key[1]}"
    known = folder / "results" / f"{name}.json"
    if (result := read_result(known)) and (found := str(result.get("config_digest"))) != runs.digest(config):
        raise InputError(
            f"compare: {known} must be of this configuration ({runs.digest(config)[:12]}), got one of {found[:12]}: "
            f"remove it and {config.output}, or take a new output"
        )
    spec = _measure_spec(folder, *key, settings, config=config.to_json(), steps=settings["steps"])
    trained = functools.partial(_trained, Path(config.output))
    return Job(name, spec, plan["runs"][key[0]]["seconds"] + _evaluation_seconds(settings), trained)


def _references(folder: Path, settings: dict, chosen: dict[str, TrainConfig], seeds: list[int]) -> list[Job]:
    """The teacher at its own steps and the start at each, untrained, on the prompts of every seed."""
    config = next(iter(chosen.values()))
    models = {"teacher": (config.teacher, [config.teacher_steps]), "start": (config.init, settings["steps"])}
    return [
        Job(
            f"{name}-{seed}",
            _measure_spec(folder, name, seed, settings, model=model, steps=steps),
            _evaluation_seconds(settings),
        )
        for name, (model, steps) in models.items()
        for seed in seeds
    ]


def _measure_spec(folder: Path, name: str, seed: int, settings: dict, **more) -> dict:
    spec = {"kind": "measure", "result": str(folder / "results" / f"{name}-{seed}.json")}
    own = {"num_images": settings["num_images"], "evaluation_seed": settings["evaluation_seed"] + seed - _FIRST_SEED}
    return spec | own | more


def _evaluation_seconds(settings: dict) -> float:
    """A guess for the progress line."""
    return 20 + 0.015 * settings["num_images"] * sum(settings["steps"])


def _trained(run_folder: Path) -> float:
    """Seconds of training a run has logged."""
    try:
        log = read_log(run_folder)
    except OSError:
        return 0.0
    return log[-1]["seconds"] if log else 0.0


def _log(folder: Path, name: str, seed: int) -> list[dict]:
    try:
        return read_log(folder / "runs" / f"{name}-{seed}")
    except OSError:
        return []

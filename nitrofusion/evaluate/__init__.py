"""Measuring a model, or a folder of pictures: numbers with 95 % intervals, and records that say how they were made.

    >>> evaluate("world", num_images=500)["accuracy"]
    >>> evaluate("nitrosd-realism", suite="coco5k", prompts="captions_val2017.json", reference="val2017",
    ...          weights="weights", output="runs/coco5k")
    >>> compare_records("runs/a/record.json", "runs/b/record.json")
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from ..options import check_output
from ..report.pictures import write_atomic
from .record import compare_records, read_record, write_record

__all__ = ["SUITES", "compare_records", "evaluate", "read_record", "write_record"]

SUITES = ("world", "coco5k", "prompts", "folder")
_WORLD_IMAGES = 500


def evaluate(
    model: str | Path,
    suite: str = "world",
    num_images: int | None = None,
    seed: int = 0,
    num_inference_steps: int | None = None,
    json_path: str | Path | None = None,
    batch_size: int | None = None,
    *,
    output: str | Path | None = None,
    metrics: tuple[str, ...] | None = None,
    weights: str | Path | None = None,
    prompts: str | Path | None = None,
    reference: str | Path | None = None,
    seed_rule: str | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    device: str | None = None,
    backend: str = "auto",
    jobs: int | None = None,
    cache: str | Path | None = None,
    allow_unknown_digest: bool = False,
) -> dict:
    """Measures a model on a suite; the same call gives the same numbers (but for times), and resumes.

    Started by torchrun, the processes share the work through ``output``, and the record is that of one process alone;
    of world the first draws and measures all.

    Args:
        model: what ``nitrofusion.load`` takes: a preset's name, a pipeline folder, a training run's folder; or, but for
            suite world, a folder of pictures of one size, in the order of their names.
        suite: ``world``, the embedded captioned scenes (``evaluate.world`` has its metrics); ``coco5k``, 5,000 captions
            of COCO val2017 with seed = index; ``prompts``, any prompt file; ``folder``, two folders of pictures.
        num_images: None is 500 for world, 5,000 for coco5k, all prompts else. Compare Frechet distances at equal
            ``num_images`` only: with fewer pictures they are larger.
        seed: of world, in 0..999_999: of prompts and noises, shared with no training. Else picture i has seed + i.
        num_inference_steps, guidance_scale, height, width: None is the model's own; world takes the steps only.
        json_path: also writes the result here; the file appears complete or not at all.
        batch_size: pictures drawn at a time; 100 for world, else 4.
        output: folder of pictures, features, record and reports; the same call resumes it. World needs none.
        metrics: names; None is the suite's.
        weights: folder of the metrics' weights (``nitrofusion evaluate --list-weights``).
        prompts: for coco5k the published ``captions_val2017.json``, else .txt, .csv, .jsonl or .parquet.
        reference: folder of real pictures, for coco5k ``val2017``. They may differ in size.
        seed_rule: how given pictures were seeded, such as ``seed = index``; goes into the protocol.
        device: of drawing and metrics. backend: as ``load`` takes it.
        jobs: processes that look at pictures side by side; None is all on a GPU, half the cores elsewhere.
        cache: folder where features of references are kept; None is ~/.cache/nitrofusion.
        allow_unknown_digest: accepts weights whose digest nobody has published.

    Returns:
        For world ``evaluate.world.evaluate_world``'s result with ``suite`` and ``model`` beside it; else the record
        (``evaluate.record``).

    Raises:
        InputError, StorageError: before any work. MetricError: at the end, if a metric failed; all others are in the
            record.
    """
    if suite not in SUITES:
        raise InputError(f"evaluate: suite must be one of {', '.join(SUITES)}, got {suite!r}")
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"evaluate: batch_size must be >= 1, got {batch_size!r}")
    if suite == "world":
        foreign = {"metrics": metrics, "prompts": prompts, "reference": reference, "seed_rule": seed_rule,
                   "weights": weights, "guidance_scale": guidance_scale, "height": height, "width": width,
                   "jobs": jobs, "cache": cache, "allow_unknown_digest": allow_unknown_digest or None}  # fmt: skip
        for name, value in foreign.items():
            if value is not None:
                raise InputError(f"evaluate: {name} must be None for suite world, which has its own, got {value!r}")
        count = _WORLD_IMAGES if num_images is None else num_images
        how = count, seed, num_inference_steps, json_path, batch_size or 100, output
        return _in_first(lambda: _evaluate_world(model, *how, {"device": device, "backend": backend}))
    if output is None:
        raise InputError(f"evaluate: output must be a folder for suite {suite}, got None")
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise InputError(f"evaluate: jobs must be >= 1, got {jobs!r}")

    from ..engine import check_sampling
    from ..engine.source import find
    from .group import Group
    from .run import Evaluation, run
    from .suites import make_plan

    cache = _cache() if cache is None else Path(cache)
    group = Group()
    try:
        plan = group.first(
            lambda: make_plan(
                suite, model, cache, num_images=num_images, seed=seed, metrics=metrics, weights_folder=weights,
                prompts=prompts, reference=reference, seed_rule=seed_rule, allow_unknown_digest=allow_unknown_digest,
            )
        )  # fmt: skip
        options, loading = {}, {"device": device, "backend": backend}
        if plan.given is None:
            steps, scale = check_sampling(find(model), num_inference_steps, guidance_scale, "evaluate")
            options = {"num_inference_steps": steps, "guidance_scale": scale, "height": height, "width": width}
            options["batch_size"] = batch_size or 4
        record = run(Evaluation(plan, Path(output), cache, options, loading, jobs, group))
    finally:
        group.close()
    if json_path is not None and group.rank == 0:
        write_record(json_path, record)
    return record


def _in_first(measure: Callable[[], dict]) -> dict:
    """What it returns in the first of torchrun's processes, in all of them."""
    from .group import Group

    group = Group()
    try:
        return group.first(measure)
    finally:
        group.close()


def _evaluate_world(model, num_images, seed, num_inference_steps, json_path, batch_size, output, loading) -> dict:
    from .world import check_sample, evaluate_world

    check_sample(num_images, seed)  # before the model is read
    if output is not None:
        if (Path(output) / "settings.json").exists():
            raise InputError(f"evaluate: output must be no other suite's folder for suite world, got {output}")
        check_output("evaluate", Path(output) / "record.json")

    from ..engine import check_sampling, load
    from ..engine.source import find

    steps, _ = check_sampling(find(model), num_inference_steps, None, "evaluate")
    engine = load(model, **loading)

    def draw(prompts: list[str], seeds: list[int]):
        return engine.generate(prompts, num_inference_steps=steps, seed=seeds, output_type="pt", batch_size=batch_size)

    result = evaluate_world(draw, num_images, seed, steps, batch_size=batch_size, progress=f"evaluate {model}")
    result = {"suite": "world", "model": str(model), **result}
    if json_path is not None:
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(json_path), (json.dumps(result, indent=2) + "\n").encode())
    if output is not None:
        from ..report.records import write_records
        from .world_record import world_record

        record = world_record(result)
        write_record(Path(output) / "record.json", record)
        write_records(Path(output) / "report.html", [record], [None])
    return result


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nitrofusion"


class _Package(types.ModuleType):
    """Lets ``nitrofusion.evaluate(...)`` mean the function, also once this package of the same name was imported."""

    def __call__(self, *args, **options) -> dict:
        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Package

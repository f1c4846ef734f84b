"""The main job on the embedded world: distil, compare with controls, and write a page to look at."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch

from .config import TrainConfig
from .engine import load
from .evaluate import evaluate
from .evaluate.world import check_sample
from .presets import CONTROL, run_preset
from .report import write_report
from .report.pictures import write_atomic
from .train import launch, train

GRID_PROMPTS = 16
_SEED = 11
GRID_SEED = 20_000_000  # scenes and noises of the picture grids


def demo(folder: Path, preset: str = "world", num_images: int = 300) -> Path:
    """Trains ``preset`` and its equal-compute control, evaluates all on the same fresh prompts.

    Both runs start from the same shipped initialisation and read the same teacher samples. The control is plain
    regression to those samples for as many optimizer steps as take the same time.

    Args:
        folder: everything goes here; the same call resumes what is there.
        num_images: pictures of each evaluation.

    Returns:
        The report, ``folder/report.html``; ``report.png`` and ``report.json`` lie beside it.
    """
    started = time.monotonic()
    check_sample(num_images, _SEED)
    config = dataclasses.replace(
        run_preset(preset), output=str(folder / "student"), cache=str(folder / "teacher_samples")
    )
    print("1/3  NitroFusion: the pool of heads against the student", flush=True)
    _train(config)
    print("2/3  control: regression for the same time", flush=True)
    control = _control(config, folder)
    _train(control)

    print("3/3  evaluation on fresh prompts", flush=True)
    models = [
        ("teacher", "world-teacher", (config.teacher_steps,)),
        ("start", "world-start", (1, 2, 4)),
        ("regression, equal compute", control.output, (1, 2, 4)),
        ("student", config.output, (1, 2, 4)),
    ]
    rows, grids = [], []
    prompts = grid_prompts()
    for label, model, step_counts in models:
        engine = load(model)
        of = {"num_images": num_images, "unet_digest": engine.unet_digest}  # weights may be others than the last time
        for steps in step_counts:
            path = folder / "evaluations" / f"{label.split(',')[0]}-{steps}.json"
            result = json.loads(path.read_text()) if path.exists() else {}
            if {name: result.get(name) for name in of} != of:
                result = evaluate(model, num_images=num_images, seed=_SEED, num_inference_steps=steps) | of
                path.parent.mkdir(exist_ok=True)
                write_atomic(path, json.dumps(result).encode())
            rows.append({"label": label, "steps": steps, **result})
            if steps in (1, 2, 4) or label == "teacher":
                seeds = [GRID_SEED + i for i in range(len(prompts))]
                pictures = engine.generate(prompts, num_inference_steps=steps, seed=seeds, output_type="pt")
                grids.append({"label": f"{label}, {steps} step{'s' * (steps > 1)}", "images": pictures})
    log = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    report = write_report(
        folder,
        {
            "title": "NitroFusion on the embedded world",
            "summary": _summary(rows, log, time.monotonic() - started),
            "rows": rows,
            "prompts": prompts,
            "grids": grids,
            "log": log,
            "config": config.to_json(),
        },
    )
    print(f"\nLook at {report}  (also {report.with_suffix('.png')} and {report.with_suffix('.json')})")
    words = ["generate", prompts[0], "--model", config.output]
    print("Draw with it:", shlex.join([os.path.relpath(sys.executable), "-m", "nitrofusion", *words]))
    return report


def _train(config: TrainConfig) -> Path:
    """On a CPU with several cores the small models of the world train fastest in several processes."""
    processes = 1 if torch.cuda.is_available() else min(4, torch.get_num_threads())
    while config.batch_size % processes:
        processes -= 1
    return train(config) if processes == 1 else launch(config, processes)


def grid_prompts() -> list[str]:
    from .world.scenes import sample_scenes

    return sample_scenes(GRID_PROMPTS, GRID_SEED).captions()


def _control(config: TrainConfig, folder: Path) -> TrainConfig:
    """Regression from the same start, for the optimizer steps that fit into the student run's training seconds."""
    log = (Path(config.output) / "log.jsonl").read_text().splitlines()
    seconds = json.loads(log[-1])["seconds"]
    known = folder / "control.json"
    if known.exists():
        steps = json.loads(known.read_text())["steps"]
    else:
        short = {"stages": (3,), "num_previews": 0}
        probe = dataclasses.replace(config, recipe="regression", output=str(folder / "probe"), **short)
        probe_log = (_train(probe) / "log.jsonl").read_text().splitlines()
        times = [json.loads(line)["seconds"] for line in probe_log]
        steps = max(1, round(seconds / ((times[-1] - times[0]) / (len(times) - 1))))
        known.write_text(json.dumps({"steps": steps, "student_seconds": seconds}))
    output, preview_every = str(folder / "regression"), max(1, steps // 4)
    return dataclasses.replace(config, **CONTROL, output=output, stages=(steps,), preview_every=preview_every)


def _summary(rows: list[dict], log: list[dict], seconds: float) -> str:
    def row(label: str, steps: int | None = 1) -> dict:
        return next(r for r in rows if r["label"] == label and steps in (None, r["steps"]))

    teacher, start, student = row("teacher", None), row("start"), row("student")
    control = row("regression, equal compute")
    return (
        f"A one-step student was distilled from the {teacher['steps']}-step teacher on {torch.get_num_threads()} CPU "
        f"threads: {log[-1]['nimg']:,} images in {log[-1]['seconds'] / 60:.1f} minutes of training "
        f"({seconds / 60:.1f} minutes for this whole page). At one step it follows {student['accuracy']:.1%} of fresh "
        f"prompts (start {start['accuracy']:.1%}, regression for the same time {control['accuracy']:.1%}, teacher "
        f"{teacher['accuracy']:.1%}) at a Frechet distance of {student['frechet']:.2f} (start {start['frechet']:.2f}, "
        f"regression {control['frechet']:.2f}, teacher {teacher['frechet']:.2f})."
    )

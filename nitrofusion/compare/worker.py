"""What one process of a comparison does: probe a run, draw teacher samples, or train and evaluate.

Every result is a JSON file that appears complete or not at all, and is written last.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from safetensors.torch import save

from ..config import TrainConfig
from ..report.pictures import write_atomic
from . import plan, runs


def work(spec: dict) -> None:
    """``spec["kind"]`` is the name of a function here; what it returns goes to ``spec["result"]``."""
    result = {"probe": probe, "samples": samples, "measure": measure}[spec["kind"]](spec)
    path = Path(spec["result"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())


def probe(spec: dict) -> dict:
    """{rates}: seconds of each kind of step."""
    from ..train import train

    config = TrainConfig.from_json(spec["config"])
    shutil.rmtree(config.output, ignore_errors=True)  # of a probe that was killed: half of one times nothing
    log = read_log(train(config))
    shutil.rmtree(config.output)
    return {"rates": plan.measured(config, log)}


def samples(spec: dict) -> dict:
    """{seconds, images} that one part of the teacher samples took, without the time to load."""
    from .. import data
    from ..shards import index_path, shard_path
    from ..train.plan import check_teacher

    config, (part, parts) = TrainConfig.from_json(spec["config"]), spec["part"]
    folder, _ = check_teacher(config)
    model = data.load_teacher(config, folder)
    cache, count = data.cache_folder(config), config.num_teacher_samples
    own = range(part, -(-count // data.SHARD), parts)
    missing = [i for i in own if not index_path(shard_path(cache, i)).exists()]
    started = time.perf_counter()
    data.prepare(config, model, cache, part=(part, parts))
    images = sum(min(data.SHARD, count - i * data.SHARD) for i in missing)
    return {"seconds": time.perf_counter() - started, "images": images}


def measure(spec: dict) -> dict:
    """Trains (where there is a config), evaluates at every number of steps and draws the pictures of the report.

    Returns:
        rows: an ``evaluate`` result for each number of steps; of a run also config_digest, optimizer_steps, images,
        training seconds and peak_mb.
    """
    from ..demo import GRID_SEED, grid_prompts
    from ..engine import load
    from ..evaluate import evaluate

    model, about = spec.get("model"), {}
    if model is None:
        from ..train import train

        config = TrainConfig.from_json(spec["config"])
        model = str(train(config))
        log = read_log(Path(model))
        about = {
            "config_digest": runs.digest(config),
            "optimizer_steps": log[-1]["step"],
            "images": log[-1]["nimg"],
            "seconds": log[-1]["seconds"],
            "peak_mb": max(line["peak_memory_mb"] for line in log),
        }
    stem, rows, grids = Path(spec["result"]).with_suffix(""), [], {}
    prompts = grid_prompts()
    seeds = [GRID_SEED + i for i in range(len(prompts))]
    for steps in spec["steps"]:
        path, of = Path(f"{stem}-{steps}.json"), {"config_digest": about.get("config_digest")}
        known = read_result(path)
        if known is None or known.get("config_digest") != of["config_digest"]:  # of a run that was removed since
            options = {"num_images": spec["num_images"], "seed": spec["evaluation_seed"]}
            known = evaluate(model, num_inference_steps=steps, **options) | of
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, (json.dumps(known, indent=1) + "\n").encode())
        rows.append(known)
        grids[str(steps)] = load(model).generate(prompts, num_inference_steps=steps, seed=seeds, output_type="pt")
    write_atomic(Path(f"{stem}.safetensors"), save({k: v.contiguous() for k, v in grids.items()}))
    return {**about, "rows": rows}


def read_result(path: Path) -> dict | None:
    """What a job wrote; None if it did not, or a machine that lost power left the file short: then it is done again."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and found else None


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log; a line that is being written is left out."""
    lines = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines

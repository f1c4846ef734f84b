"""Results of suite world as records of the common form."""

from __future__ import annotations

import platform
from datetime import UTC, datetime

import torch

from .. import __version__
from ..doctor import cpu_name
from ..world.render import RESOLUTION
from ..world.scenes import sample_scenes
from .record import make_record, make_result
from .suites import digest_of
from .world import EVAL_SEED_BASE, REFERENCE_SEED

# name: title, which way is better, key of what real pictures score
_METRICS = {
    "accuracy": ("Accuracy", "higher", "accuracy_real"),
    "frechet": ("Frechet distance", "lower", "frechet_floor"),
    "sharpness": ("Sharpness", "real", "sharpness_real"),
    "diversity": ("Diversity", "real", None),
    "grain_rate": ("Grain", "lower", None),
    "structure_rate": ("Odd structure", "lower", "structure_rate_real"),
}
_IMPLEMENTATION = "nitrofusion world judge, 1"  # counts up when a metric of the suite changes


def world_record(result: dict) -> dict:
    """The record of what ``evaluate`` returns for suite world."""
    n, seed = result["num_images"], result["seed"]
    prompts = sample_scenes(n, EVAL_SEED_BASE + seed).captions()
    sample = {
        "n": n,
        "prompts_digest": digest_of(prompts),
        "seed_rule": f"seed = {(EVAL_SEED_BASE + seed) * 1_000_003} + index",
        "resolution": [RESOLUTION, RESOLUTION],
        "format": "float",
    }
    scenes = digest_of({"scenes": result["num_reference"], "seed": REFERENCE_SEED})
    results = []
    for name, (title, better, real) in _METRICS.items():
        compared = name in ("frechet", "structure_rate")
        fields = {
            "metric": name,
            "reference_digest": scenes if compared else None,
            "reference_n": result["num_reference"] if compared else None,
            "implementation": _IMPLEMENTATION,
            "extractor": "world-judge",
            "extractor_digest": result["judge_digest"],
            "resize": "none",
        }
        measured = {
            "title": title,
            "better": better,
            "value": float(result[name]),
            "interval": [float(x) for x in result[f"{name}_interval"]],
            "noise_floor": None,
            "version": __version__,
            "target": 1.0 if name == "diversity" else result.get(real),
        }
        results.append(make_result(sample, fields, measured))
    subject = {"model": result["model"], "num_inference_steps": result["num_inference_steps"], "version": __version__}
    run = {
        "seconds_per_image": result["seconds_per_image"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return make_record("world", sample, results, subject, run, [])

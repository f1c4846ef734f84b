"""What is compared: recipes by their presets, and ablations as single changes of configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import InputError
from ..presets import MODELS, RUNS, resolve_unet, suggest
from ..recipes import RECIPES

CONTROL = "regression"  # what differences are taken to
BASE = "nitrofusion"  # what most ablations change
REFERENCES = ("teacher", "start")  # measured, not trained

# Name to what differs from ``base_of(name)``; ``pool.`` and ``options.`` reach into those.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no-pool": {"pool.heads_per_cell": 1, "pool.sampled_per_cell": 1, "pool.refresh_rate": 0.0},
    "no-refresh": {"pool.refresh_rate": 0.0},
    "no-multiscale": {"pool.tasks": ("global-cond",)},
    "no-dual": {"pool.tasks": ("global-cond", "local-cond")},
    # Where noise hides as much of a picture of 16 x 16 latents as the paper's t* do of one of 128 x 128.
    "matched-t-star": {"pool.t_star": (1, 10, 40, 190), "pool.t_star_weights": (1.0,) * 4},
    "no-anchor": {"regression_weight": 0.0},
    "teacher-samples": {"images": None},
    "wgan": {"loss": "wgan"},
    "ns": {"loss": "ns"},
    "add-heads-only": {"options.distill_weight": 0.0},
    "add-score-only": {"options.adversarial_weight": 0.0},
    "add-noise-only": {"options.student_timesteps": (999,)},
}
_OF = dict.fromkeys(("add-heads-only", "add-score-only", "add-noise-only"), "add")

_SHARED = ("teacher", "teacher_unet", "init", "teacher_steps", "teacher_scheduler", "guidance_scale")


def configs() -> dict[str, TrainConfig]:
    """Every run by name: registered recipes that have a preset ``<recipe>-world``, then the ablations."""
    found = {BASE: RUNS["world"]}
    for recipe in RECIPES:
        if f"{recipe}-world" in RUNS:
            found[recipe] = RUNS[f"{recipe}-world"]
    return found | {name: changed(found[base_of(name)], changes) for name, changes in ABLATIONS.items()}


def base_of(ablation: str) -> str:
    """The run that an ablation changes."""
    return _OF.get(ablation, BASE)


def select(names: tuple[str, ...]) -> dict[str, TrainConfig]:
    """The named runs in the order of ``configs``; ``all`` names every one.

    Raises:
        InputError: a name is unknown, or a run does not start where the others do.
    """
    known = configs()
    for name in names:
        if name != "all" and name not in known:
            raise InputError(
                f"compare: recipes must be all or among {', '.join(known)}, got {name!r}{suggest(name, known)}"
            )
    if not names:
        raise InputError(f"compare: recipes must be all or among {', '.join(known)}, got none")
    chosen = {name: config for name, config in known.items() if name in names or "all" in names}
    for name, config in chosen.items():
        for field in _SHARED:
            wanted, got = getattr(known[BASE], field), getattr(config, field)
            if got != wanted and not (config.teacher_samples == "none" and field not in ("teacher", "init")):
                raise InputError(f"compare: {field} of {name} must be {wanted!r}, as the others', got {got!r}")
    return chosen


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """``config`` with other values; ``pool.x`` names a value of the pool's, ``options.x`` one of the recipe's."""
    inner = lambda kind: {k.removeprefix(kind): v for k, v in changes.items() if k.startswith(kind)}  # noqa: E731
    plain = {name: v for name, v in changes.items() if "." not in name}
    pool = dataclasses.replace(config.pool, **inner("pool."))
    return dataclasses.replace(config, **plain, pool=pool, options={**config.options, **inner("options.")})


def digest(config: TrainConfig) -> str:
    """SHA-256 of the configuration's JSON without the folders it works in; a start that is no preset is its weights."""
    values = {k: v for k, v in config.to_json().items() if k not in ("output", "cache")}
    if config.init is not None and config.init not in MODELS:
        values["init"] = digest_of(Path(resolve_unet(config.init)))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder's safetensors in order."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()

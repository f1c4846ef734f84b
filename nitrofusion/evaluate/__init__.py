"""Measuring a model: ``evaluate`` draws from fresh prompts and seeds and returns numbers with 95 % intervals.

    >>> evaluate("world", num_images=500)["accuracy"]
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import InputError

__all__ = ["evaluate"]

SUITES = ("world",)


def evaluate(
    model: str | Path,
    suite: str = "world",
    num_images: int = 500,
    seed: int = 0,
    num_inference_steps: int | None = None,
    json_path: str | Path | None = None,
    batch_size: int = 100,
) -> dict:
    """Measures a model on a suite of prompts; the same call gives the same numbers (but for seconds_per_image).

    Args:
        model: what ``nitrofusion.load`` takes: a preset's name, a pipeline folder, or a training run's folder.
        suite: ``world``, the embedded captioned scenes; see ``evaluate.world`` for its metrics.
        num_images: pictures that accuracy, Frechet distance and sharpness are measured on, >= 2. Compare Frechet
            distances at equal ``num_images`` only: with fewer pictures it is larger.
        seed: of prompts and noises, in 0..999_999. No seed shares a scene or a noise with training.
        num_inference_steps: None is the model's default.
        json_path: also writes the result here; the file appears complete or not at all.
        batch_size: pictures drawn at a time.

    Returns:
        The suite's result (``evaluate.world.evaluate_world``) with ``suite`` and ``model`` beside it.

    Raises:
        InputError: an argument is not as above, or the model does not draw the suite's resolution.
    """
    if suite not in SUITES:
        raise InputError(f"evaluate: suite must be one of {', '.join(SUITES)}, got {suite!r}")
    from .world import check_sample, evaluate_world

    check_sample(num_images, seed)  # before the model is read
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"evaluate: batch_size must be >= 1, got {batch_size!r}")

    from ..engine import check_sampling, load
    from ..engine.source import find

    steps, _ = check_sampling(find(model), num_inference_steps, None, "evaluate")
    engine = load(model)

    def draw(prompts: list[str], seeds: list[int]):
        return engine.generate(
            prompts, num_inference_steps=steps, seed=seeds, output_type="pt", batch_size=batch_size
        )

    result = evaluate_world(draw, num_images, seed, steps, batch_size=batch_size, progress=f"evaluate {model}")
    result = {"suite": suite, "model": str(model), **result}
    if json_path is not None:
        _write_json(Path(json_path), result)
    return result


def _write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

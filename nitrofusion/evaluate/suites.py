"""What a suite draws and measures: everything is found and checked here, before any work.

- coco5k: COCO val2017; the first caption of each image by image id, seed = index, metrics of the paper's Table 1.
- prompts: any prompt file, without reference pictures unless given.
- folder: two folders of pictures, one measured, one the reference.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..prompts import read_prompts
from . import instruments, weights
from .coco import first_captions
from .gallery import Gallery, holds_pictures, open_gallery

METRICS = {
    "coco5k": ("clip_score", "fid", "aesthetic", "image_reward", "hpsv2", "patch_fid"),
    "prompts": ("clip_score", "aesthetic", "image_reward", "hpsv2"),
    "folder": ("fid", "kid", "precision", "recall"),
}
COCO_IMAGES = 5000
_LEAST_SIDE = {"inception_patch": 299}  # the side of its crop, in pixels; some of COCO's pictures are smaller
_MAX_SEED = 2**62


@dataclass(frozen=True)
class Plan:
    """One evaluation.

    Attributes:
        model: as it was asked for: a model, or a folder of pictures.
        n: pictures measured.
        prompts: one for each picture; None if the pictures came without.
        seeds: of the pictures to draw; None for given ones.
        seed_rule: how they follow from the index, in words; of given pictures what the user says.
        given: pictures that are there already; None draws them.
        reference: real pictures, or whatever the others are held against.
        metrics: names in ``instruments.METRICS``.
        weights: extractor to weight name to file. digests: extractor to the digest that names it and its weights.
    """

    suite: str
    model: str
    n: int
    prompts: list[str] | None
    seeds: list[int] | None
    seed_rule: str | None
    given: Gallery | None
    reference: Gallery | None
    metrics: tuple[str, ...]
    weights: dict[str, dict[str, Path]]
    digests: dict[str, str]

    @property
    def extractors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(instruments.METRICS[name].extractor for name in self.metrics))

    @property
    def prompts_digest(self) -> str | None:
        return None if self.prompts is None else digest_of(self.prompts)

    def check_size(self, width: int, height: int) -> None:
        """Raises InputError if the measured pictures are too small for a metric."""
        for name in self.metrics:
            side = _LEAST_SIDE.get(instruments.METRICS[name].extractor, 0)
            if min(width, height) < side:
                raise InputError(
                    f"evaluate: pictures must be of {side} pixels a side or more for {name}, got {width}x{height}"
                )

    def reference_for(self, extractor: str) -> Gallery | None:
        """The reference pictures an extractor looks at: all, or those large enough for its crop; None without need."""
        metrics = [instruments.METRICS[name] for name in self.metrics]
        if not any(metric.needs_reference for metric in metrics if metric.extractor == extractor):
            return None
        side = _LEAST_SIDE.get(extractor)
        return self.reference if side is None else self.reference.at_least(side)


def digest_of(value) -> str:
    """SHA-256 of a JSON value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def make_plan(
    suite: str, model: str | Path, cache: Path, *, num_images: int | None = None, seed: int = 0,
    metrics: tuple[str, ...] | None = None, weights_folder: str | Path | None = None,
    prompts: str | Path | None = None, reference: str | Path | None = None, seed_rule: str | None = None,
    allow_unknown_digest: bool = False,
) -> Plan:  # fmt: skip
    """The plan of an evaluation; ``evaluate`` describes the arguments.

    Raises:
        InputError: something is missing, altered, too little or unreadable.
    """
    chosen = _check_metrics(suite, metrics)
    _check_number("seed", seed, 0, _MAX_SEED)
    if num_images is not None:
        _check_number("num_images", num_images, 1, _MAX_SEED)
    given = suite == "folder" or holds_pictures(model)
    if seed_rule is not None and not given:
        raise InputError(f"evaluate: seed_rule must be given with a folder of pictures only, got {model}")
    names, texts = _prompts(suite, prompts, num_images)
    for metric in (instruments.METRICS[name] for name in chosen):
        if metric.needs_reference and reference is None:
            raise InputError(f"evaluate: reference must be a folder of pictures for {metric.name}, got None")
        if instruments.EXTRACTORS[metric.extractor].needs_prompt and texts is None:
            raise InputError(f"evaluate: prompts must be a file of one for each picture for {metric.name}, got None")
    found, digests = _weights(chosen, weights_folder, allow_unknown_digest)
    if not given:
        count = len(texts)
        _check_least(chosen, count, "num_images")
    pictures = open_gallery(model, cache, "model", one_size=True) if given else None
    if given:
        count = len(pictures)
        _check_least(chosen, count, "num_images")
        for name, number in (("num_images", num_images), ("prompts", None if texts is None else len(texts))):
            if number is not None and number != count:
                raise InputError(f"evaluate: {name} must be as many as the {count} pictures in {model}, got {number}")
    real = None
    if any(instruments.METRICS[name].needs_reference for name in chosen):
        real = open_gallery(reference, cache, "reference", names)
    for name in chosen:
        side = _LEAST_SIDE.get(instruments.METRICS[name].extractor, 0)
        if instruments.METRICS[name].needs_reference:
            _check_least([name], len(real.at_least(side)), "reference")
    rule = seed_rule if given else "seed = index" if seed == 0 else f"seed = {seed} + index"
    seeds = None if given else [seed + i for i in range(count)]
    plan = Plan(suite, str(model), count, texts, seeds, rule, pictures, real, chosen, found, digests)
    if given:
        plan.check_size(*pictures.sizes[0])
    return plan


def _check_metrics(suite: str, metrics: tuple[str, ...] | None) -> tuple[str, ...]:
    chosen = METRICS[suite] if metrics is None else tuple(metrics)
    if not chosen or len(set(chosen)) != len(chosen):
        raise InputError(f"evaluate: metrics must be different names, at least one, got {list(chosen)}")
    for name in chosen:
        if name not in instruments.METRICS:
            raise InputError(f"evaluate: metrics must be among {', '.join(instruments.METRICS)}, got {name!r}")
    return chosen


def _prompts(suite: str, file, num_images: int | None) -> tuple[list[str] | None, list[str] | None]:
    """(names of all reference pictures, the prompts), each None where the suite has none."""
    if suite == "folder":
        return None, None if file is None else read_prompts(file)
    if file is None:
        wanted = "COCO's captions_val2017.json" if suite == "coco5k" else "a .txt, .csv, .jsonl or .parquet file"
        raise InputError(f"evaluate: prompts must be {wanted} for suite {suite}, got None")
    names, texts = first_captions(file) if suite == "coco5k" else (None, read_prompts(file))
    wanted = num_images or (COCO_IMAGES if suite == "coco5k" else len(texts))
    if len(texts) < wanted:
        raise InputError(f"evaluate: prompts must be at least {wanted}, got {len(texts)} in {file}")
    return names, texts[:wanted]


def _weights(chosen: tuple[str, ...], folder, allow_unknown: bool) -> tuple[dict, dict]:
    """Extractor to {weight: file}, and to the digest of its form and files."""
    found, digests = {}, {}
    for name in dict.fromkeys(instruments.METRICS[metric].extractor for metric in chosen):
        extractor = instruments.EXTRACTORS[name]
        if extractor.weights and folder is None:
            raise InputError(
                "evaluate: weights must be a folder with the files of `nitrofusion evaluate --list-weights`, got None"
            )
        found[name] = {w: weights.locate(w, Path(folder), allow_unknown) for w in extractor.weights}
        files = {w: weights.digest(path) for w, path in found[name].items()}
        form = {"implementation": extractor.implementation, "resize": extractor.resize}
        digests[name] = digest_of({"extractor": name, **form, "weights": files})
    return found, digests


def _check_least(chosen, count: int, what: str) -> None:
    for name in chosen:
        least = instruments.METRICS[name].least
        if count < least:
            raise InputError(f"evaluate: {what} must be at least {least} pictures for {name}, got {count}")


def _check_number(name: str, value, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"evaluate: {name} must be an integer >= {low}, got {value!r}")

"""Suite ``world``: captioned scenes with exact ground truth, read off the pictures by a judge.

Metrics, each with a 95 % interval:

- accuracy: share of pictures in which every attribute the caption names is right.
- frechet: Frechet distance between the judge's features of the pictures and of ``REFERENCE_SCENES`` real scenes.
  ``frechet_floor`` is what real pictures of the same prompts score: no model can be expected below it.
- sharpness: mean absolute Laplacian; ``sharpness_real`` is that of real pictures of the same prompts.
- diversity: mean feature distance between pictures of one prompt from different noises, over the same distance
  between real scenes of equal attributes with fresh geometry and light. 1 is real; 0 is one picture per prompt.
- grain_rate, structure_rate: shares of pictures whose grain, or structure, is beyond the 99th percentile of real ones;
  see ``defects`` for what they find and what not.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..errors import InputError
from ..world.judge import Judge
from ..world.render import RESOLUTION, render
from ..world.scenes import ATTRIBUTES, RELATIONS, Scenes, sample_scenes
from .defects import GRAIN_LIMIT, Structure, grain, structure_features
from .metrics import Frechet, bootstrap_interval, pairwise_distance, sharpness, wilson_interval

JUDGE = Path(__file__).parents[1] / "world" / "weights" / "judge.safetensors"

# Scene seeds. Training and the building of the world use seeds below 10^9; prompts here use EVAL_SEED_BASE + seed,
# and noises (EVAL_SEED_BASE + seed) * 1_000_003 + index, above all that training draws from.
EVAL_SEED_BASE = 1_000_000_000
MAX_SEED = 999_999
REFERENCE_SEED = 2_000_000_000
_TWIN_SEED = 2_000_000_001  # geometry and light of the real pictures that diversity is measured against

REFERENCE_SCENES = 3000
DIVERSITY_PROMPTS = 32
DIVERSITY_NOISES = 4
_DIVERSITY_NOISE = 900_000  # first noise index of the diversity pictures
_RESAMPLES = 40

# By judge digest: rendering the reference takes longer than measuring a one-step student.
_references: dict[str, tuple[Frechet, Structure]] = {}

Draw = Callable[[list[str], list[int]], torch.Tensor]


def evaluate_world(
    draw: Draw,
    num_images: int = 500,
    seed: int = 0,
    num_inference_steps: int = 1,
    judge: Judge | None = None,
    batch_size: int = 100,
    progress: str | None = None,
) -> dict:
    """Measures what ``draw`` draws.

    Args:
        draw: prompts and as many noise seeds to pictures [n, 3, 32, 32] in [-1, 1], for n <= batch_size.
        num_images: in 2..900_000; another 128 pictures are drawn for diversity.
        seed: of prompts and noises, in 0..999_999.
        num_inference_steps: recorded in the result; ``draw`` decides.
        judge: None is the world's own.
        progress: label of a progress bar; None shows none.

    Returns:
        JSON values: accuracy, frechet, sharpness, diversity, grain_rate, structure_rate and ``<name>_interval``
        [low, high] of each; per_attribute {name: share}; accuracy_real, frechet_floor, sharpness_real and
        structure_rate_real of real pictures of the same prompts; seconds_per_image (median over batches, drawing
        alone); num_images, num_reference, seed, num_inference_steps, judge_digest.

    Raises:
        InputError: num_images or seed is out of range, or the pictures have another shape.
    """
    check_sample(num_images, seed)
    judge = (load_judge() if judge is None else judge).eval()
    digest = judge_digest(judge)
    scenes = sample_scenes(num_images, EVAL_SEED_BASE + seed)
    varied = sample_scenes(DIVERSITY_PROMPTS, EVAL_SEED_BASE + seed)
    varied = varied[np.arange(DIVERSITY_PROMPTS).repeat(DIVERSITY_NOISES)]
    total = num_images + len(varied)
    with tqdm(total=total, desc=progress, unit="image", disable=progress is None) as bar:
        look = _Observer(draw, judge, (EVAL_SEED_BASE + seed) * 1_000_003, batch_size, bar)
        drawn = look.at_drawn(scenes, 0)
        variants = look.at_drawn(varied, _DIVERSITY_NOISE)
    real = look.at_real(scenes)
    real_variants = look.at_real(real_twins(varied))
    if digest not in _references:
        reference = sample_scenes(REFERENCE_SCENES, REFERENCE_SEED)
        seen = look.at_real(reference)
        _references[digest] = Frechet(seen.features), Structure(reference, seen.structure)
    frechet, structure = _references[digest]

    spread, spread_real = (
        pairwise_distance(torch.from_numpy(v.features).view(DIVERSITY_PROMPTS, DIVERSITY_NOISES, -1)).numpy()
        for v in (variants, real_variants)
    )
    applies = scenes.attributes() >= 0
    right = int(drawn.correct.all(1).sum())
    statistics = {
        "frechet": (lambda i: frechet(drawn.features[i]), num_images),
        "sharpness": (lambda i: float(drawn.sharpness[i].mean()), num_images),
        "diversity": (lambda i: float(spread[i].mean() / spread_real[i].mean()), DIVERSITY_PROMPTS),
    }
    counts = {
        "accuracy": right,
        "grain_rate": int((drawn.grain > GRAIN_LIMIT).sum()),
        "structure_rate": int((structure(scenes, drawn.structure) > structure.limit).sum()),
    }
    result = {}
    for name, count in counts.items():
        result |= {name: count / num_images, f"{name}_interval": wilson_interval(count, num_images)}
    for name, (statistic, num) in statistics.items():
        result[name] = statistic(np.arange(num))
        result[f"{name}_interval"] = bootstrap_interval(statistic, num, result[name], _RESAMPLES, seed)
    return {
        **result,
        "per_attribute": {
            name: float(drawn.correct[applies[:, k], k].mean())
            for k, name in enumerate(ATTRIBUTES)
            if applies[:, k].any()
        },
        "accuracy_real": float(real.correct.all(1).mean()),
        "frechet_floor": frechet(real.features),
        "sharpness_real": float(real.sharpness.mean()),
        "structure_rate_real": float((structure(scenes, real.structure) > structure.limit).mean()),
        "seconds_per_image": float(np.median(look.seconds)),
        "num_images": num_images,
        "num_reference": REFERENCE_SCENES,
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "judge_digest": digest,
    }


def check_sample(num_images: int, seed: int) -> None:
    """Raises InputError if there is no such sample of prompts and noises."""
    for name, value, low, high in (("num_images", num_images, 2, _DIVERSITY_NOISE), ("seed", seed, 0, MAX_SEED)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(f"evaluate: {name} must be >= {low}, got {value!r}")
        if value > high:
            raise InputError(f"evaluate: {name} must be <= {high:_}, got {value!r}")


def load_judge(path: str | Path | None = None) -> Judge:
    """The judge of a safetensors file; None is the one that ships with the world.

    Raises:
        InputError: the file is missing or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = JUDGE if path is None else Path(path)
    judge = Judge().requires_grad_(False)
    try:
        judge.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"evaluate: judge must be the weights of a world judge, got {path} ({reason})") from error
    return judge.eval()


def judge_digest(judge: torch.nn.Module) -> str:
    """12 hex digits that name the judge's weights: numbers of different judges do not compare."""
    digest = hashlib.sha256()
    for name, value in sorted(judge.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def real_twins(scenes: Scenes) -> Scenes:
    """Scenes of equal attributes with other geometry and light; no two of the batch share them."""
    donors = sample_scenes(16 * len(scenes) + 256, _TWIN_SEED)
    chosen = np.empty(len(scenes), np.int64)
    for relation in range(-1, len(RELATIONS)):  # where objects may lie depends on their relation
        wanted = np.flatnonzero(scenes.relation == relation)
        chosen[wanted] = np.flatnonzero(donors.relation == relation)[: len(wanted)]
    other = donors[chosen]
    return Scenes(
        scenes.relation, scenes.background, scenes.shape, scenes.color, scenes.pattern,
        other.center, other.radius, other.light, scenes.terse,
    )  # fmt: skip


class _Seen:
    """What the judge and the eye saw of n pictures.

    Attributes:
        features: [n, d]. correct: [n, 8] bool. sharpness, grain: [n]. structure: [n, e].
    """

    def __init__(self, batches: list[tuple[torch.Tensor, ...]]):
        parts = [torch.cat(part).numpy() for part in zip(*batches, strict=True)]
        self.features, self.correct, self.sharpness, self.grain, self.structure = parts


class _Observer:
    """Draws or renders scenes batch by batch and keeps numbers only, never the pictures."""

    def __init__(self, draw: Draw, judge: Judge, first_seed: int, batch_size: int, bar: tqdm):
        self.draw, self.judge, self.first_seed = draw, judge, first_seed
        self.batch_size, self.bar = batch_size, bar
        self.seconds: list[float] = []  # per image, one value per drawn batch

    def at_drawn(self, scenes: Scenes, first_noise: int) -> _Seen:
        batches = []
        for start in range(0, len(scenes), self.batch_size):
            part = scenes[start : start + self.batch_size]
            first = self.first_seed + first_noise + start
            began = time.perf_counter()
            images = self.draw(part.captions(), list(range(first, first + len(part))))
            images = images.detach().float().cpu()  # waits for a device that draws asynchronously
            self.seconds.append((time.perf_counter() - began) / len(part))
            if tuple(images.shape) != (len(part), 3, RESOLUTION, RESOLUTION):
                raise InputError(
                    f"evaluate: pictures must be {(len(part), 3, RESOLUTION, RESOLUTION)} for suite world, "
                    f"got {tuple(images.shape)}"
                )
            batches.append(self._look(images, part))
            self.bar.update(len(part))
        return _Seen(batches)

    def at_real(self, scenes: Scenes) -> _Seen:
        return _Seen(
            [self._look(render(part), part) for part in (scenes[i : i + 256] for i in range(0, len(scenes), 256))]
        )

    @torch.no_grad()
    def _look(self, images: torch.Tensor, scenes: Scenes) -> tuple[torch.Tensor, ...]:
        truth = torch.from_numpy(scenes.attributes())
        inner = structure_features(self.judge, images)
        correct, features = self.judge.look(images, truth)
        return features, correct, sharpness(images), grain(images), inner

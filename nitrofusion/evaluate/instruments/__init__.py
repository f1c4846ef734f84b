"""The metrics a model is judged by, and the networks that look at its pictures for them.

    >>> extract = EXTRACTORS["inception"].load({"inception": locate("inception", folder)}, "cpu")
    >>> METRICS["fid"].value(extract(pictures, None), extract(photographs, None))

An extractor turns pictures into rows of numbers, each from its own picture and prompt alone; a metric turns rows into
one number with a 95 % interval. Scores are extractors of width 1, whose metric is the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import InputError
from .. import distances
from ..metrics import Frechet, mean_interval, wilson_interval
from . import aesthetic, clip_score, hpsv2, image_reward, inception

RESAMPLES = 1000
Extract = Callable[[list[Image.Image], list[str] | None], np.ndarray]


@dataclass(frozen=True)
class Extractor:
    """A network that looks at pictures.

    Attributes:
        implementation: whose code and weights; goes in the record of a result.
        weights: names in ``weights.WEIGHTS``.
        needs_prompt: each picture is looked at with its prompt.
        resize: what is done to a picture first, in a phrase.
        load: from where each of ``weights`` lies and a device, to a function of pictures and prompts that returns
            float32 [n, width]. The weights are read once; the pictures are left as they are.
    """

    name: str
    implementation: str
    weights: tuple[str, ...]
    needs_prompt: bool
    resize: str
    load: Callable[[dict[str, Path], str], Extract]


@dataclass(frozen=True)
class Metric:
    """One number of a set of pictures.

    Attributes:
        title: for tables and plots.
        better: ``higher`` or ``lower``.
        extractor: name in ``EXTRACTORS``.
        needs_reference: the reference pictures' rows are needed too.
        noise_floor: differences below it mean nothing: equal protocols, other seeds; None where nobody published one.
        least: fewest pictures, of the reference too, that it is given for.
        statistic: of rows and reference.
        spread: its 95 % interval, of rows, reference, resamples and seed.
    """

    name: str
    title: str
    better: str
    extractor: str
    needs_reference: bool
    noise_floor: float | None
    least: int
    statistic: Callable[..., float] = field(repr=False)
    spread: Callable[..., list[float]] = field(repr=False)

    def value(self, features: np.ndarray, reference: np.ndarray | None = None) -> float:
        """The metric of rows [n, d], and of the reference's [m, d] where it needs one.

        Raises:
            InputError: rows are too few, not finite, or not as wide as the reference's.
        """
        return float(self.statistic(*self._checked(features, reference)))

    def interval(
        self, features: np.ndarray, reference: np.ndarray | None, seed: int, resamples: int = RESAMPLES
    ) -> list[float]:
        """[low, high], 95 %: where the number's mean over other pictures as many, from the same model, would lie.

        The reference is held fixed. For a Frechet distance the mean is that at this number of pictures, which is
        above that of more: compare at equal numbers only.

        Args:
            seed: of the bootstrap.
            resamples: of the bootstrap.
        """
        features, reference = self._checked(features, reference)
        return self.spread(features, reference, resamples, seed)

    def _checked(self, features: np.ndarray, reference: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        if self.needs_reference and reference is None:
            raise InputError(f"evaluate: {self.name} must be given a reference's features, got none")
        parts = [("pictures", np.asarray(features))]
        if self.needs_reference:
            parts.append(("reference pictures", np.asarray(reference)))
        for what, rows in parts:
            width = parts[0][1].shape[-1] if self.needs_reference else 1
            if rows.ndim != 2 or rows.shape[1] != width:
                raise InputError(
                    f"evaluate: {self.name} must be given rows of width {width}, got {rows.shape} of {what}"
                )
            if len(rows) < self.least:
                why = "on fewer it is mostly bias" if self.needs_reference else "fewer give no interval"
                raise InputError(f"evaluate: {self.name} must be given >= {self.least} {what} ({why}), got {len(rows)}")
            if not np.isfinite(rows).all():
                raise InputError(f"evaluate: {self.name} must be given finite features, got NaN or infinity in {what}")
        return parts[0][1], parts[1][1] if self.needs_reference else None


def _frechet(features: np.ndarray, reference: np.ndarray) -> float:
    return Frechet(reference)(features)


def _frechet_spread(features: np.ndarray, reference: np.ndarray, resamples: int, seed: int) -> list[float]:
    value, added = Frechet(reference).with_influences(features)
    low, high = mean_interval(added, resamples, seed, value)
    return [max(0.0, low), high]


def _precision_spread(features: np.ndarray, reference: np.ndarray, resamples: int, seed: int) -> list[float]:
    # A share of independent pictures: its score interval holds near 0 and 1 too, where resampling does not.
    return wilson_interval(int(distances.inside(features, reference).sum()), len(features))


def _recall_spread(features: np.ndarray, reference: np.ndarray, resamples: int, seed: int) -> list[float]:
    value = distances.recall(features, reference)
    low, high = mean_interval(distances.recall_pseudo_values(features, reference), resamples, seed, value)
    return [max(0.0, low), min(1.0, high)]


def _mean(features: np.ndarray, reference: None) -> float:
    return features.astype(np.float64).mean()


def _mean_spread(features: np.ndarray, reference: None, resamples: int, seed: int) -> list[float]:
    return mean_interval(features[:, 0], resamples, seed)


def _of_distribution(name: str, title: str, better: str, statistic: Callable, spread: Callable, **options) -> Metric:
    known = {"extractor": "inception", "needs_reference": True, "noise_floor": None, "least": 50} | options
    return Metric(name, title, better, statistic=statistic, spread=spread, **known)


def _of_scores(name: str, title: str, noise_floor: float | None = None) -> Metric:
    return Metric(name, title, "higher", name, False, noise_floor, 10, _mean, _mean_spread)


METRICS = {
    metric.name: metric
    for metric in (
        _of_distribution("fid", "FID", "lower", _frechet, _frechet_spread, noise_floor=0.6),
        _of_distribution("kid", "KID", "lower", distances.kid, distances.kid_interval),
        _of_distribution("precision", "Precision", "higher", distances.precision, _precision_spread),
        _of_distribution("recall", "Recall", "higher", distances.recall, _recall_spread),
        _of_distribution("patch_fid", "Patch-FID", "lower", _frechet, _frechet_spread, extractor="inception_patch"),
        _of_scores("clip_score", "CLIP score (ViT-B/32)", 0.003),
        _of_scores("aesthetic", "Aesthetic V2"),
        _of_scores("image_reward", "ImageReward", 0.01),
        _of_scores("hpsv2", "HPS v2.1"),
    )
}

_INCEPTION = "nitrofusion inception (pt_inception-2015-12-05), float32"
EXTRACTORS = {
    extractor.name: extractor
    for extractor in (
        Extractor("inception", _INCEPTION, ("inception",), False, "299x299 TensorFlow 1 bilinear", inception.load),
        Extractor("inception_patch", _INCEPTION, ("inception",), False, "299x299 centre crop", inception.load_patch),
        Extractor(
            "clip_score",
            "nitrofusion clip_score (transformers CLIP ViT-B/32), cosine, float32",
            ("clip-vit-base-patch32",),
            True,
            "shorter side to 224 by PIL bicubic, centre crop (preprocessor_config.json)",
            clip_score.load,
        ),
        Extractor(
            "aesthetic",
            "nitrofusion aesthetic (sac+logos+ava1-l14-linearMSE on transformers CLIP ViT-L/14), float32",
            ("clip-vit-large-patch14", "aesthetic"),
            False,
            "shorter side to 224 by PIL bicubic, centre crop (preprocessor_config.json)",
            aesthetic.load,
        ),
        Extractor(
            "image_reward",
            "nitrofusion image_reward (ImageReward-v1.0 on transformers BLIP), 35 tokens, float32",
            ("image-reward", "bert-vocabulary"),
            True,
            "shorter side to 224 by PIL bicubic, centre crop",
            image_reward.load,
        ),
        Extractor(
            "hpsv2",
            "nitrofusion hpsv2 (HPS v2.1 on transformers CLIP ViT-H/14), cosine, float32",
            ("hpsv2", "clip-tokenizer"),
            True,
            "longer side to 224 by antialiased bicubic on floats, padded with black",
            hpsv2.load,
        ),
    )
}

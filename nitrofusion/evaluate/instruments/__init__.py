"""Metrics and the extractors whose features they read. A stand-in: the dictionaries are filled elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Metric:
    """A number of features [n, width] of pictures and, for some, of a reference.

    Attributes:
        better: ``higher`` or ``lower``.
        extractor: name in ``EXTRACTORS``.
        noise_floor: difference below which nobody should read one; None is unknown.
        least: fewest pictures it is defined for.
    """

    name: str
    title: str
    better: str
    extractor: str
    needs_reference: bool
    noise_floor: float | None
    least: int

    def value(self, features: np.ndarray, reference: np.ndarray | None) -> float:
        raise NotImplementedError

    def interval(
        self, features: np.ndarray, reference: np.ndarray | None, seed: int, resamples: int = 1000
    ) -> list[float]:
        raise NotImplementedError


@dataclass(frozen=True)
class Extractor:
    """What turns pictures (and prompts) into features.

    Attributes:
        weights: names in ``weights.WEIGHTS``.
        load: load(paths, device) -> f(images, prompts) -> float32 [n, width].
    """

    name: str
    implementation: str
    weights: tuple[str, ...]
    needs_prompt: bool
    resize: str
    load: Callable[[dict[str, Path], str], Callable[[list[Image.Image], list[str] | None], np.ndarray]]


METRICS: dict[str, Metric] = {}
EXTRACTORS: dict[str, Extractor] = {}

"""Means over seeds and paired differences, with 95 % intervals of Student's t."""

from __future__ import annotations

import functools
import math

import numpy as np


@functools.cache
def t95(df: int) -> float:
    """Two-sided 95 % quantile of Student's t with ``df`` >= 1 degrees of freedom.

    With t = sqrt(df) tan(a) its density is proportional to cos(a)^(df - 1): integrated on a fine grid, then read off.
    """
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (df - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(float(np.interp(0.95 * area[-1], area, angles)))


def summarize(values: list[float]) -> dict:
    """{mean, interval [low, high], n}; the interval is None for fewer than two values, which show no spread."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return {"mean": mean, "interval": None, "n": n}
    half = t95(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return {"mean": mean, "interval": [mean - half, mean + half], "n": n}


def paired(values: dict[int, float], reference: dict[int, float]) -> dict | None:
    """``summarize`` of value - reference over the seeds both have; None without one."""
    common = sorted(values.keys() & reference.keys())
    return summarize([values[seed] - reference[seed] for seed in common]) if common else None


def exceeds(difference: dict | None) -> bool:
    """Whether the interval of a difference leaves out zero."""
    if not difference or not difference["interval"]:
        return False
    low, high = difference["interval"]
    return not low <= 0 <= high


def by_seed(rows: list[dict], run: str, steps: int, metric: str) -> dict[int, float]:
    """Seed to value of one run at one number of inference steps."""
    found = [row for row in rows if row["run"] == run and row["steps"] == steps]
    return {row["seed"]: row[metric] for row in found if row.get(metric) is not None}

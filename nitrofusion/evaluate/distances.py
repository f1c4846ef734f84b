"""Distances between feature clouds beside Frechet's: KID, precision and recall, and what each picture adds to them.

The reference is held fixed: intervals say how far the number moves with other prompts and noises, not with another
reference. All sums are float64 and run over blocks of rows, so memory is that of ``_BLOCK`` rows of a distance matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
KID_SEED = 2020  # of the subsets: with these three, the numbers are torch-fidelity's
NEIGHBOURS = 3
_BLOCK = 1024


def kid(features: np.ndarray, reference: np.ndarray) -> float:
    """Kernel inception distance (Binkowski et al. 2018, arXiv 1801.01401): unbiased squared MMD.

    Kernel (x.y / d + 1)^3; the mean over ``KID_SUBSETS`` pairs of random subsets of ``KID_SUBSET_SIZE``, or of the
    smaller side where that is fewer. Unbiased, so that equal distributions score 0 on average, and below it sometimes.

    Args:
        features: [n, d]. reference: [m, d].
    """
    x, y = (np.asarray(v, np.float64) for v in (features, reference))
    size = min(KID_SUBSET_SIZE, len(x), len(y))
    rng = np.random.RandomState(KID_SEED)
    drawn = [(rng.choice(len(x), size, replace=False), rng.choice(len(y), size, replace=False))
             for _ in range(KID_SUBSETS)]  # fmt: skip
    if size == len(x) == len(y):
        drawn = drawn[:1]  # every subset is everything
    in_x, in_y = (_members([pair[k] for pair in drawn], len(v)) for k, v in enumerate((x, y)))
    within = _subset_sums(x, x, in_x, in_x, diagonal=False) + _subset_sums(y, y, in_y, in_y, diagonal=False)
    across = _subset_sums(x, y, in_x, in_y)
    return float(np.mean(within / (size * (size - 1)) - 2 * across / size**2))


def kid_interval(features: np.ndarray, reference: np.ndarray, resamples: int, seed: int) -> list[float]:
    """[low, high], the 95 % studentised bootstrap interval of the squared MMD of all pairs, put around ``kid``.

    Each resample's sum is compared with its own expectation, which counts a picture drawn twice as a pair with itself,
    and divided by its own standard error: the sum is skewed, and its spread grows with it.
    """
    x, y = (np.asarray(v, np.float64) for v in (features, reference))
    n = len(x)
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    drawn += n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=n * resamples).reshape(resamples, n).T
    counts = np.concatenate([np.ones((n, 1)), counts], 1)  # every picture once, then what each resample has
    pairs, added, squares, plain = (np.zeros(resamples + 1) for _ in range(4))
    for rows in _blocks(n):
        kernel, many = _kernel(x[rows], x), counts[rows]
        across, own = _kernel(x[rows], y).mean(1)[:, None], _kernel_diagonal(x[rows])[:, None]
        others = kernel @ counts - own
        pairs += (many * (others / (n * (n - 1)) - 2 * across / n)).sum(0)
        each = 2 * (others / (n - 1) - across)  # what a picture adds, to first order
        added, squares = added + (many * each).sum(0), squares + (many * each**2).sum(0)
        plain += (kernel.sum() / n - 2 * across.sum()) / n
    error = np.sqrt(np.maximum(squares / n - (added / n) ** 2, 0) / (n - 1))
    value = kid(features, reference)
    if error[0] <= 1e-12 * abs(plain[0]):
        return [value, value]
    some = error[1:] > 0
    low, high = np.quantile((pairs[1:][some] - plain[1:][some]) / error[1:][some], (0.025, 0.975))
    return [float(value - high * error[0]), float(value - low * error[0])]


def inside(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """[n] bool: whether each picture lies in a reference picture's ball, which reaches its k-th neighbour.

    The mean is the improved precision (Kynkaanniemi et al. 2019, arXiv 1904.06991), k = ``NEIGHBOURS``.
    """
    x, y = (np.asarray(v, np.float64) for v in (features, reference))
    reach = _neighbours(y)[1]
    return np.concatenate([(_squared(x[rows], y) <= reach).any(1) for rows in _blocks(len(x))])


def precision(features: np.ndarray, reference: np.ndarray) -> float:
    """Share of pictures among the reference's neighbours, see ``inside``."""
    return float(inside(features, reference).mean())


def recall(features: np.ndarray, reference: np.ndarray) -> float:
    """Share of reference pictures among the pictures' neighbours."""
    return float(inside(reference, features).mean())


def recall_pseudo_values(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """[n] jackknife pseudo-values of recall: each picture is left out once, exactly.

    Without picture i its ball is gone, and those that had it as a neighbour reach to the next one.
    """
    x, y = (np.asarray(v, np.float64) for v in (features, reference))
    near, reach, farther = _neighbours(x)
    n, covered, change = len(x), 0, np.zeros(len(x))
    for rows in _blocks(len(y)):
        apart = _squared(y[rows], x)
        holds, would_hold = apart <= reach, apart <= farther
        count = holds.sum(1)
        covered += int((count > 0).sum())
        for only, others in zip(holds[count == 1].argmax(1), would_hold[count == 1], strict=True):
            if not (near[others] == only).any():
                change[only] -= 1
        for others in would_hold[count == 0]:
            change[np.unique(near[others])] += 1
    return covered / len(y) - (n - 1) * change / len(y)


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, n, _BLOCK))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    k = x @ y.T / x.shape[1] + 1
    return k * k * k  # a power would go through logarithms


def _kernel_diagonal(x: np.ndarray) -> np.ndarray:
    return ((x**2).sum(1) / x.shape[1] + 1) ** 3


def _members(subsets: list[np.ndarray], n: int) -> np.ndarray:
    """[len(subsets), n] 1 where an item is in a subset, 0 elsewhere."""
    members = np.zeros((len(subsets), n))
    for row, subset in zip(members, subsets, strict=True):
        row[subset] = 1
    return members


def _subset_sums(x: np.ndarray, y: np.ndarray, in_x: np.ndarray, in_y: np.ndarray, diagonal: bool = True) -> np.ndarray:
    """[s] sums of the kernel over each subset's pairs; without ``diagonal`` not over an item with itself."""
    sums = np.zeros(len(in_x))
    for rows in _blocks(len(x)):
        sums += ((in_y @ _kernel(x[rows], y).T) * in_x[:, rows]).sum(1)
    return sums if diagonal else sums - in_x @ _kernel_diagonal(x)


def _squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[n, m] squared distances; from a middle, or what all features share would cost digits."""
    middle = y.mean(0)
    x, y = x - middle, y - middle
    return ((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T).clip(0)


def _neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of n > k + 1 points: its k nearest others [n, k], and the squared distances of the k-th and the next."""
    near, reach, farther = [], [], []
    for rows in _blocks(len(x)):
        apart = _squared(x[rows], x)
        own = np.arange(len(apart))
        apart[own, own + rows.start] = np.inf
        first = np.argpartition(apart, NEIGHBOURS, axis=1)[:, : NEIGHBOURS + 1]
        first = np.take_along_axis(first, np.take_along_axis(apart, first, 1).argsort(1), 1)
        distances = np.take_along_axis(apart, first, 1)
        near.append(first[:, :NEIGHBOURS])
        reach.append(distances[:, NEIGHBOURS - 1])
        farther.append(distances[:, NEIGHBOURS])
    return np.concatenate(near), np.concatenate(reach), np.concatenate(farther)

"""Distances against closed forms, brute force and other libraries; their intervals against synthetic truth."""

import math

import numpy as np
import pytest
import scipy.linalg

from nitrofusion.errors import InputError
from nitrofusion.evaluate import distances
from nitrofusion.evaluate.instruments import METRICS
from nitrofusion.evaluate.metrics import Frechet, mean_interval

TRIALS = 1000
# 95 % +- 3.5 standard deviations of the share in 1,000 trials: an interval of the nominal rate fails 1 run in 2,000.
SLACK = 3.5 * math.sqrt(0.95 * 0.05 / TRIALS)


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def with_moments(rng, n, mean, covariance):
    """[n, d] Gaussian draws moved so that their own mean and covariance are exactly these."""
    x = rng.standard_normal((n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def random_covariance(rng, d):
    a = rng.standard_normal((d, 2 * d))
    return a @ a.T / (2 * d)


# --- Frechet ---------------------------------------------------------------------------------------------------------


def test_frechet_is_the_closed_form_of_gaussians(rng):
    d = 12
    a, b, shift = rng.uniform(0.1, 3, d), rng.uniform(0.1, 3, d), rng.standard_normal(d)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]  # both covariances share these axes
    x = with_moments(rng, 90, shift, turn * a @ turn.T)
    y = with_moments(rng, 70, np.zeros(d), turn * b @ turn.T)
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert METRICS["fid"].value(x, y) == pytest.approx(expected, rel=1e-9)
    assert METRICS["fid"].value(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_of_one_feature(rng):
    x, y = rng.normal(3, 2, (30, 1)), rng.normal(1, 0.5, (40, 1))
    wanted = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert Frechet(y)(x) == pytest.approx(wanted, rel=1e-9)


def test_frechet_equals_scipys_matrix_root(rng):
    x, y = rng.standard_normal((80, 20)) @ random_covariance(rng, 20), rng.standard_normal((100, 20)) + 0.3
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    assert METRICS["fid"].value(x, y) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("n", [60, 15])  # with fewer pictures than features too
def test_frechet_influences_are_its_derivatives(rng, n):
    d, step = 20, 1e-5
    x, frechet = rng.standard_normal((n, d)) * 1.2, Frechet(rng.standard_normal((300, d)) + 0.2)
    value, added = frechet.with_influences(x)
    assert value == pytest.approx(frechet(x), abs=1e-6)  # roots of eigenvalues that are 0 but for rounding

    def weighted(weights):  # the distance of a weighted sample, by scipy
        mean = weights @ x
        covariance = (x - mean).T * weights @ (x - mean) * n / (n - 1)
        values = np.linalg.eigvalsh(frechet.root @ covariance @ frechet.root).clip(0)
        values = np.sort(values)[-min(d, n - 1) :]
        return ((mean - frechet.mean) ** 2).sum() + np.trace(covariance) + frechet.trace - 2 * np.sqrt(values).sum()

    even = np.full(n, 1 / n)
    slopes = [(weighted(even + step * (one - even)) - weighted(even - step * (one - even))) / (2 * step)
              for one in np.eye(n)]  # fmt: skip
    assert added == pytest.approx(np.array(slopes), abs=1e-4 * np.abs(added).max())


# --- KID -------------------------------------------------------------------------------------------------------------


def brute_mmd(x, y):
    def k(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_is_the_sum_over_all_pairs(rng):
    x, y = rng.standard_normal((60, 7)), rng.standard_normal((60, 7)) + 0.5
    assert METRICS["kid"].value(x, y) == pytest.approx(brute_mmd(x, y), rel=1e-9)


def test_kid_is_the_mean_over_the_seeded_subsets(rng, monkeypatch):
    monkeypatch.setattr(distances, "KID_SUBSETS", 6)
    monkeypatch.setattr(distances, "KID_SUBSET_SIZE", 20)
    monkeypatch.setattr(distances, "_BLOCK", 16)
    x, y = rng.standard_normal((55, 5)), rng.standard_normal((70, 5)) * 1.1
    draw, values = np.random.RandomState(distances.KID_SEED), []
    for _ in range(6):
        of_x = draw.choice(55, 20, replace=False)
        of_y = draw.choice(70, 20, replace=False)
        values.append(brute_mmd(x[of_x], y[of_y]))
    assert METRICS["kid"].value(x, y) == pytest.approx(np.mean(values), rel=1e-9)


def test_kid_is_unbiased_for_the_closed_form_of_gaussians(rng):
    # One feature: (xy + 1)^3 = sum C(3, r) x^r y^r, so the squared MMD is sum C(3, r) (E x^r - E y^r)^2.
    mean, deviation = 0.4, 1.3
    moments = [mean, mean**2 + deviation**2, mean**3 + 3 * mean * deviation**2]
    truth = sum(c * (a - b) ** 2 for c, a, b in zip((3, 3, 1), moments, (0, 1, 0), strict=True))
    found = [distances.kid(rng.normal(mean, deviation, (50, 1)), rng.standard_normal((50, 1))) for _ in range(600)]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 4 * error


def test_kids_interval_is_the_studentised_bootstrap(rng, monkeypatch):
    """Resample by resample, drawn the same way."""
    monkeypatch.setattr(distances, "_BLOCK", 16)
    n, resamples = 52, 40
    x, y = rng.standard_normal((n, 4)), rng.standard_normal((n, 4)) + 0.2

    def apart(rows):  # unbiased over positions, without the reference's own term; and its standard error
        k, across = (rows @ rows.T / 4 + 1) ** 3, ((rows @ y.T / 4 + 1) ** 3).mean(1)
        k[np.arange(n), np.arange(n)] = 0
        each = 2 * (k.sum(1) / (n - 1) - across)
        return k.sum() / (n * (n - 1)) - 2 * across.mean(), each.std() / math.sqrt(n - 1)

    expected = ((x @ x.T / 4 + 1) ** 3).mean() - 2 * ((x @ y.T / 4 + 1) ** 3).mean()
    t = []
    for again in np.random.default_rng(7).integers(n, size=(resamples, n)):
        value, error = apart(x[again])
        t.append((value - expected) / error)
    low, high = np.quantile(t, (0.025, 0.975))
    value, error = distances.kid(x, y), apart(x)[1]
    found = METRICS["kid"].interval(x, y, seed=7, resamples=resamples)
    assert found == pytest.approx([value - high * error, value - low * error], rel=1e-9)


# --- precision and recall --------------------------------------------------------------------------------------------


def brute_share(inner, outer, k=3):
    """Share of ``inner`` within some ball of ``outer``, ball by ball."""
    hit = 0
    reaches = [sorted(float(np.linalg.norm(a - b)) for j, b in enumerate(outer) if j != i)[k - 1]
               for i, a in enumerate(outer)]  # fmt: skip
    for a in inner:
        hit += any(np.linalg.norm(a - b) <= reach for b, reach in zip(outer, reaches, strict=True))
    return hit / len(inner)


def test_precision_and_recall_are_those_of_the_definition(rng, monkeypatch):
    monkeypatch.setattr(distances, "_BLOCK", 17)
    x, y = rng.standard_normal((60, 3)) * 0.7, rng.standard_normal((75, 3))
    assert METRICS["precision"].value(x, y) == pytest.approx(brute_share(x, y))
    assert METRICS["recall"].value(x, y) == pytest.approx(brute_share(y, x))


def test_what_all_features_share_costs_precision_no_digits(rng):
    x, y = rng.normal(size=(40, 12)), rng.normal(0.4, 1.2, size=(45, 12))
    for shift in (1e3, 1e8):
        a, b = x + shift, y + shift  # what is left of x and y then is exact in a difference
        assert distances.precision(a, b) == pytest.approx(brute_share(a, b))
        assert distances.recall(a, b) == pytest.approx(brute_share(b, a))


def test_recall_pseudo_values_leave_each_picture_out(rng, monkeypatch):
    monkeypatch.setattr(distances, "_BLOCK", 17)
    x, y = rng.standard_normal((50, 4)) * 0.8, rng.standard_normal((80, 4))
    total, pseudo = brute_share(y, x), distances.recall_pseudo_values(x, y)
    for i in range(len(x)):
        without = brute_share(y, np.delete(x, i, 0))
        assert pseudo[i] == pytest.approx(50 * total - 49 * without)


# --- a second library ------------------------------------------------------------------------------------------------


def test_distances_equal_torch_fidelitys(rng):
    try:
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs torch-fidelity and a torchvision that imports beside this torch: {error}")
    import torch

    x, y = (rng.standard_normal((n, 16)) * s for n, s in ((1200, 1.2), (1100, 1.0)))
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    fid = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert METRICS["fid"].value(x, y) == pytest.approx(fid["frechet_inception_distance"], rel=1e-6)
    assert METRICS["kid"].value(x, y) == pytest.approx(
        kid_features_to_metric(a, b, verbose=False)["kernel_inception_distance_mean"], rel=1e-6
    )
    shares = prc_features_to_metric(a, b, verbose=False)
    assert METRICS["precision"].value(x, y) == pytest.approx(shares["precision"], abs=2e-3)
    assert METRICS["recall"].value(x, y) == pytest.approx(shares["recall"], abs=2e-3)


# --- intervals -------------------------------------------------------------------------------------------------------


def coverage(draw, metric, reference, truth):
    held = 0
    for trial in range(TRIALS):
        low, high = metric.interval(draw(), reference, seed=trial, resamples=400)
        held += low <= truth <= high
    return held / TRIALS


@pytest.mark.parametrize("kind", ["even", "skewed"])
def test_intervals_of_means_hold_the_truth_at_their_rate(rng, kind):
    draws = {"even": lambda: rng.normal(0.3, 0.1, (60, 1)), "skewed": lambda: rng.gamma(2.0, 1.0, (60, 1))}
    truth = {"even": 0.3, "skewed": 2.0}[kind]
    assert coverage(draws[kind], METRICS["clip_score"], None, truth) == pytest.approx(0.95, abs=SLACK)


@pytest.mark.parametrize("name", ["fid", pytest.param("kid", marks=pytest.mark.slow)])
def test_intervals_of_distances_hold_the_truth_at_their_rate(rng, name):
    metric, d, n = METRICS[name], 8, 200  # as many of the reference: KID then has one subset, and is quick
    scale = np.linspace(0.5, 1, d)

    def features(n, scale, shift):  # never below 0, as the network's are
        return np.maximum(rng.standard_normal((n, d)) * scale + shift, 0)

    reference = features(n, scale, 0.4)
    truth = np.mean([metric.value(features(n, 1.15 * scale, 0.7), reference) for _ in range(2000)])  # at n pictures
    found = coverage(lambda: features(n, 1.15 * scale, 0.7), metric, reference, truth)
    assert found == pytest.approx(0.95, abs=SLACK)


@pytest.mark.parametrize("name, n, above", [("precision", 150, SLACK), ("recall", 80, 1.0)])
def test_intervals_of_precision_hold_the_truth_and_recalls_hold_it_more_often(rng, name, n, above):
    metric, reference = METRICS[name], rng.standard_normal((100, 6))

    def draw():
        return rng.standard_normal((n, 6)) * 0.9

    truth = np.mean([metric.value(draw(), reference) for _ in range(2000)])
    assert 0.95 - SLACK <= coverage(draw, metric, reference, truth) <= 0.95 + above


def test_intervals_repeat_with_their_seed_and_have_no_width_for_equal_scores(rng):
    scores = rng.standard_normal((50, 1))
    metric = METRICS["image_reward"]
    assert metric.interval(scores, None, seed=3) == metric.interval(scores, None, seed=3)
    assert metric.interval(scores, None, seed=3) != metric.interval(scores, None, seed=4)
    assert mean_interval(np.full(20, 0.25), 100, 0) == [0.25, 0.25]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_too_few_pictures_are_refused(rng, name):
    metric = METRICS[name]
    width = 6 if metric.needs_reference else 1
    few, enough = rng.standard_normal((3, width)), rng.standard_normal((60, width))
    with pytest.raises(InputError, match=rf"{name} must be given >= \d+ pictures .* got 3$"):
        metric.value(few, enough)
    with pytest.raises(InputError, match="got 3$"):
        metric.interval(few, enough, seed=0)
    if metric.needs_reference:
        with pytest.raises(InputError, match="reference pictures .* got 3$"):
            metric.value(enough, few)


def test_features_that_do_not_fit_are_refused(rng):
    rows = rng.standard_normal((60, 4))
    with pytest.raises(InputError, match="reference's features, got none"):
        METRICS["fid"].value(rows, None)
    with pytest.raises(InputError, match="rows of width 4"):
        METRICS["fid"].value(rows, rows[:, :3])
    with pytest.raises(InputError, match="rows of width 1"):
        METRICS["aesthetic"].value(rows)
    with pytest.raises(InputError, match="NaN or infinity in pictures"):
        METRICS["kid"].value(np.where(rows > 2, np.nan, rows) + np.where(np.arange(60) == 0, np.inf, 0)[:, None], rows)

"""The metrics against independent references, and the world suite against pictures whose quality is known."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import binomtest

from nitrofusion.errors import InputError
from nitrofusion.evaluate import evaluate, world
from nitrofusion.evaluate.metrics import Frechet, bootstrap_interval, pairwise_distance, sharpness, wilson_interval
from nitrofusion.world.judge import Judge
from nitrofusion.world.render import render
from nitrofusion.world.scenes import ATTRIBUTES, Scenes, parse_caption, sample_scenes


@pytest.fixture(autouse=True)
def few_reference_scenes(monkeypatch):
    monkeypatch.setattr(world, "REFERENCE_SCENES", 200)
    monkeypatch.setattr(world, "_references", {})


@pytest.fixture(scope="module")
def judge():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Judge()


class ReadingJudge(Judge):
    """Reads the attributes that ``write`` left in the first pixels."""

    def forward(self, images):
        values = images[:, 0, 0, : len(ATTRIBUTES)].mul(10).round().long()
        parts = [
            torch.nn.functional.one_hot(values[:, k].clamp(0, n - 1), n) for k, n in enumerate(ATTRIBUTES.values())
        ]
        return torch.cat(parts, 1).float(), images[:, :, ::4, ::4].flatten(1)[:, : self.num_features]


def write(prompts, seeds, wrong=()):
    """Pictures that carry their prompt's attributes; color_1 is wrong where the seed ends in a digit of ``wrong``."""
    images = torch.stack([torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds])
    truth = torch.stack([torch.from_numpy(parse_caption(p)) for p in prompts])
    truth[[s % 10 in wrong for s in seeds], 3] ^= 1
    images[:, 0, 0, : len(ATTRIBUTES)] = truth / 10
    return images


def paint(prompts, seeds):
    """Real scenes of the prompts; geometry and light from the seeds."""
    images = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        layout, background, *looks = parse_caption(prompt)
        looks = np.array(looks).reshape(1, 2, 3).clip(0)
        relation = (-1, 0, 2)[layout]
        donors = sample_scenes(64, seed)
        donor = donors[np.flatnonzero(donors.relation == relation)[:1]]
        images.append(
            render(
                Scenes(
                    np.array([relation]), np.array([background]), looks[..., 0], looks[..., 1], looks[..., 2],
                    donor.center, donor.radius, donor.light, donor.terse,
                )
            )
        )  # fmt: skip
    return torch.cat(images)


def same(prompts, seeds):
    return paint(prompts, [7] * len(seeds))


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize("n", [300, 12])  # 12 < 20 dimensions: a singular covariance
def test_frechet_matches_the_matrix_square_root(n):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(n, 20)) @ rng.normal(size=(20, 20)) + rng.normal(size=20)
    b = rng.normal(size=(400, 20)) @ rng.normal(size=(20, 20))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert Frechet(b)(a) == pytest.approx(expected, rel=1e-5)


def test_frechet_of_a_set_to_itself_is_zero_and_of_a_shift_is_its_square():
    x = np.random.default_rng(1).normal(size=(200, 8))
    assert Frechet(x)(x) == pytest.approx(0, abs=1e-8)
    assert Frechet(x)(x + 3) == pytest.approx(9 * 8)


@pytest.mark.parametrize(("right", "total"), [(0, 5), (5, 5), (1, 2), (37, 50), (499, 500)])
def test_wilson_matches_scipy(right, total):
    expected = binomtest(right, total).proportion_ci(method="wilson")
    assert wilson_interval(right, total) == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_a_share_of_none_may_be_any():
    assert wilson_interval(0, 0) == [0.0, 1.0]


def test_bootstrap_interval_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(2).normal(5, 2, size=400)
    low, high = bootstrap_interval(lambda i: float(x[i].mean()), 400, float(x.mean()), resamples=2000, seed=0)
    assert (low + high) / 2 == pytest.approx(x.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / math.sqrt(400), rel=0.08)


def test_sharpness_matches_a_loop():
    image = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = torch.zeros(2, dtype=torch.float64)
    for n in range(2):
        values = [
            abs(4 * p[y, x] - p[y - 1, x] - p[y + 1, x] - p[y, x - 1] - p[y, x + 1])
            for p in image[n]
            for y in range(1, 5)
            for x in range(1, 4)
        ]
        expected[n] = sum(values) / len(values)
    torch.testing.assert_close(sharpness(image), expected)


def test_pairwise_distance_matches_a_loop():
    f = torch.randn(3, 4, 7, dtype=torch.float64)
    expected = [np.mean([np.linalg.norm(g[i] - g[j]) for i in range(4) for j in range(i)]) for g in f.numpy()]
    torch.testing.assert_close(pairwise_distance(f), torch.tensor(expected))


# ---------------------------------------------------------------- suite world


def test_accuracy_counts_pictures_with_every_attribute_right():
    result = world.evaluate_world(write, num_images=50, judge=ReadingJudge())
    assert result["accuracy"] == 1.0 and set(result["per_attribute"].values()) == {1.0}
    assert set(result["per_attribute"]) == set(ATTRIBUTES)

    first = world.EVAL_SEED_BASE * 1_000_003
    result = world.evaluate_world(lambda p, s: write(p, s, wrong=(1, 2)), num_images=50, judge=ReadingJudge())
    expected = sum((first + i) % 10 not in (1, 2) for i in range(50)) / 50
    assert result["accuracy"] == result["per_attribute"]["color_1"] == expected
    assert result["per_attribute"]["shape_2"] == 1.0
    low, high = result["accuracy_interval"]
    assert low < expected < high


def test_real_pictures_score_as_real(judge):
    result = world.evaluate_world(paint, num_images=100, judge=judge)
    assert result["diversity"] == pytest.approx(1, abs=0.12)
    assert result["frechet"] == pytest.approx(result["frechet_floor"], rel=0.3)
    assert result["sharpness"] == pytest.approx(result["sharpness_real"], rel=0.05)
    for name in ("accuracy", "frechet", "sharpness", "diversity"):
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high
    noise = world.evaluate_world(lambda p, s: torch.randn(len(p), 3, 32, 32), num_images=100, judge=judge)
    assert noise["frechet"] > 1.5 * result["frechet"] and noise["sharpness"] > 3 * result["sharpness"]


def test_one_picture_per_prompt_has_no_diversity(judge):
    result = world.evaluate_world(same, num_images=4, judge=judge)
    assert result["diversity"] == 0.0 and result["diversity_interval"] == [0.0, 0.0]


def test_result_is_deterministic_json_whatever_the_batch_size(judge):
    a, b = (world.evaluate_world(write, 20, seed=3, judge=judge, batch_size=n) for n in (20, 7))
    assert a.pop("seconds_per_image") > 0 and b.pop("seconds_per_image") > 0
    flat = lambda r: json.loads(json.dumps(r), parse_float=lambda v: round(float(v), 4))  # noqa: E731
    assert flat(a) == flat(b)
    other = world.evaluate_world(write, 20, seed=4, judge=judge)
    assert other["frechet"] != a["frechet"]


def test_draw_gets_fresh_captions_and_distinct_seeds_in_batches(judge):
    calls = []

    def draw(prompts, seeds):
        calls.append((prompts, seeds))
        return write(prompts, seeds)

    world.evaluate_world(draw, num_images=30, seed=2, judge=judge, batch_size=25)
    prompts = [p for call in calls for p in call[0]]
    seeds = [s for call in calls for s in call[1]]
    assert max(len(call[0]) for call in calls) == 25
    assert prompts[:30] == sample_scenes(30, world.EVAL_SEED_BASE + 2).captions()
    assert len(set(seeds)) == len(seeds) == 30 + world.DIVERSITY_PROMPTS * world.DIVERSITY_NOISES
    training = range(world.MAX_SEED * 1_000_003)
    assert not any(s in training for s in seeds) and max(seeds) < 2**63


def test_real_twins_keep_attributes_and_change_the_rest():
    scenes = sample_scenes(40, 5)
    twins = world.real_twins(scenes)
    assert twins.captions() == scenes.captions()
    assert (twins.attributes() == scenes.attributes()).all()
    assert (twins.center != scenes.center).any((1, 2)).all()
    assert len(np.unique(twins.light)) == 40


# ---------------------------------------------------------------- errors and files


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_images": 0}, "evaluate: num_images must be >= 2, got 0"),
        ({"num_images": 2.5}, "evaluate: num_images must be >= 2, got 2.5"),
        ({"seed": -1}, "evaluate: seed must be >= 0, got -1"),
        ({"seed": 10**6}, "evaluate: seed must be <= 999_999, got 1000000"),
        ({"suite": "wrld"}, "evaluate: suite must be one of world, coco5k, prompts, folder, got 'wrld'"),
        ({"batch_size": 0}, "evaluate: batch_size must be >= 1, got 0"),
    ],
)
def test_bad_arguments_say_what_was_expected(kwargs, message):
    with pytest.raises(InputError) as error:
        evaluate("no such model", **kwargs)
    assert str(error.value) == message


def test_pictures_of_another_size_are_refused(judge):
    with pytest.raises(InputError, match=r"pictures must be \(2, 3, 32, 32\) for suite world, got \(2, 3, 64, 64\)"):
        world.evaluate_world(lambda p, s: torch.zeros(len(p), 3, 64, 64), num_images=2, judge=judge)


def test_judge_file_is_checked_and_named(tmp_path, judge):
    from safetensors.torch import save_file

    path = tmp_path / "judge.safetensors"
    with pytest.raises(InputError, match="judge must be the weights of a world judge"):
        world.load_judge(path)
    path.write_bytes(b"not one")
    with pytest.raises(InputError, match="judge must be the weights of a world judge"):
        world.load_judge(path)
    save_file(judge.state_dict(), path)
    assert world.judge_digest(world.load_judge(path)) == world.judge_digest(judge) != world.judge_digest(Judge())


def test_evaluate_draws_with_the_engine_and_writes_json(tmp_path, monkeypatch, judge):
    class Engine:
        def generate(self, prompts, num_inference_steps, seed, output_type, batch_size):
            assert (num_inference_steps, output_type, batch_size) == (4, "pt", 100)
            return write(prompts, seed)

    monkeypatch.setattr("nitrofusion.engine.load", lambda model, device, backend: Engine())
    monkeypatch.setattr(world, "load_judge", lambda: judge)
    path = tmp_path / "new" / "result.json"
    result = evaluate("world", num_images=4, num_inference_steps=4, json_path=path)
    assert json.loads(path.read_text()) == result
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    assert (result["suite"], result["model"], result["num_inference_steps"]) == ("world", "world", 4)


def test_the_public_name_is_the_function_whatever_was_imported_before():
    import nitrofusion
    import nitrofusion.evaluate.metrics  # noqa: F401

    with pytest.raises(InputError, match="suite must be one of"):
        nitrofusion.evaluate("world", suite="imagenet")

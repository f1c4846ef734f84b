"""What a recipe may be told, and what it needs, is refused before any weight is read."""

import dataclasses

import pytest

from nitrofusion import recipes
from nitrofusion.config import TrainConfig
from nitrofusion.errors import InputError
from nitrofusion.pool import PoolConfig
from nitrofusion.train.plan import preflight

from ..tiny import tiny_folder

CONFIG = TrainConfig(device="cpu", batch_size=2)


def test_options_are_the_recipes_own():
    made = recipes.options(dataclasses.replace(CONFIG, options={"r1_weight": 1, "misaligned_weight": 0.5}))
    assert (made.r1_weight, made.misaligned_weight) == (1, 0.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r1_wait": 1.0}, "options of nitrofusion must be among r1_weight, misaligned_weight, got 'r1_wait'"),
        ({"r1_weight": "much"}, "options.r1_weight must be a number, got 'much'"),
        ({"r1_weight": True}, "options.r1_weight must be a number, got True"),
        ({"r1_weight": -1.0}, "options.r1_weight must be >= 0, got -1.0"),
        ({"r1_weight": float("inf")}, "options.r1_weight must be made of text or finite numbers, got inf"),
        ({"r1_weight": [[1]]}, "options.r1_weight must be made of text or finite numbers, got "),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        recipes.options(dataclasses.replace(CONFIG, options=options))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"recipe": "regression", "options": {"r1_weight": 1.0}}, "options of regression must be among nothing"),
        ({"teacher_samples": "none"}, "teacher_samples must be cache or online for nitrofusion .or give images., got"),
        ({"recipe": "regression", "teacher_samples": "none", "images": "world"}, "cache or online for regression, got"),
        ({"images": "world", "prompts": "prompts.txt"}, "prompts must be unset beside images"),
        ({"images": "nowhere"}, "images: nowhere must be a folder with metadata.jsonl, got nothing"),
        ({"lr": float("inf")}, "config: lr must be a finite number, got inf"),
        ({"guidance_scale": float("inf")}, "config: guidance_scale must be a finite number, got inf"),
        ({"pool": PoolConfig(width=100)}, "pool: width must be a multiple of its 12 groups, got 100"),
        ({"pool": PoolConfig(t_star_weights=(float("inf"), 1, 1, 1))}, "pool.t_star_weights must be several numbers"),
        ({"pool": PoolConfig(logit_init=float("inf"))}, "pool.logit_init must be a finite number, got inf"),
        ({"pool": PoolConfig(tasks=("local-cond",) * 2)}, "pool: tasks must be each named once, got"),
        ({"recipe": "add", "options": {"augment": [["color"]]}}, "options.augment must be made of text or finite"),
        ({"lora_rank": -1}, "lora_rank must be >= 0, got -1"),
        ({"lr": 10**400}, "config: lr must be a finite number, got 1000"),
        ({"options": {"r1_weight": 10**400}}, "options.r1_weight must be made of text or finite numbers, got 1000"),
        ({"num_previews": 65}, "num_previews must be in 0..64, got 65"),
        ({"discriminator_warmup": 1000}, "discriminator_warmup must leave one of 1000 steps to the student, which is"),
        ({"stages": (5, 1), "discriminator_warmup": 1, "generator_interval": 6}, "of generator_interval, got 1"),
        ({"recipe": "add", "options": {"student_timesteps": [True, 3]}}, "must be a list, each a whole number, got"),
        ({"recipe": "add", "options": {"augment": [3]}}, "options.augment must be a list, each text, got"),
        ({"recipe": "add", "options": {"timestep_weights": [True] * 4}}, "must be a list, each text or a number, got"),
        ({"recipe": "add", "options": {"feature_size": 10**9}}, "options.feature_size must be in 0..4096, got 1000000"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adamw8bit, got 'sgd'"),
        ({"options": {"misaligned_weight": 1.0}, "batch_size": 1}, "misaligned_weight must be 0 with batch_size 1"),
    ],
)
def test_what_a_run_lacks_is_named_before_work(changes, message, tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.getbasetemp() / "options-teacher")
    base = dataclasses.replace(CONFIG, teacher=str(folder), init=None, crop_size=8, output=str(folder / "run"))
    preflight(base)
    with pytest.raises(InputError, match=message):
        preflight(dataclasses.replace(base, **changes))
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"discriminator_warmup": 999},
        {"discriminator_warmup": 5, "generator_interval": 2, "stages": (7,)},
        {"discriminator_warmup": 40, "recipe": "regression", "stages": (3,)},  # which has it from the run it controls
    ],
)
def test_a_student_that_is_trained_once_is_enough(changes, tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.getbasetemp() / "options-teacher")
    base = dataclasses.replace(CONFIG, teacher=str(folder), init=None, crop_size=8, output=str(folder / "run"))
    preflight(dataclasses.replace(base, **changes))

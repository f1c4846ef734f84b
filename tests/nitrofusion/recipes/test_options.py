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
        ({"lr": float("inf")}, "config: lr must be finite, got inf"),
        ({"guidance_scale": float("inf")}, "config: guidance_scale must be finite, got inf"),
        ({"pool": PoolConfig(width=100)}, "pool: width must be a multiple of its 12 groups, got 100"),
        ({"pool": PoolConfig(t_star_weights=(float("inf"), 1, 1, 1))}, "t_star_weights must be 4 numbers >= 0, got"),
        ({"pool": PoolConfig(logit_init=float("inf"))}, "logit_init must be >= 0 and finite, got inf"),
        ({"pool": PoolConfig(tasks=("local-cond",) * 2)}, "pool: tasks must be each named once, got"),
        ({"recipe": "add", "options": {"augment": [["color"]]}}, "options.augment must be made of text or finite"),
        ({"lora_rank": -1}, "lora_rank must be >= 0, got -1"),
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

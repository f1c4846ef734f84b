"""Teacher samples drawn by Ray while its worker is killed, against those drawn in one process."""

import os
from pathlib import Path

import pytest

from benchmarks.prepare import kill_workers
from nitrofusion import data, prepare_ray, shards
from nitrofusion.config import TrainConfig
from nitrofusion.errors import InputError

from .tiny import tiny_folder


@pytest.fixture(scope="module")
def ray():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise, which a busy machine starves
    ray = pytest.importorskip("ray", reason="needs ray (the extra ray)")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_killed_worker_changes_no_byte_and_leaves_no_file(ray, tmp_path):
    teacher = tiny_folder(tmp_path / "teacher")
    config = TrainConfig(
        teacher=str(teacher), num_teacher_samples=4 * data.SHARD, teacher_steps=1, guidance_scale=1.0,
        teacher_batch_size=data.SHARD, precision="fp32", device="cpu", init=None,
    )  # fmt: skip
    found = kill_workers(config, tmp_path, kills=1)
    assert sum(found["kills"].values()) == 1 and found["orphans"] == 0 and found["equal"], found


def tiny_config(**changes) -> TrainConfig:
    small = dict(num_teacher_samples=2, teacher_steps=1, guidance_scale=1.0, teacher_batch_size=2)
    return TrainConfig(precision="fp32", device="cpu", init=None, **small | changes)


def test_a_worker_with_other_weights_or_prompts_writes_nothing(tmp_path):
    """What the task itself does on a node where other files lie at the same paths."""
    asked, other = (tiny_folder(tmp_path / name, seed=seed) for seed, name in enumerate(("asked", "other")))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\n")
    config = tiny_config(teacher=str(asked), prompts=str(prompts))
    settings = data.sample_settings(config, asked)
    values, _ = prepare_ray._sent(config, asked)
    (folder := tmp_path / "samples").mkdir()
    with pytest.raises(InputError, match="other of .* of teacher [0-9a-f]{64}, got [0-9a-f]{64}"):
        prepare_ray._draw(values, str(other), str(folder), settings, 0)
    prompts.write_text("a square\n")
    with pytest.raises(InputError, match="must draw the samples asked for, of prompts [0-9a-f]{64}, got [0-9a-f]{64}"):
        prepare_ray._draw(values, str(asked), str(folder), settings, 0)
    assert not list(folder.iterdir())
    prompts.write_text("a circle\n")
    digest = prepare_ray._draw(values, str(asked), str(folder), settings, 0)
    assert shards.read_index(shards.shard_path(folder, 0), settings, 2, whole=True) and len(digest) == 64


def test_paths_mean_the_same_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_folder(Path("teacher"))
    Path("prompts.txt").write_text("a circle\n")
    config = tiny_config(teacher="teacher", prompts="prompts.txt")
    settings, sent = data.sample_settings(config, Path("teacher")), prepare_ray._sent(config, Path("teacher"))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    assert prepare_ray._draw(*sent, str(tmp_path), settings, 0)
    assert '"images": "world"' in prepare_ray._sent(tiny_config(images="world"), Path("teacher"))[0]

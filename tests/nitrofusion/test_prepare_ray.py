"""Teacher samples drawn by Ray while its worker is killed, against those drawn in one process."""

import os

import pytest

from benchmarks.prepare import kill_workers
from nitrofusion import data
from nitrofusion.config import TrainConfig

from .tiny import tiny_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise, which a busy machine starves
    ray = pytest.importorskip("ray", reason="needs ray (the extra ray)")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


def test_a_killed_worker_changes_no_byte_and_leaves_no_file(ray, tmp_path):
    teacher = tiny_folder(tmp_path / "teacher")
    config = TrainConfig(
        teacher=str(teacher), num_teacher_samples=4 * data.SHARD, teacher_steps=1, guidance_scale=1.0,
        teacher_batch_size=data.SHARD, precision="fp32", device="cpu", init=None,
    )  # fmt: skip
    found = kill_workers(config, tmp_path, kills=1)
    assert sum(found["kills"].values()) == 1 and found["orphans"] == 0 and found["equal"], found

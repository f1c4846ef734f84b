"""Runs that go on elsewhere, twice at once, in a thread; names and settings that are none."""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import nitrokernels
from nitrofusion import checkpoint, cli, data
from nitrofusion.cli import main
from nitrofusion.config import TrainConfig
from nitrofusion.engine.calibrate import calibrate
from nitrofusion.engine.source import find
from nitrofusion.errors import CheckpointError, InputError
from nitrofusion.pool import PoolConfig
from nitrofusion.train import prepare, run_folder, train
from nitrofusion.train.run_folder import claim_folder, hold, other_rounding, thin_previews

from .kills import digest
from .tiny import tiny_folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    root = tmp_path_factory.mktemp("run_folder")
    return TrainConfig(
        output=str(root / "run"),
        teacher=str(tiny_folder(root / "teacher")),
        init=None,
        cache=str(root / "cache"),
        num_teacher_samples=4,
        teacher_steps=2,
        batch_size=1,
        accumulation=1,
        stages=(4,),
        crop_size=8,
        pool=PoolConfig(heads_per_cell=1, width=8, max_depth=1),
        precision="fp32",
        num_previews=0,
        checkpoint_every=2,
        device="cpu",
    )


@pytest.fixture(scope="module")
def run(config):
    return train(config)


@pytest.fixture
def broken(config, run, tmp_path) -> TrainConfig:
    """The run as a kill after step 3 leaves it, moved."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    return dataclasses.replace(config, output=str(tmp_path / "run"))


def test_a_moved_run_goes_on_in_a_thread_and_by_another_spelling(broken, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(broken.cache, tmp_path / "elsewhere")
    config = dataclasses.replace(broken, output="../" + tmp_path.name + "/run", cache="elsewhere")
    failed = []

    def work():
        try:
            train(config)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and digest(tmp_path / "run") == digest(run)


def test_relative_paths_hold_from_any_folder(config, tmp_path, monkeypatch):
    """A run's teacher and prompts are found, and may be spelled otherwise, wherever it is drawn with or resumed."""
    (tmp_path / "a b").mkdir()
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    os.symlink(config.teacher, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    relative = {"teacher": "teacher", "prompts": "./prompts.txt", "cache": None, "lora_rank": 2}
    config = dataclasses.replace(config, output="run", stages=(1,), **relative)
    train(config)
    monkeypatch.chdir(tmp_path / "a b")
    assert find("../run").folder.samefile("../teacher")
    again = dataclasses.replace(config, output="../run", teacher="../teacher", prompts="../prompts.txt")
    assert train(again) == Path("../run")
    (tmp_path / "a b" / "prompts.txt").write_text("a blue ring\n")
    with pytest.raises(InputError, match="this run's own, got a run with prompts"):
        train(dataclasses.replace(again, prompts="prompts.txt"))


def test_adapters_lie_on_the_unet_that_they_were_trained_on(config, tmp_path):
    """Without ``init`` the student is a copy of the teacher's, which ``teacher_unet`` may have replaced."""
    other = tiny_folder(tmp_path / "other") / "unet"
    made = dataclasses.replace(
        config, output=str(tmp_path / "run"), cache=None, stages=(1,), lora_rank=2, teacher_unet=str(other)
    )
    assert find(train(made)).unet_files == [other / "diffusion_pytorch_model.safetensors"]


def test_a_checkpoint_under_another_steps_name_is_refused(broken):
    """Saving that step would keep it, as one that was sealed already."""
    folder = Path(broken.output) / "checkpoints"
    shutil.copytree(folder / "step-000002", folder / "step-000004")
    with pytest.raises(CheckpointError, match="step-000004 must hold this run's state, got step 2 under another one's"):
        train(broken)


def test_checkpoints_that_cannot_be_listed_are_not_none(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {}, {})

    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(CheckpointError, match="checkpoints must be a folder that can be read, got Permission denied"):
        checkpoint.latest(tmp_path)


def test_one_process_at_a_time(config, run, monkeypatch):
    """Another one waits for a while and is refused; a death frees the folder."""
    code = "import sys; from pathlib import Path; from nitrofusion.train.run_folder import hold\n"
    code += "lock = hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr(run_folder, "_PATIENCE", 0.2)
        with pytest.raises(InputError, match="must be of one run at a time, got one that another process trains in"):
            train(config)
        other.kill()
        other.wait()
        hold(run).close()
    finally:
        other.kill()
        other.communicate()


def test_pictures_of_others_among_previews(tmp_path):
    for name in ("step-best.png", *(f"step-{k:06d}.png" for k in range(70))):
        (tmp_path / name).write_bytes(b"")
    thin_previews(tmp_path)
    assert (tmp_path / "step-best.png").exists() and len(list(tmp_path.iterdir())) < 70


def test_another_machines_rounding_is_told(config, run):
    folder = run / "checkpoints" / "step-000004"
    state = checkpoint.load(folder)[1]
    own = {"device": "cpu", "threads": torch.get_num_threads()}
    assert other_rounding(folder, state, own) == [] == other_rounding(folder, {}, own)
    (line,) = other_rounding(folder, state, own | {"threads": 64})
    assert f"is of threads {own['threads']} instead of 64, so rounding may differ" in line


def test_tensorboard_has_each_step_once(config, broken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(broken.output)
    config = dataclasses.replace(broken, tensorboard=True)
    train(config)
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    train(config)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("images_per_second")] == [3, 4]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": "4"}, "batch_size must be an integer, got '4'"),
        ({"batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"accumulation": True}, "accumulation must be an integer, got True"),
        ({"lr": math.inf}, "lr must be a finite number, got inf"),
        ({"guidance_scale": math.inf}, "guidance_scale must be a finite number, got inf"),
        ({"betas": 0.5}, "betas must be several numbers, each a finite number, got 0.5"),
        ({"stages": (1.5,)}, "stages must be several numbers, each an integer, got"),
        ({"ema_decay": None}, "ema_decay must be a finite number, got None"),
        ({"pool": None}, "pool must be a PoolConfig, got None"),
        ({"pool": PoolConfig(width=8.5)}, "pool.width must be an integer, got 8.5"),
        ({"pool": PoolConfig(t_star_weights=(1.0, 1.0, 1.0, math.inf))}, "pool.t_star_weights must be several numbers"),
        ({"options": None}, "options must be a dictionary, got None"),
        ({"init": 3}, "init must be text, got 3"),
        ({"prompts": ""}, "prompts must be a file, or unset, got ''"),
        ({"output": "a\0b"}, "output must be a path, got"),
        ({"num_teacher_samples": 10**30}, "num_teacher_samples must be at most 2\\^32, got one of 100 bits"),
        ({"batch_size": 10**5000}, "batch_size must be at most 2\\^32, got one of 16610 bits"),
        ({"stages": (1, 2**33)}, "stages must be at most 2\\^32, got one of 34 bits"),
    ],
)
def test_settings_of_another_type(config, changes, words):
    with pytest.raises(InputError, match=f"config: {words}"):
        dataclasses.replace(config, **changes).validate()


@pytest.mark.parametrize("name", ["heads_per_cell", "width"])
def test_heads_beyond_what_can_be_counted(config, name):
    pool = dataclasses.replace(config.pool, **{name: 2**31})
    with pytest.raises(InputError, match=f"pool: {name} must be in 1..65536, got 2147483648"):
        dataclasses.replace(config, pool=pool).validate()


def test_settings_from_json_that_are_none(config):
    values = config.to_json()
    assert TrainConfig.from_json(values).validate() == config
    dataclasses.replace(config, clip_grad_norm=math.inf, lr=1).validate()
    for pool in (None, [], {"widths": 3}):
        with pytest.raises(InputError, match="pool must hold settings of PoolConfig"):
            TrainConfig.from_json(values | {"pool": pool})


@pytest.mark.parametrize("part", [(3, 2), (0, 0), (-1, 2), (0.5, 2), (2, 2), (0,), (0, 1, 2), 5, None])
def test_parts_that_are_none(config, part):
    with pytest.raises(InputError, match="part must be"):
        prepare(config, part)


@pytest.mark.parametrize(
    "wrong",
    [{"num_cpus": -1}, {"num_cpus": "x"}, {"num_gpus": math.nan}, {"num_gpus": 1.5}, {"num_gpus": -1}],
)
def test_a_workers_share_that_ray_would_refuse_is_refused_before_anything_starts(config, tmp_path, wrong):
    ((name, value),) = wrong.items()
    fresh = dataclasses.replace(config, output=str(tmp_path / "run"), cache=None)
    with pytest.raises(InputError, match=f"prepare: {name} must be a number >= 0.*, got {value!r}"):
        prepare(fresh, engine="ray", **wrong)
    assert not any(tmp_path.iterdir())


def test_a_configuration_is_on_the_disk_before_it_has_its_name(config, tmp_path, monkeypatch):
    """A machine that loses power must not be left with an empty one, which no run could go on from."""
    done, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("sync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    folder = claim_folder(dataclasses.replace(config, output=str(tmp_path / "new")))
    assert done[:2] == ["sync", "replace"] and json.loads((folder / "config.json").read_text())["seed"] == 0


def test_what_is_missing_is_counted_from_one_listing(config, tmp_path, monkeypatch):
    """Of each part, whatever is finished; a billion samples are no billion questions to the disk."""
    planning = importlib.import_module("nitrofusion.train.plan")  # its package has a function of that name
    monkeypatch.setattr(planning, "samples_bytes", lambda config, unet: config.num_teacher_samples)
    for shard in (0, 3, 4, 7):
        (tmp_path / f"shard-{shard:06d}.json").write_text("")
    (tmp_path / "shard-000001.tar").write_text("")  # not finished
    (tmp_path / "shard-000009.json").write_text("")  # of another run's
    config = dataclasses.replace(config, cache=str(tmp_path), num_teacher_samples=7 * data.SHARD + 5)
    for part in ((0, 1), (0, 3), (1, 3), (2, 3), (7, 8), (8, 9)):
        numbers = range(8)[part[0] :: part[1]]
        wanted = sum(data.shard_count(config, n) for n in numbers if not (tmp_path / f"shard-{n:06d}.json").is_file())
        assert planning._missing_samples(config, None, part) == wanted
    huge = dataclasses.replace(config, num_teacher_samples=10**12)
    assert planning._missing_samples(huge, None) == 10**12 - 5 * data.SHARD


def test_bad_lines_of_commands(tmp_path, capsys, monkeypatch):
    (tmp_path / "run.yaml").write_text("pool: 3\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "config: pool must hold settings of PoolConfig, got 3" in capsys.readouterr().err
    monkeypatch.setenv("NITROKERNELS_BACKEND", "nix")
    assert main(["doctor"]) == 2
    assert "NITROKERNELS_BACKEND must be one of cuda, triton, cpu, ref, got 'nix'" in capsys.readouterr().err
    assert cli.BACKENDS == nitrokernels.dispatch.BACKENDS


def test_a_calibration_makes_its_folder_and_skips_what_there_is(tmp_path):
    made = tmp_path / "a" / "b" / "world.json"
    calibrate("world", made, ("a ring",), 1)
    assert len(json.loads(made.read_text())["timesteps"]) == 4
    for skip in ("nix", ""):
        with pytest.raises(InputError, match=f"skip must be pieces of the names of linear layers, got '{skip}'"):
            calibrate("world", made, skip=(skip,))


@pytest.mark.parametrize(
    "change",
    [
        {"step": "4"},
        {"world_size": "2"},
        {"images_per_step": [1]},
        {"seconds": "x"},
        {"machine": 5},
        {"bad_steps": None},
        {"bad_steps": {"student": 0}},
        None,
    ],
)
def test_a_state_that_no_run_wrote_is_refused(broken, change):
    folder = Path(broken.output) / "checkpoints" / "step-000002"
    state = json.loads((folder / "state.json").read_text())
    text = json.dumps([] if change is None else state | change).encode()
    (folder / "state.json").write_bytes(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = hashlib.sha256(text).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    words = "must say what it belongs to" if change is None else f"must hold this run's state, got {next(iter(change))}"
    with pytest.raises(InputError if change is None else CheckpointError, match=words):
        train(broken)

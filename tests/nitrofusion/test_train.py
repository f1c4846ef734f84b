"""Runs: resume equals uninterrupted, kills, previews, logs, bad input."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nitrofusion import checkpoint, data, losses
from nitrofusion.config import TrainConfig
from nitrofusion.errors import CheckpointError, InputError, NitroError, StorageError, TrainingError
from nitrofusion.pool import PoolConfig
from nitrofusion.train import loop, plan, prepare, train
from nitrofusion.train.run_folder import (
    MOST_PREVIEWS,
    check_identity,
    claim_folder,
    identity,
    thin_previews,
    truncate_log,
)

from ..native import backends
from .kills import digest, while_training
from .tiny import tiny_folder

NUM_KILLS = 8  # ``benchmarks.survival`` makes more


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def config(teacher, tmp_path) -> TrainConfig:
    return TrainConfig(
        output=str(tmp_path / "run"),
        teacher=str(teacher),
        init=None,
        cache=str(teacher / "cache"),
        num_teacher_samples=8,
        teacher_steps=2,
        shifted_timestep=500,
        batch_size=2,
        accumulation=1,
        stages=(3, 2),
        lr=1e-4,
        head_lr=1e-3,
        crop_size=8,
        pool=PoolConfig(heads_per_cell=2, width=8, max_depth=1, refresh_rate=0.05),
        precision="fp32",
        num_previews=1,
        preview_every=100,
        checkpoint_every=1,
        device="cpu",
    )


def logged(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("seconds", "images_per_second", "peak_memory_mb"):
            line.pop(key)
    return lines


@pytest.mark.parametrize("last", [b'{"step": 3, "loss', b"\xff\n", b"[3]\n", b'{"step": null}\n', b"[" * 10**5 + b"\n"])
def test_the_log_is_cut_after_a_step_and_where_a_line_is_none(tmp_path, last):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": k, "loss": random.random()}).encode() + b"\n" for k in range(1, 8)]
    path.write_bytes(b"".join(lines))
    truncate_log(path, 4)
    assert path.read_bytes() == b"".join(lines[:4])
    path.write_bytes(b"".join(lines[:2]) + last)
    truncate_log(path, 9)
    assert path.read_bytes() == b"".join(lines[:2]) and [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
    path.write_bytes(b"".join(lines[:2])[:-1])  # cut before the end of a line that is whole
    truncate_log(path, 2)
    assert path.read_bytes() == b"".join(lines[:2])


def test_log_previews_and_checkpoints(config):
    run = train(config)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["inference_steps"] for line in lines] == [1, 1, 1, 2, 2]
    assert lines[-1]["nimg"] == 10
    for line in lines:
        assert {"student.adversarial", "pool.adversarial"} <= line["loss"].keys()
        assert line["grad_norm"]["student"] > 0 and line["grad_norm"]["pool"] > 0
        assert line["peak_memory_mb"] > 0
        assert line["cells"] and sum(line["head_age"]["histogram"]) == 3 * 4 * 2 * 10
    for before, line in itertools.pairwise([{"seconds": 0}, *lines]):
        assert line["images_per_second"] * (line["seconds"] - before["seconds"]) == pytest.approx(2, rel=0.05)
    assert sorted(p.name for p in (run / "previews").iterdir()) == ["step-000000.png", "step-000005.png"]
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000004", "step-000005"]
    files = {p.name for p in (run / "checkpoints" / "step-000005").iterdir()}
    assert {p.split(".")[1] for p in files} == {"safetensors", "json"}
    assert TrainConfig.from_json(json.loads((run / "config.json").read_text())) == config


def test_the_same_seed_repeats_and_another_differs(config, tmp_path):
    a = digest(train(config))
    silent = train(dataclasses.replace(config, output=str(tmp_path / "b"), num_previews=0))
    b = digest(silent)
    assert not (silent / "previews").exists()
    c = digest(train(dataclasses.replace(config, output=str(tmp_path / "c"), lr=2e-4)))
    assert a == b != c


def test_kills_at_random_moments_change_nothing(config, tmp_path):
    """SIGKILLs anywhere in a run, resumed by the same call, against the run nobody killed."""
    config = dataclasses.replace(config, stages=(8, 4))
    whole = train(config)
    broken = dataclasses.replace(config, output=str(tmp_path / "broken"))
    assert while_training(broken, NUM_KILLS, "moments")["deaths"] >= 3, "too few kills hit a running child"
    assert digest(tmp_path / "broken") == digest(whole)
    assert logged(tmp_path / "broken") == logged(whole)


def test_the_fused_run_is_the_eager_run(config, tmp_path):
    """32 steps on the ops chosen here and in eager PyTorch: the same losses."""
    config = dataclasses.replace(config, stages=(20, 12), checkpoint_every=100)
    eager = dataclasses.replace(config, backend="ref", output=str(tmp_path / "eager"))
    for ours, theirs in zip(logged(train(config)), logged(train(eager)), strict=True):
        for name, value in theirs["loss"].items():
            assert ours["loss"][name] == pytest.approx(value, rel=2e-5, abs=2e-6), (theirs["step"], name)


def test_a_kill_before_the_first_checkpoint_leaves_no_line_behind(config, tmp_path):
    config = dataclasses.replace(config, stages=(2,))
    whole = train(config)
    broken = dataclasses.replace(config, output=str(tmp_path / "broken"))
    folder = claim_folder(broken)
    (folder / "log.jsonl").write_text('{"step": 1, "nimg": 2}\n{"step": 2, "ni')
    assert logged(train(broken)) == logged(whole)


def test_an_altered_checkpoint_is_refused_and_the_one_before_used(config, capfd):
    run = train(config)
    wanted = digest(run)
    victim = run / "checkpoints" / "step-000005" / "student.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    train(config)
    out = "".join(capfd.readouterr())
    assert "step-000005" in out and "student.safetensors" in out and "step-000004" in out
    assert digest(run) == wanted


def test_a_run_whose_checkpoints_are_all_altered_is_not_begun_anew(config):
    run = train(dataclasses.replace(config, keep_checkpoints=1))
    (run / "checkpoints" / "step-000005" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must have a checkpoint that verifies") as caught:
        train(dataclasses.replace(config, keep_checkpoints=1))
    assert caught.value.exit_code == 4
    assert (run / "checkpoints" / "step-000005").exists()


def test_a_gradient_that_is_not_finite_is_skipped_then_given_up(config, monkeypatch):
    original = losses.generator_loss
    monkeypatch.setattr(losses, "generator_loss", lambda kind, fake: original(kind, fake) * float("nan"))
    with pytest.raises(TrainingError, match="gradients of student must be finite"):
        train(dataclasses.replace(config, nan_limit=2, stages=(9,)))


def test_a_skipped_step_leaves_nothing_to_the_next(config, monkeypatch):
    """Heads of a step whose gradient was not finite take no part in the next, so a kill in between changes nothing."""
    original = losses.discriminator_loss

    def train_with_a_bad_step(changes, stop=None):
        trainer = loop.Trainer(dataclasses.replace(config, **changes))
        log = trainer._log

        def stopping(line):
            log(line)
            if line["step"] == stop:
                raise KeyboardInterrupt

        bad = lambda *args: original(*args) * (float("nan") if trainer.step == 2 else 1)  # noqa: E731
        monkeypatch.setattr(losses, "discriminator_loss", bad)
        monkeypatch.setattr(trainer, "_log", stopping)
        trainer.run()
        return Path(config.output)

    wanted = digest(train_with_a_bad_step({}))
    other = {"output": config.output + "-2"}
    with pytest.raises(KeyboardInterrupt):
        train_with_a_bad_step(other, stop=4)
    train_with_a_bad_step(other)
    assert digest(other["output"]) == wanted


def test_signals_and_full_disks(config):
    """A signal saves and exits 75, a second one ends at once; what does not fit ends a run in one line, to go on later.

    The log is the first to be full, then a checkpoint.
    """
    config = dataclasses.replace(config, stages=(4,))
    said = while_training(config, 2, "signals,disks")
    for name, result in said["signals"].items():
        assert not result["refused"], name
        if name.startswith("SIGINT twice"):
            assert result["code"] == 128 + signal.SIGINT and result["seconds"] < 3, "saving takes longer"
        else:
            assert result["code"] == 75 and result["newest"] == result["logged"] >= 2, name
    whole = digest(train(config))
    for result in said["outcomes"]:
        assert (result["code"], result["refused"], result["newest"], result["again"]) == (3, 0, 2, 0)
        assert re.search(r"must be writable with [0-9,]+ bytes free.*got File too large", result["said"])
        assert result["digest"] == whole


def test_a_signal_while_setting_up_ends_with_75(config, tmp_path, monkeypatch):
    """While the teacher is loaded, while its samples are drawn, while a checkpoint is looked for."""
    config = dataclasses.replace(config, cache=str(tmp_path / "cache"), stages=(1,))

    def told(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    previous = signal.signal(signal.SIGTERM, lambda *args: pytest.fail("the run has to hear it"))
    own = signal.getsignal(signal.SIGTERM)
    try:
        for place in ((loop, "make_student"), (data.ShardDrawer, "draw"), (loop, "identity")):
            with monkeypatch.context() as patch:
                patch.setattr(*place, told)
                with pytest.raises(SystemExit) as stop:
                    train(config)
            assert stop.value.code == 75 and signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert len(logged(train(config))) == 1


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("teacher", "0" * 64, "got teacher '0000"),
        ("recipe", "add", "got recipe 'add' instead of 'nitrofusion'"),
        ("format", 0, "got format 0 instead of 1"),
        ("torch", "1.0", "got torch 1.0 instead of .* \\(allow_inexact goes on"),
        ("nitrofusion", "0.0", "got nitrofusion 0.0 instead of"),
        (None, None, "must say what it belongs to"),
    ],
)
def test_what_a_checkpoint_belongs_to(key, value, message):
    own = {"format": 1, "nitrofusion": "0.1", "torch": "2.9", "recipe": "nitrofusion", "teacher": "1" * 64}
    state = {"identity": own | {key: value}} if key else {}
    with pytest.raises(InputError, match=message):
        check_identity(Path("step-000001"), state, own, allow_inexact=False)
    if key in ("torch", "nitrofusion"):
        (line,) = check_identity(Path("step-000001"), state, own, allow_inexact=True)
        assert f"{key} {value} instead of {own[key]}" in line
    else:
        with pytest.raises(InputError, match=message):
            check_identity(Path("step-000001"), state, own, allow_inexact=True)


def test_a_checkpoint_of_another_teacher_is_refused(config, tmp_path):
    """The folder's name and its configuration are the same; the weights in it are not."""
    folder = tmp_path / "teacher"
    shutil.copytree(config.teacher, folder, ignore=shutil.ignore_patterns("cache"))
    config = dataclasses.replace(config, teacher=str(folder), cache=None, teacher_samples="online", stages=(1,))
    run = train(config)
    shutil.copytree(tiny_folder(tmp_path / "other", seed=5) / "unet", folder / "unet", dirs_exist_ok=True)
    with pytest.raises(InputError, match="must be of this run, got teacher") as caught:
        train(config)
    assert caught.value.exit_code == 2 and checkpoint.latest(run)[0].name == "step-000001"


def test_the_teachers_unet_may_be_a_folder(config, teacher):
    """The file, its folder or a pipeline: the same samples, and a folder trains."""
    folder = teacher / "unet"
    paths = (folder / "diffusion_pytorch_model.safetensors", teacher, folder)
    given = [dataclasses.replace(config, teacher_unet=str(path), stages=(1,)) for path in paths]
    assert len({data.teacher_digest(each, teacher) for each in given}) == 1
    assert len(logged(train(given[-1]))) == 1


@pytest.mark.parametrize("key", ["vae", "prompts", "images", "features", "clip_model", "negative_prompts"])
def test_a_file_replaced_in_place_makes_another_run(teacher, config, tmp_path, key):
    """What a run reads beside the teacher's UNet and text encoders, under the same name."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("cache"))
    for name in ("prompts.txt", "metadata.jsonl", "negative.txt", "model.safetensors", "config.json"):
        (tmp_path / name).write_text(name)
    file, changes = {
        "vae": (folder / "vae" / "diffusion_pytorch_model.safetensors", {}),
        "prompts": (tmp_path / "prompts.txt", {"prompts": str(tmp_path / "prompts.txt")}),
        "images": (tmp_path / "metadata.jsonl", {"images": str(tmp_path)}),
        "features": (tmp_path / "model.safetensors", {"recipe": "add", "options": {"features": str(tmp_path)}}),
        "clip_model": (tmp_path / "model.safetensors", {"recipe": "pgsb", "options": {"clip_model": str(tmp_path)}}),
        "negative_prompts": (
            tmp_path / "negative.txt",
            {"recipe": "pgsb", "options": {"negative_prompts": str(tmp_path / "negative.txt")}},
        ),
    }[key]
    config = dataclasses.replace(config, **changes)
    before = identity(config, folder)
    check_identity(Path("step-000001"), {"identity": before}, identity(config, folder), False)
    file.write_bytes(file.read_bytes() + b"!")
    with pytest.raises(InputError, match=f"step-000001 must be of this run, got {key} '"):
        check_identity(Path("step-000001"), {"identity": before}, identity(config, folder), True)
    older = {name: value for name, value in before.items() if name != key}
    (line,) = check_identity(Path("step-000001"), {"identity": older}, before, False)
    assert line.startswith(f"resumed unchecked: step-000001 does not say what its {key} was")


def test_other_prompts_in_the_same_file_are_refused(config, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red ring on a gray background\n")
    config = dataclasses.replace(config, teacher_samples="online", prompts=str(file), cache=None, stages=(1,))
    train(config)
    file.write_text("a red ring on a navy background\n")
    with pytest.raises(InputError, match="must be of this run, got prompts"):
        train(config)


def test_a_checkpoint_of_other_tensors_is_refused(config):
    run = train(dataclasses.replace(config, stages=(2,), keep_checkpoints=1))
    folder = run / "checkpoints" / "step-000002"
    parts, state = checkpoint.load(folder)
    shutil.rmtree(folder)
    checkpoint.save(run, 2, parts | {"student": {"a": torch.zeros(2)}}, state)
    with pytest.raises(CheckpointError, match="step-000002 must hold this run's state") as caught:
        train(dataclasses.replace(config, stages=(2,), keep_checkpoints=1))
    assert "\n" not in str(caught.value)


def test_previews_are_bounded(tmp_path):
    for step in range(0, 30_000, 100):
        (tmp_path / f"step-{step:06d}.png").write_bytes(b"")
        thin_previews(tmp_path)
    steps = sorted(int(p.stem[5:]) for p in tmp_path.iterdir())
    assert len(steps) <= MOST_PREVIEWS and steps[0] == 0
    assert steps[-20:] == list(range(28_000, 30_000, 100))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"accumulation": 0}, "accumulation must be >= 1, got 0"),
        ({"stages": ()}, "stages must be 1 to 4 numbers"),
        ({"loss": "bce"}, "loss must be one of hinge, wgan, ns, got 'bce'"),
        ({"cache": ""}, "cache must be a folder, or unset, got ''"),
        ({"images": ""}, "images must be a folder, or unset, got ''"),
        ({"teacher": "/nowhere"}, "must be a diffusers folder, got nothing"),
        ({"init": "/nowhere.safetensors"}, "must be a UNet .safetensors file"),
        ({"prompts": "/nowhere.txt"}, "nowhere.txt"),
        ({"crop_size": 32}, "crop_size must be a multiple of 4 in 8..16"),
        ({"recipe": "nitro"}, "recipe must be"),
    ],
)
def test_bad_input_is_one_line_before_any_work(config, changes, message):
    bad = dataclasses.replace(config, **changes)
    for call in (plan, train):
        with pytest.raises(NitroError, match=message) as caught:
            call(bad)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("unet/config.json", {"in_channels": 9}, "4 input channels, got 9"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "must predict epsilon"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "must hold a StableDiffusionXLPipeline"),
    ],
)
def test_teachers_that_do_not_fit(teacher, config, tmp_path, part, change, message):
    wrong = tmp_path / "wrong"
    shutil.copytree(teacher, wrong)
    values = json.loads((wrong / part).read_text()) | change
    (wrong / part).write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(config, teacher=str(wrong)))
    assert not os.path.exists(config.output)


def test_the_folder_of_another_run_is_refused(config):
    train(config)
    with pytest.raises(InputError, match="got a run with lr"):
        train(dataclasses.replace(config, lr=5e-4))
    os.remove(os.path.join(config.output, "config.json"))
    with pytest.raises(InputError, match="got one with other files"):
        train(config)


def test_samples_prepared_into_the_run_folder_are_its_own(config):
    config = dataclasses.replace(config, cache=None, stages=(1,))
    folder = prepare(config)
    assert folder == Path(config.output) / "teacher_samples"
    online = dataclasses.replace(config, teacher_samples="online")
    with pytest.raises(InputError, match="got one with other files"):
        train(online)
    written = (folder / "shard-000000.tar").stat().st_mtime_ns
    assert len(logged(train(config))) == 1
    assert (folder / "shard-000000.tar").stat().st_mtime_ns == written
    with pytest.raises(InputError, match="prepare: teacher_samples must be cache, got 'online'"):
        prepare(online)


def test_plan_counts_what_is_there(config):
    values = plan(config)
    assert values["steps"] == 5 and values["images"] == 10
    assert values["memory_total_bytes"] == sum(values["memory_bytes"].values()) > 0
    assert values["flops_per_step"] > 0 and values["disk_bytes"] > 0
    assert not os.path.exists(config.output)


def test_a_disk_that_is_too_small_is_known_before_any_work(config, monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    for call in (plan, train):
        with pytest.raises(StorageError, match="bytes free, got 1,000") as caught:
            call(config)
        assert caught.value.exit_code == 3
    assert not os.path.exists(config.output)


def test_tensorboard_gets_the_same_numbers(config):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="the train extra")
    run = train(dataclasses.replace(config, stages=(2,), tensorboard=True))
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    written = [e.value for e in events.Scalars("loss/pool.adversarial")]
    logged_values = [json.loads(line)["loss"]["pool.adversarial"] for line in (run / "log.jsonl").open()]
    assert written == pytest.approx(logged_values, rel=1e-5)


def test_online_samples_and_a_prompt_file(config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring on a gray background\na blue cross on a pink background\n")
    online = dataclasses.replace(config, teacher_samples="online", prompts=str(prompts), cache=None, stages=(2,))
    a = train(online)
    b = train(dataclasses.replace(online, output=str(tmp_path / "again")))
    assert digest(a) == digest(b)
    assert not (a / "teacher_samples").exists()


@pytest.mark.parametrize("change", [{"loss": "wgan"}, {"loss": "ns"}, {"generator_interval": 2}, {"precision": "bf16"},
                                    {"gradient_checkpointing": True}, {"crop_time_ids": "constant"}])  # fmt: skip
def test_every_switch_trains(config, change):
    run = train(dataclasses.replace(config, stages=(2,), accumulation=2, cache=None, **change))
    lines = logged(run)
    assert len(lines) == 2 and all(v is not None for line in lines for v in line["loss"].values())
    updates = sum("student" in line["grad_norm"] for line in lines)
    assert updates == (1 if "generator_interval" in change else 2)


def test_gradient_checkpointing_changes_no_number(config, tmp_path):
    a = train(dataclasses.replace(config, stages=(2,)))
    b = train(dataclasses.replace(config, stages=(2,), gradient_checkpointing=True, output=str(tmp_path / "b")))
    for x, y in zip(logged(a), logged(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)


@pytest.mark.parametrize("backend", backends("cpu", "ref"))
def test_gradient_checkpointing_keeps_a_named_backend_in_another_thread(config, monkeypatch, backend):
    """On a GPU autograd computes again in a thread of its own, which knows no ``use``."""
    backward = torch.Tensor.backward

    def elsewhere(loss, *args, **kwargs):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(backward, loss, *args, **kwargs).result()

    monkeypatch.setattr(torch.Tensor, "backward", elsewhere)
    run = train(dataclasses.replace(config, stages=(1,), gradient_checkpointing=True, backend=backend))
    assert len(logged(run)) == 1


def test_accumulation_is_the_mean_of_its_micro_batches(config, tmp_path):
    """Regression has no randomness beside the samples: 2 x 4 and 4 x 2 images give the same first update."""
    base = dataclasses.replace(config, recipe="regression", stages=(1,), lr=1e-3)
    runs = [
        train(dataclasses.replace(base, batch_size=b, accumulation=a, output=str(tmp_path / f"{b}x{a}")))
        for b, a in ((2, 4), (4, 2), (8, 1))
    ]
    norms = [logged(run)[0]["grad_norm"]["student"] for run in runs]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)

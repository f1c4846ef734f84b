"""The plan against what PyTorch's allocator reports and operations counted, and samples on paper against files."""

import collections
import dataclasses
import os
import shutil
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.memory_plan import measure
from nitrofusion import checkpoint, data, shards
from nitrofusion.cli import main
from nitrofusion.config import TrainConfig
from nitrofusion.errors import StorageError
from nitrofusion.pool import PoolConfig
from nitrofusion.student import trajectories
from nitrofusion.train import prepare, train
from nitrofusion.train.loop import Trainer
from nitrofusion.train.memory import device_bytes, disk_bytes, host_bytes, samples_bytes
from nitrofusion.train.plan import plan, plan_samples, preflight, use_backend
from nitrofusion.train.rehearse import Counted, meta_unet

from .recipes.scores import run_config
from .tiny import tiny_folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("memory")
    return TrainConfig(
        output=str(folder / "run"), cache=str(folder / "cache"), teacher=str(tiny_folder(folder / "teacher")),
        init=None, num_teacher_samples=8, teacher_steps=1, batch_size=4, accumulation=2, stages=(3,), crop_size=8,
        pool=PoolConfig(width=8, max_depth=2), precision="fp32", device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(config) -> dict:
    return measure(config)


def test_a_step_takes_what_the_plan_says(found):
    assert found["ratio"] == pytest.approx(1, abs=0.1) and found["step_ratio"] == pytest.approx(1, abs=0.1), found


@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_a_step_in_bf16_takes_what_the_plan_says(config, tmp_path, backend):
    """Autocast keeps casts of the weights, and activations of half the size; heads stay in fp32."""
    folders = {"output": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    bf16 = dataclasses.replace(config, precision="bf16", backend=backend, **folders)
    assert measure(bf16)["step_ratio"] == pytest.approx(1, abs=0.1)


def test_alive_counts_storages_for_as_long_as_they_live():
    kept = torch.empty(1000, device="meta")
    with Counted([kept]) as alive:
        a = kept[:10] + 1  # 40 bytes; the view is of what is known
        b = torch.empty(100, device="meta")
        c = b.view(10, 10).t()
        del b
        assert alive.now == 440
        del c
        assert alive.now == 40
        torch.empty(25, device="meta")
        assert (alive.now, alive.peak) == (40, 440)
        del a
    assert alive.now == 0


def test_what_takes_less_is_planned_to(config, found):
    folder, full = Path(config.teacher), found["planned"]
    unet = meta_unet(folder)
    assert full["student weights"] == 4 * sum(p.numel() for p in unet.parameters())
    less = dataclasses.replace(config, gradient_checkpointing=True, pool_offload=True, accumulation=1)
    spared, rehearsed = device_bytes(less, folder, unet, processes=2)
    assert rehearsed.moments["student"] < 0.9 * found["planned_moments"]["student"]
    assert spared["head pool AdamW"] == 0 and spared["gradients being exchanged"] == full["student weights"]
    assert host_bytes(less, unet)["head pool AdamW"] == full["head pool AdamW"]


class Operations(TorchDispatchMode):
    """Counts floating-point operations of real tensors; attention is made of products here."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.count += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(
    "recipe, changes",
    [
        ("nitrofusion", {"gradient_checkpointing": True}),
        ("nitrofusion", {"generator_interval": 2, "accumulation": 2}),
        ("add", {}),
        ("pgsb", {"generator_interval": 3}),
        ("dmd2", {"generator_interval": 2}),
        ("regression", {"accumulation": 2, "guidance_scale": 3.0}),
        ("regression", {"guidance_scale": 1.0}),
        ("nitrofusion", {"stages": (0, 9), "first_step_weight": (1.0, 1e-9), "regression_weight": 0.5}),
        ("pgsb", {"stages": (0, 9), "first_step_weight": (1.0, 1e-9), "accumulation": 2}),
        ("dmd2", {"stages": (0, 9), "first_step_weight": (1.0, 1e-9), "generator_interval": 2}),
    ],
)
def test_operations_are_those_of_the_steps(config, tmp_path, recipe, changes):
    """Decoders, vision networks, heads and what is computed again among them."""
    config = run_config(config.teacher, tmp_path / "run", recipe, teacher_samples="online", backend="ref", **changes)
    planned, trainer, steps = plan(config)["flops_per_step"], Trainer(config), changes.get("generator_interval", 1)
    with Operations() as seen, sdpa_kernel(SDPBackend.MATH), use_backend(config):
        for _ in range(steps):
            trainer._train_step()
    assert planned == pytest.approx(seen.count / steps, rel=0.03)


@pytest.mark.parametrize(
    "recipe, changes", [("nitrofusion", {}), ("dmd2", {}), ("regression", {"guidance_scale": 3.0, "teacher_steps": 7})]
)
def test_operations_are_the_mean_over_all_stages(config, tmp_path, monkeypatch, recipe, changes):
    """Each trajectory that a micro-batch may take, as often as it is drawn."""
    changes |= {"stages": (3, 0, 1, 2), "first_step_weight": (1.0, 1.0, 0.5, 0.2), "teacher_samples": "online"}
    config = run_config(config.teacher, tmp_path / "run", recipe, backend="ref", **changes)
    planned, trainer, mean = plan(config)["flops_per_step"], Trainer(config), 0.0
    with sdpa_kernel(SDPBackend.MATH), use_backend(config):
        for stage, steps in enumerate(config.stages, start=1):
            for share, path in trajectories(config, stage) if steps else ():
                monkeypatch.setattr(f"{type(trainer.recipe).__module__}.choose_step", lambda *_, path=path: path)
                with Operations() as seen:
                    trainer._train_step()
                mean += seen.count * share * steps / config.total_steps
    assert planned == pytest.approx(mean, rel=0.02)  # of heads it counts none


def test_a_checkpoint_is_read_in_the_memory_planned_for_it(config, tmp_path):
    run = train(dataclasses.replace(config, output=str(tmp_path / "run"), stages=(1,)))
    folder, _ = checkpoint.latest(run)
    tracemalloc.start()
    try:
        checkpoint.load(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    planned = host_bytes(config, meta_unet(Path(config.teacher)))["checkpoint being read or written"]
    assert peak == pytest.approx(planned, rel=0.05)


def test_samples_on_paper_are_those_on_disk(config, tmp_path):
    count, unet = data.SHARD, meta_unet(Path(config.teacher))
    config = dataclasses.replace(config, num_teacher_samples=count)
    latents = torch.randn(4, unet.config.sample_size, unet.config.sample_size)
    made = [shards.Sample(i, "a prompt of usual length", i, latents) for i in range(count)]
    shards.write_shard(tmp_path / "shard-000000.tar", made, {})
    assert os.path.getsize(tmp_path / "shard-000000.tar") == pytest.approx(samples_bytes(config, unet), rel=0.01)
    million = plan_samples(dataclasses.replace(config, num_teacher_samples=1_000_000))
    assert million["shards"] == 3907 and million["flops"] == 1_000_000 * million["flops_per_sample"] > 0


@pytest.fixture
def disks(monkeypatch):
    """Bytes that are free on the file system below each folder; elsewhere there is one disk with plenty."""
    plans, free = sys.modules["nitrofusion.train.plan"], {}
    usage = collections.namedtuple("usage", "total used free")

    def place(path):
        return next((root for root in free if Path(path).is_relative_to(root)), None)

    monkeypatch.setattr(plans, "_file_system", place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free.get(place(path), 1 << 50)))
    return free


def test_each_disk_needs_room_for_what_is_yet_to_be_written(config, tmp_path, disks):
    (tmp_path / "fast").mkdir()
    (tmp_path / "large").mkdir()
    run, cache = tmp_path / "fast" / "run", tmp_path / "large" / "cache"
    config = dataclasses.replace(config, output=str(run), cache=str(cache))
    unet = meta_unet(Path(config.teacher))
    needed = disk_bytes(config, unet)
    disks[tmp_path] = sum(needed.values())
    preflight(config)
    disks[tmp_path] -= 1
    with pytest.raises(StorageError, match=f"train: {run.parent} and {cache.parent} must have"):
        preflight(config)
    del disks[tmp_path]
    disks |= {run.parent: needed["checkpoints"], cache.parent: needed["teacher samples"] - 1}
    with pytest.raises(StorageError, match=f"train: {cache.parent} must have"):
        preflight(config)
    with pytest.raises(StorageError, match=f"prepare: {cache.parent} must have"):
        prepare(config)
    disks[cache.parent] += 1
    prepare(config)
    disks[cache.parent] = 0
    preflight(config)  # they are there: neither disk needs anything more for them
    disks[run.parent] -= 1
    with pytest.raises(StorageError, match=f"train: {run.parent} must have"):
        preflight(config)
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "checkpoints" / "step-000001" / "student.safetensors").write_bytes(bytes(100))
    preflight(config)


def test_files_that_another_process_renames_meanwhile_are_left_out(config, monkeypatch):
    monkeypatch.setattr(os, "walk", lambda folder: [(str(folder), [], [".tmp-step-000001.1.host"])])
    preflight(config)


def test_the_command_prints_it(config, capsys):
    small = ["--preset", "world-smoke", "--teacher", config.teacher, "--output", config.output, "--init", "null"]
    assert main(["prepare", *small, "--num_teacher_samples", "1000000", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "1,000,000 in 3,907 shards" in out and "by arithmetic" in out
    assert main(["plan", *small, "--processes", "0"]) == 2
    assert "plan: processes must be in 1..1,048,576, got 0" in capsys.readouterr().err

"""Several processes: the same run as one, whatever happens to them; the parts by themselves below."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nitrofusion.config import TrainConfig
from nitrofusion.draws import Draws
from nitrofusion.errors import InputError
from nitrofusion.evaluate.group import Group
from nitrofusion.pool import HeadPool, PoolConfig, RowAdamW
from nitrofusion.recipes import Phase
from nitrofusion.train import parallel, run_folder
from nitrofusion.train.loop import Trainer

from .kills import forked, waited

PARTS = ("batch", "reshard", "restart", "failure")


@pytest.mark.slow
def test_several_processes(tmp_path):
    """``benchmarks.parallel`` with small counts, in its own process: autograd does not survive the forks."""
    path = tmp_path / "record.json"
    counts = ["--steps", "3", "--length", "4", "--kills", "1", "--loaded_by", "1", "3"]
    command = [sys.executable, "-m", "benchmarks.parallel", "--only", *PARTS, *counts, "--json", str(path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(path.read_text())

    # 1 x 4 images against 2 x 2, with the gradients averaged and with the student sharded
    assert record["batch"]["exit_codes"] == [0] * 5
    for name in ("ddp_2x2_against_none_1x4", "fsdp2_2x2_against_none_1x4", "fsdp2_against_ddp"):
        found = record["batch"][name]
        assert found["student"] <= 1e-6 and found["loss"] <= 2e-6 and found["grad_norm"] <= 1e-4, name

    # a sharded run is loaded by any number
    assert set(record["reshard"].pop("exit_codes")) == {0}
    assert record["reshard"] == {"loaded_by_1": True, "loaded_by_3": True}

    # a killed process ends the other, and a signal stops both
    found = record["restart"]
    assert found["equal"] == found["kills"] == 1 and set(found["exit_codes"]) == {0}
    assert all(code not in (0, -9) for code in found["survivors"]), "the other one must end by itself"
    assert found["stopped_with"] == [[75, 75]]

    # an error of one process is that of all
    found = record["failure"]
    for name in ("checkpoint_full_on_0", "log_full_on_0", "preview_full_on_0"):
        assert found[name] == [3, 3], name
    assert found["samples_altered_on_1"] == [2, 2]
    assert found["stopped_while_drawing_samples_on_1"] == [75, 75]
    assert found["error_on_1"] == [1, 9], "its own exception, and a NitroError for the other"
    assert max(value for name, value in found.items() if name.endswith("_seconds")) < 30


def test_the_slurm_script_passes_on_sigterm_and_requeues(tmp_path):
    """With stand-ins for Slurm's commands, and for torchrun one that takes a while to stop."""
    for name, body in {
        "srun": 'shift; exec "$@"',
        "scontrol": '[ "$1" = show ] && echo node0 || echo "$@" > requeued',
        "torchrun": "trap 'sleep 0.3; touch saved; exit 1' TERM\n"
        'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $@" > .started; mv .started started; while :; do sleep 0.05; done',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = Path(__file__).parents[2] / "examples" / "slurm.sbatch"
    env = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="1")
    job = subprocess.Popen(["bash", script, "--output", "run"], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    job.terminate()
    assert job.wait(60) == 1 and (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    timeout, *command = (tmp_path / "started").read_text().split()
    (notice,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", script.read_text(), re.M)
    assert 30 < int(timeout) < int(notice) and command[-3:] == ["nitrofusion.train", "--output", "run"]


# ------------------------------------------------------------------ parts


def test_what_rank_0_has_is_dealt_evenly(tmp_path):
    """Whatever the others have: they may have looked a little later."""

    def deal(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2)
        asked = ([1, 3, 5, 7, 9], [4], []) if rank == 0 else ([8, 8],) * 3
        dealt = [parallel.Processes(rank, 2).deal(numbers) for numbers in asked]
        (tmp_path / f"{rank}.json").write_text(json.dumps(dealt))

    both = [forked(lambda rank=rank: deal(rank)) for rank in range(2)]
    assert [waited(child) for child in both] == [0, 0]
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert said == [[[1, 5, 9], [4], []], [[3, 7], [], []]]
    assert parallel.Processes().deal([1, 3]) == [1, 3]


def test_a_damaged_sample_of_one_process_ends_both(tmp_path, capfd):
    """Which only its reader meets; the other would wait for its gradients."""

    def read(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2)

        def samples(position, count):
            if rank == 1:
                raise InputError("prepare: shard-000000.tar must be as it was written, but sample 5 differs")
            return {"noise": None, "target": None, "cond": None}

        group = parallel.Processes(rank, 2)
        trainer = SimpleNamespace(config=TrainConfig(), step=0, rank=rank, world_size=2, group=group, samples=samples)
        Trainer._batch(trainer, 0)

    both = [forked(lambda rank=rank: read(rank)) for rank in range(2)]
    assert [waited(child) for child in both] == [2, 2]
    said = capfd.readouterr().err
    assert said.count("sample 5 differs") == said.count("got a failure of another one") == 1


def test_draws_are_slices_of_the_whole_batchs():
    """Four images in one process, two or four, in two groups: the same numbers image by image."""

    def drawn(world_size):
        parts = []
        for rank in range(world_size):
            torch.manual_seed(seed)
            draws, count = Draws(rank, world_size), 4 // world_size
            x = torch.empty(2 * count, 3, 5)
            noise, t = draws.randn_like(x, groups=2), draws.randint(0, 1000, count, groups=2)
            parts.append((noise.unflatten(0, (2, count)), t.view(2, count), draws.rand(count)[None]))
        return [torch.cat(part, 1) for part in zip(*parts, strict=True)]

    seed = torch.seed() % 2**32
    for world_size in (2, 4):
        for a, b in zip(drawn(world_size), drawn(1), strict=True):
            assert torch.equal(a, b)
    torch.manual_seed(seed)
    assert torch.equal(drawn(1)[0].flatten(), torch.manual_seed(seed) and torch.randn(8 * 15))


@pytest.mark.parametrize("bucket", [1 << 26, 300])
def test_only_sampled_heads_gradients_are_reduced(monkeypatch, bucket):
    config = PoolConfig(heads_per_cell=4, width=8, max_depth=2)
    pool = HeadPool(config, [4, 6], [8, 4])
    optimizer = RowAdamW(pool.parameters(), lr=1e-3)
    features = [[torch.randn(2, c, s, s) for c, s in ((4, 8), (6, 4))] for _ in config.tasks]
    rows = pool.sample(1)
    pool.logits(features, rows).sum().backward()
    marked = rows.view(len(config.tasks), 2, -1)
    for level, stack in enumerate(pool.stacks):
        for p in stack.values():
            optimizer.mark_rows(p, marked[:, level].flatten())
    before = {name: p.grad.clone() for name, p in pool.named_parameters()}
    others = {name: torch.randn_like(g) for name, g in before.items()}  # what the other process has in those rows
    sent, expected = [], []
    for level, stack in enumerate(pool.stacks):
        for name in stack:
            key = f"stacks.{level}.{name}"
            expected.append(others[key][sorted(set(marked[:, level].flatten().tolist()))].flatten())
    queue = torch.cat(expected)

    def all_reduce(flat):
        at = sum(sent)
        sent.append(flat.numel())
        flat += queue[at : at + flat.numel()]

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(parallel, "BUCKET", bucket)
    parallel.Processes(0, 2).average_gradients(Phase("pool", pool, optimizer))
    total = sum(p.numel() for p in pool.parameters())
    per_head = total // len(pool.age[0])
    assert sum(sent) == queue.numel() == 3 * per_head and len(sent) > (bucket == 300)  # 3 of 48 heads on each level
    for level, stack in enumerate(pool.stacks):
        inside = torch.zeros(pool.rows, dtype=torch.bool)
        inside[marked[:, level].flatten()] = True
        for name, p in stack.items():
            key = f"stacks.{level}.{name}"
            mean = (before[key] + others[key]) / 2
            torch.testing.assert_close(p.grad[inside], mean[inside], rtol=0, atol=0)
            assert torch.equal(p.grad[~inside], before[key][~inside])


def test_one_process_reduces_nothing(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *args: pytest.fail("there is no other process"))
    layer = torch.nn.Linear(2, 2)
    layer(torch.randn(3, 2)).sum().backward()
    parallel.Processes().average_gradients(Phase("layer", layer, torch.optim.AdamW(layer.parameters())))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parallel": "fsdp"}, "parallel must be one of none, ddp, fsdp2, got 'fsdp'"),
        ({"parallel": "fsdp2", "lora_rank": 4}, "lora_rank must be 0 with parallel fsdp2"),
        ({"parallel": "fsdp2", "optimizer": "adamw8bit"}, "optimizer must be adamw with parallel fsdp2"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TrainConfig(), **changes).validate()


def test_none_is_no_setting_for_several(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(InputError, match="parallel must be ddp or fsdp2 in 2 processes, got 'none'"):
        parallel.join(TrainConfig(parallel="none"))
    with pytest.raises(InputError, match="device must be cuda in 2 processes, got 'cuda:0': each has its own"):
        parallel.join(TrainConfig(parallel="ddp", device="cuda:0"))


@pytest.mark.parametrize(
    "told, words",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be in 1.*, as torchrun sets it, got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be in 1.*, got '0'"),
        ({"WORLD_SIZE": "2"}, "RANK must be in 0..1, as torchrun sets it, got none"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be in 0..1, as torchrun sets it, got '2'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT must be in 1..65535, .* got 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR must be a host, .* got none"),
    ],
)
def test_what_a_launcher_has_to_tell(monkeypatch, told, words):
    """A rank that is none would be waited for, and the rest is a traceback of torch's."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: pytest.fail("nobody is to be waited for"))
    with pytest.raises(InputError, match=f"train: {words}"):
        parallel.join(TrainConfig())
    if not words.startswith("MASTER"):  # whose errors are told by torch there
        with pytest.raises(InputError, match=f"evaluate: {words}"):
            Group()


def test_another_layout_is_refused_unless_allowed(tmp_path):
    config = TrainConfig(output=str(tmp_path / "run"), batch_size=2, accumulation=2)
    folder = run_folder.claim_folder(config)
    shared = dataclasses.replace(config, batch_size=1, parallel="fsdp2")
    with pytest.raises(InputError, match="got a run with .* instead of .* \\(allow_inexact goes on"):
        run_folder.claim_folder(shared)
    assert run_folder.claim_folder(shared, allow_inexact=True) == folder
    with pytest.raises(InputError, match="got a run with lr"):
        run_folder.claim_folder(dataclasses.replace(shared, lr=1.0), allow_inexact=True)
    state = {"world_size": 1, "images_per_step": 4}
    run_folder.check_layout(folder, state, config, 1, False)
    with pytest.raises(InputError, match="must be resumed in 1 process, got 2 "):
        run_folder.check_layout(folder, state, shared, 2, False)
    run_folder.check_layout(folder, state, shared, 2, True)
    with pytest.raises(InputError, match=r"4 images per optimizer step, got 8 \(batch_size 2 x accumulation 2 x 2"):
        run_folder.check_layout(folder, state, config, 2, True)
    with pytest.raises(InputError, match=r"got 8 .* x 2 processes; of 1, which also takes allow_inexact\)"):
        run_folder.check_layout(folder, state, config, 2, False)


def test_runs_from_before_there_was_a_choice_go_on(tmp_path):
    config = TrainConfig(output=str(tmp_path / "run"))
    path = run_folder.claim_folder(config) / "config.json"
    values = json.loads(path.read_text())
    del values["parallel"]
    path.write_text(json.dumps(values))
    assert run_folder.claim_folder(config) == path.parent

"""Sealed checkpoints: kills, altered files, full disks, optimizers bit for bit."""

import errno
import json
import os
import random
import resource
import signal
import time

import pytest
import torch

from nitrofusion import checkpoint
from nitrofusion.errors import CheckpointError, StorageError

STATE = {"step": 3, "nimg": 12}


def parts(size=1000) -> dict:
    return {
        "student": {"a.weight": torch.randn(size), "b": torch.randn(3, 4).t()},
        "pool": {"conv": torch.randn(2, 3).to(torch.bfloat16), "age": torch.arange(5)},
        "rng": checkpoint.pack_rng(),
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys() and all(torch.equal(a[n][k], b[n][k]) for k in a[n]) for n in a
    )


def test_round_trip(tmp_path):
    wanted = parts()
    folder = checkpoint.save(tmp_path, 3, wanted, STATE)
    assert folder.name == "step-000003"
    got, state = checkpoint.load(folder)
    assert same(wanted, got) and state == STATE
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {"files"}
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 3, parts(), STATE)
    wanted = parts()
    assert same(checkpoint.load(checkpoint.save(tmp_path, 3, wanted, STATE))[0], wanted)


FILES = ["student.safetensors", "pool.safetensors", "rng.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["remove", "flip", "truncate"])
def test_harm_is_refused_by_name_and_the_one_before_used(tmp_path, name, harm):
    good = checkpoint.save(tmp_path, 1, parts(), STATE)
    bad = checkpoint.save(tmp_path, 2, parts(), STATE)
    victim = bad / name
    data = bytearray(victim.read_bytes())
    if harm == "remove":
        victim.unlink()
    elif harm == "truncate":
        victim.write_bytes(data[: len(data) // 2])
    else:
        for _ in range(20):  # any single bit, anywhere
            bit = random.randrange(len(data) * 8)
            data[bit // 8] ^= 1 << bit % 8
            victim.write_bytes(data)
            with pytest.raises(CheckpointError, match="step-000002"):
                checkpoint.load(bad)
            data[bit // 8] ^= 1 << bit % 8
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(bad)
    if harm != "flip" or name != "manifest.json":
        assert name in str(caught.value)
    found, refused = checkpoint.latest(tmp_path)
    assert found == good and len(refused) == 1 and "step-000002" in refused[0]


def test_a_stranger_in_the_folder_is_refused(tmp_path):
    folder = checkpoint.save(tmp_path, 1, parts(), STATE)
    (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"extra\.bin is not in its manifest"):
        checkpoint.load(folder)


def test_prune_keeps_the_newest_and_the_last_good_one(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, parts(10), STATE)
    for step in (3, 4, 5):
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("{}")
    checkpoint.prune(tmp_path, keep=2)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000002", "step-000004", "step-000005"]
    with pytest.raises(ValueError, match="keep must be >= 1"):
        checkpoint.prune(tmp_path, keep=0)


def test_twenty_kills_while_saving(tmp_path):
    """Whatever was acknowledged is there afterwards, and the newest checkpoint always opens."""
    wanted = parts(200_000)
    for kill in range(20):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            checkpoint.sweep(tmp_path)
            for step in range(100 * kill + 1, 100 * kill + 100):
                checkpoint.save(tmp_path, step, wanted, {"step": step})
                os.write(write, f"{step}\n".encode())
                checkpoint.prune(tmp_path, keep=2)
            os._exit(0)
        os.close(write)
        time.sleep(random.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            acknowledged = [int(line) for line in pipe]
        found, refused = checkpoint.latest(tmp_path)
        assert not refused
        if acknowledged:
            got, state = checkpoint.load(found)
            assert state["step"] >= acknowledged[-1] and same(got, wanted)
    checkpoint.sweep(tmp_path)
    assert all(p.name.startswith("step-") for p in (tmp_path / "checkpoints").iterdir())


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    good = checkpoint.save(tmp_path, 1, parts(), STATE)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.save(tmp_path, 2, parts(500_000), STATE)
        except StorageError as error:
            os._exit(error.exit_code if "bytes free" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert checkpoint.latest(tmp_path) == (good, [])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses(tmp_path, monkeypatch, code):
    good = checkpoint.save(tmp_path, 1, parts(), STATE)

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError, match="must be writable"):
        checkpoint.save(tmp_path, 2, parts(), STATE)
    assert checkpoint.latest(tmp_path) == (good, [])


def test_too_little_space_is_known_before_writing(tmp_path, monkeypatch):
    import collections
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda p: collections.namedtuple("u", "total used free")(10, 5, 5))
    with pytest.raises(StorageError, match="bytes free, got 5"):
        checkpoint.save(tmp_path, 1, parts(), STATE)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_continues_bit_for_bit(fused):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)

    def advance(model, optimizer, steps, seed):
        g = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 7, generator=g)).square().mean().backward()
            optimizer.step()

    a, opt_a = make()
    advance(a, opt_a, 3, seed=1)
    b, opt_b = make()
    b.load_state_dict(a.state_dict())
    checkpoint.unpack_optimizer(opt_b, {k: v.clone() for k, v in checkpoint.pack_optimizer(opt_a).items()})
    advance(a, opt_a, 4, seed=2)
    advance(b, opt_b, 4, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_rng_round_trip():
    saved = checkpoint.pack_rng()
    wanted = torch.randn(5)
    torch.manual_seed(99)
    checkpoint.unpack_rng(saved)
    assert torch.equal(torch.randn(5), wanted)

"""Sealed checkpoints: kills, altered files, full disks, optimizers bit for bit."""

import errno
import json
import os
import platform
import random
import resource
import shutil
import signal
import threading
import time
from collections import namedtuple

import pytest
import torch

from nitrofusion import checkpoint
from nitrofusion.errors import CheckpointError, StorageError

from .kills import altered, same, while_saving

STATE = {"step": 3, "nimg": 12}


def parts(size=1000) -> dict:
    return {
        "student": {"a.weight": torch.randn(size), "b": torch.randn(3, 4).t()},
        "pool": {"conv": torch.randn(2, 3).to(torch.bfloat16), "age": torch.arange(5)},
        "rng": checkpoint.pack_rng(),
    }


def test_round_trip(tmp_path):
    wanted = parts()
    folder = checkpoint.save(tmp_path, 3, wanted, STATE)
    assert folder.name == "step-000003"
    got, state = checkpoint.load(folder)
    assert same(wanted, got) and state == STATE
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {"files"}
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}


def test_saving_a_step_again_keeps_it_if_it_verifies_and_else_replaces_it(tmp_path):
    first, second = parts(), parts()
    folder = checkpoint.save(tmp_path, 3, first, STATE)
    assert same(checkpoint.load(checkpoint.save(tmp_path, 3, second, STATE))[0], first)
    (folder / "pool.safetensors").unlink()
    assert same(checkpoint.load(checkpoint.save(tmp_path, 3, second, STATE))[0], second)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_shared_expanded_and_empty_tensors(tmp_path):
    weight = torch.randn(4, 6)
    wanted = {"shared": {"a": weight, "b": weight, "c": weight[1:3], "d": weight[:1].expand(5, 6)}, "none": {}}
    assert same(checkpoint.load(checkpoint.save(tmp_path, 1, wanted, STATE))[0], wanted)


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, parts(), {"odd": object()})
    with pytest.raises(ValueError, match="plain names"):
        checkpoint.save(tmp_path, 1, {"../up": {}}, STATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["student.safetensors", "pool.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["remove", "flip", "truncate"])
def test_harm_is_refused_by_name_and_the_one_before_used(tmp_path, name, harm):
    good = checkpoint.save(tmp_path, 1, parts(), STATE)
    bad = checkpoint.save(tmp_path, 2, parts(), STATE)
    sealed = (bad / name).read_bytes()
    for _ in range(20 if harm == "flip" else 1):
        if harm == "flip":  # any single bit, anywhere
            bit, data = random.randrange(len(sealed) * 8), bytearray(sealed)
            data[bit // 8] ^= 1 << bit % 8
            (bad / name).write_bytes(data)
        elif harm == "truncate":
            (bad / name).write_bytes(sealed[: len(sealed) // 2])
        else:
            (bad / name).unlink()
        for read in (checkpoint.load, checkpoint.verify):
            with pytest.raises(CheckpointError) as caught:
                read(bad)
            assert "step-000002" in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
        assert checkpoint.latest(tmp_path) == (good, [str(caught.value)])


def test_strangers_and_what_cannot_be_read_are_refused(tmp_path):
    good, *bad = (checkpoint.save(tmp_path, step, parts(), STATE) for step in range(1, 5))
    (tmp_path / "checkpoints" / "step-000005").write_text("a file")
    (bad[0] / "extra.bin").write_bytes(b"x")
    (bad[1] / "manifest.json").write_text("[" * 100_000)
    (bad[2] / "pool.safetensors").unlink()
    (bad[2] / "pool.safetensors").mkdir()
    found, refused = checkpoint.latest(tmp_path)
    reasons = ["Not a directory", "pool.safetensors is no file", "manifest.json must be readable", "extra.bin is not"]
    assert found == good and all(reason in line for reason, line in zip(reasons, refused, strict=True))


def test_sweep_spares_what_a_live_process_writes(tmp_path):
    root = tmp_path / "checkpoints"
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    here = platform.node()
    live, own = f".tmp-step-000001.{os.getppid()}.{here}", f".tmp-step-000001.{os.getpid()}.{here}"
    for name in (live, own, f".tmp-step-000001.{child}.{here}", ".tmp-step-000001.1.another-host", ".tmp-odd"):
        (root / name).mkdir(parents=True)
    checkpoint.sweep(tmp_path)
    assert [p.name for p in root.iterdir()] == [live]


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


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_ten_kills_while_saving(tmp_path, background):
    """Whatever was acknowledged is there afterwards, and the newest checkpoint always opens."""
    result = while_saving(tmp_path, 10, parts(200_000), background)
    assert result.pop("sealed") > 0, "no save ended between the kills"
    assert result == {"kills": 10, "unresumable": 0, "lost": 0, "orphans": 0}


def test_every_file_removed_and_bits_flipped(tmp_path):
    result = altered(tmp_path, 40, parts())
    assert result == {"removed": 5, "flipped": 40, "accepted": 0, "unnamed": 0, "no fallback": 0}


def test_a_save_in_the_background_holds_what_was_true_then(tmp_path):
    wanted, state = parts(), {"step": 1, "bad": {"a": 0}}
    then = {name: {k: v.clone() for k, v in tensors.items()} for name, tensors in wanted.items()}
    go = threading.Event()
    with checkpoint.Saver(tmp_path / "a", 3) as saver:
        saver._seal = lambda *args, seal=saver._seal: (go.wait(30), seal(*args))
        saver.save(1, wanted, state)
        assert saver.sealed is None and checkpoint.latest(tmp_path / "a") == (None, [])
        saver.check()  # nothing to say yet
        for tensors in wanted.values():
            for tensor in tensors.values():
                tensor.zero_()
        state["bad"]["a"] = 7
        go.set()
    assert saver.sealed == 1
    checkpoint.save(tmp_path / "b", 1, then, {"step": 1, "bad": {"a": 0}})
    a, b = (tmp_path / name / "checkpoints" / "step-000001" for name in "ab")
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_a_failure_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first = checkpoint.save(tmp_path, 1, parts(), STATE)
    monkeypatch.setattr(os, "rename", refuse)
    for last in (
        lambda saver: saver.wait(),
        lambda saver: saver.save(3, parts(), STATE),
        lambda saver: _until_raised(saver.check),
        lambda saver: saver.__exit__(None, None, None),
    ):
        saver = checkpoint.Saver(tmp_path, 1)
        saver.save(2, parts(), STATE)
        with pytest.raises(StorageError, match="bytes free, got No space left"):
            last(saver)
        assert saver.sealed is None and checkpoint.latest(tmp_path) == (first, [])
        saver.wait()  # said once
    with pytest.raises(KeyError) as caught, checkpoint.Saver(tmp_path, 1) as saver:
        saver.save(2, parts(), STATE)
        raise KeyError("of the block")
    assert "No space left" in caught.value.__notes__[0]


def _until_raised(check):
    while True:
        check()
        time.sleep(0.01)


def test_retention_with_an_altered_newest_and_one_under_way(tmp_path):
    with checkpoint.Saver(tmp_path, 1) as saver:
        saver.save(1, parts(), STATE)
        saver.wait()
        (tmp_path / "checkpoints" / "step-000001").rename(tmp_path / "checkpoints" / "step-000009")
        newest = tmp_path / "checkpoints" / "step-000009"
        saver.save(2, parts(), STATE)
        saver.wait()
        (newest / "state.json").write_text("{}")  # the newest by name, and not by content
        saver.save(3, parts(), STATE)
    assert sorted(p.name for p in newest.parent.iterdir()) == ["step-000003", "step-000009"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    good = checkpoint.save(tmp_path, 1, parts(), STATE)
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            for limit in (0, 100, 4096, 100_000, 1_000_000):  # bytes of one file
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                with pytest.raises(StorageError, match="bytes free, got File too large"):
                    checkpoint.save(tmp_path, 2, parts(500_000), STATE)
            os._exit(StorageError.exit_code)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert checkpoint.latest(tmp_path) == (good, [])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses(tmp_path, monkeypatch, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    folders = [checkpoint.save(tmp_path, step, parts(), STATE) for step in (1, 2)]
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError, match="must be writable with [0-9,]+ bytes free"):
        checkpoint.save(tmp_path, 3, parts(), STATE)
    with pytest.raises(StorageError, match="must be writable"):
        checkpoint.prune(tmp_path, keep=1)
    assert sorted((tmp_path / "checkpoints").iterdir()) == folders
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        checkpoint.save(tmp_path / "file", 1, parts(), STATE)


def test_too_little_space_is_known_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: namedtuple("Usage", "total used free")(10, 5, 5))
    with pytest.raises(StorageError, match=r"must have \d,\d+ bytes free, got 5"):
        checkpoint.save(tmp_path, 1, {"student": {"a": torch.zeros(1000)}}, STATE)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_an_optimizer_continues_bit_for_bit(tmp_path, options):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
        groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[1].parameters(), "lr": 3e-3}]
        return model, torch.optim.AdamW(groups, **options)

    def advance(model, optimizer, steps, seed):
        g = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 7, generator=g)).square().mean().backward()
            optimizer.step()

    a, opt_a = make()
    advance(a, opt_a, 3, seed=1)
    saved = {"student": a.state_dict(), "optimizer_student": checkpoint.pack_optimizer(opt_a)}
    loaded, _ = checkpoint.load(checkpoint.save(tmp_path, 3, saved, STATE))
    b, opt_b = make()
    advance(b, opt_b, 1, seed=3)  # what it held before is forgotten
    b.load_state_dict(loaded["student"])
    checkpoint.unpack_optimizer(opt_b, loaded["optimizer_student"])
    advance(a, opt_a, 4, seed=2)
    advance(b, opt_b, 4, seed=2)
    assert same({"p": a.state_dict()}, {"p": b.state_dict()})
    assert same({"o": checkpoint.pack_optimizer(opt_a)}, {"o": checkpoint.pack_optimizer(opt_b)})


def test_optimizer_state_keeps_its_dtype_and_its_own_memory():
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer, kept = torch.optim.SGD([param], momentum=0.9), torch.arange(3, dtype=torch.float32)
    checkpoint.unpack_optimizer(optimizer, {"0.momentum_buffer": kept})
    held = optimizer.state[param]["momentum_buffer"]
    assert held.dtype == torch.float32 and torch.equal(held, kept) and held.data_ptr() != kept.data_ptr()
    with pytest.raises(CheckpointError, match="must have 1 parameters, got state 1.momentum_buffer"):
        checkpoint.unpack_optimizer(optimizer, {"1.momentum_buffer": kept})
    optimizer.state[param]["momentum_buffer"] = None
    assert checkpoint.pack_optimizer(optimizer) == {}


def test_rng_round_trip():
    saved = checkpoint.pack_rng()
    wanted = torch.randn(5)
    torch.manual_seed(99)
    checkpoint.unpack_rng(saved)
    assert torch.equal(torch.randn(5), wanted)

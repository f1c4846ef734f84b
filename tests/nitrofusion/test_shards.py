"""Shards of teacher samples: format, random access, refusals, idempotence; and the batches that training gets."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as parse_safetensors

from nitrofusion import data, shards
from nitrofusion.config import TrainConfig
from nitrofusion.errors import InputError, StorageError
from nitrofusion.models import sdxl
from nitrofusion.shards import Sample, Shards

from .tiny import tiny_folder

SETTINGS = {"format": shards.FORMAT, "num_samples": 5, "shard_size": 2, "seed": 1}


def random_samples(first: int, count: int) -> list[Sample]:
    prompts = [f"a \u00e9 {hashlib.sha256(bytes([i])).hexdigest()[: 7 * i]}" for i in range(first, first + count)]
    return [
        Sample(first + k, prompt, 7 * (first + k), torch.randn(4, 6, 5).bfloat16()) for k, prompt in enumerate(prompts)
    ]


def write(folder: Path) -> list[Sample]:
    shards.claim_folder(folder, SETTINGS)
    made = random_samples(0, 5)
    for number in range(3):
        shards.write_shard(shards.shard_path(folder, number), made[2 * number : 2 * number + 2], SETTINGS)
    return made


def same(a: Sample, b: Sample) -> bool:
    return dataclasses.replace(a, latents=None) == dataclasses.replace(b, latents=None) and a.latents.equal(b.latents)


def test_any_order_is_read_as_written(tmp_path):
    made = write(tmp_path)
    read = Shards(tmp_path)
    assert len(read) == 5
    for i in torch.randint(0, 5, (20,)).tolist():
        assert same(read[i], made[i]) and read[i].latents.dtype == torch.bfloat16


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 1)
    made, read = write(tmp_path), Shards(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    assert all(same(read[i], made[i]) for i in (0, 4, 2, 1, 3, 0))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        read.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_tarfile_reads_it_and_the_index_says_where(tmp_path):
    made = write(tmp_path)
    index = json.loads((tmp_path / "shard-000001.json").read_text())
    raw = (tmp_path / "shard-000001.tar").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == index["sha256"] and len(raw) == index["bytes"]
    with tarfile.open(tmp_path / "shard-000001.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [
            f"00000000{i}.{ending}" for i in (2, 3) for ending in ("json", "safetensors")
        ]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
        for (json_at, json_size, at, size, crc), sample in zip(index["samples"], made[2:4], strict=True):
            about = tar.extractfile(f"{sample.index:09d}.json").read()
            latents = tar.extractfile(f"{sample.index:09d}.safetensors").read()
            assert raw[json_at : json_at + json_size] == about and raw[at : at + size] == latents
            assert zlib.crc32(about + latents) == crc
            assert json.loads(about) == {
                "index": sample.index, "prompt": sample.prompt, "noise_seed": sample.noise_seed,
            }  # fmt: skip
            assert parse_safetensors(latents)["latents"].equal(sample.latents)


def test_webdataset_reads_it(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset (pip install webdataset)")
    made = write(tmp_path)
    urls = [str(shards.shard_path(tmp_path, number)) for number in range(3)]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["__key__"] for s in found] == [f"{i:09d}" for i in range(5)]
    for values, sample in zip(found, made, strict=True):
        assert values["json"]["prompt"] == sample.prompt
        assert parse_safetensors(values["safetensors"])["latents"].equal(sample.latents)


def test_every_altered_byte_or_cut_is_refused_by_name(tmp_path, seed):
    write(tmp_path)
    tar, index = tmp_path / "shard-000001.tar", tmp_path / "shard-000001.json"
    generator = torch.Generator().manual_seed(seed)
    for path in (tar, index):
        whole = path.read_bytes()
        for size in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(InputError, match="shard-000001"):
                Shards(tmp_path)
        for _ in range(20):
            position = int(torch.randint(0, len(whole), (), generator=generator))
            altered = bytearray(whole)
            altered[position] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
            path.write_bytes(altered)
            with pytest.raises(InputError, match="shard-000001"):
                shards.read_index(tar, SETTINGS, 2, whole=True)
        path.write_bytes(whole)
    rows = json.loads(index.read_text())["samples"]
    altered = bytearray(whole := tar.read_bytes())
    altered[rows[1][2] + rows[1][3] - 1] ^= 1  # one bit of a sample's last latent: seen when that sample is read
    tar.write_bytes(altered)
    read = Shards(tmp_path)
    assert read[2].index == 2
    with pytest.raises(InputError, match="shard-000001.tar must be as it was written, but sample 3 differs"):
        read[3]
    tar.write_bytes(whole)
    tar.unlink()
    with pytest.raises(InputError, match="shard-000001.tar"):
        Shards(tmp_path)
    index.unlink()
    with pytest.raises(InputError, match="got no shard-000001.tar"):
        Shards(tmp_path)


def test_what_killed_writers_left_is_swept_and_live_ones_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = os.uname().nodename
    left = {
        f".tmp-shard-000001.tar.{dead.pid}.{node}": (False, False),
        f".tmp-shard-000001.tar.{os.getppid()}.{node}": (True, True),
        f".tmp-shard-000001.tar.{os.getpid()}.elsewhere.local": (True, False),
        ".tmp-strange": (False, False),
    }
    for everyone in (False, True):
        for name in left:
            (tmp_path / name).write_bytes(b"")
        shards.sweep(tmp_path, everyone=everyone)
        assert {p.name for p in tmp_path.iterdir()} == {name for name, stays in left.items() if stays[everyone]}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    shards.claim_folder(tmp_path, SETTINGS)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"with [\d,]+ bytes free, got No space left"):
        shards.write_shard(shards.shard_path(tmp_path, 0), random_samples(0, 2), SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.json"]


def test_what_another_machine_left_is_swept_when_the_shard_is_there_and_time_has_passed(tmp_path):
    write(tmp_path)
    there, missing, altered = ("shard-000000.tar", "shard-000001.json", "shard-000002.tar")
    (tmp_path / missing).unlink()
    with open(tmp_path / altered, "ab") as file:
        file.write(b"x")
    left = [
        (f".tmp-{there}.7.elsewhere", 7200, False),
        (f".tmp-{there}.8.elsewhere", 60, True),  # perhaps it is being written
        (f".tmp-{missing}.7.elsewhere", 7200, True),
        (f".tmp-{altered}.7.elsewhere", 7200, True),
        (".tmp-samples.json.7.elsewhere", 7200, False),
        (".tmp-notes.7.elsewhere", 7200, True),
    ]
    for name, age, _ in left:
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    shards.sweep(tmp_path)
    assert {p.name for p in tmp_path.glob(".tmp-*")} == {name for name, _, stays in left if stays}


def test_a_samples_row_takes_forty_bytes(tmp_path):
    settings = SETTINGS | {"num_samples": 2048, "shard_size": 64}
    shards.claim_folder(tmp_path, settings)
    latents = torch.zeros(4, 1, 1)
    for number in range(32):
        samples = [Sample(i, "a", i, latents) for i in range(64 * number, 64 * (number + 1))]
        shards.write_shard(shards.shard_path(tmp_path, number), samples, settings)
    tracemalloc.start()
    read = Shards(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(read), "as lists, its five numbers take 250 bytes"
    assert read[2047].index == 2047 and read._rows.nbytes == 40 * len(read)


def refused_by_a_disk_that_can_only_be_read(folder):
    with pytest.raises(StorageError, match=r"with [\d,]+ bytes free, got Read-only file system"):
        shards.write_shard(shards.shard_path(folder, 0), random_samples(0, 2), SETTINGS)
    with pytest.raises(StorageError, match="new must be writable, got Read-only file system"):
        shards.claim_folder(folder / "new", SETTINGS)


def test_a_disk_that_can_only_be_read(tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    made = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
    if made is None or made.returncode:
        pytest.skip(f"needs to mount a tmpfs, got {'no mount' if made is None else made.stderr.strip()}")
    try:
        refused_by_a_disk_that_can_only_be_read(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_refuses_every_change(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("mkdir", "unlink", "replace"):
        monkeypatch.setattr(os, name, refuse)
    refused_by_a_disk_that_can_only_be_read(tmp_path)


# ---------------------------------------------------------------------- what the teacher draws


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("teacher"))
    return folder, sdxl.load(folder)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(data, "SHARD", 4)


@pytest.fixture(scope="module")
def config(teacher) -> TrainConfig:
    return TrainConfig(
        teacher=str(teacher[0]), num_teacher_samples=10, teacher_steps=2, teacher_batch_size=3, precision="fp32",
        device="cpu", init=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def drawn(config, teacher, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD", 4)
        return data.prepare(config, teacher[1], tmp_path_factory.mktemp("drawn") / "cache")


@pytest.fixture
def cache(drawn, tmp_path) -> Path:
    return shutil.copytree(drawn, tmp_path / "cache")


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_parts_make_what_one_process_makes(config, teacher, drawn, tmp_path):
    whole = digests(drawn)
    assert len(whole) == 3 * 2 + 1
    for k in (1, 2, 0):
        data.prepare(config, teacher[1], tmp_path / "parts", part=(k, 3))
    assert digests(tmp_path / "parts") == whole


def test_what_a_dead_job_of_an_array_left_is_listed_as_a_whole_and_drawn_in_any_share(config, teacher, cache):
    wanted = digests(cache)
    for name in ("shard-000000.json", "shard-000002.json"):
        (cache / name).unlink()
    assert [data.claim(config, teacher[0], cache, part=(k, 2)) for k in (0, 1)] == [[0, 2], []]  # as that array
    assert data.claim(config, teacher[0], cache) == [0, 2]
    for number in (2, 0):
        data.draw(config, teacher[1], cache, [number], progress=False)
    assert digests(cache) == wanted


def test_samples_are_the_teachers(config, teacher, drawn):
    """Each by itself, from its own noise and prompt."""
    read, scheduler = Shards(drawn), data.teacher_scheduler(teacher[0])
    prompts = data.training_prompts(config, 10)
    for i in (0, 3, 9):
        _, x0, _ = data.draw_samples(config, teacher[1], scheduler, [prompts[i]], [i])
        assert read[i].prompt == prompts[i] and read[i].index == i
        torch.testing.assert_close(read[i].latents.float(), x0[0], rtol=2**-8, atol=1e-4)


def test_what_is_there_stays_and_what_is_damaged_is_drawn_again(config, teacher, cache, capfd):
    folder, wanted = cache, digests(cache)
    kept = (folder / "shard-000000.tar").stat().st_mtime_ns
    with open(folder / "shard-000001.tar", "r+b") as file:  # seen by its size
        file.truncate(700)
    with open(folder / "shard-000002.tar", "r+b") as file:  # seen by its digest
        file.seek(1600)
        file.write(b"\xff\x00\xff")
    data.prepare(config, teacher[1], folder)
    assert "shard-000001.tar" in "".join(capfd.readouterr()) and digests(folder) != wanted
    data.prepare(config, teacher[1], folder, verify=True)
    assert "shard-000002.tar" in "".join(capfd.readouterr()) and digests(folder) == wanted
    assert (folder / "shard-000000.tar").stat().st_mtime_ns == kept


@pytest.mark.parametrize("content", [b" " * ((1 << 20) + 1), b"[" * 100_000, b"[]", b"\xff"])
def test_an_index_nobody_here_wrote_is_refused_and_drawn_again(config, teacher, cache, content):
    wanted = digests(cache)
    (cache / "shard-000001.json").write_bytes(content)
    with pytest.raises(InputError, match="shard-000001.json must be as it was written, but .*prepare --verify"):
        Shards(cache)
    data.prepare(config, teacher[1], cache, verify=True)
    assert digests(cache) == wanted
    (cache / "samples.json").write_bytes(content)
    with pytest.raises(InputError, match="samples.json must be readable JSON|must hold samples of format 1"):
        Shards(cache)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"seed": 5}, "samples of seed 5, got 0"),
        ({"num_teacher_samples": 9}, "samples of num_samples 9, got 10"),
        ({"guidance_scale": 3.0}, "samples of guidance_scale 3.0, got 2.5"),
        ({"teacher_steps": 3}, "samples of teacher_steps 3, got 2"),
        ({"precision": "bf16"}, "samples of precision bf16, got fp32"),
    ],
)
def test_samples_of_other_settings_are_refused(config, teacher, drawn, change, says):
    with pytest.raises(InputError, match=says):
        data.prepare(dataclasses.replace(config, **change), teacher[1], drawn)


def test_shards_of_another_teacher_are_refused(config, cache, tmp_path):
    other = tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="samples of teacher [0-9a-f]{64}, got [0-9a-f]{64}"):
        data.prepare(config, sdxl.load(other), cache)
    settings = shards.read_settings(cache) | {"teacher": "0" * 64}
    (cache / "samples.json").write_text(json.dumps(settings))  # one folder's shards beside another's settings
    with pytest.raises(InputError, match="shard-000000.tar must hold samples of"):
        Shards(cache)


def test_an_older_cache_is_to_be_prepared_again(config, teacher, tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps({"num_samples": 10, "prompts_list": []}))
    with pytest.raises(InputError, match="an older version's: remove the folder and prepare again"):
        data.prepare(config, teacher[1], tmp_path)


@pytest.mark.parametrize("content", ["null", "[1]", '"prompts_list"', "7", '{"format": 99}'])
def test_settings_nobody_here_wrote_are_refused(tmp_path, content):
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(InputError, match=f"must hold samples of format {shards.FORMAT}, got another"):
        shards.claim_folder(tmp_path, SETTINGS)


def test_training_gets_each_sample_once_an_epoch_from_any_position(config, teacher, drawn):
    model, folder = teacher[1], drawn
    batches, read = data.Samples(config, model, folder), Shards(folder)
    prompts = data.training_prompts(config, 10)
    one = batches(10, 10)  # the second epoch
    order = [next(i for i in range(10) if read[i].latents.float().equal(target)) for target in one["target"]]
    assert sorted(order) == list(range(10)) and one["prompts"] == [prompts[i] for i in order]
    seeds = [read[i].noise_seed for i in order]
    noise = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    assert one["noise"].equal(noise) and one["target"].dtype == torch.float32
    later = data.Samples(config, model, folder)(13, 4)  # a resumed run begins anywhere
    assert later["target"].equal(one["target"][3:7]) and later["prompts"] == one["prompts"][3:7]
    assert not one["target"].equal(batches(0, 10)["target"])

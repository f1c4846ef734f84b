"""Teacher samples: how fast shards are drawn, written and read, and what kills of Ray's workers leave behind.

python -m benchmarks.prepare --json prepare.json --samples 2048 --kills 20
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

import torch

from nitrofusion import data, prepare_ray, shards
from nitrofusion.config import TrainConfig
from nitrofusion.presets import RUNS
from nitrofusion.train.plan import check_teacher

from . import records


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in ``folder``."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def write_and_read(folder: Path, count: int, side: int, seed: int = 0) -> dict:
    """Rates of ``count`` samples of latents [4, side, side]: written shard by shard, opened, read in random order."""
    settings = {"format": shards.FORMAT, "num_samples": count, "shard_size": data.SHARD}
    shards.claim_folder(folder, settings)
    generator = torch.Generator().manual_seed(seed)
    wrote, size = 0.0, 0
    for number in range(-(-count // data.SHARD)):
        indices = range(number * data.SHARD, min((number + 1) * data.SHARD, count))
        latents = torch.randn(len(indices), 4, side, side, generator=generator).bfloat16()
        prompt = "a prompt of usual length, twelve words or so"
        made = [shards.Sample(i, prompt, i, x) for i, x in zip(indices, latents, strict=True)]
        started = time.perf_counter()
        shards.write_shard(shards.shard_path(folder, number), made, settings)
        wrote += time.perf_counter() - started
        size += shards.shard_path(folder, number).stat().st_size
    started = time.perf_counter()
    opened = shards.Shards(folder)
    open_seconds = time.perf_counter() - started
    order = torch.randperm(count, generator=generator).tolist()
    started = time.perf_counter()
    for i in order:
        opened[i]
    read = time.perf_counter() - started
    return {
        "samples": count,
        "latents": [4, side, side],
        "bytes": size,
        "bytes_per_sample": size / count,
        "written_samples_per_second": count / wrote,
        "written_bytes_per_second": size / wrote,
        "open_seconds": open_seconds,
        "read_samples_per_second": count / read,
        "read_microseconds_per_sample": 1e6 * read / count,
    }


def draw(config: TrainConfig, folder: Path, engine: str) -> tuple[dict[str, str], float]:
    """(digests, seconds) of ``config``'s samples; loading the teacher and starting workers included."""
    config = dataclasses.replace(config, cache=str(folder))
    teacher, _ = check_teacher(config)
    started = time.perf_counter()
    if engine == "ray":
        prepare_ray.prepare(config, teacher)
    else:
        data.prepare(config, data.load_teacher(config, teacher), folder, progress=False)
    return digests(folder), time.perf_counter() - started


class Killer(threading.Thread):
    """Kills this driver's Ray workers: every other one at the sight of a file it is writing, others at random times."""

    def __init__(self, folder: Path, kills: int, pause: tuple[float, float], seed: int | None = None):
        super().__init__(daemon=True)
        self.folder, self.kills, self.pause = folder, kills, pause
        self.random, self.done = random.Random(seed), threading.Event()
        self.killed = {"writing": 0, "any": 0}

    def run(self) -> None:
        while sum(self.killed.values()) < self.kills and not self.done.is_set():
            kind = "writing" if self.killed["writing"] <= self.killed["any"] else "any"
            time.sleep(self.random.uniform(*self.pause) if kind == "any" else 0.0005)
            workers = _workers()
            if kind == "writing":
                names = [p.name for p in self.folder.glob(".tmp-*")]
                workers = [pid for pid in workers if any(f".{pid}." in name for name in names)]
            if workers:
                os.kill(self.random.choice(workers), signal.SIGKILL)
                self.killed[kind] += 1


def _workers() -> list[int]:
    """Descendants of this process that run a task of ours."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it ended meanwhile

    def ours(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    return [pid for pid, name in names.items() if name.startswith(b"ray::_draw") and ours(pid)]


def kill_workers(config: TrainConfig, folder: Path, kills: int, pause=(0.2, 3.0), seed: int | None = None) -> dict:
    """Draws ``config``'s samples on Ray while workers are killed, and serially, and compares."""
    wanted, _ = draw(config, folder / "serial", "serial")
    (folder / "ray").mkdir()
    killer = Killer(folder / "ray", kills, pause, seed)
    killer.start()
    try:
        found, seconds = draw(config, folder / "ray", "ray")
    finally:
        killer.done.set()
        killer.join()
    return {
        "shards": (len(wanted) - 1) // 2,
        "kills": killer.killed,
        "seconds": seconds,
        "files": len(wanted),
        "files_that_differ": sum(found.get(name) != digest for name, digest in wanted.items()),
        "orphans": sum(name.startswith(".tmp-") for name in found),
        "equal": found == wanted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=records.output, required=True)
    parser.add_argument("--samples", type=int, default=2048, help="drawn by each engine, and read")
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    import ray

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    config = dataclasses.replace(RUNS["world"], num_teacher_samples=args.samples, seed=11)
    record = {
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__},
        "load_average": os.getloadavg(),
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, side, count in (("world", 16, args.samples), ("sdxl", 128, min(args.samples, 2048))):
            record[f"files_{name}"] = write_and_read(folder / name, count, side)
        serial, seconds = draw(config, folder / "serial", "serial")
        record["serial"] = {"samples": args.samples, "seconds": seconds, "samples_per_second": args.samples / seconds}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            found, seconds = draw(config, folder / "on-ray", "ray")
            rate = args.samples / seconds
            record["ray"] = {
                "workers": 2, "samples": args.samples, "seconds": seconds, "samples_per_second": rate,
                "equal": found == serial,
            }  # fmt: skip
            record["kills"] = kill_workers(config, folder, args.kills)
        finally:
            ray.shutdown()
    records.write(args.json, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

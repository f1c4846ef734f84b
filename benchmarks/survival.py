"""What training survives, in numbers: kills, altered files, full disks, hostile files, ten hours in fast motion.

python -m benchmarks.survival --output survival.json [--only saving training ...]

Writes one JSON record; the same functions run in small counts in ``tests``. Linux.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch

from nitrofusion import checkpoint
from nitrofusion.config import TrainConfig
from nitrofusion.pool import PoolConfig
from tests.nitrofusion import hostile, kills
from tests.nitrofusion.bombs import defused
from tests.nitrofusion.tiny import tiny_folder

from . import records

STATE_MB = 200  # of the save whose stall is measured


def tiny_config(root: Path, teacher: Path, name: str, steps: int, **changes) -> TrainConfig:
    config = TrainConfig(
        output=str(root / name), teacher=str(teacher), init=None, cache=str(root / "cache"), num_teacher_samples=8,
        teacher_steps=2, shifted_timestep=500, batch_size=2, accumulation=1, stages=(steps,), lr=1e-4, head_lr=1e-3,
        crop_size=8, pool=PoolConfig(heads_per_cell=2, width=8, max_depth=1, refresh_rate=0.05), precision="fp32",
        num_previews=1, preview_every=100, checkpoint_every=1, device="cpu",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def parts(megabytes: float) -> dict[str, dict[str, torch.Tensor]]:
    count = int(megabytes * 250_000) // 4
    return {"student": {f"layer.{i}": torch.randn(count) for i in range(3)}, "pool": {"heads": torch.randn(count)}}


def saving(root: Path, args) -> dict:
    """SIGKILLs at random moments of saving, in the foreground and in the background."""
    return {
        name: kills.while_saving(root / f"saving-{name}", args.saving_kills, parts(1), name == "background")
        for name in ("foreground", "background")
    }


def altered(root: Path, args) -> dict:
    return kills.altered(root / "altered", args.flips, parts(0.1))


def training(root: Path, args) -> dict:
    """SIGKILLs at random steps of training: the final digest against that of a run nobody killed."""
    teacher = tiny_folder(root / "teacher")
    whole, broken = (tiny_config(root, teacher, name, 3 * args.training_kills) for name in ("whole", "broken"))
    kills.while_training(whole, 0, "steps", timeout=3000)
    result = kills.while_training(broken, args.training_kills, "steps", timeout=3000)
    return result | {"equal to the uninterrupted run": kills.digest(whole.output) == kills.digest(broken.output)}


def disks(root: Path, args) -> dict:
    """Disks that are full at so many points of training; then there is room again."""
    teacher = tiny_folder(root / "teacher")
    whole, full = (tiny_config(root, teacher, name, 4, preview_every=1) for name in ("roomy", "full"))
    kills.while_training(whole, 0, "steps", timeout=3000)
    wanted = kills.digest(whole.output)
    outcomes = kills.while_training(full, args.disk_points, "disks", timeout=3000)["outcomes"]
    return {
        "points": len(outcomes),
        "exit codes": sorted({r["code"] for r in outcomes}),
        "checkpoint lost": sum(r["newest"] != 2 or r["refused"] > 0 for r in outcomes),
        "equal afterwards": sum(r["digest"] == wanted for r in outcomes),
        "said": sorted({r["said"].split("must be", 1)[-1] for r in outcomes}),
    }


def stalls(root: Path, args) -> dict:
    """Seconds that training waits for a save of ``STATE_MB``, and until it is sealed; medians of five."""
    state, result = parts(STATE_MB), {}
    for name in ("foreground", "background"):
        waited, sealed = [], []
        with checkpoint.Saver(root / f"stall-{name}", 1, name == "background") as saver:
            for step in range(1, 6):
                started = time.perf_counter()
                saver.save(step, state, {})
                waited.append(time.perf_counter() - started)
                saver.wait()
                sealed.append(time.perf_counter() - started)
        result[name] = {"stall_s": round(sorted(waited)[2], 3), "sealed_s": round(sorted(sealed)[2], 3)}
    return {"state_mb": STATE_MB} | result


def safetensors(root: Path, args) -> dict:
    return hostile.mutated(root / "mutated", random.Random(args.seed), args.mutations)


def pickles(root: Path, args) -> dict:
    return hostile.unpickled(tiny_folder(root / "teacher"), root / "pickles", random.Random(args.seed))


def folders(root: Path, args) -> dict:
    return hostile.opened(tiny_folder(root / "teacher"), root / "hostile", random.Random(args.seed))


def bombs(root: Path, args) -> dict:
    return defused(tiny_folder(root / "teacher"), root / "defused", random.Random(args.seed))


def endurance(root: Path, args) -> dict:
    """Ten hours in fast motion: memory, descriptors, log, previews and checkpoints while a run goes on."""
    often = {"num_previews": 8, "preview_every": 20, "checkpoint_every": 10}
    config = tiny_config(root, tiny_folder(root / "teacher"), "long", args.steps, **often)
    from nitrofusion.train import train

    child = kills.forked(lambda: train(config))
    seen, log, run = [], root / "long" / "log.jsonl", root / "long"
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.5)
        if log.exists():
            status = Path(f"/proc/{child}/status").read_text()
            rss = int(status.split("VmRSS:")[1].split()[0]) if "VmRSS:" in status else 0
            files = len(list(Path(f"/proc/{child}/fd").iterdir())) if rss else 0
            count = len(list((run / "previews").glob("*.png"))), len(list(run.glob("checkpoints/step-*")))
            seen.append((kills._lines(log), rss / 1024, files, *count))
    code = kills.waited(child)
    seen = [row for row in seen if row[1] and row[0] >= args.steps // 5]  # after the warm-up
    step, rss = (torch.tensor([row[i] for row in seen], dtype=torch.float64) for i in (0, 1))
    slope = ((step - step.mean()) * (rss - rss.mean())).sum() / (step - step.mean()).square().sum()
    return {
        "steps": args.steps,
        "exit code": code,
        "rss_mb": {"mean": round(rss.mean().item(), 1), "per 1000 steps": round(1000 * slope.item(), 2)},
        "descriptors": {"first": seen[0][2], "most": max(row[2] for row in seen), "last": seen[-1][2]},
        "log_bytes_per_step": round(log.stat().st_size / args.steps),
        "previews": {"drawn": args.steps // 20 + 1, "most kept": max(row[3] for row in seen)},
        "checkpoints": {"saved": args.steps // 10, "most on disk": max(row[4] for row in seen)},
    }


PARTS = (saving, altered, stalls, safetensors, pickles, folders, bombs, disks, training, endurance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--output", type=records.output, default=Path("survival.json"))
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="these parts; those that are not run stay in the record"
    )
    parser.add_argument("--saving_kills", type=int, default=40, help="in the foreground, and again in the background")
    parser.add_argument("--training_kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--mutations", type=int, default=600, help="of each of seven kinds")
    parser.add_argument("--disk_points", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2000, help="of the long run")
    parser.add_argument("--seed", type=int, default=0, help="of mutations; kills are at random")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = records.read(args.output)
    record |= {"torch": torch.__version__, "python": platform.python_version(), "system": platform.system()}
    # What forks and then trains comes first in a process whose autograd has not run; drawing does not run it.
    for part in PARTS:
        if part.__name__ in args.only:
            root = Path(tempfile.mkdtemp(prefix="survival-"))
            started = time.perf_counter()
            try:
                record[part.__name__] = part(root, args) | {"seconds": round(time.perf_counter() - started, 1)}
            finally:
                shutil.rmtree(root, ignore_errors=True)
            print(part.__name__, json.dumps(record[part.__name__]), flush=True)
            records.write(args.output, record)


if __name__ == "__main__":
    main()

"""What a run has to survive: kills while it saves and while it trains, altered files, full disks, signals.

Children are forked from a warm process of their own, because autograd does not survive a fork:

python -m tests.nitrofusion.kills CONFIG.json (moments | steps | signals | disks)[,...] COUNT
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from nitrofusion import checkpoint, storage
from nitrofusion.config import TrainConfig
from nitrofusion.errors import CheckpointError, NitroError

ROOT = Path(__file__).parents[2]


def digest(run: str | Path) -> str:
    """Of everything the last checkpoint holds, clocks aside."""
    folder, refused = checkpoint.latest(run)
    assert folder is not None and not refused, refused
    parts, state = checkpoint.load(folder)
    h = hashlib.sha256(json.dumps({k: state[k] for k in ("step", "nimg")}).encode())
    for name in sorted(parts):
        for key in sorted(parts[name]):
            h.update(f"{name}.{key}".encode())
            h.update(parts[name][key].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys() and all(torch.equal(a[n][k], b[n][k]) for k in a[n]) for n in a
    )


def forked(work: Callable[[], object]) -> int:
    """The child's process id; it leaves with 0, with what ``work`` exits with, or with 99 and its error."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code
        except NitroError as error:
            print(error, file=sys.stderr, flush=True)
            code = error.exit_code
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return child


def waited(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ------------------------------------------------------------------------------------------------ saving


def while_saving(run: Path, kills: int, parts: dict, background: bool) -> dict[str, int]:
    """SIGKILLs at random moments of saving. What was acknowledged is there; the newest checkpoint always opens."""
    sealed = unresumable = lost = 0
    for _ in range(kills):
        read, write = os.pipe()

        def work(first=sealed + 1, write=write):
            checkpoint.sweep(run)
            saver = checkpoint.Saver(run, 2, background)
            for step in range(first, first + 1000):
                saver.save(step, parts, {"step": step})
                os.write(write, f"{saver.sealed or 0}\n".encode())

        child = forked(work)
        os.close(write)
        time.sleep(random.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        assert waited(child) == -signal.SIGKILL
        with os.fdopen(read) as pipe:
            sealed = max([sealed, *map(int, pipe)])
        found, refused = checkpoint.latest(run)
        unresumable += bool(refused) or (found is None and sealed > 0)
        if found is not None:
            got, state = checkpoint.load(found)
            lost += state["step"] < sealed or not same(got, parts)
            sealed = max(sealed, state["step"])
    checkpoint.sweep(run)
    orphans = sum(not path.name.startswith("step-") for path in (run / "checkpoints").iterdir())
    return {"kills": kills, "sealed": sealed, "unresumable": unresumable, "lost": lost, "orphans": orphans}


def altered(run: Path, flips: int, parts: dict) -> dict[str, int]:
    """Every file of the newest of two checkpoints removed, and bits flipped in turn: what was not refused by name."""
    good, bad = (checkpoint.save(run, step, parts, {"step": step}) for step in (1, 2))
    files = sorted(bad.iterdir())
    counts = {"removed": 0, "flipped": 0, "accepted": 0, "unnamed": 0, "no fallback": 0}
    for i in range(len(files) + flips):
        file = files[i % len(files)]
        sealed = file.read_bytes()
        if i < len(files):
            file.unlink()
        else:
            bit, data = random.randrange(len(sealed) * 8), bytearray(sealed)
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
        counts["removed" if i < len(files) else "flipped"] += 1
        try:
            checkpoint.load(bad)
            counts["accepted"] += 1
        except CheckpointError as error:
            counts["unnamed"] += file.name not in str(error)
        counts["no fallback"] += checkpoint.latest(run)[0] != good
        file.write_bytes(sealed)
    assert checkpoint.latest(run) == (bad, [])
    return counts


# ------------------------------------------------------------------------------------------------ training


def while_training(config: TrainConfig, kills: int, at: str, timeout: float = 300) -> dict:
    """The counts of a run of ``config`` that is killed at random ``moments`` or ``steps``, and resumed until it ends.

    ``disks``: its disk is full at so many points. ``signals``: see ``_signals``.
    """
    path = Path(config.output).with_suffix(".json")
    path.write_text(json.dumps(config.to_json()))
    command = [sys.executable, "-m", "tests.nitrofusion.kills", str(path), at, str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _killed(config: TrainConfig, num_kills: int, at: str) -> dict:
    from nitrofusion.train import train

    rng, log = random.Random(os.getpid()), Path(config.output) / "log.jsonl"
    kills = deaths = 0
    deadline = time.monotonic() + 3000
    while time.monotonic() < deadline:
        child = forked(lambda: train(config))
        if kills < num_kills:
            if at == "steps":
                _await_lines(log, child, rng.randint(1, 2))
            time.sleep(rng.uniform(0.05, 1.6) if at == "moments" else rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            kills += 1
        code = waited(child)
        if code == -signal.SIGKILL:
            deaths += 1
        elif code:
            sys.exit(f"a resumed run failed with {code} after {kills} kills")
        elif kills >= num_kills:
            return {"kills": kills, "deaths": deaths}
        elif at == "steps":
            num_kills = kills  # it has ended
    sys.exit("the run did not get on between kills")


def _await_lines(log: Path, child: int, count: int) -> None:
    """Waits until the child has written so many lines of its log, or is gone."""
    time.sleep(0.2)
    before = _lines(log)
    while _lines(log) < before + count and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        before = min(before, _lines(log))  # it takes back what no checkpoint has
        time.sleep(0.005)


def _lines(log: Path) -> int:
    try:
        return log.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _full_disks(config: TrainConfig, points: int) -> dict:
    """Files may grow to so many bytes and no further, from step 3 on: the log, previews, each part of a checkpoint."""
    from nitrofusion.train import train
    from nitrofusion.train.loop import Trainer

    read, write = os.pipe()
    os.dup2(write, 2)  # the children's messages
    outcomes = []
    for i in range(points):
        run, share = dataclasses.replace(config, output=f"{config.output}-{i}"), i / max(1, points - 1)

        def work(run=run, share=share):
            trainer, log = Trainer(run), Trainer._log

            def then_full(line):
                log(trainer, line)
                if line["step"] == 3:
                    trainer._saver.wait()
                    files = (trainer.run_folder / "checkpoints" / "step-000002").iterdir()
                    least, most = (
                        (trainer.run_folder / "log.jsonl").stat().st_size,
                        max(f.stat().st_size for f in files),
                    )
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    limit = int(least * (0.99 * most / least) ** share)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

            trainer._log = then_full
            trainer.run()

        code = waited(forked(work))
        said = os.read(read, 1 << 16).decode().splitlines()[-1]
        newest, refused = checkpoint.latest(run.output)
        step = newest and int(newest.name[5:])
        again = waited(forked(lambda run=run: train(run)))
        outcomes.append({"code": code, "said": said, "newest": step, "refused": len(refused), "again": again,
                         "digest": digest(run.output)})  # fmt: skip
    return {"outcomes": outcomes}


def _signals(config: TrainConfig) -> dict:
    """Exit codes through the command line, and the newest checkpoint's step against the log's."""
    from nitrofusion import cli

    outcomes = {}
    for name, signals, slow in (
        ("SIGTERM", (signal.SIGTERM,), False),
        ("SIGUSR1", (signal.SIGUSR1,), False),
        ("SIGTERM while saving", (signal.SIGTERM,), True),
        ("SIGINT twice while saving", (signal.SIGINT, signal.SIGINT), True),
    ):
        run = Path(f"{config.output}-{name.replace(' ', '-')}")
        values = dataclasses.replace(
            config, output=str(run), stages=(500,), checkpoint_every=1 if slow else 10**6
        ).to_json()
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))

        def work(slow=slow, path=path):
            if slow:
                sync = storage.sync
                storage.sync = lambda folder: (time.sleep(0.7), sync(folder))
            raise SystemExit(cli.main(["train", "--config", str(path), "--init", "null"]))

        child = forked(work)
        _await_lines(run / "log.jsonl", child, 2)
        started = time.monotonic()
        for number in signals:
            os.kill(child, number)
            time.sleep(0.1)
        code, seconds = waited(child), time.monotonic() - started
        newest, refused = checkpoint.latest(run)
        outcomes[name] = {"code": code, "seconds": seconds, "newest": newest and int(newest.name[5:]),
                          "logged": _lines(run / "log.jsonl"), "refused": refused}  # fmt: skip
    return outcomes


def main(path: str, at: str, count: int) -> None:
    torch.set_num_threads(1)
    with open(path) as file:
        config = TrainConfig.from_json(json.load(file))
    import nitrofusion.train.loop  # noqa: F401  warm: children start at once

    result = {}
    for kind in at.split(","):
        if kind == "signals":
            result |= {"signals": _signals(config)}
        else:
            result |= _full_disks(config, count) if kind == "disks" else _killed(config, count, kind)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""Whether a run is the same in one process and in several, and whatever happens to them.

    python -m benchmarks.parallel --json parallel.json      # all, about ten minutes on two cores; --only batch for one

Tiny models on the CPU, gloo. Processes are forked from this one, which has imported everything; ``elastic``
and ``commands`` start real interpreters.

    batch       1 process x batch 4 against 2 x 2, ddp and fsdp2: parameters, losses and gradient norms after ``steps``
    reshard     saved by 2 processes with fsdp2, loaded by 1, 2 and 3: every tensor
    restart     ``kills`` times: one of two processes killed at a random step, both started again, one told to stop,
                both started again: exit codes, digest and losses against the run nobody touched
    failure     an error in one process alone: exit codes, seconds until all have ended
    commands    the same digest by `torchrun`, by two of it as two nodes, and by `accelerate launch`
    elastic     one process killed under `torchrun --max_restarts`, ``elastic_kills`` times; and torchrun told to stop
                where no checkpoint is due: its exit code, the step it sealed, the digest after going on
    recipes     ``batch`` of every other recipe, ddp
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import yaml

from nitrofusion import checkpoint
from nitrofusion.config import TrainConfig
from nitrofusion.pool import PoolConfig
from nitrofusion.train import train

from . import records
from .records import machine

HOST = "127.0.0.1"
SEED = random.randrange(1000)


def tiny_config(folder: Path, **changes) -> TrainConfig:
    values = dict(
        teacher=str(folder / "teacher"), cache=str(folder / "cache"), init=None, num_teacher_samples=16,
        teacher_steps=2, shifted_timestep=500, batch_size=2, accumulation=1, stages=(6, 4), lr=1e-4, head_lr=1e-3,
        crop_size=8, pool=PoolConfig(heads_per_cell=2, width=8, max_depth=1, refresh_rate=0.05), precision="fp32",
        num_previews=1, preview_every=1000, checkpoint_every=2, device="cpu", seed=SEED,
    )  # fmt: skip
    return TrainConfig(**(values | changes))


# ------------------------------------------------------------------ processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def _end(call) -> None:
    """Runs ``call`` and ends this forked process with the exit code the command line would return."""
    code = 9
    try:
        call()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        code = getattr(error, "exit_code", 9)
        print(f"[{os.environ.get('RANK')}] {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def forked(call) -> int:
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        _end(call)
    return pid


def start(world_size: int, call) -> list[int]:
    """The process ids of ``world_size`` processes of one group, each of which does ``call()``."""
    port, pids = str(free_port()), []
    for rank in range(world_size):

        def body(rank=rank):
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=HOST,
                               MASTER_PORT=port)  # fmt: skip
            call()

        pids.append(forked(body))
    return pids


def wait(pids: list[int], seconds: float = 120) -> list[int]:
    """Exit codes; a process that does not end in time is killed."""
    codes, deadline = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def run(config: TrainConfig, world_size: int, allow_inexact: bool = False) -> list[int]:
    return wait(start(world_size, lambda: train(config, allow_inexact)))


def torchrun(config: TrainConfig, *options: str) -> subprocess.Popen:
    """The command a user would type."""
    return _launched(config, ["torch.distributed.run", *options])


def _launched(config: TrainConfig, launcher: list[str]) -> subprocess.Popen:
    path = Path(f"{config.output}.yaml")
    path.write_text(yaml.safe_dump(config.to_json()))
    command = [sys.executable, "-m", *launcher, "-m", "nitrofusion.train", "--config", str(path)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def worker(launched: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of that rank below a launcher."""
    for process in psutil.Process(launched.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank) and "nitrofusion.train" in process.cmdline():
                return process
    raise LookupError(f"{launched.args} must have a process of rank {rank}, got none")


def wait_for_step(config: TrainConfig, step: int, pids: list[int], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while len(logged(config)) < step:
        for pid in pids:
            os.kill(pid, 0)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{config.output} must reach step {step}, got {len(logged(config))}")
        time.sleep(0.005)


# ------------------------------------------------------------------ what a run left


def logged(config: TrainConfig) -> list[dict]:
    lines = []
    with contextlib.suppress(FileNotFoundError), open(Path(config.output) / "log.jsonl") as log:
        for line in log:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def stored(config: TrainConfig) -> tuple[dict, dict]:
    folder, refused = checkpoint.latest(config.output)
    if folder is None or refused:
        raise RuntimeError(f"{config.output} must hold a checkpoint, got {refused or 'none'}")
    return checkpoint.load(folder)


def digest(parts: dict[str, dict[str, torch.Tensor]]) -> str:
    """Of every tensor of a checkpoint: student, pool, optimizers, average, generators."""
    h = hashlib.sha256()
    for name in sorted(parts):
        for key in sorted(parts[name]):
            h.update(f"{name}.{key}".encode())
            h.update(parts[name][key].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def run_digest(config: TrainConfig) -> str:
    parts, state = stored(config)
    return f"{state['step']}:{state['nimg']}:{digest(parts)}"


def difference(a: TrainConfig, b: TrainConfig) -> dict:
    """Relative differences of two runs: of the student as one vector, of gradient norms, and of losses.

    The log has six decimals, so that of a loss below 1 is its absolute one.
    """
    ours, theirs = (stored(c)[0]["student"] for c in (a, b))
    apart = sum((ours[k].double() - theirs[k].double()).square().sum() for k in theirs).sqrt()
    size = sum(theirs[k].double().square().sum() for k in theirs).sqrt()
    worst = {"loss": 0.0, "grad_norm": 0.0}
    for x, y in zip(logged(a), logged(b), strict=True):
        for kind in worst:
            for name, value in y[kind].items():
                apart_by = abs(x[kind][name] - value)
                size_of = max(1.0, abs(value)) if kind == "loss" else abs(value) or 1.0
                worst[kind] = max(worst[kind], apart_by / size_of)
    return {"student": float(apart / size), "loss": round(worst["loss"], 6), "grad_norm": worst["grad_norm"]}


# ------------------------------------------------------------------ parts


def batch(folder: Path, options) -> dict:
    alone = tiny_config(
        folder, output=str(folder / "batch-none"), batch_size=4, stages=_stages(options.steps), parallel="none",
        regression_weight=0.5, regression_features=1.0,
    )  # fmt: skip
    codes = run(alone, 1)
    record = {"steps": options.steps}
    for kind in ("ddp", "fsdp2"):
        shared = dataclasses.replace(alone, output=str(folder / f"batch-{kind}"), batch_size=2, parallel=kind)
        codes += run(shared, 2)
        record[f"{kind}_2x2_against_none_1x4"] = difference(shared, alone)
    ddp = dataclasses.replace(alone, output=str(folder / "batch-ddp"))
    record["fsdp2_against_ddp"] = difference(shared, ddp)
    return record | {"exit_codes": codes}


def recipes(folder: Path, options) -> dict:
    from tests.nitrofusion.tiny import tiny_features

    features, record = tiny_features(folder / "features"), {}
    for recipe, own in {"regression": {}, "add": {"features": str(features)}, "dmd2": {}, "pgsb": {}}.items():
        alone = tiny_config(
            folder,
            output=str(folder / f"{recipe}-1"),
            batch_size=4,
            stages=(options.steps,),
            recipe=recipe,
            options=own,
        )
        shared = dataclasses.replace(alone, output=str(folder / f"{recipe}-2"), batch_size=2)
        codes = run(alone, 1) + run(shared, 2)
        record[recipe] = difference(shared, alone) | {"exit_codes": codes}
    return record


def reshard(folder: Path, options) -> dict:
    config = tiny_config(folder, output=str(folder / "reshard"), batch_size=3, parallel="fsdp2", stages=(1,))
    record = {"exit_codes": run(config, 2)}
    wanted = digest(stored(config)[0])
    for world_size in options.loaded_by:
        asked = dataclasses.replace(config, batch_size=6 // world_size)
        found = folder / f"reshard-{world_size}"

        def load(asked=asked, found=found):
            from nitrofusion.train.loop import Trainer

            trainer = Trainer(asked, allow_inexact=True)
            parts = trainer._components()
            if trainer.rank == 0:
                found.write_text(digest(parts))

        record["exit_codes"] += wait(start(world_size, load))
        record[f"loaded_by_{world_size}"] = found.read_text() == wanted
    return record


def restart(folder: Path, options) -> dict:
    """Without a launcher: whoever is left after a kill has to end by itself, and all after one's SIGTERM."""
    whole = tiny_config(folder, output=str(folder / "restart"), stages=_stages(options.length), checkpoint_every=3)
    codes, wanted = run(whole, 2), run_digest(whole)
    record = {"kills": 0, "equal": 0, "killed_at": [], "survivors": [], "stopped_at": [], "stopped_with": []}
    for i in range(options.kills):
        broken = dataclasses.replace(whole, output=str(folder / f"restart-{i}"))
        step = random.randint(1, options.length - 2)
        for number, at in ((signal.SIGKILL, step), (signal.SIGTERM, step + 1)):
            pids, rank = start(2, lambda broken=broken: train(broken)), random.randrange(2)
            wait_for_step(broken, at, pids)
            os.kill(pids[rank], number)
            if number == signal.SIGKILL:
                record["survivors"].append(wait(pids)[1 - rank])
            else:
                record["stopped_with"].append(wait(pids))
        record["killed_at"].append(step)
        record["stopped_at"].append(stored(broken)[1]["step"])
        codes += run(broken, 2)
        record["kills"] += 1
        record["equal"] += run_digest(broken) == wanted and _losses(broken) == _losses(whole)
    return record | {"exit_codes": codes}


def elastic(folder: Path, options) -> dict:
    whole = tiny_config(folder, output=str(folder / "elastic"), stages=_stages(options.length))
    codes, wanted = run(whole, 2), run_digest(whole)
    record = {"kills": 0, "equal": 0, "steps_killed_at": []}
    for i in range(options.elastic_kills):
        broken = dataclasses.replace(whole, output=str(folder / f"elastic-{i}"))
        step, rank = random.randint(1, whole.total_steps - 2), random.randrange(2)
        launched = torchrun(broken, "--standalone", "--nproc_per_node=2", "--max_restarts=3")
        wait_for_step(broken, step, [launched.pid])
        worker(launched, rank).kill()
        codes.append(launched.wait(300))
        record["kills"] += 1
        record["equal"] += run_digest(broken) == wanted and _losses(broken) == _losses(whole)
        record["steps_killed_at"].append(step)
    stopped = dataclasses.replace(whole, output=str(folder / "elastic-stopped"), checkpoint_every=1000)
    told = torchrun(stopped, "--standalone", "--nproc_per_node=2", "--max_restarts=3")
    wait_for_step(stopped, 2, [told.pid])
    told.terminate()
    record["told_to_stop"] = {"exit_code": told.wait(300)}
    sealed, steps = stored(stopped)[1]["step"], len(logged(stopped))
    codes.append(torchrun(stopped, "--standalone", "--nproc_per_node=2").wait(300))
    record["told_to_stop"] |= {"sealed": sealed, "logged": steps, "equal": run_digest(stopped) == wanted}
    return record | {"exit_codes": codes}


def failure(folder: Path, options) -> dict:
    """Exit codes where one process alone meets a full disk, a bad shard, a signal or an unexpected error; seconds."""
    import errno

    from nitrofusion.errors import InputError
    from nitrofusion.train import loop

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def altered(*args):
        raise InputError("prepare: a shard must be as it was written, but it is not")

    def stopped(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    record = {}
    for name, rank, owner, attribute, broken in (
        ("checkpoint_full_on_0", 0, checkpoint, "_write", full),
        ("log_full_on_0", 0, loop.Trainer, "_log", full),
        ("preview_full_on_0", 0, loop, "save_preview", full),
        ("samples_altered_on_1", 1, loop, "Samples", altered),
        ("stopped_while_drawing_samples_on_1", 1, loop, "draw", stopped),
        ("error_on_1", 1, loop, "preflight", lambda config: config.nothing),
    ):
        config = tiny_config(folder, output=str(folder / name))

        def body(rank=rank, owner=owner, attribute=attribute, broken=broken, config=config):
            if os.environ["RANK"] == str(rank):
                setattr(owner, attribute, broken)
            train(config)

        started = time.monotonic()
        record[name] = wait(start(2, body))
        record[f"{name}_seconds"] = round(time.monotonic() - started, 1)
    return record


def commands(folder: Path, options) -> dict:
    base = tiny_config(folder, output=str(folder / "forked"))
    codes, wanted, record = run(base, 2), run_digest(base), {}
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={HOST}:{free_port()}"]
    # accelerate has no launcher of several CPU processes any more; that of several GPUs is torchrun, GPUs or not.
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    accelerate += [f"--main_process_port={free_port()}", "--mixed_precision=no", "--dynamo_backend=no"]
    for name, launchers in {
        "torchrun": [["torch.distributed.run", "--standalone", "--nproc_per_node=2"]],
        "two_nodes": [["torch.distributed.run", *nodes]] * 2,
        "accelerate": [accelerate],
    }.items():
        config = dataclasses.replace(base, output=str(folder / name))
        launched = [_launched(config, launcher) for launcher in launchers]
        ended = [child.wait(300) for child in launched]
        record[name] = {"equal": not any(ended) and run_digest(config) == wanted, "exit_codes": ended}
    return record | {"exit_codes": codes}


def _stages(steps: int) -> tuple[int, int]:
    """Two thirds at one inference step, the rest at two."""
    return steps - steps // 3, steps // 3


def _losses(config: TrainConfig) -> list[dict]:
    return [line["loss"] for line in logged(config)]


PARTS = {f.__name__: f for f in (batch, reshard, restart, failure, commands, elastic, recipes)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=10, help="of batch and recipes")
    parser.add_argument("--length", type=int, default=10, help="steps of the runs that are killed")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--elastic_kills", type=int, default=3)
    parser.add_argument("--loaded_by", type=int, nargs="+", default=[1, 2, 3], help="processes of reshard, 1 to 3")
    parser.add_argument("--json", type=records.output, help="record; parts that are not run stay in it")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    from nitrofusion.train import loop  # noqa: F401 -- children start with everything imported
    from tests.nitrofusion.tiny import tiny_folder

    record = records.read(options.json) if options.json else {}
    record |= {"machine": machine(os.cpu_count()), "seed": SEED}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_folder(folder / "teacher")
        before = 0.0
        for part in options.only:
            started = time.perf_counter()
            record[part] = PARTS[part](folder, options)
            spent = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu, before = spent.ru_utime + spent.ru_stime - before, spent.ru_utime + spent.ru_stime
            took = f"{time.perf_counter() - started:5.0f} s, {cpu:.0f} s of CPU"
            print(f"{part:10} {took}  {json.dumps(record[part])}", flush=True)
            records.write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether a run is the same in one process and in several, and whatever happens to them.

    python -m benchmarks.parallel --json parallel.json       # all, about ten minutes on two cores; --only batch for some

Tiny models on the CPU, gloo. Processes are forked from this one, which has imported everything; ``commands`` starts real
interpreters by torchrun and accelerate.

    batch       1 process x batch 4 against 2 x 2, ddp and fsdp2: parameters, losses and gradient norms after ``steps``
    recipes     the same of every other recipe, ddp
    reshard     saved by 2 processes with fsdp2, loaded by 1, 2 and 3: every tensor
    restart     one of two processes killed at a random step, ``kills`` times; torch's elastic agent starts both again
    agents      two elastic agents as two nodes, against two processes of one
    stop        SIGTERM to one process: exit codes, and the digest of the run that goes on
    failure     an error in one process alone: exit codes, seconds until all have ended
    commands    the same by `torchrun`, by two of it as two nodes, and by `accelerate launch`
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nitrofusion import checkpoint
from nitrofusion.config import TrainConfig
from nitrofusion.pool import PoolConfig
from nitrofusion.train import train

from .one_step import machine

HOST = "127.0.0.1"
SEED = random.randrange(1000)


def tiny_config(folder: Path, **changes) -> TrainConfig:
    values = dict(
        teacher=str(folder / "teacher"), cache=str(folder / "cache"), init=None, num_teacher_samples=16, teacher_steps=2,
        shifted_timestep=500, batch_size=2, accumulation=1, stages=(6, 4), lr=1e-4, head_lr=1e-3, crop_size=8,
        pool=PoolConfig(heads_per_cell=2, width=8, max_depth=1, refresh_rate=0.05), precision="fp32", preview_every=1000,
        checkpoint_every=2, device="cpu", seed=SEED,
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


def agent(config: TrainConfig, nodes: int, node: int, processes: int, endpoint: str) -> None:
    """torch's elastic agent, which is torchrun without its command line."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=processes, run_id=str(os.getppid()), rdzv_backend="c10d",
        rdzv_endpoint=endpoint, rdzv_configs={"is_host": node == 0, "join_timeout": 60}, max_restarts=3,
        start_method="fork", monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(settings, _worker)(config)


def _worker(config: TrainConfig) -> None:
    (Path(config.output).parent / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    train(config)


def start_agents(config: TrainConfig, nodes: int, processes: int) -> list[int]:
    endpoint = f"{HOST}:{free_port()}"
    return [forked(lambda node=node: agent(config, nodes, node, processes, endpoint)) for node in range(nodes)]


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
    """Relative differences of two runs: of the student as one vector and of gradient norms; losses' absolute ones.

    The log has six decimals.
    """
    ours, theirs = (stored(c)[0]["student"] for c in (a, b))
    apart = sum((ours[k].double() - theirs[k].double()).square().sum() for k in theirs).sqrt()
    size = sum(theirs[k].double().square().sum() for k in theirs).sqrt()
    worst = {"loss": 0.0, "grad_norm": 0.0}
    for x, y in zip(logged(a), logged(b), strict=True):
        for kind in worst:
            for name, value in y[kind].items():
                apart_by = abs(x[kind][name] - value)
                worst[kind] = max(worst[kind], apart_by if kind == "loss" else apart_by / value)
    return {"student": float(apart / size), "loss": round(worst["loss"], 6), "grad_norm": worst["grad_norm"]}


# ------------------------------------------------------------------ parts


def batch(folder: Path, options) -> dict:
    stages = (options.steps - options.steps // 3, options.steps // 3)
    alone = tiny_config(folder, output=str(folder / "batch-none"), batch_size=4, stages=stages, parallel="none")
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
    config = tiny_config(folder, output=str(folder / "reshard"), batch_size=3, parallel="fsdp2", stages=(3,))
    record = {"exit_codes": run(config, 2)}
    wanted = digest(stored(config)[0])
    for world_size in (1, 2, 3):
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
    whole = tiny_config(folder, output=str(folder / "restart" / "whole"))
    Path(whole.output).parent.mkdir()
    codes, wanted = run(whole, 2), run_digest(whole)
    record = {"kills": 0, "equal": 0, "steps_killed_at": []}
    for i in range(options.kills):
        broken = dataclasses.replace(whole, output=str(folder / "restart" / str(i) / "run"))
        Path(broken.output).parent.mkdir()
        step, rank = random.randint(1, whole.total_steps - 2), random.randrange(2)
        agents = start_agents(broken, 1, 2)
        wait_for_step(broken, step, agents)
        os.kill(int((Path(broken.output).parent / f"pid-{rank}").read_text()), signal.SIGKILL)
        codes += wait(agents)
        record["kills"] += 1
        record["equal"] += run_digest(broken) == wanted and _losses(broken) == _losses(whole)
        record["steps_killed_at"].append(step)
    return record | {"exit_codes": codes}


def agents(folder: Path, options) -> dict:
    root = folder / "agents"
    root.mkdir()
    one = tiny_config(folder, output=str(root / "one"))
    two = dataclasses.replace(one, output=str(root / "two"))
    codes = run(one, 2) + wait(start_agents(two, 2, 1))
    return {"equal": run_digest(one) == run_digest(two), "exit_codes": codes}


def stop(folder: Path, options) -> dict:
    whole = tiny_config(folder, output=str(folder / "stop-whole"), checkpoint_every=1000)
    broken = dataclasses.replace(whole, output=str(folder / "stop"))
    codes = run(whole, 2)
    pids = start(2, lambda: train(broken))
    wait_for_step(broken, 3, pids)
    os.kill(pids[random.randrange(2)], signal.SIGTERM)
    stopped = wait(pids)
    step = stored(broken)[1]["step"]
    codes += run(broken, 2)
    equal = run_digest(broken) == run_digest(whole)
    return {"stopped_with": stopped, "stopped_at": step, "equal": equal, "exit_codes": codes}


def failure(folder: Path, options) -> dict:
    """A disk that fills for the process that writes, and a run folder that only one of them cannot have."""
    import errno

    from nitrofusion.train import loop

    config = tiny_config(folder, output=str(folder / "failure"))

    def body():
        if os.environ["RANK"] == "0":

            def full(*args):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            checkpoint._write = full
        train(config)

    started = time.monotonic()
    disk = wait(start(2, body))
    disk_seconds = time.monotonic() - started

    def refused():
        if os.environ["RANK"] == "1":
            loop.preflight = lambda config: config.nothing
        train(dataclasses.replace(config, output=str(folder / "failure-2")))

    started = time.monotonic()
    early = wait(start(2, refused))
    return {
        "disk_full_on_0": disk,
        "seconds": round(disk_seconds, 1),
        "error_on_1": early,
        "seconds_early": round(time.monotonic() - started, 1),
    }


def commands(folder: Path, options) -> dict:
    root = folder / "commands"
    root.mkdir()
    base = tiny_config(folder, output=str(root / "forked"))
    codes, wanted, record = run(base, 2), run_digest(base), {}

    def command(name: str, *launchers: list[str]) -> None:
        config = dataclasses.replace(base, output=str(root / name))
        path = root / f"{name}.yaml"
        path.write_text(json.dumps({k: v for k, v in config.to_json().items() if v is not None} | {"init": None}))
        ask = ["-m", "nitrofusion.train", "--config", str(path)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        started = [subprocess.Popen([sys.executable, "-m", *launcher, *ask], env=env) for launcher in launchers]
        ended = [child.wait(300) for child in started]
        record[name] = {"equal": run_digest(config) == wanted, "exit_codes": ended}

    torchrun = ["torch.distributed.run"]
    command("torchrun", [*torchrun, "--standalone", "--nproc_per_node=2"])
    nodes = [
        *torchrun,
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={HOST}:{free_port()}",
    ]
    command("two_nodes", nodes, nodes)
    launch = ["accelerate.commands.launch", "--cpu", "--multi_cpu", "--num_processes=2", "--num_machines=1"]
    command(
        "accelerate", [*launch, f"--main_process_port={free_port()}", "--mixed_precision=no", "--dynamo_backend=no"]
    )
    return record | {"exit_codes": codes}


def _losses(config: TrainConfig) -> list[dict]:
    return [line["loss"] for line in logged(config)]


PARTS = {f.__name__: f for f in (batch, recipes, reshard, restart, agents, stop, failure, commands)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=10, help="of batch and recipes")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--json", default=None, help="write the record here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    from tests.nitrofusion.tiny import tiny_folder

    import nitrofusion.train.loop  # noqa: F401  children start with everything imported

    record = {"machine": machine(os.cpu_count())}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_folder(folder / "teacher")
        for part in options.only:
            started = time.perf_counter()
            record[part] = PARTS[part](folder, options)
            print(f"{part:10} {time.perf_counter() - started:5.0f} s  {json.dumps(record[part])}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

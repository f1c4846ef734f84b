"""Processes of one thread each, some at a time, with one progress line over all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..processes import last_words, stop
from .worker import read_result

_THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


@dataclass(frozen=True, eq=False)
class Job:
    """One call of ``worker.work`` in a process of its own.

    Attributes:
        name: of its spec, log and messages.
        spec: JSON for the worker; ``spec["result"]`` is the file that it writes last, and that means done.
        seconds: expected, for the progress line.
        progress: seconds of them that are over, asked while it runs.
    """

    name: str
    spec: dict
    seconds: float = 10.0
    progress: Callable[[], float] = lambda: 0.0

    @property
    def result(self) -> Path:
        return Path(self.spec["result"])

    def done(self) -> bool:
        return read_result(self.result) is not None


def run_jobs(jobs: list[Job], folder: Path, parallel: int, title: str) -> dict[str, str]:
    """Runs what is not done yet; returns job to error, one line, of those that failed.

    Output of a job goes to ``folder/logs/<name>.log``. Jobs end when this process does, however it ends.
    """
    todo = [job for job in jobs if not job.done()]
    errors: dict[str, str] = {}
    if not todo:
        return errors
    total = sum(job.seconds for job in jobs)
    running: dict[Job, subprocess.Popen] = {}
    over = total - sum(job.seconds for job in todo)
    bar = tqdm(
        total=total, initial=over, desc=title, disable=None,  # None: silent where nobody looks
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
    )  # fmt: skip
    try:
        while todo or running:
            while todo and len(running) < parallel:
                job = todo.pop(0)
                running[job] = _start(job, folder)
            time.sleep(0.2)
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                over += job.seconds
                if process.returncode or not job.done():
                    errors[job.name] = last_words(folder / "logs" / f"{job.name}.log", process.returncode)
                    tqdm.write(f"failed: {job.name}: {errors[job.name]}")
            bar.n = min(total, over + sum(min(job.progress(), job.seconds) for job in running))
            done = sum(job.done() for job in jobs)
            bar.set_description_str(f"{title} {done}/{len(jobs)}", refresh=False)
            bar.refresh()
    finally:
        stop(list(running.values()))
        bar.close()
    return errors


def _start(job: Job, folder: Path) -> subprocess.Popen:
    for name in ("jobs", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    spec = folder / "jobs" / f"{job.name}.json"
    spec.write_text(json.dumps(job.spec))
    with open(folder / "logs" / f"{job.name}.log", "ab") as log:
        # A pipe nobody writes to: the worker ends when it closes, so a killed suite leaves no process behind.
        return subprocess.Popen(
            [sys.executable, "-m", "nitrofusion.compare", str(spec)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | _THREADS,
        )  # fmt: skip

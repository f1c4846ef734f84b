"""Processes that look at pictures while others are drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..processes import last_words, stop

_LINES = 3  # of the log, that tell why a process failed


@dataclass
class Workers:
    """Runs jobs, some at a time, whenever it is polled; they end when this process does, however it ends.

    Attributes:
        folder: of specs and logs. tag: in their names, so that processes of several ranks do not share any.
        parallel: processes side by side. threads: of each; fixed, so that sharing the work changes no bit.
        errors: job to what it said last.
    """

    folder: Path
    tag: str
    parallel: int
    threads: int
    errors: dict[str, str] = field(default_factory=dict)
    todo: list[tuple[str, dict]] = field(default_factory=list)
    running: dict[str, subprocess.Popen] = field(default_factory=dict)

    def add(self, name: str, spec: dict) -> None:
        self.todo.append((name, spec))

    def poll(self) -> bool:
        """Starts what may start and collects what has ended; True while there is work."""
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                process.stdin.close()
                if process.returncode:
                    self.errors[name] = last_words(self._file(name, "log"), process.returncode, _LINES)
        while self.todo and len(self.running) < self.parallel:
            name, spec = self.todo.pop(0)
            self.running[name] = self._start(name, spec)
        return bool(self.running or self.todo)

    def stop(self) -> None:
        self.todo.clear()
        stop(list(self.running.values()))

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}{self.tag}.{kind}"

    def _start(self, name: str, spec: dict) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._file(name, "json")
        path.write_text(json.dumps(spec))
        count = str(self.threads)
        threads = {key: count for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # it is no rank of anything
        environment = {key: value for key, value in os.environ.items() if key not in ranks} | threads
        with open(self._file(name, "log"), "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "nitrofusion.evaluate", str(path)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
            )  # fmt: skip

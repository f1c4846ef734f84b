"""What processes begin with, and what a suite's children share: they end with it, and their last words are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .errors import NitroError

_GRACE = 60.0  # seconds a process has to save after a signal
_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# Threads that spin until there is work burn what other programs need; those that sleep at once wake too late for the
# next of many short ops. So GNU's OpenMP, which is PyTorch's on Linux, spins for some 0.1 ms.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}


def settle() -> None:
    """Sets how threads wait and how libraries report, where nobody did; before torch and transformers are imported."""
    waiting = {} if _WAITING.keys() & os.environ.keys() else _WAITING
    for name, value in (_SETTINGS | waiting).items():
        os.environ.setdefault(name, value)


def run(work: Callable[[dict], None]) -> None:
    """Does what the JSON file named on the command line says; an expected failure is one line and its exit code."""
    end_with_parent(sys.stdin.fileno())
    settle()
    try:
        work(json.loads(Path(sys.argv[1]).read_text()))
    except NitroError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def end_with_parent(descriptor: int) -> None:
    """Ends this process when the pipe ``descriptor`` closes: the suite is gone, and may soon run again."""

    def watch() -> None:
        os.read(descriptor, 1)  # no buffered stream: its lock would be held when the interpreter shuts down
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stop(processes: list[subprocess.Popen]) -> None:
    """Asks them to end, and insists after a minute."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_words(log: Path, code: int, lines: int = 1) -> str:
    """The exit code and the reason a process gave: the last lines of its log, joined."""
    text = log.read_bytes().decode(errors="replace").replace("\r", "\n")
    found = [line.strip() for line in text.splitlines() if line.strip()]
    reason = " | ".join(line[:300] for line in found[-lines:]) if found else "no output"
    return f"exit code {code}: {reason}"

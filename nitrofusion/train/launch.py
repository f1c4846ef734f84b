"""One run in several processes of this machine."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import yaml

from ..config import TrainConfig
from ..errors import InputError, Preempted, of_exit_code
from ..torchrun import END_WITH_PARENT

_STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def launch(config: TrainConfig, processes: int, allow_inexact: bool = False) -> Path:
    """Runs or resumes ``config`` in ``processes`` processes of one thread each; each takes its share of the batch.

    Small models train faster so than in one process with as many threads.

    Returns:
        The run folder.

    Raises:
        InputError: the batch cannot be shared. Preempted: a signal, which all processes are told of, stopped them.
        Another NitroError: a process failed; its own line stands above.
    """
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise InputError(f"train: processes must be an integer >= 1, got {processes!r}")
    if config.batch_size % processes:
        raise InputError(f"train: batch_size must be a multiple of {processes} processes, got {config.batch_size}")
    share = dataclasses.replace(config, batch_size=config.batch_size // processes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        # Not as JSON: YAML has other words for infinity, and no pairs of escapes for characters beyond U+FFFF.
        path.write_text(yaml.safe_dump(share.to_json()))
        command = [sys.executable, "-m", "nitrofusion.torchrun", END_WITH_PARENT, "--standalone"]
        command += [f"--nproc_per_node={processes}"]
        command += ["-m", "nitrofusion.train", "--config", str(path), *["--allow_inexact"] * allow_inexact]
        code = _run(command)
    if code:
        raise of_exit_code(code)(f"train: all {processes} processes must end well, got exit code {code}")
    return Path(config.output)


def _run(command: list[str]) -> int:
    """The exit code of torchrun, which signals to this process are passed on to, and waited for while it stops.

    Raises:
        Preempted: there was one.
    """
    told, process = [], None

    def pass_on(signum, frame) -> None:
        told.append(signum)
        if process is not None:
            process.terminate()

    main = threading.current_thread() is threading.main_thread()  # Python tells no other
    ignored = [s for s in _STOPPING if s.name == "SIGHUP" and signal.getsignal(s) is signal.SIG_IGN]  # by nohup
    previous = {s: signal.signal(s, pass_on) for s in _STOPPING if main and s not in ignored}
    try:
        # A session of its own, or a terminal would tell it too: at a second signal it leaves before its processes do.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True) as process:
            if told:  # before there was one to pass it on to
                process.terminate()
            code = process.wait()
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
    if code == Preempted.exit_code or told and code:
        raise Preempted
    return code

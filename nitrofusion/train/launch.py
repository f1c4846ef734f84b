"""One run in several processes of this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..config import TrainConfig
from ..errors import InputError, TrainingError


def launch(config: TrainConfig, processes: int, allow_inexact: bool = False) -> Path:
    """Runs or resumes ``config`` in ``processes`` processes of one thread each; each takes its share of the batch.

    Small models train faster so than in one process with as many threads.

    Returns:
        The run folder.

    Raises:
        InputError: the batch cannot be shared. TrainingError: a process failed; its own line stands above.
    """
    if config.batch_size % processes:
        raise InputError(f"train: batch_size must be a multiple of {processes} processes, got {config.batch_size}")
    share = dataclasses.replace(config, batch_size=config.batch_size // processes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(share.to_json()))  # JSON is YAML
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "nitrofusion.train", "--config", str(path), *["--allow_inexact"] * allow_inexact]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise TrainingError(f"train: all {processes} processes must end well, got exit code {done.returncode}")
    return Path(config.output)

"""Every Triton kernel compiles for every part at the shapes its file lists, without spills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nitrokernels import _triton


@pytest.mark.skipif(_triton.MISSING is not None, reason="needs triton")
def test_kernels_fit():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # interpreted kernels cannot be compiled
    # float16 takes what bfloat16 does; benchmarks/results/aot.json has it too
    command = [sys.executable, "-m", "benchmarks.aot", "--dtypes", "float32", "bfloat16"]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

"""Every Triton kernel compiles for every part at the shapes its file lists, without spills.

With versions of Triton before the newest some kernels spill; each version's record says which, and nothing else may.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nitrokernels import _triton

ROOT = Path(__file__).parents[2]


def spilled(path: Path) -> dict[tuple, int]:
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {(r["kernel"], r["arch"], r["shape"]): r["spills"] for r in rows if r["spills"]}


@pytest.mark.skipif(_triton.MISSING is not None, reason="needs triton")
def test_kernels_fit(tmp_path):
    results, minor = ROOT / "benchmarks" / "results", ".".join(_triton.triton.__version__.split(".")[:2])
    assert spilled(results / "aot.json") == {}
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # interpreted kernels cannot be compiled
    # float16 takes what bfloat16 does; benchmarks/results/aot.json has it too
    command = [sys.executable, "-m", "benchmarks.aot", "--dtypes", "float32", "bfloat16", "--json", tmp_path / "a.json"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert rows and all(r["shared_bytes"] <= r["shared_limit"] for r in rows), done.stderr[-3000:]
    known, found = spilled(results / f"aot-triton-{minor}.json"), spilled(tmp_path / "a.json")
    assert all(spills <= known.get(key, 0) for key, spills in found.items()), done.stderr[-3000:]
    assert done.returncode == (1 if found else 0), done.stderr[-3000:]

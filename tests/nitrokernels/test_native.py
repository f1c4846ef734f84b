"""The native library: its ABI, life without it, and what builds it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nitrokernels import _native

ROOT = Path(__file__).parents[2]


def setup_module_of_project():
    """setup.py as a module, without running setup()."""
    source = (ROOT / "setup.py").read_text().rpartition("\nsetup(")[0]
    spec = importlib.util.spec_from_loader("project_setup", loader=None)
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(ROOT / "setup.py")
    exec(compile(source, module.__file__, "exec"), module.__dict__)  # our own file
    return module


@pytest.mark.skipif(_native.MISSING is not None, reason="needs a C++ compiler at install time")
def test_abi():
    assert _native.LIBRARY.abi == _native.ABI
    assert _native.missing("cpu") is None


WITHOUT = """
import importlib, pkgutil, sys

sys.modules["triton"] = None  # as where it is not installed
import torch, nitrokernels.ops

for info in pkgutil.iter_modules(nitrokernels.ops.__path__):
    module = importlib.import_module(f"nitrokernels.ops.{info.name}")
    args = next(iter(module.CASES.values())).make(torch.float32, "cpu")
    getattr(module, module.OP.name)(*args)
    print("; ".join(nitrokernels.explain(module.OP.name, *args)))
"""


def test_everything_works_without_it():
    """Nor without Triton: every op runs, on the reference, and says why."""
    env = os.environ | {"NITROKERNELS_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(line.endswith("ref: chosen") for line in done.stdout.splitlines())
    assert "; triton: triton is not installed; " in done.stdout
    assert "; cpu: the native library is turned off by NITROKERNELS_NATIVE=0; " in done.stdout


def test_a_library_that_was_not_built_says_so(monkeypatch):
    monkeypatch.delenv("NITROKERNELS_NATIVE", raising=False)
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: None)
    reason = "the native library was not built; reinstall the package where there is a C++ compiler"
    assert _native._load() == (None, reason)


@pytest.mark.skipif(_native.MISSING is not None or not hasattr(os, "fork"), reason="needs a C++ compiler, and fork")
def test_threads_beside_pytorch_and_after_a_fork():
    code = (
        "import ctypes, os, torch, nitrokernels as nk\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(256, 2048)\n"
        "(x * 2).sum()\n"
        "if (child := os.fork()) == 0:\n"  # PyTorch's own threads would hang in a child
        "    nk.geglu(x)\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "bits = lambda: ctypes.string_at((y := nk.geglu(x)).data_ptr(), 4 * y.numel())\n"
        "first = bits()\n"
        "for _ in range(50):\n"
        "    (x * 2).sum()\n"
        "    assert bits() == first\n"
        "if (child := os.fork()) == 0:\n"
        "    os._exit(bits() != first)\n"
        "assert os.waitpid(child, 0)[1] == 0 and bits() == first\n"
    )
    env = os.environ | {"NITROKERNELS_BACKEND": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_another_abi_is_refused(monkeypatch):
    if _native.MISSING is not None:
        pytest.skip("needs a C++ compiler at install time")
    from nitrokernels import _C

    monkeypatch.setattr(_native, "ABI", 999)
    library, reason = _native._load()
    assert library is None and reason == f"the native library must have ABI 999, got {_C.abi}; reinstall the package"


def test_without_a_compiler_the_install_is_pure_python(monkeypatch):
    module = setup_module_of_project()
    monkeypatch.setenv("PATH", "/nonexistent")
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    cxx, nvcc, line = module.native_parts()
    assert cxx is None and nvcc is None and "pure Python" in line
    assert module.native_parts({"NITROKERNELS_NATIVE": "0"})[0] is None


def test_the_builds_ninja_is_that_of_the_path(monkeypatch, tmp_path):
    ninja = pytest.importorskip("ninja", reason="a build's need")
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setattr(ninja, "BIN_DIR", "/of/the/module")
    module = setup_module_of_project()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.find_ninja() == str(tmp_path / "ninja")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert module.find_ninja() == "/of/the/module/ninja"


def test_the_build_names_every_source_and_no_torch():
    module = setup_module_of_project()
    text = module.ninja_file("c++", "nvcc", ROOT / "build" / "x.so")
    for source in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]:
        assert str(source) in text
    assert "torch" not in text.replace(str(ROOT), "") and "-march=native" not in text
    assert ".cu" not in module.ninja_file("c++", None, ROOT / "x.so").replace(str(ROOT), "")


def test_the_build_makes_what_nvcc_knows(monkeypatch):
    module = setup_module_of_project()
    assert module.cuda_archs("/nonexistent/nvcc") == list(module.CUDA_ARCHS)
    listed = subprocess.CompletedProcess([], 0, stdout="sm_80\nsm_90\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: listed)
    text = module.ninja_file("c++", "nvcc", ROOT / "x.so")
    assert module.cuda_archs("nvcc") == ["80", "90a"]
    assert "code=sm_90a" in text and "code=compute_90" in text
    assert "sm_100" not in text and "compute_100" not in text

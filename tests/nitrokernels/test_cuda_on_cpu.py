"""The CUDA sources run on a CPU: compiled as C++ against cuda_on_cpu, where a block's threads are fibers.

What only a GPU can show stays open: wgmma, the order of memory, speed. The arithmetic, the indices and the barriers are
the ones that nvcc compiles.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nitrokernels import _native
from nitrokernels.ops import group_norm_silu as norm
from nitrokernels.testing import assert_within_budget, poisoned_outputs

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "cuda_on_cpu"
SOURCES = ("group_norm_silu.cu", "head_pool_conv.cu", "common/native.cpp")


class OnCpu:
    """Stands in for ``_native.LIBRARY``."""

    def __init__(self, path: Path):
        self.run = ctypes.CDLL(str(path)).run_launcher
        self.run.argtypes = ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t

    def launch(self, name: str, params: bytes, context: int) -> None:
        status = self.run(name.encode(), params, len(params))
        if status != 0:
            raise RuntimeError(f"{name}: launch must return 0, got {status}")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(STAND_IN / "device.cuh", folder / "csrc" / "common")
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", f"-I{folder / 'csrc'}", f"-I{STAND_IN}", "-x", "c++"]
    sources = [str(folder / "csrc" / name) for name in SOURCES] + [str(STAND_IN / "entry.cpp")]
    library = folder / "library.so"
    done = subprocess.run(["g++", *flags, *sources, "-o", str(library), "-lpthread"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return OnCpu(library)


@pytest.fixture
def cuda_on_cpu(compiled, monkeypatch):
    monkeypatch.setattr(_native, "LIBRARY", compiled)


def run_norm(monkeypatch, splits, x, weight, bias, groups, shift, silu, dy):
    """(y, mean, rstd), (dx, dweight, dbias, dshift) of the CUDA launchers."""
    launch = _native.launch

    def with_scratch(name, *fields):
        sums, cut = (2, splits) if "fwd" in name else (3, max(splits, 1))
        partial = torch.empty(sums * len(x) * cut * x.shape[1] + 2 * len(x) * groups) if cut else None
        launch(name.replace("_cpu", "_cuda"), *fields, partial, cut)

    with monkeypatch.context() as patch, poisoned_outputs():
        patch.setattr(_native, "launch", with_scratch)
        forward = norm._fwd_native(x, weight, bias, shift, groups, 1e-5, silu)
        return forward, norm._bwd_native(dy, x, weight, bias, shift, *forward[1:], groups, silu)


@pytest.mark.parametrize("splits", [0, 1, 5])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "shape, groups, dtype",
    [
        ((2, 24, 4, 4), 8, torch.float32),  # one pack a channel
        ((1, 96, 6, 8), 3, torch.bfloat16),  # groups of whole packs
        ((1, 80, 3, 8), 8, torch.float16),  # groups that begin inside a pack
        ((2, 15, 7, 5), 5, torch.float32),  # nothing to load in packs
        ((1, 8, 40, 36), 2, torch.bfloat16),  # several packs a thread
    ],
)
def test_group_norm_silu(monkeypatch, cuda_on_cpu, shape, groups, dtype, last, splits):
    silu = shape[1] != 80
    layout = torch.channels_last if last else torch.contiguous_format
    x = (torch.randn(shape) + 3).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, shape[1])
    shift, dy = torch.randn(shape[:2]), torch.randn(shape).to(dtype)
    (y, mean, rstd), grads = run_norm(monkeypatch, splits, x, weight, bias, groups, shift, silu, dy)
    assert y.is_contiguous(memory_format=layout)
    again = run_norm(monkeypatch, splits, x, weight, bias, groups, shift, silu, dy)
    assert all(torch.equal(a, b) for a, b in zip([y, mean, rstd, *grads], [*again[0], *again[1]], strict=True))

    def reference(precision):
        inputs = [t.to(precision).requires_grad_() for t in (x, weight, bias, shift)]
        out = norm.group_norm_silu_ref(*inputs[:3], groups, 1e-5, inputs[3], silu)
        return [out.detach(), *torch.autograd.grad(out, inputs, dy.to(precision))]

    exact = reference(torch.float64)
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias, shift)]
    out = norm.group_norm_silu_ref(*inputs[:3], groups, 1e-5, inputs[3], silu)
    eager = [out.detach(), *torch.autograd.grad(out, inputs, dy)]
    assert_within_budget(y, eager[0], exact[0])
    for got, near, true in zip(grads, eager[1:], exact[1:], strict=True):
        assert_within_budget(got, near, true, factor=3.0)


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("last", [False, True])
def test_group_norm_silu_of_unaligned_memory_without_parameters(monkeypatch, cuda_on_cpu, last, splits):
    room = torch.randn(1 * 16 * 24 + 1) * 0.01 + 100
    x = room[1:].view(1, 4, 6, 16).permute(0, 3, 1, 2) if last else room[1:].view(1, 16, 4, 6)
    dy = torch.randn(x.shape)
    (y, *_), _ = run_norm(monkeypatch, splits, x, None, None, 4, None, False, dy)
    exact, eager = (norm.group_norm_silu_ref(t, None, None, 4, 1e-5, None, False) for t in (x.double(), x))
    assert_within_budget(y, eager, exact)

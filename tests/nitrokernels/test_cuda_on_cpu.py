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
from nitrokernels.kernels import head_pool_conv as conv
from nitrokernels.ops import group_norm_silu as norm
from nitrokernels.ops import head_pool as heads
from nitrokernels.testing import assert_draws_within_budget, poisoned_outputs

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
        partial = torch.empty(3 * len(x) * splits * x.shape[1] + 2 * len(x) * groups) if splits else None
        launch(name.replace("_cpu", "_cuda"), *fields, partial, splits)

    with monkeypatch.context() as patch, poisoned_outputs():
        patch.setattr(_native, "launch", with_scratch)
        forward = norm._fwd_native(x, weight, bias, shift, groups, 1e-5, silu)
        return forward, norm._bwd_native(dy, x, weight, bias, shift, *forward[1:], groups, silu)


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "shape, groups, dtype",
    [
        ((2, 8, 4, 4), 4, torch.float32),  # one pack a channel
        ((1, 48, 6, 8), 3, torch.bfloat16),  # groups of whole packs
        ((1, 40, 3, 8), 4, torch.float16),  # groups that begin inside a pack
        ((2, 6, 7, 5), 2, torch.float32),  # nothing to load in packs
        ((1, 8, 40, 36), 2, torch.bfloat16),  # several packs a thread
        ((1, 128, 2, 4), 4, torch.float32),  # a warp of columns
    ],
)
def test_group_norm_silu(monkeypatch, cuda_on_cpu, shape, groups, dtype, last, splits):
    silu = shape[1] != 40
    layout = torch.channels_last if last else torch.contiguous_format

    def reference(precision, dy, *inputs):
        inputs = [t.detach().to(precision or t.dtype).requires_grad_() for t in inputs]
        out = norm.group_norm_silu_ref(*inputs[:3], groups, 1e-5, inputs[3], silu)
        return [out.detach(), *torch.autograd.grad(out, inputs, dy.to(out.dtype))]

    def draw():
        x = (torch.randn(shape) + 3).to(dtype).contiguous(memory_format=layout)
        weight, bias = torch.randn(2, shape[1])
        shift, dy = torch.randn(shape[:2]), torch.randn(shape).to(dtype)
        (y, mean, rstd), grads = run_norm(monkeypatch, splits, x, weight, bias, groups, shift, silu, dy)
        assert y.is_contiguous(memory_format=layout)
        again = run_norm(monkeypatch, splits, x, weight, bias, groups, shift, silu, dy)
        assert all(torch.equal(a, b) for a, b in zip([y, mean, rstd, *grads], [*again[0], *again[1]], strict=True))
        exact = reference(torch.float64, dy, x, weight, bias, shift)
        eager = reference(None, dy, x, weight, bias, shift)
        return list(zip([y, *grads], eager, exact, strict=True))

    assert_draws_within_budget(lambda: draw()[:1])
    assert_draws_within_budget(lambda: draw()[1:], factor=3.0)


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("last", [False, True])
def test_group_norm_silu_of_unaligned_memory_without_parameters(monkeypatch, cuda_on_cpu, last, splits):
    def draw():
        room = torch.randn(1 * 16 * 24 + 1) * 0.01 + 100
        x = room[1:].view(1, 4, 6, 16).permute(0, 3, 1, 2) if last else room[1:].view(1, 16, 4, 6)
        (y, *_), _ = run_norm(monkeypatch, splits, x, None, None, 4, None, False, torch.randn(x.shape))
        exact, eager = (norm.group_norm_silu_ref(t, None, None, 4, 1e-5, None, False) for t in (x.double(), x))
        return [(y, eager, exact)]

    assert_draws_within_budget(draw)


@pytest.mark.parametrize("positions", [48 * 256, 24 * 256])  # 48 KB of x; of x and dy
def test_group_norm_silu_of_48_kb(monkeypatch, cuda_on_cpu, positions):
    """What is dynamic fits what any kernel may have, and not beside what is static."""
    x, dy = torch.randn(2, 1, 1, 1, positions)
    (y, *_), (dx, *_) = run_norm(monkeypatch, 0, x, None, None, 1, None, True, dy)
    x.requires_grad_()
    wanted = norm.group_norm_silu_ref(x, None, None, 1)
    torch.testing.assert_close(y, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dx, torch.autograd.grad(wanted, x, dy)[0], rtol=1e-4, atol=1e-5)


def assert_first_conv(draw_args):
    """Every map's result against fp64, with twice the error of an fp32 conv, twice the same bits."""

    def draw():
        features, stacks, index = draw_args()
        triples = []
        with poisoned_outputs():
            got, again = conv._conv_cuda(features, stacks, index), conv._conv_cuda(features, stacks, index)
        for x, stack, rows, y, y_again in zip(features, stacks, index, got, again, strict=True):
            weight = stack[rows].flatten(0, 1)
            exact = F.conv2d(x.double(), weight.double(), stride=2, padding=1)
            assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y, y_again)
            triples.append((y, F.conv2d(x.float(), weight, stride=2, padding=1), exact))
        return triples

    assert_draws_within_budget(draw)


@pytest.mark.parametrize("blocks", [1, 3, 40])  # whole tiles; tiles of two blocks; tiles of many
@pytest.mark.parametrize("tile", [64, 96, 128])
def test_head_pool_conv(monkeypatch, cuda_on_cpu, blocks, tile):
    monkeypatch.setattr(conv, "_gpu", lambda device: (blocks, 0))
    monkeypatch.setattr(conv, "_tile", lambda columns, shared: tile)

    def draw():
        stacks = [torch.randn(4, 24, channels, 4, 4) / 8 for channels in (5, 12, 5)]
        last = torch.randn(2, 12, 6, 10).contiguous(memory_format=torch.channels_last)
        features = [torch.randn(2, 5, 17, 12), last.half(), torch.randn(2, 5, 4, 4).bfloat16()]
        return features, stacks, torch.stack([torch.randperm(4)[:3] for _ in features])

    assert_first_conv(draw)


def test_head_pool_conv_in_many_launches_with_fp32_channels_last(monkeypatch, cuda_on_cpu):
    monkeypatch.setattr(conv, "_gpu", lambda device: (2, 227 * 1024))

    def draw():
        features = [torch.randn(1, 8, 4, 6).contiguous(memory_format=torch.channels_last) for _ in range(34)]
        return features, [torch.randn(40, 8, 8, 4, 4)] * 34, torch.randint(40, (34, 1))

    assert_first_conv(draw)


def test_head_pool_with_its_first_conv_native(monkeypatch, cuda_on_cpu):
    """The cuda backend around the launcher: logits and gradients, those of gradients included."""
    monkeypatch.setattr(conv, "_gpu", lambda device: (3, 227 * 1024))
    monkeypatch.setattr(conv, "_CONV_CUDA", conv._conv_cuda)
    features, levels, index, params, groups = heads.CASES["small"].make(torch.float32, "cpu")
    stacks = [t.requires_grad_() for group in heads._flatten(params) for t in group]
    features = [x.requires_grad_() for x in features]

    def results(run):
        logits = run(features, levels, index, params, groups)
        first = torch.autograd.grad(logits.square().sum(), [*features, *stacks], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first[: len(features)]), stacks, allow_unused=True)
        return [logits, *first, *(g for g in second if g is not None)]

    for got, wanted in zip(results(heads._run_cuda), results(heads.head_pool_ref), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)

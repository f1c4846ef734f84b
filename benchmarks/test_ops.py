"""nitrokernels' ops against eager PyTorch in the same precision."""

import pytest
import torch

from nitrokernels import renoise, use

SHAPES = {"world 64x4x16x16": (64, 4, 16, 16), "sdxl 4x4x128x128": (4, 4, 128, 128)}


def make(shape):
    alpha, alpha_next = torch.rand(2, shape[0]) * 0.9 + 0.07
    tensors = [torch.randn(shape) for _ in range(3)]
    return *tensors, alpha, (1 - alpha**2).sqrt(), alpha_next, (1 - alpha_next**2).sqrt()


@pytest.mark.benchmark(group="renoise")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_ours(benchmark, shape):
    args = make(shape)
    benchmark(lambda: renoise(*args))


@pytest.mark.benchmark(group="renoise")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_eager(benchmark, shape):
    args = make(shape)

    def run():
        with use("ref"):
            renoise(*args)

    benchmark(run)

"""Head pool: stacked heads against a Python loop over torch.nn modules, the world's shapes, one D step's work."""

import pytest
import torch
from torch import nn

from nitrofusion.models import sdxl
from nitrofusion.pool import HeadPool, PoolConfig

from .train_iteration import as_modules

BATCH = 32


@pytest.fixture(scope="module")
def case(world_teacher):
    shapes = sdxl.feature_shapes(world_teacher.unet, 8)
    pool = HeadPool(PoolConfig(width=16, max_depth=2), [c for c, _ in shapes], [s for _, s in shapes])
    full = sdxl.feature_shapes(world_teacher.unet, 16)
    features = [[torch.randn(BATCH, c, s, s) for c, s in maps] for maps in (full, shapes, shapes)]
    return pool, features, pool.sample(0)


def sampled(pool: HeadPool, index: torch.Tensor) -> list[nn.Module]:
    """The sampled heads as modules, in the order of the pool's logits."""
    modules, rows = as_modules(pool), index.view(len(pool.config.tasks), pool.num_levels).tolist()
    return [modules[level][row] for task in rows for level, row in enumerate(task)]


@pytest.mark.benchmark(group="head_pool forward + backward")
def test_ours(benchmark, case):
    pool, features, index = case

    def step():
        pool.zero_grad()
        pool.logits(features, index).mean().backward()

    benchmark(step)


@pytest.mark.benchmark(group="head_pool forward + backward")
def test_eager(benchmark, case):
    pool, features, index = case
    heads = sampled(pool, index)
    flat = [x for taps in features for x in taps]
    wanted = torch.stack([h(x).mean((1, 2, 3)) for h, x in zip(heads, flat, strict=True)], 1)
    torch.testing.assert_close(pool.logits(features, index).flatten(1), wanted, rtol=1e-3, atol=1e-4)

    def step():
        for head in heads:
            head.zero_grad()
        torch.stack([h(x).mean() for h, x in zip(heads, flat, strict=True)]).mean().backward()

    benchmark(step)

"""Head pool: stacked heads against a Python loop over torch.nn modules, the world's shapes, one D step's work."""

import pytest
import torch
from torch import nn

from nitrofusion.models import sdxl
from nitrofusion.pool import HeadPool, PoolConfig

BATCH = 32


@pytest.fixture(scope="module")
def case(world_teacher):
    shapes = sdxl.feature_shapes(world_teacher.unet, 8)
    pool = HeadPool(PoolConfig(width=16, max_depth=2), [c for c, _ in shapes], [s for _, s in shapes])
    full = sdxl.feature_shapes(world_teacher.unet, 16)
    features = [[torch.randn(BATCH, c, s, s) for c, s in maps] for maps in (full, shapes, shapes)]
    return pool, features, pool.sample(0)


def as_modules(pool: HeadPool, index: torch.Tensor) -> list[nn.Module]:
    heads = []
    rows = index.view(len(pool.config.tasks), pool.num_levels)
    for task in range(len(pool.config.tasks)):
        for level, stack in enumerate(pool.stacks):
            row, layers = int(rows[task, level]), []
            for d in range(pool.depths[level]):
                weight = stack[f"conv{d}"].data[row]
                conv = nn.Conv2d(weight.shape[1], weight.shape[0], 4, 2, 1, bias=False)
                conv.weight.data = weight.clone()
                layers += [conv, nn.GroupNorm(pool.num_groups, weight.shape[0]), nn.SiLU()]
            logit = nn.Conv2d(pool.config.width, 1, 1)
            logit.weight.data = stack["logit_weight"].data[row].view(1, -1, 1, 1).clone()
            logit.bias.data = stack["logit_bias"].data[row].view(1).clone()
            heads.append(nn.Sequential(*layers, logit))
    return heads


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
    heads = as_modules(pool, index)
    flat = [x for taps in features for x in taps]
    wanted = torch.stack([h(x).mean((1, 2, 3)) for h, x in zip(heads, flat, strict=True)], 1)
    torch.testing.assert_close(pool.logits(features, index).flatten(1), wanted, rtol=1e-3, atol=1e-4)

    def step():
        for head in heads:
            head.zero_grad()
        torch.stack([h(x).mean() for h, x in zip(heads, flat, strict=True)]).mean().backward()

    benchmark(step)

"""The first convs of head_pool on a GPU: one launch for all maps and heads, with the error of an fp32 conv."""

import pytest
import torch
import torch.nn.functional as F

from nitrokernels import _native
from nitrokernels.kernels import head_pool_conv as op
from nitrokernels.testing import assert_within_budget, poisoned_outputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_native.missing("cuda") is not None, reason="needs native code for CUDA, which needs nvcc"),
]

MAPS = {  # (channels, height, width) of the maps, images, heads, width
    "small": ([(5, 9, 14), (12, 4, 4)], 3, 2, 8),
    "one head": ([(320, 64, 64), (640, 32, 32), (1280, 16, 16)], 5, 1, 64),
    "three heads": ([(320, 32, 32), (1280, 8, 8)], 2, 3, 64),
    "many maps": ([(16, 8, 8)] * 70, 2, 2, 16),
}


def make(name, dtype, last):
    shapes, images, heads, width = MAPS[name]
    layout = torch.channels_last if last else torch.contiguous_format
    features = [torch.randn(images, *s, device="cuda").to(dtype).contiguous(memory_format=layout) for s in shapes]
    stacks = [torch.randn(2 * heads, width, s[0], 4, 4, device="cuda") / (16 * s[0]) ** 0.5 for s in shapes]
    index = torch.stack([torch.randperm(2 * heads)[:heads] for _ in shapes]).cuda()
    return features, stacks, index


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_of_fp32(name, dtype, last, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    features, stacks, index = make(name, dtype, last)
    with poisoned_outputs():
        got = op._CONV_CUDA(features, stacks, index)
    for x, stack, rows, y in zip(features, stacks, index, got, strict=True):
        weight = stack[rows].flatten(0, 1)
        exact = F.conv2d(x.double(), weight.double(), stride=2, padding=1)
        assert_within_budget(y, F.conv2d(x.float(), weight, stride=2, padding=1), exact)
    again = op._CONV_CUDA(features, stacks, index)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_any_width_of_tile(monkeypatch):
    features, stacks, index = make("three heads", torch.float32, last=False)
    results = []
    for tile in (64, 96, 128):
        monkeypatch.setattr(op, "_tile", lambda columns, shared, tile=tile: tile)
        results.append(op._CONV_CUDA(features, stacks, index))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_index_is_read_by_the_graph_that_is_replayed():
    features, stacks, index = make("one head", torch.float32, last=True)
    op._CONV_CUDA(features, stacks, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op._CONV_CUDA(features, stacks, index)
    index.copy_(1 - index)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, op._CONV_CUDA(features, stacks, index), strict=True))

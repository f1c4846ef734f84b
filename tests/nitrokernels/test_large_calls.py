"""What only large calls do, held to the contract at a size that any machine can afford: slices, loops over tiles.

No case of the contract suite is that large, so that on a GPU those kernels would pass it without having run.
"""

import pytest
import torch

from nitrokernels.kernels import head_pool as head_pool_kernels
from nitrokernels.ops import group_norm_silu, head_pool, layer_norm

from . import test_contract as contract

exact_convs = contract.exact_convs
DTYPES = [torch.float32, torch.bfloat16]


def keeps_the_contract(module, case, dtype, device):
    contract.test_forward(module, case, dtype, device)
    contract.test_gradients(module, case, dtype, device)


@pytest.mark.parametrize("device", contract.DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("side", [50, 49])  # in packs, and one by one
def test_group_norm_silu_in_slices_of_several_tiles(monkeypatch, side, last, dtype, device):
    monkeypatch.setattr(group_norm_silu, "_HELD", 0)  # the CUDA version holds no group in one block
    monkeypatch.setattr(group_norm_silu, "_TILE", 256)
    monkeypatch.setattr(group_norm_silu, "_PROGRAMS", 32)
    x = torch.empty(2, 8 if side == 50 else 6, 24 if side == 50 else 25, side)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    _, _, splits, per_split = group_norm_silu._tiling(x, 256)
    assert splits > 1 and per_split >= 2 * (32 if last else 256)
    keeps_the_contract(group_norm_silu, group_norm_silu._case(tuple(x.shape), 2, shift=True, last=last), dtype, device)


@pytest.mark.parametrize("device", contract.DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_of_several_rows_a_program(monkeypatch, dtype, device):
    monkeypatch.setattr(layer_norm, "_PARTS", 4)  # of 4, 4, 4 and 1 rows
    keeps_the_contract(layer_norm, layer_norm._case(13, 24), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd", "wide"])
def test_head_pool_of_several_tiles_a_program(monkeypatch, name, dtype):
    """The interpreter has two programs whatever is asked."""
    monkeypatch.setattr(head_pool_kernels, "_programs", lambda args: (min(args["tiles"], 2),))
    keeps_the_contract(head_pool, head_pool.CASES[name], dtype, "cuda")

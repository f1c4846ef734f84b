"""What group_norm_silu promises beyond the contract: layouts, threads, large means, missing parameters, errors."""

import pytest
import torch
import torch.nn.functional as F

from nitrokernels import group_norm_silu, use
from nitrokernels.ops.group_norm_silu import CASES, OP, _scratch, group_norm_silu_ref
from nitrokernels.testing import assert_draws_within_budget, map_tensors


def backends(args) -> list[str]:
    return [name for name, impl in OP.impls.items() if impl.supports(*args) is None]


@pytest.mark.parametrize("last", [False, True])
def test_is_group_norm_and_silu_in_the_layout_of_its_input(last):
    x, weight, bias, groups, eps, shift, _ = CASES["small"].make(torch.float32, "cpu")
    layout = torch.channels_last if last else torch.contiguous_format
    wanted = F.silu(F.group_norm(x + shift[:, :, None, None], groups, weight, bias, eps))
    args = (x.contiguous(memory_format=layout), weight, bias, groups, eps, shift)
    for backend in backends(args):
        with use(backend):
            got = group_norm_silu(*args)
        torch.testing.assert_close(got, wanted, msg=backend)
        assert got.is_contiguous(memory_format=layout), backend


@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_weight_and_bias_may_be_missing(present):
    x, weight, bias, groups, *_ = CASES["small"].make(torch.float32, "cpu")
    x.requires_grad_()
    weight, bias = (t if p else None for t, p in zip((weight, bias), present, strict=True))
    wanted = F.silu(F.group_norm(x, groups, weight, bias))
    for backend in backends((x, weight, bias, groups)):
        with use(backend):
            got = group_norm_silu(x, weight, bias, groups)
        torch.testing.assert_close(got, wanted, msg=backend)
        (g,), (w,) = (torch.autograd.grad(y.square().sum(), x, retain_graph=True) for y in (got, wanted))
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5, msg=backend)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_parameters_alone_have_gradients(weighted, last):
    """On the reference too, where PyTorch's group_norm has none to a bias alone, and crashes if channels are last."""
    x, weight, bias = torch.randn(3, 160, 16, 16), *torch.randn(2, 160)
    groups = x.double().view(3, 32, -1)
    hat = (groups - groups.mean(2, True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    asked = [weight, bias][not weighted :]
    map_tensors(torch.Tensor.requires_grad_, asked)
    wanted = F.silu(hat.view_as(x) * (weight if weighted else bias * 0 + 1)[:, None, None] + bias[:, None, None])
    wanted = torch.autograd.grad(wanted.square().sum(), asked)
    args = (x.contiguous(memory_format=torch.channels_last) if last else x, weight if weighted else None, bias, 32)
    for backend in backends(args):
        with use(backend):
            got = torch.autograd.grad(group_norm_silu(*args).square().sum(), asked)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-2, msg=backend)


@pytest.mark.parametrize("last", [False, True])
def test_a_mean_far_above_the_deviation_costs_no_more_than_in_eager(last):
    def draw():
        x = torch.randn(1, 8, 24, 24) * 0.01 + torch.tensor([1000.0, -500.0]).repeat_interleave(4).view(1, 8, 1, 1)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        exact, eager = group_norm_silu_ref(x.double(), None, None, 2, 1e-9), group_norm_silu_ref(x, None, None, 2, 1e-9)
        triples = []
        for backend in backends((x, None, None, 2)):
            with use(backend):
                triples.append((group_norm_silu(x, None, None, 2, 1e-9), eager, exact))
        return triples

    assert_draws_within_budget(draw)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels, side", [(96, 48), (800, 17)])
def test_two_threads_change_no_bit(channels, side, last, dtype):
    x = torch.randn(1, channels, side, side).to(dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    weight, bias = torch.randn(2, channels).requires_grad_()
    shift = torch.randn(1, channels).requires_grad_()
    if "cpu" not in backends((x, weight, bias, 8)):
        pytest.skip("needs the native library, which needs a C++ compiler")

    def run(threads):
        torch.set_num_threads(threads)
        with use("cpu"):
            y = group_norm_silu(x, weight, bias, 8, shift=shift)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, weight, bias, shift))

    try:
        one, two = run(1), run(2)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_bad_arguments_are_named():
    x, weight = torch.randn(2, 320, 4, 4), torch.randn(320)
    with pytest.raises(ValueError, match=r"group_norm_silu: weight must be \[320\], got \[64\]"):
        group_norm_silu(x, weight[:64], weight, 32)
    with pytest.raises(ValueError, match=r"group_norm_silu: shift must be \[2, 320\], got \[320\]"):
        group_norm_silu(x, weight, weight, 32, shift=weight)
    with pytest.raises(ValueError, match="group_norm_silu: num_groups must be a divisor of 320 channels, got 33"):
        group_norm_silu(x, weight, weight, 33)
    with pytest.raises(ValueError, match=r"group_norm_silu: x must be \[B, C, ...\], got \[320\]"):
        group_norm_silu(weight, weight, weight, 32)
    with pytest.raises(ValueError, match="group_norm_silu: num_groups must be a divisor of 320 channels, got True"):
        group_norm_silu(x, weight, weight, True)
    with pytest.raises(ValueError, match="group_norm_silu: silu must be a bool, got 'yes'"):
        group_norm_silu(x, weight, weight, 32, silu="yes")
    with pytest.raises(ValueError, match="group_norm_silu: x must be fp32, fp16, bf16 or fp64, got float8_e5m2"):
        group_norm_silu(x.to(torch.float8_e5m2), weight, weight, 32)


@pytest.mark.parametrize(
    "shape, last, held",
    [
        ((1, 1280, 32, 32), True, True),  # groups of 40 channels: five packs
        ((1, 320, 64, 64), True, False),  # of 10: no packs, and 40,960 elements to move one by one
        ((1, 320, 16, 16), True, True),  # so few that one launch is worth more
        ((1, 320, 64, 64), False, True),
        ((1, 320, 63, 63), False, False),
        ((1, 320, 128, 128), False, False),
    ],
)
def test_what_one_block_of_a_gpu_holds(monkeypatch, shape, last, held):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=layout)
    partial, splits = _scratch(x, 32, 1)
    assert (partial is None) == (splits == 0) == held

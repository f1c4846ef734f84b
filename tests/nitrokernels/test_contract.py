"""The contract of renoise on every backend this machine has, against fp64 and on fresh random input."""

import itertools

import pytest
import torch

from nitrokernels import renoise, use
from nitrokernels.ops.renoise import CASES, OP, renoise_ref
from nitrokernels.testing import assert_within_budget, poisoned_outputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def make(shape, dtype=torch.float32, device="cpu"):
    tensors = [torch.randn(shape, device=device).to(dtype) for _ in range(3)]
    alpha, alpha_next = torch.rand(2, shape[0], device=device) * 0.9 + 0.07
    return *tensors, alpha, (1 - alpha**2).sqrt(), alpha_next, (1 - alpha_next**2).sqrt()


def exact(args):
    return renoise_ref(*(a.double() for a in args))


def backends(args) -> list[str]:
    return [name for name, impl in OP.impls.items() if impl.supports(*args) is None]


def check(args):
    wanted, eager = exact(args), renoise_ref(*args)
    for backend in backends(args):
        with use(backend), poisoned_outputs():
            got = renoise(*args)
        assert got[0].dtype == torch.float32 and got[1].dtype == args[0].dtype
        assert got[0].shape == got[1].shape == args[0].shape
        for g, e, w in zip(got, eager, wanted, strict=True):
            assert_within_budget(g, e, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape, dtype", itertools.product(CASES.values(), DTYPES), ids=str)
def test_forward(shape, dtype, device):
    check(make(shape, dtype, device))


def test_the_native_library_is_among_the_backends_when_it_was_built():
    from nitrokernels import _native

    if _native.MISSING is None:
        assert "cpu" in backends(make((2, 4, 8, 8)))
    else:
        assert backends(make((2, 4, 8, 8))) == ["ref"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, device):
    base = make((6, 8, 10, 12), dtype, device)
    coefficients = base[3:]
    plain = base[:3]
    last = [t.to(memory_format=torch.channels_last) for t in plain]
    check((*last, *coefficients))
    check((last[0], plain[1], plain[2], *coefficients))
    sliced = [t[:, ::2, 1:, ::3] for t in plain]
    check((*sliced, *coefficients))
    turned = [t.transpose(1, 3) for t in plain]
    check((*turned, *coefficients))
    odd = [torch.randn(6 * 35 + 1, device=device).to(dtype)[1:].view(6, 5, 7) for _ in range(3)]  # not 16-byte aligned
    check((*odd, *coefficients))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_survives(dtype):
    """With alpha = alpha_next = 1 and no noise x_next is x_t: conversions are exact for all finite values."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = x[torch.isfinite(x)].view(1, -1)
    one, zero = torch.ones(1), torch.zeros(1)
    args = (x, torch.zeros_like(x), torch.zeros_like(x), one, zero, one, zero)
    for backend in backends(args):
        with use(backend):
            x0, x_next = renoise(*args)
        assert torch.equal(x0, x.float()) and torch.equal(x_next, x), backend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_to_nearest_even(dtype):
    """Random fp32 results rounded to 16 bits, against torch's own conversion, subnormals and overflow included."""
    scale = torch.tensor([1e-7, 1e-5, 1.0, 7e4]).view(-1, 1)
    x = (torch.randn(4, 4096) * scale).to(dtype)
    e, n = torch.randn(2, 4, 4096).to(dtype)
    one, small = torch.ones(4), torch.full((4,), 1e-8)
    args = (x, e, n, one, small, one, small)
    wanted = renoise_ref(*args)[1]
    for backend in backends(args):
        with use(backend):
            assert torch.equal(renoise(*args)[1], wanted), backend


def test_gradients_to_second_order_of_the_reference_and_the_function():
    from nitrokernels.ops.renoise import RenoiseFunction

    args = make((2, 3, 2, 2))
    wide = [a.double() for a in args]
    inputs = [a.requires_grad_() for a in wide[:3]]

    def function(*tensors):
        return RenoiseFunction.apply(renoise_ref, *tensors, *wide[3:])

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradcheck(lambda *t: renoise(*t, *wide[3:]), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_equals_autograd_of_the_reference(dtype):
    args = make((3, 4, 6, 6), dtype)
    upstream = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6).to(dtype)
    grads = {}
    for backend in backends(args):
        inputs = [a.clone().requires_grad_() for a in args[:3]]
        with use(backend):
            out = renoise(*inputs, *args[3:])
        before = [u.clone() for u in upstream]
        grads[backend] = torch.autograd.grad(out, inputs, upstream)
        assert all(torch.equal(u, b) for u, b in zip(upstream, before, strict=True)), "incoming gradients are not ours"
    for backend, values in grads.items():
        for got, wanted in zip(values, grads["ref"], strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got, wanted, msg=lambda m, b=backend: f"{b}: {m}")


def test_mixed_precision_falls_to_the_reference():
    args = make((2, 4, 4, 4))
    mixed = (args[0], args[1].bfloat16(), *args[2:])
    torch.testing.assert_close(renoise(*mixed)[0], renoise_ref(*mixed)[0])
    with use("cpu"), pytest.raises(RuntimeError, match="renoise: a backend among cpu must run this call"):
        renoise(*mixed)


def test_bad_shapes_are_named():
    args = make((2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"renoise: eps must be \[2, 4, 8, 8\], got \[2, 4, 8, 9\]"):
        renoise(args[0], torch.randn(2, 4, 8, 9), *args[2:])
    with pytest.raises(ValueError, match=r"renoise: alpha must be \[2\], got \[3\]"):
        renoise(*args[:3], torch.rand(3), *args[4:])


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    op = getattr(torch.ops.nitrokernels, f"renoise_fwd_{device}")
    args = make((2, 4, 8, 8), device=device)
    if device in backends(args):
        torch.library.opcheck(op.default, args)


@pytest.mark.gpu
def test_cuda_stream_and_graph():
    args = make((2, 4, 64, 64), device="cuda")
    wanted = renoise_ref(*args)
    with use("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            got = renoise(*args)
        torch.cuda.current_stream().wait_stream(side)
        torch.testing.assert_close(got, wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = renoise(*args)
        args[0].normal_()
        graph.replay()
        torch.testing.assert_close(out, renoise_ref(*args))

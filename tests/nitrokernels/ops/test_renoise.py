"""What renoise promises beyond the contract: 16-bit conversions, mixed input, errors, CUDA graphs."""

import pytest
import torch

from nitrokernels import _native, _triton, renoise, use
from nitrokernels.ops.renoise import CASES, OP, RenoiseFunction, renoise_ref


def make(dtype=torch.float32, device="cpu"):
    return CASES["odd"].make(dtype, device)


def backends(args) -> list[str]:
    return [name for name, impl in OP.impls.items() if impl.supports(*args) is None]


def exact_backends(args) -> list[str]:
    """Those whose conversions are the machine's; Triton's interpreter truncates bf16 and flushes its subnormals."""
    return [b for b in backends(args) if b != "triton" or not _triton.INTERPRETED]


def test_the_native_library_is_among_the_backends_when_it_was_built():
    from nitrokernels import _native

    assert ("cpu" in backends(make())) == (_native.MISSING is None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_survives(dtype):
    """With alpha = alpha_next = 1 and no noise x_next is x_t: conversions are exact for all finite values."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = x[torch.isfinite(x)].view(1, -1)
    one, zero = torch.ones(1), torch.zeros(1)
    args = (x, torch.zeros_like(x), torch.zeros_like(x), one, zero, one, zero)
    for backend in exact_backends(args):
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
    for backend in exact_backends(args):
        with use(backend):
            assert torch.equal(renoise(*args)[1], wanted), backend


def test_gradients_to_second_order_of_the_reference_and_the_function():
    args = [a[:2].flatten(1)[:, :12] if a.ndim > 1 else a[:2] for a in make()]
    wide = [a.double() for a in args]
    inputs = [a.requires_grad_() for a in wide[:3]]

    def function(*tensors):
        return RenoiseFunction.apply(renoise_ref, *tensors, *wide[3:])

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradcheck(lambda *t: renoise(*t, *wide[3:]), inputs)


def test_mixed_precision_falls_to_the_reference():
    args = make()
    mixed = (args[0], args[1].bfloat16(), *args[2:])
    torch.testing.assert_close(renoise(*mixed)[0], renoise_ref(*mixed)[0])
    with use("cpu"), pytest.raises(RuntimeError, match="renoise: a backend among cpu must run this call"):
        renoise(*mixed)


def test_bad_shapes_are_named():
    args = make()
    with pytest.raises(ValueError, match=r"renoise: eps must be \[3, 5, 7, 11\], got \[2, 4, 8, 9\]"):
        renoise(args[0], torch.randn(2, 4, 8, 9), *args[2:])
    with pytest.raises(ValueError, match=r"renoise: alpha must be \[3\], got \[4\]"):
        renoise(*args[:3], torch.rand(4), *args[4:])


@pytest.mark.gpu
@pytest.mark.skipif(_native.missing("cuda") is not None, reason="needs nvcc at install time")
def test_cuda_stream_and_graph():
    args = CASES["sdxl"].make(torch.float32, "cuda")
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

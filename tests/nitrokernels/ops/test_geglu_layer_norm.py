"""What geglu and layer_norm promise beyond the contract: PyTorch's values, threads, large means, tails, errors."""

import pytest
import torch
import torch.nn.functional as F

from nitrokernels import geglu, layer_norm, use
from nitrokernels.ops import geglu as geglu_module
from nitrokernels.ops import layer_norm as layer_norm_module
from nitrokernels.testing import assert_draws_within_budget, assert_within_budget


def backends(op, *args) -> list[str]:
    return [name for name, impl in op.impls.items() if impl.supports(*args) is None]


def two_threads(function):
    """The same call with one and with two threads."""
    try:
        one = function()
        torch.set_num_threads(2)
        return one, function()
    finally:
        torch.set_num_threads(1)


def test_values_are_pytorchs():
    x, weight, bias = torch.randn(3, 5, 48), *torch.randn(2, 48)
    a, gate = x.chunk(2, -1)
    for backend in backends(layer_norm_module.OP, x, weight, bias):
        with use(backend):
            torch.testing.assert_close(layer_norm(x, weight, bias), F.layer_norm(x, (48,), weight, bias))
            torch.testing.assert_close(layer_norm(x, None, None), F.layer_norm(x, (48,)))
            torch.testing.assert_close(geglu(x), a * F.gelu(gate))


def test_gelu_over_its_whole_range():
    """Extremes included: what is large passes, what is very negative vanishes, NaN stays."""
    gate = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -100.0, 100.0, 1e30, 0.0, -0.0])])
    x = torch.stack([torch.ones_like(gate), gate]).flatten()
    exact, eager = geglu_module.geglu_ref(x.double()), geglu_module.geglu_ref(x)
    for backend in backends(geglu_module.OP, x):
        with use(backend):
            got = geglu(x)
            assert geglu(torch.tensor([1.0, float("nan")])).isnan().all(), backend
        assert_within_budget(got[:4001], eager[:4001], exact[:4001])
        torch.testing.assert_close(got[4001:], eager[4001:], msg=backend)


def test_a_mean_far_above_the_deviation_costs_no_more_than_in_eager():
    def draw():
        x = torch.randn(6, 320) * 0.01 + 1000
        exact, eager = (layer_norm_module.layer_norm_ref(t, None, None, 1e-9) for t in (x.double(), x))
        triples = []
        for backend in backends(layer_norm_module.OP, x, None, None):
            with use(backend):
                triples.append((layer_norm(x, None, None, 1e-9), eager, exact))
        return triples

    assert_draws_within_budget(draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_threads_change_no_bit(dtype):
    x = torch.randn(1024, 256).to(dtype).requires_grad_()
    weight, bias = torch.randn(2, 256).requires_grad_()
    if "cpu" not in backends(layer_norm_module.OP, x, weight, bias):
        pytest.skip("needs the native library, which needs a C++ compiler")

    def run():
        with use("cpu"):
            y, z = layer_norm(x, weight, bias), geglu(x)
        return y, z, *torch.autograd.grad(y.float().square().sum() + z.float().sum(), (x, weight, bias))

    one, two = two_threads(run)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"geglu: x must be \[..., 2D\], got \[3, 5\]"):
        geglu(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"layer_norm: weight must be \[5\], got \[4\]"):
        layer_norm(torch.randn(3, 5), torch.randn(4), None)
    with pytest.raises(ValueError, match="geglu: x must be fp32, fp16, bf16 or fp64, got float8_e4m3fn"):
        geglu(torch.randn(3, 4).to(torch.float8_e4m3fn))
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout)
        with pytest.raises(ValueError, match="layer_norm: x must be dense, got a nested tensor"):
            layer_norm(nested, None, None)

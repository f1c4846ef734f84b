"""What nag_combine promises beyond the contract: the published formulas, zero tokens, no bound, dependent inputs."""

import math

import pytest
import torch

from nitrokernels import nag_combine, use
from nitrokernels.ops.nag_combine import CASES, OP


@pytest.fixture(params=["ref", "triton"])
def backend(request):
    if (reason := OP.impls[request.param].supports(*make())) is not None:
        pytest.skip(reason)
    with use(request.param):
        yield request.param


def make():
    return CASES["small"].make(torch.float32, "cpu")


def test_is_the_papers_formula(backend):
    positive, negative, *_ = make()
    phi, tau, alpha = 2.0, 2.5, 0.5
    guided = positive + phi * (positive - negative)
    ratio = guided.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
    wanted = alpha * guided * ratio.clamp(max=tau) / ratio + (1 - alpha) * positive
    torch.testing.assert_close(nag_combine(positive, negative, phi, tau, alpha), wanted)


def test_growth_is_bounded(backend):
    positive, negative, *_ = make()
    out = nag_combine(positive, negative * 100, 4.0, 2.5, 1.0)
    torch.testing.assert_close(out.abs().sum(-1), 2.5 * positive.abs().sum(-1))


def test_nasa_is_a_setting(backend):
    positive, negative = (x.requires_grad_() for x in make()[:2])
    out = nag_combine(positive, negative, 0.3, math.inf, 1.0, keep=1.0)
    torch.testing.assert_close(out, positive - 0.3 * negative)
    out.sum().backward()
    torch.testing.assert_close(positive.grad, torch.ones_like(positive))
    torch.testing.assert_close(negative.grad, torch.full_like(negative, -0.3))


def test_no_guidance_changes_nothing(backend):
    positive, negative, *_ = make()
    assert torch.equal(nag_combine(positive, negative, 0.0, 1.0, 1.0), positive)


@pytest.mark.parametrize("tau", [2.5, math.inf])
@pytest.mark.parametrize("zero", ["positive", "negative", "both"])
def test_tokens_of_zeros(backend, zero, tau):
    positive, negative, *_ = make()
    if zero != "negative":
        positive[0, 0] = 0
    if zero != "positive":
        negative[0, 0] = 0
    positive.requires_grad_(), negative.requires_grad_()
    out = nag_combine(positive, negative, 2.0, tau, 0.5)
    grads = torch.autograd.grad(out.square().sum(), (positive, negative))
    assert all(torch.isfinite(t).all() for t in (out, *grads))
    if zero == "positive" and tau == 2.5:
        assert (out[0, 0] == 0).all()  # nothing may grow beyond tau times nothing


def test_second_order_when_one_input_is_made_of_the_other(backend):
    def twice(dtype):
        x = start.to(dtype).requires_grad_()
        negative = 0.5 * x.flip(-1) ** 2
        (first,) = torch.autograd.grad(nag_combine(x, negative, 2.0, 2.5, 0.5).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    start = make()[0]
    got = twice(torch.float32)
    with use("ref"):
        torch.testing.assert_close(got, twice(torch.float64).float(), rtol=1e-4, atol=1e-4)


def test_one_input_may_ask_alone(backend):
    for asking in (0, 1):
        args = list(make())
        args[asking].requires_grad_()
        grad = torch.autograd.grad(nag_combine(*args).square().sum(), args[asking], create_graph=True)[0]
        grad.square().sum().backward()
        assert torch.isfinite(args[asking].grad).all() and args[1 - asking].grad is None


def test_bad_input_is_named():
    positive, negative, *_ = make()
    with pytest.raises(ValueError, match=r"nag_combine: negative must be \[2, 5, 8\], got \[2, 5, 7\]"):
        nag_combine(positive, negative[..., :7])
    with pytest.raises(ValueError, match="nag_combine: tau must be positive, got 0"):
        nag_combine(positive, negative, 2.0, 0)
    with use("triton"), pytest.raises(RuntimeError, match="nag_combine: a backend among triton must run this call"):
        nag_combine(positive.double(), negative.double())

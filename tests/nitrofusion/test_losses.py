"""Losses against loops in plain Python."""

import math

import pytest
import torch

from nitrofusion import losses


def _softplus(v: float) -> float:
    return math.log1p(math.exp(-abs(v))) + max(v, 0.0)


DISCRIMINATOR = {
    "hinge": lambda r, f: max(0.0, 1 - r) + max(0.0, 1 + f),
    "wgan": lambda r, f: f - r,
    "ns": lambda r, f: _softplus(-r) + _softplus(f),
}
GENERATOR = {"hinge": lambda f: -f, "wgan": lambda f: -f, "ns": lambda f: _softplus(-f)}


@pytest.mark.parametrize("kind", DISCRIMINATOR)
def test_losses_against_a_loop(kind):
    real, fake = torch.randn(6, 30) * 3, torch.randn(6, 30) * 3
    rows = list(zip(real.tolist(), fake.tolist(), strict=True))
    wanted_d = [sum(DISCRIMINATOR[kind](r, f) for r, f in zip(a, b, strict=True)) / 30 for a, b in rows]
    wanted_g = [sum(GENERATOR[kind](f) for f in row) / 30 for row in fake.tolist()]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(losses.discriminator_loss(kind, real, fake), torch.tensor(wanted_d), **close)
    torch.testing.assert_close(losses.generator_loss(kind, fake), torch.tensor(wanted_g), **close)


@pytest.mark.parametrize("kind", DISCRIMINATOR)
def test_the_game_has_the_right_signs(kind):
    real = torch.zeros(1, 1, requires_grad=True)
    fake = torch.zeros(1, 1, requires_grad=True)
    losses.discriminator_loss(kind, real, fake).sum().backward()
    assert real.grad.item() < 0 < fake.grad.item()  # the heads raise real and lower fake
    student = torch.zeros(1, 1, requires_grad=True)
    losses.generator_loss(kind, student).sum().backward()
    assert student.grad.item() < 0  # the student raises fake


def test_unknown_loss_is_named():
    with pytest.raises(ValueError, match="kind must be hinge, wgan or ns, got 'bce'"):
        losses.discriminator_loss("bce", torch.zeros(1, 1), torch.zeros(1, 1))


def test_regression_is_the_mean_square():
    x, y = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    wanted = [(a - b).double().pow(2).sum().item() / a.numel() for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(losses.regression_loss(x, y), torch.tensor(wanted).float())


def test_r1_is_the_squared_gradient_of_each_images_mean_logit():
    """Against one backward pass per image in fp64, and its own gradient against finite differences."""
    torch.manual_seed(4)
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    first, second = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)

    def penalty(weight):
        inputs = [first.clone().requires_grad_(), second.clone().requires_grad_()]
        logits = torch.tanh(torch.cat(inputs, 1) @ weight.T).square()
        return losses.r1_penalty(logits, inputs)

    wanted = []
    for i in range(3):
        x = torch.cat([first, second], 1)[i].requires_grad_()
        torch.tanh(x @ weight.T).square().mean().backward()
        wanted.append(x.grad.square().sum())
    torch.testing.assert_close(penalty(weight), torch.stack(wanted), rtol=1e-6, atol=1e-9)
    (grad,) = torch.autograd.grad(penalty(weight).sum(), weight)
    for i, j in ((0, 0), (2, 3), (4, 6)):
        step = torch.zeros_like(weight)
        step[i, j] = 1e-3
        slope = (penalty(weight + step).sum() - penalty(weight - step).sum()) / 2e-3
        assert abs(slope.item() - grad[i, j].item()) < 1e-3 * max(1, abs(slope.item()))

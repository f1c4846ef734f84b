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
def test_score_distillation_against_loops():
    """Element by element in doubles."""
    x0, real, fake = (torch.randn(3, 2, 2, 2) for _ in range(3))
    weight = torch.rand(3)
    rows = list(zip(weight.tolist(), real.flatten(1).tolist(), fake.flatten(1).tolist(), strict=True))
    wanted = [[w * (r - f) for r, f in zip(a, b, strict=True)] for w, a, b in rows]
    got = losses.score_gradient(real, fake, weight)
    torch.testing.assert_close(got.flatten(1), torch.tensor(wanted), rtol=1e-5, atol=1e-6)

    wanted = []
    for x, r, f in zip(*(v.flatten(1).tolist() for v in (x0, real, fake)), strict=True):
        scale = sum(abs(p - q) for p, q in zip(x, r, strict=True)) / len(x)
        wanted.append([(q - p) / scale for p, q in zip(r, f, strict=True)])
    got = losses.distribution_matching_gradient(x0, real, fake)
    torch.testing.assert_close(got.flatten(1), torch.tensor(wanted), rtol=1e-5, atol=1e-6)

    wanted = [w * sum((r - f) ** 2 for r, f in zip(a, b, strict=True)) / 8 for w, a, b in rows]
    torch.testing.assert_close(losses.epsilon_loss(real, fake, weight), torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.epsilon_loss(real, fake) * weight, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_a_sample_without_a_finite_direction_stays():
    """The teacher agrees with x0 to the bit, or a prediction overflowed: no gradient there, others theirs."""
    x0, fake = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
    real = torch.randn(3, 2, 2, 2)
    real[0], fake[1, 0, 0, 0] = x0[0], float("nan")
    got = losses.distribution_matching_gradient(x0, real, fake)
    assert torch.isfinite(got).all() and (got[0] == 0).all() and got[1, 0, 0, 0] == 0 and (got[2] != 0).all()


def test_gradient_loss_hands_its_gradient_on():
    """Against the papers' form, 0.5 MSE(x0, stopgrad(x0 - g)), in doubles."""
    x0 = (torch.randn(3, 4, 2, 2) * 100).requires_grad_()
    gradient = torch.randn(3, 4, 2, 2, requires_grad=True)
    value = losses.gradient_loss(x0, gradient)
    value.sum().backward()
    assert gradient.grad is None
    theirs = x0.detach().double().requires_grad_()
    wanted = 0.5 * (theirs - (theirs - gradient.double()).detach()).pow(2).flatten(1).mean(1)
    wanted.sum().backward()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(x0.grad.double(), theirs.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(x0.grad, gradient.detach() / 16, rtol=1e-5, atol=1e-9)


def test_clamped_similarity_against_a_loop():
    images, texts, tau = torch.randn(20, 5), torch.randn(20, 5), 0.3
    dot = lambda a, b: sum(p * q for p, q in zip(a, b, strict=True))  # noqa: E731
    wanted = [max(0.0, tau - dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)))
              for a, b in zip(images.tolist(), texts.tolist(), strict=True)]  # fmt: skip
    got = losses.clamped_similarity_loss(images, texts, tau)
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    assert 0 < sum(w == 0 for w in wanted) < 20

"""What the tests of score distillation share: a density about which everything is known, small batches and runs."""

from __future__ import annotations

import dataclasses
import math
import random
import shutil

import torch

from nitrofusion import checkpoint
from nitrofusion.config import TrainConfig
from nitrofusion.models import sdxl
from nitrofusion.pool import PoolConfig
from nitrofusion.recipes import Batch
from nitrofusion.train import train

from ..test_train import digest, logged
from ..tiny import PROMPTS


class Gaussians:
    """Data N(m, s^2) and a student a z + b, both per element: scores and KL divergence in closed form.

    Noised to t, a density N(mean, var) is N(alpha mean, alpha^2 var + sigma^2).
    """

    def __init__(self, alphas_cumprod: torch.Tensor):
        self.m, self.s = random.uniform(0.4, 0.8), random.uniform(0.4, 0.7)
        self.a, self.b = random.uniform(1.0, 1.4), random.uniform(-0.5, -0.2)
        self.alphas = alphas_cumprod

    def eps(self, x_t: torch.Tensor, t: torch.Tensor, mean: float, std: float) -> torch.Tensor:
        """The best prediction of the noise: -sigma times the score."""
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in (self.alphas[t].sqrt(), (1 - self.alphas[t]).sqrt()))
        return sigma * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    def coefficients(self, t: int) -> tuple[float, float]:
        a = self.alphas[t].item()
        return math.sqrt(a), math.sqrt(1 - a)

    def kl(self, t: int, a: float, b: float) -> float:
        """Of the student's density from the data's, at t."""
        alpha, sigma = self.coefficients(t)
        fake, real = alpha**2 * a**2 + sigma**2, alpha**2 * self.s**2 + sigma**2
        return 0.5 * (math.log(real / fake) + (fake + alpha**2 * (b - self.m) ** 2) / real - 1)

    def gradient(self, weight) -> tuple[float, float]:
        """d/da and d/db of the sum over t of weight(t) KL(t), by central differences."""
        total = lambda a, b: sum(weight(t) * self.kl(t, a, b) for t in range(20, 981))  # noqa: E731
        h, a, b = 1e-4, self.a, self.b
        return (total(a + h, b) - total(a - h, b)) / (2 * h), (total(a, b + h) - total(a, b - h)) / (2 * h)

    def sigma2_weight(self, t: int) -> float:
        """The gradient in x0 is sigma^2 (eps_real - eps_fake), that of the KL alpha / sigma (eps_real - eps_fake)."""
        alpha, sigma = self.coefficients(t)
        return sigma**3 / alpha

    def dmd_weight(self, t: int) -> float:
        """The gradient in x0 is sigma / alpha (eps_real - eps_fake) / E|x0 - E_real[x0 | x_t]|."""
        alpha, sigma = self.coefficients(t)
        var = alpha**2 * self.s**2 + sigma**2
        mu = sigma**2 * (self.b - self.m) / var
        std = math.sqrt(sigma**4 * self.a**2 + alpha**2 * self.s**4 * sigma**2) / var
        distance = std * math.sqrt(2 / math.pi) * math.exp(-(mu**2) / (2 * std**2)) + mu * math.erf(
            mu / (std * math.sqrt(2))
        )
        return (sigma / alpha) ** 2 / distance

    def install(self, monkeypatch, recipe, side: int = 16):
        """Puts both densities in the place of the recipe's UNets: one image for each t, alike for every prompt.

        Returns:
            (a, b) as tensors that require gradients, and a function that draws a batch.
        """
        a, b = torch.tensor(self.a, requires_grad=True), torch.tensor(self.b, requires_grad=True)

        def denoise(unet, x_t, t, cond):
            data = unet is recipe.model.unet
            return self.eps(x_t, t, self.m, self.s) if data else self.eps(x_t, t, b.item(), a.item())

        def every_t(low, high, size, **_):
            assert size == (high - low,)
            return torch.arange(low, high)

        monkeypatch.setattr(sdxl, "denoise", denoise)
        monkeypatch.setattr(torch, "randint", every_t)
        monkeypatch.setattr(f"{type(recipe).__module__}.student_x0", lambda c, u, batch, *_: a * batch.noise + b)

        def batch() -> Batch:
            n = 981 - 20
            cond = sdxl.Conditioning(torch.zeros(n, 1, 1), torch.zeros(n, 1), torch.zeros(n, 6))
            return Batch(torch.randn(n, 4, side, side), None, cond, 0, torch.Generator())

        return a, b, batch


def make_batch(model, size: int = 3, step: int = 0, seed: int | None = None) -> Batch:
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    g = torch.Generator().manual_seed(seed)
    shape = (size, 4, model.latent_size, model.latent_size)
    prompts = (PROMPTS * size)[:size]
    cond = sdxl.encode_prompt(model, prompts)
    noise, target = (torch.randn(shape, generator=g) for _ in range(2))
    return Batch(noise, target, cond, step, g, prompts=prompts)


def overfit(recipe, phase, batch: Batch, lr: float, steps: int) -> float:
    """Trains a second score on three fixed samples at the same t and noise; its last epsilon loss over its first."""
    optimizer = torch.optim.AdamW(phase.module.parameters(), lr=lr)
    batch.shared["x0"] = torch.randn(3, 4, 16, 16)
    values = []
    for _ in range(steps):
        torch.manual_seed(5)
        value = recipe.loss(phase.name, batch)["epsilon"].mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values[-1] / values[0]


def run_config(teacher, output, recipe: str, **changes) -> TrainConfig:
    config = TrainConfig(
        output=str(output),
        recipe=recipe,
        teacher=str(teacher),
        init=None,
        teacher_samples="none",
        teacher_steps=2,
        batch_size=2,
        accumulation=2,
        stages=(3, 1),
        lr=1e-4,
        head_lr=1e-3,
        crop_size=8,
        pool=PoolConfig(width=8, max_depth=1),
        precision="fp32",
        num_previews=1,
        preview_every=100,
        checkpoint_every=2,
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


def assert_resume_equals_uninterrupted(config: TrainConfig, elsewhere) -> list[dict]:
    """A run that lost all after its second step and was started again against one that did not; its log."""
    whole = train(config)
    broken = train(dataclasses.replace(config, output=str(elsewhere)))
    shutil.rmtree(broken / "checkpoints" / "step-000004")
    assert checkpoint.latest(broken)[0].name == "step-000002"
    train(dataclasses.replace(config, output=str(elsewhere)))
    assert digest(broken) == digest(whole)
    assert logged(broken) == logged(whole)
    return logged(whole)


def require(recipe, name: str):
    """As the loop does before a phase; returns the phase."""
    for phase in recipe.phases:
        phase.module.requires_grad_(phase.name == name)
    return next(phase for phase in recipe.phases if phase.name == name)


def moved(module) -> int:
    """Parameters with a gradient that is not zero."""
    return sum(p.grad is not None and bool(p.grad.abs().sum()) for p in module.parameters())

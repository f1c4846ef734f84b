"""DMD2 (arXiv 2405.14867): distribution matching with a fully trained fake score, and a GAN on its bottleneck.

Per micro-batch: the student draws x0 at a step of its own trajectory (backward simulation, section 4.5). x0 is
re-noised, and where the teacher and the fake score take it for having come from gives its gradient. The fake score
learns from the same x0 in every optimizer step, the student in each ``generator_interval``-th (section 4.2). A head on
the fake score's mid block tells real pictures from the student's at random t (section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .. import losses, schedule
from ..draws import Draws
from ..errors import InputError
from ..models import sdxl
from ..pool import HeadPool, PoolConfig
from ..scores import T_RANGE, beside_teacher, guided_eps, noised
from ..student import choose_step, make_optimizer, student_phase, student_x0
from . import Batch, Phase, Recipe, expect, options


@dataclass(frozen=True)
class Options:
    """Beside what every recipe has; the head's learning rate, width and depth are ``head_lr`` and those of ``pool``.

    Attributes:
        real_guidance, fake_guidance: guidance of the teacher, and of the fake score, where the two are compared.
        fake_lr: the fake score's learning rate.
        gan_weight: of softplus(-logit) in the student's loss; 0 leaves the GAN out, and real pictures with it.
        classifier_weight: of softplus(-real) + softplus(fake) in the fake score's loss.
    """

    real_guidance: float = 8.0
    fake_guidance: float = 1.0
    fake_lr: float = 5e-7
    gan_weight: float = 5e-3
    classifier_weight: float = 1e-2

    def validate(self, config) -> None:
        for name in ("real_guidance", "fake_guidance", "gan_weight"):
            expect(getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        for name in ("fake_lr", "classifier_weight"):
            expect(getattr(self, name) > 0, name, "> 0", getattr(self, name))


class DMD2(Recipe):
    Options = Options

    def __init__(self, config, model: sdxl.SDXL, student):
        super().__init__(config, model, student)
        self.fake = beside_teacher(config, model)
        parts = nn.ModuleDict({"unet": self.fake})
        groups = [{"params": list(self.fake.parameters()), "lr": self.options.fake_lr}]
        self.head = None
        if self.options.gan_weight:
            self.head = parts["head"] = _head(config, self.fake).to(model.device)
            groups.append({"params": list(self.head.parameters()), "lr": config.head_lr})
        optimizer = make_optimizer(config, groups, self.options.fake_lr, config.betas, config.weight_decay)
        self.phases = (
            student_phase(config, student, interval=config.generator_interval, start=config.discriminator_warmup),
            Phase("fake", parts, optimizer),
        )

    @classmethod
    def check(cls, config, unet) -> None:
        if options(config).gan_weight and config.teacher_samples == "none" and not config.images:
            raise InputError(
                "config: images must be given for dmd2 with options.gan_weight above 0 (or teacher_samples cache or "
                "online), got None"
            )

    @classmethod
    def extra_parameters(cls, config, unet) -> dict[str, int]:
        extra = {"fake score": sum(p.numel() for p in unet.parameters())}
        if options(config).gan_weight:
            with torch.device("meta"):
                extra["classifier head"] = sum(p.numel() for p in _head(config, unet).parameters())
        return extra

    def loss(self, phase: str, batch: Batch) -> dict[str, torch.Tensor]:
        return self._student_loss(batch) if phase == "student" else self._fake_loss(batch)

    def _student_loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        x0 = self._draw(batch)
        terms = {"dmd": losses.gradient_loss(x0, self._gradient(x0.detach(), batch))}
        if self.head is not None:
            logits = self._logits(x0, batch.cond, batch.draws)
            terms["gan"] = self.options.gan_weight * losses.generator_loss("ns", logits)
        return terms

    @torch.no_grad()
    def _gradient(self, x0: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[B, 4, h, w] of the samples x0 (equation 2 of the paper, in x0 and normalised as DMD's equation 8)."""
        alphas, cond = self.model.alphas_cumprod, batch.cond
        x_t, _, t = noised(x0, alphas, batch.draws, T_RANGE)
        real = guided_eps(self.model.unet, x_t, t, cond, self.options.real_guidance)
        fake = guided_eps(self.fake, x_t, t, cond, self.options.fake_guidance)
        x0_real, x0_fake = (schedule.to_x0(x_t, eps, t, alphas) for eps in (real, fake))
        return losses.distribution_matching_gradient(x0, x0_real, x0_fake)

    def _fake_loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        if "x0" not in batch.shared:
            with torch.no_grad():
                self._draw(batch)
        x0, cond = batch.shared["x0"], batch.cond
        x_t, noise, t = noised(x0, self.model.alphas_cumprod, batch.draws)
        terms = {"epsilon": losses.epsilon_loss(guided_eps(self.fake, x_t, t, cond), noise)}
        if self.head is not None:
            both = self._logits(torch.cat([batch.real, x0]), sdxl.Conditioning.cat([cond, cond]), batch.draws, 2)
            real, fake = both.chunk(2)
            terms["gan"] = self.options.classifier_weight * losses.discriminator_loss("ns", real, fake)
        return terms

    def _logits(self, x0: torch.Tensor, cond: sdxl.Conditioning, draws: Draws, groups: int = 1) -> torch.Tensor:
        """[B, 1] of the head for latents x0 [B, 4, h, w], each re-noised to a t of its own."""
        x_t, _, t = noised(x0, self.model.alphas_cumprod, draws, groups=groups)
        middle = sdxl.encoder_features(self.fake, x_t, t, cond)[-1]
        only = torch.zeros(1, 1, dtype=torch.int64, device=middle.device)
        return self.head.logits([[middle]], only).flatten(1)

    def _draw(self, batch: Batch) -> torch.Tensor:
        config = self.config
        x0 = student_x0(config, self.student, batch, self.model.alphas_cumprod, choose_step(config, batch))
        batch.shared["x0"] = x0.detach()
        return x0


def _head(config, unet) -> HeadPool:
    """One head for the mid block's map."""
    channels, side = sdxl.feature_shapes(unet, unet.config.sample_size)[-1]
    one = PoolConfig(
        heads_per_cell=1, width=config.pool.width, max_depth=config.pool.max_depth, t_star=(0,), t_star_weights=(1.0,),
        tasks=("global-cond",),
    )  # fmt: skip
    return HeadPool(one, [channels], [side])

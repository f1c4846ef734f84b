"""PG-SB, SNOOPI's variational score distillation (arXiv 2412.02687): two teachers judge under one random guidance.

Per micro-batch: the student draws x0, it is re-noised to a random t, and the frozen teacher psi and the LoRA teacher
pi, which knows the student's samples, predict its noise, both guided by the same kappa. Where they differ is the
gradient of x0. pi then learns from the same x0. With negative prompts this is the third version's NASA-T: they lead
psi's guidance away and act in the student's cross-attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import losses, schedule
from ..adapters import Adapters, check_installed, count_parameters
from ..models import clip, sdxl
from ..models.nasa import Nasa
from ..models.recompute import recompute_
from ..presets import resolve_folder
from ..prompts import read_prompts
from ..scores import T_RANGE, beside_teacher, guided_eps, noised
from ..student import choose_step, make_optimizer, student_phase, student_x0
from . import Batch, Phase, Recipe, expect, options


@dataclass(frozen=True)
class Options:
    """Beside what every recipe has; ``discriminator_warmup`` and ``generator_interval`` count the LoRA teacher's steps.

    Attributes:
        kappa_min, kappa_max: each sample's guidance is drawn between them, for both teachers.
        weighting: ``sigma2`` weighs the gradient by sigma_t^2 (SwiftBrush); ``dmd`` divides it by each image's
            mean|x0 - x0_real| (DMD2), which SDXL's range of scales asks for.
        teacher_rank, teacher_scale, teacher_layers, teacher_lr: of the LoRA teacher; scale is LoRA's alpha / rank.
        prompt_dropout: share of its samples without a prompt, so that it can be guided too.
        clip_model: folder or hub id of a CLIP model whose max(0, tau - cos(picture, prompt)) is added; empty is none.
        clip_tau, clip_weight: of that term; the weight decays linearly to 0 at the end of the run.
        negative_prompts: file of negative prompts as ``prompts`` is one (NASA-T); empty is none.
        nasa_alpha: with them, each image's alpha is drawn from 0 .. this in the student's cross-attention.
    """

    kappa_min: float = 0.5
    kappa_max: float = 4.0
    weighting: str = "sigma2"
    teacher_rank: int = 64
    teacher_scale: float = 2.0
    teacher_layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    teacher_lr: float = 1e-3
    prompt_dropout: float = 0.1
    clip_model: str = ""
    clip_tau: float = 0.37
    clip_weight: float = 0.1
    negative_prompts: str = ""
    nasa_alpha: float = 1.0

    def validate(self, config) -> None:
        expect(self.kappa_min >= 0, "kappa_min", ">= 0", self.kappa_min)
        expect(self.kappa_max >= self.kappa_min, "kappa_max", ">= kappa_min", self.kappa_max)
        expect(self.weighting in ("sigma2", "dmd"), "weighting", "sigma2 or dmd", self.weighting)
        expect(self.teacher_rank >= 1, "teacher_rank", ">= 1", self.teacher_rank)
        for name in ("teacher_scale", "teacher_lr", "clip_weight"):
            expect(getattr(self, name) > 0, name, "> 0", getattr(self, name))
        expect(0 <= self.prompt_dropout < 1, "prompt_dropout", "in [0, 1)", self.prompt_dropout)
        expect(-1 <= self.clip_tau <= 1, "clip_tau", "in -1..1", self.clip_tau)
        expect(self.nasa_alpha >= 0, "nasa_alpha", ">= 0", self.nasa_alpha)


class PGSB(Recipe):
    Options = Options

    def __init__(self, config, model: sdxl.SDXL, student):
        super().__init__(config, model, student)
        o = self.options
        self.lora_teacher = beside_teacher(config, model, shared=True)
        adapters = Adapters(self.lora_teacher, o.teacher_rank, o.teacher_layers, o.teacher_scale, "lora_teacher")
        adapters.to(model.device, torch.float32)  # PEFT makes them in the teacher's precision
        optimizer = make_optimizer(config, adapters.parameters(), o.teacher_lr, config.betas, config.weight_decay)
        self.phases = (
            student_phase(config, student, interval=config.generator_interval, start=config.discriminator_warmup),
            Phase("lora_teacher", adapters, optimizer),
        )
        self.negative, self.nasa, self.clip = None, None, None
        if o.negative_prompts:
            self.negative = read_prompts(o.negative_prompts)
            self.nasa = Nasa(student) if o.nasa_alpha else None
        if o.clip_model:
            self.clip = clip.Clip(resolve_folder(o.clip_model), model.device)
            if config.gradient_checkpointing:
                recompute_(model.vae)

    @classmethod
    def check(cls, config, unet) -> None:
        check_installed("recipe pgsb")
        o = options(config)
        for layer in o.teacher_layers:
            expect(isinstance(layer, str) and bool(count_parameters(unet, 1, (layer,))), "teacher_layers",
                   "ends of the names of the UNet's layers", layer)  # fmt: skip
        expect(bool(o.teacher_layers), "teacher_layers", "at least one layer", o.teacher_layers)
        if o.clip_model:
            clip.check_clip(resolve_folder(o.clip_model))
        if o.negative_prompts:
            read_prompts(o.negative_prompts)

    @classmethod
    def extra_parameters(cls, config, unet) -> dict[str, int]:
        o = options(config)
        return {"LoRA teacher": count_parameters(unet, o.teacher_rank, o.teacher_layers)}

    @classmethod
    def frozen_files(cls, config) -> dict[str, list[Path]]:
        o, found = options(config), {}
        if o.clip_model:
            found["clip_model"] = clip.files(resolve_folder(o.clip_model))
        if o.negative_prompts:
            found["negative_prompts"] = [Path(o.negative_prompts)]
        return found

    def loss(self, phase: str, batch: Batch) -> dict[str, torch.Tensor]:
        return self._student_loss(batch) if phase == "student" else self._teacher_loss(batch)

    def _student_loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        o = self.options
        x0 = self._draw(batch)
        kappas = torch.empty(batch.draws.total(len(x0)), device=x0.device).uniform_(o.kappa_min, o.kappa_max)
        gradient = self._gradient(x0.detach(), batch, batch.draws.mine(kappas))
        terms = {"vsd": losses.gradient_loss(x0, gradient)}
        if self.clip is not None:
            weight = o.clip_weight * (1 - batch.step / self.config.total_steps)
            vae = self.model.vae
            pixels = vae.decode(x0.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
            images, texts = self.clip.images(pixels), self.clip.texts(batch.prompts)
            terms["clip"] = weight * losses.clamped_similarity_loss(images, texts, o.clip_tau)
        return terms

    @torch.no_grad()
    def _gradient(self, x0: torch.Tensor, batch: Batch, kappa: torch.Tensor) -> torch.Tensor:
        """[B, 4, h, w] of the samples x0, under guidance kappa [B] of both teachers."""
        alphas = self.model.alphas_cumprod
        x_t, _, t = noised(x0, alphas, batch.draws, T_RANGE)
        real = guided_eps(self.model.unet, x_t, t, batch.cond, kappa, batch.shared.get("negative"))
        fake = guided_eps(self.lora_teacher, x_t, t, batch.cond, kappa)
        if self.options.weighting == "sigma2":
            return losses.score_gradient(real, fake, 1 - alphas[t])
        x0_real, x0_fake = (schedule.to_x0(x_t, eps, t, alphas) for eps in (real, fake))
        return losses.distribution_matching_gradient(x0, x0_real, x0_fake)

    def _teacher_loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """SwiftBrush's: both sides of the epsilon loss times alpha_t."""
        if "x0" not in batch.shared:
            with torch.no_grad():
                self._draw(batch)
        x0, alphas = batch.shared["x0"], self.model.alphas_cumprod
        x_t, noise, t = noised(x0, alphas, batch.draws)
        asked = batch.draws.rand(len(x0), device=x0.device) >= self.options.prompt_dropout
        told, null = batch.cond, batch.cond.null()
        cond = dataclasses.replace(
            told,
            prompt_embeds=torch.where(asked[:, None, None], told.prompt_embeds, null.prompt_embeds),
            pooled_prompt_embeds=torch.where(asked[:, None], told.pooled_prompt_embeds, null.pooled_prompt_embeds),
        )
        return {"epsilon": losses.epsilon_loss(guided_eps(self.lora_teacher, x_t, t, cond), noise, alphas[t])}

    def _draw(self, batch: Batch) -> torch.Tensor:
        """The student's x0 [B, 4, h, w]; leaves it, and the negative prompts' conditioning, in ``batch.shared``."""
        config, acting = self.config, contextlib.nullcontext()
        if self.negative is not None:
            picks = batch.draws.randint(0, len(self.negative), len(batch.noise)).tolist()
            away = sdxl.encode_prompt(self.model, [self.negative[i] for i in picks])
            batch.shared["negative"] = away
            if self.nasa is not None:
                alpha = batch.draws.rand(len(picks), device=batch.noise.device) * self.options.nasa_alpha
                acting = self.nasa.negative(away.prompt_embeds, alpha)
        with acting:
            x0 = student_x0(config, self.student, batch, self.model.alphas_cumprod, choose_step(config, batch))
        batch.shared["x0"] = x0.detach()
        return x0

"""Adversarial diffusion distillation (ADD, arXiv 2311.17042): heads on a frozen vision network, and a teacher's score.

Per micro-batch: each image is noised to one of the student's timesteps, and the student answers with x0 in one call.
Its decoded picture is judged by heads on token maps of the vision network, against the decoded real picture; and its
latents, re-noised, are led where the teacher's one step leads. The fake's maps are computed once, with a graph for the
student, and reused detached for the heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from nitrokernels import group_norm_silu

from .. import losses, sampling, schedule
from ..models import features as vision
from ..models import sdxl
from ..models.recompute import recompute_
from ..presets import resolve_folder
from ..student import make_optimizer, student_phase
from . import Batch, Phase, Recipe, expect
from . import options as read_options

_LAST = schedule.NUM_TRAIN_TIMESTEPS - 1
_MOST_PIXELS = 4096  # on a side


@dataclass(frozen=True)
class Options:
    """Beside what every recipe has; ``guidance_scale`` is that of the teacher's step.

    Attributes:
        features: the vision network: preset name, folder, hub id in the local cache, or ``timm:<name>``.
        feature_size: side of the pictures it is given, in pixels; 0 is its own.
        augment: what changes pictures before it sees them, of color, translation, cutout.
        feature_crop: chance that larger pictures are cut to its size instead of resized (StyleGAN-T).
        text_condition: heads are told the pooled prompt.
        image_condition: heads are told the real picture's class embedding, where the student saw any of it.
        head_width: length of the vectors whose product is the logit.
        student_timesteps: origin timesteps the student is trained at; 999 is pure noise.
        timestep_weights: how often each is drawn; empty is the paper's uniform draw.
        adversarial_weight: of the heads in the student's loss; 0 is the paper's ablation without them.
        distill_weight: lambda.
        distill_kind: c(t): exponential, sds or nfsd (``losses.distillation_weight``).
        distance: where it is measured, pixels or latents.
        negative_prompt: of nfsd. Empty: no prompt stands in for it, which leaves delta_D 0 from t = 200 on.
        r1_weight: gamma.
    """

    features: str = "world-features"
    feature_size: int = 0
    augment: tuple[str, ...] = vision.AUGMENTATIONS
    feature_crop: float = 0.5
    text_condition: bool = True
    image_condition: bool = True
    head_width: int = 64
    student_timesteps: tuple[int, ...] = (999, 749, 499, 249)
    timestep_weights: tuple[float, ...] = ()
    adversarial_weight: float = 1.0
    distill_weight: float = 2.5
    distill_kind: str = "exponential"
    distance: str = "pixels"
    negative_prompt: str = ""
    r1_weight: float = 1e-5

    def validate(self, config) -> None:
        kinds = {"distill_kind": ("exponential", "sds", "nfsd"), "distance": ("pixels", "latents")}
        for name, choices in kinds.items():
            expect(getattr(self, name) in choices, name, "one of " + ", ".join(choices), getattr(self, name))
        for name in ("adversarial_weight", "distill_weight", "r1_weight"):
            expect(getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        expect(set(self.augment) <= set(vision.AUGMENTATIONS), "augment", f"among {', '.join(vision.AUGMENTATIONS)}",
               self.augment)  # fmt: skip
        size = self.feature_size
        expect(0 <= size <= _MOST_PIXELS, "feature_size", f"in 0..{_MOST_PIXELS}", size)
        expect(0 <= self.feature_crop <= 1, "feature_crop", "in 0..1", self.feature_crop)
        expect(self.head_width >= 1, "head_width", ">= 1", self.head_width)
        steps, weights = self.student_timesteps, self.timestep_weights
        expect(
            bool(steps) and all(isinstance(t, int) and 0 <= t <= _LAST for t in steps),
            "student_timesteps",
            f"whole numbers in 0..{_LAST}",
            steps,
        )
        numbers = len(weights) == len(steps) and all(isinstance(w, int | float) for w in weights)
        expect(
            not weights or numbers and min(weights) >= 0 < sum(weights),
            "timestep_weights",
            f"empty or {len(steps)} numbers >= 0",
            weights,
        )


class Head(nn.Module):
    """One map's critic, StyleGAN-T's in smooth form (section 3.2).

    Maps [B, C, h, w] and conditions {name: [B, size]} to logits [B]: a 1x1 convolution, a residual one over nine tokens
    that wraps around, each with GroupNorm and SiLU, then the product with what the conditions are mapped to, summed
    with that of a learned vector, mean over tokens.

    StyleGAN-T has local batch norm and LeakyReLU: groups need no second image, and SiLU gives R1 a second derivative
    everywhere. Its spectral norm stays on the last layer alone, as the scale of a convolution before a normalisation
    changes nothing.
    """

    def __init__(self, channels: int, conditions: dict[str, int], width: int = 64):
        super().__init__()
        self.groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (g == 1 or channels // g >= 8))
        self.point = nn.Conv1d(channels, channels, 1)
        self.line = nn.Conv1d(channels, channels, 9, padding=4, padding_mode="circular")
        self.scales = nn.ParameterList(torch.ones(channels) for _ in range(2))
        self.biases = nn.ParameterList(torch.zeros(channels) for _ in range(2))
        self.last = spectral_norm(nn.Linear(channels, width))
        self.mapped = nn.ModuleDict({name: nn.Linear(size, width, bias=False) for name, size in conditions.items()})
        self.always = nn.Parameter(torch.randn(width))

    def forward(self, maps: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self._norm(self.point(maps.flatten(2)), 0)
        x = (self._norm(self.line(x), 1) + x) / math.sqrt(2)
        x = self.last(x.mean(2))  # linear, so the mean over tokens may come first
        direction = self.always + sum(self.mapped[name](value) for name, value in conditions.items())
        return (x * direction).sum(1).float() / math.sqrt(x.shape[1])

    def _norm(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        return group_norm_silu(x, self.scales[layer], self.biases[layer], self.groups)


class ADD(Recipe):
    Options = Options
    needs = ("real",)

    def __init__(self, config, model: sdxl.SDXL, student):
        super().__init__(config, model, student)
        options = self.options
        self.features = vision.load(_resolve(options.features), options.feature_size, model.device)
        self.heads = _heads(options, self.features.form, model.unet).to(model.device)
        if config.gradient_checkpointing:
            recompute_(model.vae)
        self.negative = None
        if options.distill_kind == "nfsd" and options.negative_prompt:
            self.negative = sdxl.encode_prompt(model, [options.negative_prompt])
        optimizer = make_optimizer(config, self.heads.parameters(), config.head_lr, config.head_betas)
        self.phases = (
            student_phase(config, student, interval=config.generator_interval, start=config.discriminator_warmup),
            Phase("heads", self.heads, optimizer),
        )
        self._seen: dict[str, list[torch.Tensor]] = {"real": [], "fake": []}

    def loss(self, phase: str, batch: Batch) -> dict[str, torch.Tensor]:
        if "timesteps" not in batch.shared:
            self._prepare(batch)
        return self._student_loss(batch) if phase == "student" else self._heads_loss(batch)

    def _prepare(self, batch: Batch) -> None:
        """Timesteps of the images, the real pictures, and what heads are told of both."""
        options, shared = self.options, batch.shared
        steps = torch.tensor(options.student_timesteps)
        weights = torch.tensor(options.timestep_weights or [1] * len(steps), dtype=torch.float32)
        picks = torch.multinomial(weights, batch.draws.total(len(batch.noise)), replacement=True)
        shared["timesteps"] = steps[batch.draws.mine(picks)].to(batch.noise.device)
        conditions = {}
        with torch.no_grad():
            shared["real"] = sdxl.decode_with_gradient(self.model, batch.real)
            if options.text_condition:
                conditions["text"] = _normalised(batch.cond.pooled_prompt_embeds)
            if options.image_condition:  # of a picture that noise hid altogether, the student can know nothing
                seen = (shared["timesteps"] < _LAST)[:, None]
                conditions["image"] = _normalised(self.features(shared["real"])[1]) * seen
        shared["conditions"] = conditions

    def _student_loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        options, shared = self.options, batch.shared
        x0 = self._student_x0(batch)
        pixels = sdxl.decode_with_gradient(self.model, x0)
        maps = self._maps(pixels, batch)
        shared["fake_maps"] = [m.detach() for m in maps]
        adversarial = losses.generator_loss(self.config.loss, self._logits(maps, shared["conditions"]))
        terms = {"adversarial": options.adversarial_weight * adversarial}
        if options.distill_weight:
            terms["distillation"] = options.distill_weight * self._distillation(batch, x0, pixels)
        return terms

    def _heads_loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        shared, weight = batch.shared, self.options.r1_weight
        with torch.no_grad():
            if "fake_maps" not in shared:
                shared["fake_maps"] = self._maps(sdxl.decode_with_gradient(self.model, self._student_x0(batch)), batch)
            real_maps = self._maps(shared["real"], batch)
        if weight:
            real_maps = [m.requires_grad_() for m in real_maps]
        real, fake = (self._logits(maps, shared["conditions"]) for maps in (real_maps, shared["fake_maps"]))
        self._seen["real"].append(real.detach().mean(0))
        self._seen["fake"].append(fake.detach().mean(0))
        terms = {"adversarial": losses.discriminator_loss(self.config.loss, real, fake)}
        if weight:  # the mean over heads of each head's own penalty: a map reaches the mean logit through one head
            terms["r1"] = weight * len(real_maps) * losses.r1_penalty(real, real_maps)
        return terms

    def _student_x0(self, batch: Batch) -> torch.Tensor:
        """[B, 4, h, w] fp32 from the real latents, noised; at the last timestep noise alone (zero terminal SNR)."""
        t, model = batch.shared["timesteps"], self.model
        x_t = schedule.add_noise(batch.real, batch.noise, t, model.alphas_cumprod)
        x_t = torch.where((t == _LAST).view(-1, 1, 1, 1), batch.noise.float(), x_t)
        denoise = sampling.with_unet(self.student)
        shifted = self.config.shifted_timestep
        return next(sampling.student_steps(denoise, x_t, batch.cond, model.alphas_cumprod, [t], shifted, None))

    def _distillation(self, batch: Batch, x0: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """[B] c(t) times the mean square distance of x0 to where the teacher's step from re-noised x0 leads."""
        kind, alphas_cumprod = self.options.distill_kind, self.model.alphas_cumprod
        t = batch.draws.randint(0, schedule.NUM_TRAIN_TIMESTEPS, len(x0)).to(x0.device)
        alpha = alphas_cumprod[t].sqrt()
        sigma = (1 - alphas_cumprod[t]).sqrt()
        with torch.no_grad():
            target = losses.distillation_target(x0, self._direction(x0, t, batch), alpha, sigma)
            if self.options.distance == "pixels":
                target = sdxl.decode_with_gradient(self.model, target)
        distance = losses.regression_loss(pixels if self.options.distance == "pixels" else x0, target)
        return losses.distillation_weight(kind, alpha, sigma) * distance

    def _direction(self, x0: torch.Tensor, t: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[B, 4, h, w] fp32 what one step of the teacher subtracts from x0, in units of sigma / alpha."""
        noise, scale, cond = batch.draws.randn_like(x0), self.config.guidance_scale, batch.cond
        x_t = schedule.add_noise(x0, noise, t, self.model.alphas_cumprod)
        asked = [cond]
        if self.options.distill_kind == "nfsd" or scale > 1:
            asked.append(cond.null())
        if self.negative is not None:
            every = torch.zeros(len(cond), dtype=torch.long)
            asked.append(self.negative[every].with_time_ids(cond.time_ids))
        many = len(asked)
        denoise = sampling.with_unet(self.model.unet)
        eps = denoise(x_t.repeat(many, 1, 1, 1), t.repeat(many), sdxl.Conditioning.cat(asked), 0).float().chunk(many)
        if self.options.distill_kind == "nfsd":
            text, null, negative = eps if many == 3 else (*eps, eps[1])
            return losses.nfsd_direction(null, text, negative, t, scale)
        guided = eps[0] if many == 1 else eps[1] + scale * (eps[0] - eps[1])
        return guided - noise

    def _maps(self, pixels: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        return self.features(pixels, self.options.augment, self.options.feature_crop, batch.draws)[0]

    def _logits(self, maps: list[torch.Tensor], conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, heads]."""
        return torch.stack([head(m, conditions) for head, m in zip(self.heads, maps, strict=True)], 1)

    def end_step(self, step: int) -> dict:
        seen, self._seen = self._seen, {"real": [], "fake": []}
        mean = lambda values: [round(v, 4) for v in torch.stack(values).mean(0).tolist()]  # noqa: E731
        return {"logits": {name: mean(values) for name, values in seen.items() if values}}

    @classmethod
    def check(cls, config, unet) -> None:
        _form(read_options(config))

    @classmethod
    def extra_parameters(cls, config, unet) -> dict[str, int]:
        options = read_options(config)
        with torch.device("meta"):
            heads = _heads(options, _form(options), unet)
        return {"heads": sum(p.numel() for p in heads.parameters())}

    @classmethod
    def frozen_files(cls, config) -> dict[str, list[Path]]:
        return {"features": vision.files(_resolve(read_options(config).features))}


def _form(options: Options) -> vision.Form:
    return vision.check(_resolve(options.features), options.feature_size)


def _resolve(name: str) -> str:
    return name if name.startswith(vision.TIMM) else resolve_folder(name)


def _heads(options: Options, form: vision.Form, unet) -> nn.ModuleList:
    """One head for each kept map."""
    conditions = {}
    if options.text_condition:
        conditions["text"] = sdxl.pooled_width(unet)
    if options.image_condition:
        conditions["image"] = form.width
    return nn.ModuleList(Head(form.width, conditions, options.head_width) for _ in form.depths)


def _normalised(embedding: torch.Tensor) -> torch.Tensor:
    """[B, size] fp32 of mean 0 and variance 1: networks differ in the scale of theirs."""
    return F.layer_norm(embedding.float(), embedding.shape[1:])

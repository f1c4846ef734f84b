"""NitroFusion (arXiv 2412.02030): a dynamic pool of discriminator heads on the teacher's frozen encoder.

Per micro-batch: one t*, one group of heads, one crop per image and local task. Real is the teacher's x0, fake the
student's from the same noise and prompt; both are re-noised to t* with fresh noise. Work is shared: the fake's
features are computed once, with a graph for the student, and reused detached for the heads; the two local tasks
go through the encoder as one batch; features that only the heads need carry no graph.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from .. import losses, schedule
from ..models import sdxl
from ..pool import HeadPool, RowAdamW
from ..presets import resolve_folder
from ..student import choose_step, regression_error, student_phase, student_x0
from . import Batch, Phase, Recipe, expect


@dataclass(frozen=True)
class Plan:
    """What one micro-batch's heads look at; real and fake share it.

    Attributes:
        t_index: which t*.
        rows: [tasks * levels, sampled_per_cell] heads.
        top, left: [local tasks, B] crop corners in latents.
    """

    t_index: int
    rows: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor


def crop(x: torch.Tensor, top: torch.Tensor, left: torch.Tensor, size: int) -> torch.Tensor:
    """[B, C, size, size] windows of x [B, C, H, W], one corner per image."""
    rows = top[:, None] + torch.arange(size, device=x.device)
    cols = left[:, None] + torch.arange(size, device=x.device)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return x[image, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Options:
    """Beside what every recipe has.

    Attributes:
        r1_weight: gamma of ADD: of the squared gradient of each head's logit of real samples in that head's input, mean
            over heads.
        misaligned_weight: of real samples with another sample's prompt, which the conditional heads are to refuse.
    """

    r1_weight: float = 0.0
    misaligned_weight: float = 0.0

    def validate(self, config) -> None:
        expect(self.r1_weight >= 0, "r1_weight", ">= 0", self.r1_weight)
        expect(self.misaligned_weight >= 0, "misaligned_weight", ">= 0", self.misaligned_weight)
        cond = [task for task in config.pool.tasks if not task.endswith("uncond")]
        expect(not self.misaligned_weight or bool(cond), "misaligned_weight", "0 without a conditional task",
               self.misaligned_weight)  # fmt: skip
        expect(not self.misaligned_weight or config.batch_size > 1, "misaligned_weight", "0 with batch_size 1",
               self.misaligned_weight)  # fmt: skip


class NitroFusion(Recipe):
    Options = Options
    needs = ("real",)

    def __init__(self, config, model: sdxl.SDXL, student):
        super().__init__(config, model, student)
        self.backbone = model.unet
        if config.backbone is not None:
            folder, fused = resolve_folder(config.backbone), config.backend != "ref"
            self.backbone = sdxl.load(folder, model.device, model.unet.dtype, fused=fused).unet
        self.locals = [task for task in config.pool.tasks if task.startswith("local")]
        size = config.crop_size if self.locals else model.latent_size
        shapes = sdxl.feature_shapes(self.backbone, size)
        self.pool = HeadPool(config.pool, [c for c, _ in shapes], [s for _, s in shapes]).to(model.device)
        pool_optimizer = RowAdamW(
            self.pool.parameters(), lr=config.head_lr, betas=config.head_betas, offload=config.pool_offload
        )
        self.phases = (
            student_phase(config, student, interval=config.generator_interval, start=config.discriminator_warmup),
            Phase("pool", self.pool, pool_optimizer),
        )
        self._cells: dict[str, dict] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._deck: list[int] = []

    def loss(self, phase: str, batch: Batch) -> dict[str, torch.Tensor]:
        if "plan" not in batch.shared:
            batch.shared["plan"] = self._plan(batch)
            batch.shared["timesteps"] = choose_step(self.config, batch)
        return self._student_loss(batch) if phase == "student" else self._pool_loss(batch)

    def _student_loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        c, shared = self.config, batch.shared
        fake = student_x0(c, self.student, batch, self.model.alphas_cumprod, shared["timesteps"])
        features = self._features(fake, batch, shared["plan"])
        shared["fake_features"] = [[f.detach() for f in taps] for taps in features]
        logits = self.pool.logits(self._watched(features, shared["plan"]), shared["plan"].rows)
        terms = {"adversarial": losses.generator_loss(c.loss, logits.flatten(1))}
        weight = c.regression_weight
        if c.regression_fade:
            weight *= max(0.0, 1 - max(0, batch.step - c.discriminator_warmup) / c.regression_fade)
        if weight:
            terms["regression"] = weight * regression_error(c, self.model, batch, fake, shared["timesteps"])
        return terms

    def _pool_loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        shared, plan = batch.shared, batch.shared["plan"]
        with torch.no_grad():
            if "fake_features" not in shared:
                fake = student_x0(self.config, self.student, batch, self.model.alphas_cumprod, shared["timesteps"])
                shared["fake_features"] = self._features(fake, batch, plan)
            real_features = self._features(batch.real, batch, plan)
            others = self._misaligned(batch, plan)
        if self.options.r1_weight:
            real_features = [[f.requires_grad_() for f in taps] for taps in real_features]
        sets = [real_features, shared["fake_features"], *others]
        features = [[torch.cat(maps) for maps in zip(*taps, strict=True)] for taps in zip(*sets, strict=True)]
        real, fake, *misaligned = self.pool.logits(features, plan.rows).split(len(batch.noise))
        self._mark(plan)
        self._record(plan, real.detach(), fake.detach())
        kind = self.config.loss
        terms = {"adversarial": losses.discriminator_loss(kind, real.flatten(1), fake.flatten(1))}
        for logits in misaligned:
            seen = logits[:, [k for k, task in enumerate(self.config.pool.tasks) if not task.endswith("uncond")]]
            terms["misaligned"] = self.options.misaligned_weight * losses.fake_loss(kind, seen.flatten(1))
        if self.options.r1_weight:
            inputs = [f for taps in real_features for f in taps]
            # The mean over heads of each head's own penalty. A map reaches the mean logit of a slot through one head.
            slots = real.unflatten(2, (self.pool.num_levels, -1)).flatten(1, 2).unbind(2)
            penalty = sum(losses.r1_penalty(logits, inputs) for logits in slots) * len(inputs) / len(slots)
            terms["r1"] = self.options.r1_weight * penalty
        return terms

    def _misaligned(self, batch: Batch, plan: Plan) -> list[list[list[torch.Tensor]]]:
        """One set of features of real samples under their neighbour's prompt, or none.

        The neighbour is of the same process: only here does it count which images a process has.
        """
        if not self.options.misaligned_weight:
            return []
        other = dataclasses.replace(batch, cond=batch.cond[torch.arange(len(batch.cond)).roll(1)])
        return [self._features(batch.real, other, plan)]

    @classmethod
    def extra_parameters(cls, config, unet) -> dict[str, int]:
        shapes = sdxl.feature_shapes(unet, config.crop_size)
        with torch.device("meta"):
            pool = HeadPool(config.pool, [c for c, _ in shapes], [s for _, s in shapes])
        return {"head pool": sum(p.numel() for p in pool.parameters())}

    def end_step(self, step: int) -> dict:
        self.pool.age += 1
        refreshed = []
        if step >= self.config.discriminator_warmup:
            refreshed = self.pool.refresh(self.phases[1].optimizer)
        age = self.pool.age.flatten().float()
        histogram = torch.histc(age, bins=16, min=0, max=max(16.0, age.max().item()))
        cells, self._cells = self._cells, {}
        mean = lambda values: [round(v, 4) for v in torch.stack(values).mean(0).tolist()]  # noqa: E731
        return {
            "cells": {name: {k: mean(v) for k, v in cell.items()} for name, cell in cells.items()},
            "head_age": {
                "mean": round(age.mean().item(), 2),
                "max": int(age.max()),
                "histogram": histogram.int().tolist(),
            },
            "refreshed": len(refreshed),
            **self._gradient_share(),
        }

    def _plan(self, batch: Batch) -> Plan:
        """Draws t*, heads and crops from the generator all processes share (so that they train the same rows)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=batch.plan)))
            if not self._deck:
                self._deck = self._shuffle_t()
            t_index = self._deck.pop()
            rows = self.pool.sample(t_index)
        room = self.model.latent_size - self.config.crop_size + 1
        count, corners = len(batch.noise), torch.empty(0, dtype=torch.int64)
        if self.locals:
            corners = batch.draws.randint(0, max(room, 1), count, groups=2 * len(self.locals))
        return Plan(t_index, rows, *corners.view(2, len(self.locals), count).to(batch.noise.device))

    def _shuffle_t(self) -> list[int]:
        """t* indices of one optimizer step, in random order, each as often as its weight says (systematic sampling)."""
        weights = torch.tensor(self.config.pool.t_star_weights, dtype=torch.float64)
        count = self.config.accumulation
        points = (torch.arange(count) + torch.rand((), dtype=torch.float64)) / count
        deck = torch.searchsorted(weights.cumsum(0) / weights.sum(), points, right=True).clamp(max=len(weights) - 1)
        return deck[torch.randperm(count)].tolist()

    def _features(self, x0: torch.Tensor, batch: Batch, plan: Plan) -> list[list[torch.Tensor]]:
        """Each task's taps for clean latents x0 [B, 4, h, w], re-noised to t* with fresh noise."""
        t_star, cond, draws = self.config.pool.t_star[plan.t_index], batch.cond, batch.draws
        by_task = {}
        if "global-cond" in self.config.pool.tasks:
            by_task["global-cond"] = self._encode(x0, t_star, cond, draws.randn_like(x0))
        if self.locals:
            size, count = self.config.crop_size, len(x0)
            crops, conds = [], []
            for task, top, left in zip(self.locals, plan.top, plan.left, strict=True):
                crops.append(crop(x0, top, left, size))
                local = cond if task == "local-cond" else cond.null()
                if self.config.crop_time_ids == "true_crop":
                    local = local.with_time_ids(self.model.time_ids(count, top.cpu(), left.cpu(), size, size))
                conds.append(local)
            x0 = torch.cat(crops)
            noise = draws.randn_like(x0, groups=len(crops))
            taps = self._encode(x0, t_star, sdxl.Conditioning.cat(conds), noise)
            for k, task in enumerate(self.locals):
                by_task[task] = [f[k * count : (k + 1) * count] for f in taps]
        return [by_task[task] for task in self.config.pool.tasks]

    def _encode(self, x0, t_star: int, cond: sdxl.Conditioning, noise: torch.Tensor) -> list[torch.Tensor]:
        t = torch.full((len(x0),), t_star, device=x0.device)
        x_t = schedule.add_noise(x0, noise, t, self.model.alphas_cumprod)
        return sdxl.encoder_features(self.backbone, x_t, t, cond)

    def _watched(self, features: list[list[torch.Tensor]], plan: Plan) -> list[list[torch.Tensor]]:
        """The features as the heads alone read them; what comes back to each is summed per cell and level.

        A view, because the map itself also gets the gradient of the deeper levels.
        """
        t_star, watched = self.config.pool.t_star[plan.t_index], []

        def add(gradient: torch.Tensor, total: torch.Tensor) -> None:
            total.add_(gradient.detach().float().square().sum())

        for task, taps in zip(self.config.pool.tasks, features, strict=True):
            watched.append([f.view_as(f) for f in taps])
            sums = self._gradients.setdefault(f"{task}/{t_star}", torch.zeros(len(taps), device=taps[0].device))
            for f, total in zip(watched[-1], sums, strict=True):
                if f.requires_grad:
                    f.register_hook(functools.partial(add, total=total))
        return watched

    def _gradient_share(self) -> dict:
        """Each cell's and level's share of the heads' squared gradient in their features; sums to 1, for the log."""
        gradients, self._gradients = self._gradients, {}
        total = sum(levels.sum() for levels in gradients.values())
        if not gradients or not 0 < total < float("inf"):
            return {}
        share = lambda levels: [round(v, 5) for v in (levels / total).tolist()]  # noqa: E731
        return {"gradient_share": {name: share(levels) for name, levels in gradients.items()}}

    def _mark(self, plan: Plan) -> None:
        by_level = plan.rows.view(len(self.config.pool.tasks), self.pool.num_levels, -1)
        for level, stack in enumerate(self.pool.stacks):
            for param in stack.values():
                self.phases[1].optimizer.mark_rows(param, by_level[:, level].flatten())

    def _record(self, plan: Plan, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Mean logits per (task, t*) cell and level, for the log."""
        t_star = self.config.pool.t_star[plan.t_index]
        for k, task in enumerate(self.config.pool.tasks):
            cell = self._cells.setdefault(f"{task}/{t_star}", {"real": [], "fake": []})
            for name, logits in (("real", real), ("fake", fake)):
                cell[name].append(logits[:, k].view(len(logits), self.pool.num_levels, -1).mean((0, 2)))

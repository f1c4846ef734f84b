"""One training step at the world's size: the recipe against a straight eager version of the same mathematics.

Straight: one encoder pass per task and image set, a fresh student forward for each phase, heads as separate modules
in a Python loop, torch.optim.AdamW over all of them. It is what one would write first.
"""

import dataclasses

import pytest
import torch

from nitrofusion import losses, schedule
from nitrofusion.models import sdxl
from nitrofusion.presets import RUNS
from nitrofusion.recipes import Batch, build
from nitrofusion.recipes.nitrofusion import crop
from nitrofusion.student import student_x0

from .test_pool import as_modules

BATCH = 16


@pytest.fixture(scope="module")
def setup(world_teacher):
    config = dataclasses.replace(RUNS["world"], batch_size=BATCH, accumulation=1, discriminator_warmup=0)
    student = type(world_teacher.unet).from_config(world_teacher.unet.config)
    student.load_state_dict(world_teacher.unet.state_dict())
    shape = (BATCH, 4, world_teacher.latent_size, world_teacher.latent_size)
    cond = sdxl.encode_prompt(world_teacher, ["a red circle on a gray background"] * BATCH)
    return config, world_teacher, student, torch.randn(shape), torch.randn(shape), cond


@pytest.mark.benchmark(group="one training step")
def test_ours(benchmark, setup):
    config, model, student, noise, target, cond = setup
    recipe = build(config, model, student)

    def step():
        batch = Batch(noise, target, cond, 0, torch.Generator().manual_seed(0))
        for phase in recipe.phases:
            for other in recipe.phases:
                other.module.requires_grad_(other is phase)
            sum(t.mean() for t in recipe.loss(phase.name, batch).values()).backward()
        for phase in recipe.phases:
            phase.optimizer.step()
            phase.optimizer.zero_grad()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="one training step")
def test_eager(benchmark, setup):
    config, model, student, noise, target, cond = setup
    recipe = build(config, model, student)
    heads = as_modules(recipe.pool, recipe.pool.sample(0))
    head_optimizer = torch.optim.AdamW([p for h in heads for p in h.parameters()], lr=1e-3)
    student_optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    corners = torch.randint(0, 9, (2, 2, BATCH))

    def logits(x0):
        out = []
        for task in range(3):
            x, c = x0, cond
            if task:
                top, left = corners[task - 1]
                x = crop(x0, top, left, 8)
                c = (cond if task == 1 else cond.null()).with_time_ids(model.time_ids(BATCH, top, left, 8, 8))
            t = torch.full((BATCH,), 250)
            x_t = schedule.add_noise(x, torch.randn_like(x), t, model.alphas_cumprod)
            taps = sdxl.encoder_features(model.unet, x_t, t, c)
            out += [h(f).mean((1, 2, 3)) for h, f in zip(heads[10 * task : 10 * task + 10], taps, strict=True)]
        return torch.stack(out, 1)

    def draw():
        batch = Batch(noise, target, cond, 0, torch.Generator())
        return student_x0(config, student, batch, model.alphas_cumprod, [999])

    def step():
        student.requires_grad_(True)
        losses.discriminator_loss("hinge", logits(target), logits(draw().detach())).mean().backward()
        head_optimizer.step()
        losses.generator_loss("hinge", logits(draw())).mean().backward()
        student_optimizer.step()
        head_optimizer.zero_grad()
        student_optimizer.zero_grad()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)

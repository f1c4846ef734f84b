"""What every recipe's student does: draw x0 at a chosen inference step, gradients through the last call only."""

from __future__ import annotations

import torch

import nitrokernels

from . import losses, sampling, schedule
from .adapters import Adapters
from .data import teacher_scheduler
from .models import sdxl
from .models.recompute import recompute_
from .presets import resolve_unet
from .recipes import Batch, Phase

_FEATURE_TIMESTEPS = (10, 250)  # where the teacher's encoder sees detail: the two least noisy t* of the paper


def trajectories(config, stage: int) -> list[tuple[float, list[int]]]:
    """What a micro-batch of a stage may run through: origin timesteps, each with its share of the micro-batches."""
    timesteps, first = schedule.origin_timesteps(stage), config.first_step_weight[stage - 1]
    if stage == 1:
        return [(1.0, timesteps)]
    return [(first, timesteps[:1]), *(((1 - first) / (stage - 1), timesteps[:n]) for n in range(2, stage + 1))]


def choose_step(config, batch: Batch) -> list[int]:
    """Origin timesteps the micro-batch runs through; the last one gets the gradient (backward simulation).

    In stage n the trajectory is that of n inference steps, and the first step keeps ``first_step_weight[n - 1]`` of
    the micro-batches (section 3.5; the mix is ours).
    """
    (first, start), *later = trajectories(config, config.stage(batch.step))
    u = torch.rand((), generator=batch.plan).item()
    if not later or u < first:
        return start
    return later[min(int((u - first) / (1 - first) * len(later)), len(later) - 1)][1]


def student_x0(config, unet, batch: Batch, alphas_cumprod: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """[B, 4, h, w] fp32 x0 after the last of ``timesteps``; only that call carries gradients.

    Leaves what that call started from, (x0 before, its noise), in ``batch.shared["renoised"]``.
    """
    x_t, denoise = batch.noise, sampling.with_unet(unet)
    if len(timesteps) > 1:
        with torch.no_grad():
            fresh = lambda: batch.draws.randn_like(x_t)  # noqa: E731
            *_, x0 = sampling.student_steps(
                denoise, x_t, batch.cond, alphas_cumprod, timesteps[:-1], config.shifted_timestep, fresh
            )
            noise = batch.draws.randn_like(x0)
            batch.shared["renoised"] = (x0, noise)
            t = torch.full((len(x0),), timesteps[-1], device=x0.device)
            x_t = schedule.add_noise(x0, noise, t, alphas_cumprod)
        # Of weights cast without a graph: in older PyTorch they leave the last call without gradients (issue 158232).
        torch.clear_autocast_cache()
    last = sampling.student_steps(
        denoise, x_t, batch.cond, alphas_cumprod, timesteps[-1:], config.shifted_timestep, next_noise=None
    )
    return next(last)


def teacher_x0(config, model: sdxl.SDXL, batch: Batch, timesteps: list[int]) -> torch.Tensor:
    """[B, 4, h, w] fp32 where the teacher ends from what ``student_x0`` last started from.

    At a later step that is not the sample of the batch: fresh noise has hidden part of it, and regressing to it would
    teach the mean of all pictures that the rest allows.
    """
    if len(timesteps) == 1:
        return batch.target
    image, noise = batch.shared["renoised"]
    if noise.is_meta:  # a rehearsal: schedulers ask for numbers, so it counts their calls apart
        batch.shared["teacher_walks"] = True
        return batch.target
    scheduler = teacher_scheduler(model.folder, config.teacher_scheduler)
    steps, scale, last = config.teacher_steps, config.guidance_scale, timesteps[-1]
    denoise = sampling.with_unet(model.unet)
    generators = sampling.seed_generators(batch.draws.randint(0, 2**62, len(noise)).tolist())
    return sampling.sample_teacher(denoise, noise, batch.cond, scheduler, steps, scale, generators, image, last)


def regression_error(config, model, batch: Batch, x0: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """[B] error of x0 [B, 4, h, w], drawn at the last of ``timesteps``: in latents, and in features where asked."""
    target = teacher_x0(config, model, batch, timesteps)
    error = losses.regression_loss(x0, target)
    if config.regression_features:
        error = error + config.regression_features * _feature_error(model, batch, x0, target)
    return error


def _feature_error(model: sdxl.SDXL, batch: Batch, x0: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[B] relative square error of the teacher's encoder features, mean over its taps; both see the same noise.

    In latents the best answer to two possible pictures is their blurred mean; the encoder knows that for no picture.
    """
    choice = torch.randint(len(_FEATURE_TIMESTEPS), (), generator=batch.plan)
    t = torch.full((len(x0),), _FEATURE_TIMESTEPS[choice], device=x0.device)
    noise = batch.draws.randn_like(x0)

    def features(x):
        x_t = schedule.add_noise(x, noise, t, model.alphas_cumprod)
        return [f.float() for f in sdxl.encoder_features(model.unet, x_t, t, batch.cond)]

    with torch.no_grad():
        real = features(target)
    size = lambda f: f.square().flatten(1).mean(1)  # noqa: E731  of each image, whichever others its process has
    each = [losses.regression_loss(f, r) / size(r) for f, r in zip(features(x0), real, strict=True)]
    return torch.stack(each).mean(0)


def student_phase(config, student, **when) -> Phase:
    """The phase that trains a student UNet, or the adapters it was given; ``when`` is for ``Phase``."""
    module = trainable(student)
    optimizer = make_optimizer(config, module.parameters(), config.lr, config.betas, config.weight_decay)
    return Phase("student", module, optimizer, **when)


def make_student(config, model: sdxl.SDXL, fused: bool = False) -> torch.nn.Module:
    """A trainable fp32 copy of the teacher's UNet, filled from ``config.init``, with adapters where there is a rank.

    Under adapters it is as precise as the run.
    """
    student = type(model.unet).from_config(model.unet.config)
    if config.init is None:
        student.load_state_dict(model.unet.state_dict())
    else:
        sdxl.load_unet_(student, resolve_unet(config.init))
    frozen = bool(config.lora_rank) and config.precision == "bf16"  # adapters learn in fp32, and nothing else does
    torch.nn.Module.to(student, model.device, torch.bfloat16 if frozen else torch.float32)
    if config.gradient_checkpointing:
        recompute_(student)
        recompute_(model.unet)
    if fused and nitrokernels.fusible(model.device):
        nitrokernels.fuse_(student)
    if config.lora_rank:
        student.adapters = (Adapters(student, config.lora_rank),)  # in a tuple: no submodule of what it adapts
        student.adapters[0].to(torch.float32)
    return student


def trainable(student: torch.nn.Module) -> torch.nn.Module:
    """What of a student is trained, averaged and stored: itself, or its adapters."""
    return student.adapters[0] if hasattr(student, "adapters") else student


def make_optimizer(config, params, lr: float, betas, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW in the form ``config.optimizer`` names."""
    if config.optimizer == "adamw":
        fused = not torch.empty(()).is_meta  # a rehearsal of memory has no such kernel
        return torch.optim.AdamW(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=fused)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(list(params), lr=lr, betas=tuple(betas), weight_decay=weight_decay)

"""The training loop. It knows phases, losses and steps, and no method.

Everything random in optimizer step s is a function of (seed, process, s), and the data position of the images seen,
so that a run that was killed and resumed equals one that was not, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from .. import checkpoint, recipes, sampling
from ..config import TrainConfig
from ..data import Samples, cache_folder, prepare, sample_noise, teacher_scheduler, training_prompts
from ..device import pick_device
from ..errors import EXIT_PREEMPTED, CheckpointError, TrainingError
from ..models import sdxl
from ..report import save_preview
from ..schedule import origin_timesteps
from ..student import make_student, trainable
from .plan import preflight
from .run_folder import claim_folder, truncate_log

PREVIEWS = 8  # pictures in a preview row
_PREVIEW_SEED = 4242


class Trainer:
    """One run: its models, its recipe, and where it stands."""

    def __init__(self, config: TrainConfig):
        folder, _ = preflight(config)
        self.config = config
        self.rank, self.world_size = _processes()
        self.device = pick_device(config.device)
        self.run_folder = claim_folder(config)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        frozen = torch.bfloat16 if config.precision == "bf16" else torch.float32
        fused = config.backend != "ref"
        self.model = sdxl.load(folder, self.device, frozen, config.teacher_unet, fused)
        torch.manual_seed(config.seed)
        self.student = make_student(config, self.model, fused)
        self.trained = trainable(self.student)
        self.recipe = recipes.build(config, self.model, self.student)
        self.ema = {k: v.detach().clone() for k, v in self.trained.state_dict().items()}
        cache = None
        if config.teacher_samples == "cache":
            cache = cache_folder(config)
            prepare(config, self.model, cache, part=(self.rank, self.world_size))
            self._barrier()
        self.samples = Samples(config, self.model, cache)
        self.step, self.seconds = 0, 0.0
        self.bad_steps = {phase.name: 0 for phase in self.recipe.phases}  # in a row
        self._stop_signal = 0
        self._resume()

    # ------------------------------------------------------------------ the loop

    def run(self) -> Path:
        config, last_save = self.config, self.step
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        progress = tqdm(total=config.total_steps, initial=self.step, desc="train", unit="step", disable=self.rank > 0)
        if self.step == 0:
            self._preview()
        try:
            while self.step < config.total_steps and not self._stop_signal:
                line = self._train_step()
                progress.update()
                shown = {k: "nan" if v is None else f"{v:.3g}" for k, v in line["loss"].items()}
                progress.set_postfix(shown, refresh=False)
                self._log(line)
                done = self.step == config.total_steps
                if done or self.step % config.preview_every == 0:
                    self._preview()
                if done or self.step % config.checkpoint_every == 0:
                    self._save()
                    last_save = self.step
            if self._stop_signal and self.step > last_save:
                self._save()
        finally:
            progress.close()
            for s, handler in previous.items():
                signal.signal(s, handler)
        if self._stop_signal:
            raise SystemExit(EXIT_PREEMPTED)  # run the same command again
        return self.run_folder

    def _train_step(self) -> dict:
        config, started = self.config, time.perf_counter()
        self._seed(self.rank)
        due = [phase for phase in self.recipe.phases if phase.due(self.step)]
        rate = self._learning_rate_scale()
        totals: dict[str, torch.Tensor] = {}
        for micro in range(config.accumulation):
            batch = self._batch(micro)
            for phase in due:
                _require_grad(self.recipe.phases, phase)
                with self.autocast:
                    terms = self.recipe.loss(phase.name, batch)
                loss = sum(term.float().mean() for term in terms.values()) / config.accumulation
                loss.backward()
                for name, term in terms.items():
                    key = f"{phase.name}.{name}"
                    totals[key] = totals.get(key, 0) + term.detach().float().mean() / config.accumulation
        norms = {}
        for phase in due:
            norms[phase.name] = self._optimizer_step(phase, rate)
        torch.manual_seed(_mix(config.seed, self.step, -1))  # refresh is equal on all processes
        extra = self.recipe.end_step(self.step)
        self._update_ema()
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return {
            "step": self.step,
            "nimg": self.step * config.images_per_step * self.world_size,
            "seconds": round(self.seconds, 3),
            "inference_steps": config.stage(self.step - 1),
            "loss": {k: _finite(v.item()) for k, v in totals.items()},
            "grad_norm": {k: _finite(v) for k, v in norms.items()},
            "lr_scale": round(rate, 6),
            "images_per_second": round(config.images_per_step * self.world_size / seconds, 2),
            "peak_memory_mb": _peak_memory_mb(self.device),
            **extra,
        }

    def _batch(self, micro: int) -> recipes.Batch:
        config = self.config
        global_micro = (self.step * config.accumulation + micro) * self.world_size + self.rank
        samples = self.samples(global_micro * config.batch_size, config.batch_size)
        plan = torch.Generator().manual_seed(_mix(config.seed, self.step, micro + 1_000_000))
        return recipes.Batch(**samples, step=self.step, plan=plan)

    def _optimizer_step(self, phase: recipes.Phase, rate: float) -> float:
        params = [p for p in phase.module.parameters() if p.grad is not None]
        if self.world_size > 1:
            flat = torch.cat([p.grad.flatten() for p in params])
            dist.all_reduce(flat)
            parts = flat.div_(self.world_size).split([p.numel() for p in params])
            for p, part in zip(params, parts, strict=True):
                p.grad.copy_(part.view_as(p))
        norm = torch.nn.utils.clip_grad_norm_(params, self.config.clip_grad_norm).item()
        if math.isfinite(norm):
            for group in phase.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            phase.optimizer.step()
            self.bad_steps[phase.name] = 0
        else:
            self.bad_steps[phase.name] += 1
            if self.bad_steps[phase.name] >= self.config.nan_limit:
                raise TrainingError(
                    f"train: gradients of {phase.name} must be finite, got {norm} for {self.bad_steps[phase.name]} "
                    f"steps in a row at step {self.step}; lower lr or head_lr and rerun from the last checkpoint"
                )
        phase.optimizer.zero_grad(set_to_none=True)
        return norm

    def _learning_rate_scale(self) -> float:
        config = self.config
        scale = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.lr_decay == "cosine":
            scale *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.step / config.total_steps))
        return scale

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        current = self.trained.state_dict()
        torch._foreach_lerp_(list(self.ema.values()), [current[k] for k in self.ema], 1 - decay)

    def _seed(self, rank: int) -> None:
        torch.manual_seed(_mix(self.config.seed, self.step, rank))

    # ------------------------------------------------------------------ run folder

    def _components(self) -> dict[str, dict[str, torch.Tensor]]:
        parts = {"ema": self.ema, "rng": checkpoint.pack_rng()}
        for phase in self.recipe.phases:
            parts[phase.name] = phase.module.state_dict()
            parts[f"optimizer_{phase.name}"] = checkpoint.pack_optimizer(phase.optimizer)
        return parts

    def _save(self) -> None:
        if self.rank == 0:
            state = {
                "step": self.step,
                "nimg": self.step * self.config.images_per_step * self.world_size,
                "seconds": self.seconds,
                "bad_steps": self.bad_steps,
            }
            checkpoint.save(self.run_folder, self.step, self._components(), state)
            checkpoint.prune(self.run_folder, self.config.keep_checkpoints)
        self._barrier()

    def _resume(self) -> None:
        for phase in self.recipe.phases:
            for group in phase.optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        if self.rank == 0:
            checkpoint.sweep(self.run_folder)
        folder, refused = checkpoint.latest(self.run_folder)
        for reason in refused:
            tqdm.write(f"refused {reason}")
        if folder is None:
            if refused:  # starting over would overwrite what may still be mended
                raise CheckpointError(
                    f"train: {self.run_folder} must have a checkpoint that verifies, got none: remove its checkpoints "
                    f"to start over (newest: {refused[0]})"
                )
            if self.rank == 0:
                truncate_log(self.run_folder / "log.jsonl", 0)  # killed before the first checkpoint
            return
        parts, state = checkpoint.load(folder)
        for phase in self.recipe.phases:
            phase.module.load_state_dict(parts[phase.name])
            checkpoint.unpack_optimizer(phase.optimizer, parts[f"optimizer_{phase.name}"])
        self.ema = {k: v.to(self.device) for k, v in parts["ema"].items()}
        checkpoint.unpack_rng(parts["rng"])
        self.step, self.seconds, self.bad_steps = state["step"], state["seconds"], state["bad_steps"]
        if self.rank == 0:
            truncate_log(self.run_folder / "log.jsonl", self.step)
            tqdm.write(f"resumed {folder}")

    def _log(self, line: dict) -> None:
        if self.rank:
            return
        with open(self.run_folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        if self.config.tensorboard:
            self._tensorboard(line)

    def _tensorboard(self, line: dict) -> None:
        if not hasattr(self, "_writer"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.run_folder / "tensorboard")
        for group in ("loss", "grad_norm"):
            for name, value in line[group].items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, line["step"])
        self._writer.add_scalar("images_per_second", line["images_per_second"], line["step"])

    @torch.no_grad()
    def _preview(self) -> None:
        """Fixed prompts and noises at 1, 2 and 4 steps beside the teacher, drawn with the averaged student."""
        if self.rank:
            return
        config, model = self.config, self.model
        folder = self.run_folder / "previews"
        folder.mkdir(exist_ok=True)
        prompts = training_prompts(config, PREVIEWS)
        cond = sdxl.encode_prompt(model, prompts)
        seeds = [_PREVIEW_SEED + i for i in range(PREVIEWS)]
        noise = sample_noise(model, sampling.seed_generators(seeds))
        if not hasattr(self, "_teacher_preview"):
            scheduler = teacher_scheduler(model.folder, config.teacher_scheduler)
            generators = sampling.seed_generators(seeds)
            steps, scale = config.teacher_steps, config.guidance_scale
            denoise = sampling.with_unet(model.unet)
            x0 = sampling.sample_teacher(denoise, noise, cond, scheduler, steps, scale, generators)
            self._teacher_preview = sdxl.decode_each(model, x0)
        rows = [(f"teacher, {config.teacher_steps} steps", self._teacher_preview)]
        live = {k: v.clone() for k, v in self.trained.state_dict().items()}
        self.trained.load_state_dict(self.ema)
        for steps in (1, 2, 4):
            generators = sampling.seed_generators(seeds)
            x_t = sampling.randn(noise.shape[1:], generators, device=self.device)
            fresh = lambda g=generators: sampling.randn(noise.shape[1:], g, device=self.device)  # noqa: E731
            with self.autocast:
                *_, x0 = sampling.student_steps(
                    sampling.with_unet(self.student), x_t, cond, model.alphas_cumprod, origin_timesteps(steps),
                    config.shifted_timestep, fresh,
                )  # fmt: skip
            rows.append((f"student, {steps} step{'s' * (steps > 1)}", sdxl.decode_each(model, x0)))
        self.trained.load_state_dict(live)
        save_preview(folder / f"step-{self.step:06d}.png", rows)

    def _on_signal(self, signum, frame) -> None:
        if self._stop_signal:
            os._exit(128 + signum)  # asked twice: stop at once; a checkpoint is sealed or absent, never half
        self._stop_signal = signum

    def _barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def _require_grad(phases: tuple[recipes.Phase, ...], phase: recipes.Phase) -> None:
    for other in phases:
        other.module.requires_grad_(other is phase)


def _mix(seed: int, step: int, salt: int) -> int:
    """A seed for one purpose at one step (splitmix64's finaliser over the three numbers)."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + (salt + 2) * 0x94D049BB133111EB) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) % 2**63


def _finite(value: float) -> float | None:
    """What JSON can hold."""
    return round(value, 6) if math.isfinite(value) else None


def _processes() -> tuple[int, int]:
    """(rank, world size); joins the group when launched by torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _peak_memory_mb(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

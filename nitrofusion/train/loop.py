"""The training loop. It knows phases, losses and steps, and no method.

Everything random in optimizer step s is a function of (seed, s, image), and the data position of the images seen, so
that a run that was killed and resumed equals one that was not, bit for bit on a CPU (on a GPU attention and cuDNN add
up gradients in no fixed order), and one that several processes share equals one that a single process has, but for the
order of its sums.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from .. import checkpoint, recipes, sampling
from ..config import TrainConfig
from ..data import Samples, cache_folder, claim, draw, load_teacher, sample_noise, teacher_scheduler, training_prompts
from ..device import pick_device
from ..errors import CheckpointError, Preempted, TrainingError
from ..models import sdxl
from ..report import save_preview
from ..schedule import origin_timesteps
from ..student import make_student, trainable
from . import parallel
from .plan import preflight
from .run_folder import (
    check_identity,
    check_layout,
    check_state,
    claim_folder,
    hold,
    identity,
    located,
    other_rounding,
    thin_previews,
    truncate_log,
    writing,
)
from .stop import StopSignals

_PREVIEW_SEED = 4242


class Trainer:
    """One run: its models, its recipe, and where it stands.

    Args:
        allow_inexact: go on from a checkpoint of another number of processes, or another way of sharing the images of
            an optimizer step among them, although sums then differ in their last bits (and, with another
            ``accumulation``, what is drawn for each micro-batch).
    """

    def __init__(self, config: TrainConfig, allow_inexact: bool = False):
        config.validate()
        self.config, self.allow_inexact = config, allow_inexact
        self.group = parallel.join(config)
        self.rank, self.world_size = self.group.rank, self.group.world_size
        self._stop, self._lock = StopSignals(), None
        with self._stop.heard():  # not before: a process that waits in ``join`` could not be stopped
            self._set_up()

    def _set_up(self) -> None:
        config, allow_inexact = self.config, self.allow_inexact
        with self._part():
            folder, _ = preflight(config)
            if self.rank == 0:
                self._lock = hold(claim_folder(config, allow_inexact))
        self.device = pick_device(config.device)
        self.sharded = config.parallel == "fsdp2" and self.world_size > 1
        # Autocast keeps casts of parameters, which sharding is to be rid of.
        bf16 = dict(dtype=torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=not self.sharded)
        self.autocast = torch.autocast(self.device.type, **bf16)
        fused = config.backend != "ref"
        with self._part():
            self.run_folder = claim_folder(config, allow_inexact)  # the others find it made
            self.model = load_teacher(config, folder)
            torch.manual_seed(config.seed)
            self.student = make_student(config, self.model, fused)
        with self._part():
            if self.sharded:
                parallel.shard_(self.student)
            self.trained = trainable(self.student)
            self.recipe = recipes.build(config, self.model, self.student)
        self.ema = {k: v.detach().clone() for k, v in self.trained.state_dict().items()}
        cache = None
        if config.teacher_samples == "cache":
            cache = cache_folder(config)
            with self._part():
                missing = claim(config, self.model.folder, cache)
            own = self.group.deal(missing)
            with self._part():
                draw(config, self.model, cache, own, progress=self.rank == 0)
        self.step, self.seconds = 0, 0.0
        self.bad_steps = {phase.name: 0 for phase in self.recipe.phases}  # in a row
        self._saver = checkpoint.Saver(self.run_folder, config.keep_checkpoints, config.async_checkpoints)
        with self._part():
            self.samples = Samples(config, self.model, cache)
            self._resume()
        self._check_position()

    @contextlib.contextmanager
    def _part(self) -> Iterator[None]:
        """Of setting up, which nothing is lost of: a signal to one process ends all of them at once."""
        with self.group.agreed(), self._stop.at_once():
            yield

    # ------------------------------------------------------------------ the loop

    def run(self) -> Path:
        try:
            with self._stop.heard():
                stopped = self._train()
        finally:
            if self._lock is not None:
                self._lock.close()
        if stopped:
            raise Preempted
        return self.run_folder

    def _train(self) -> bool:
        """Whether a signal ended it before the last step."""
        config, last_save, stopped = self.config, self.step, False
        progress = tqdm(total=config.total_steps, initial=self.step, desc="train", unit="step", disable=self.rank > 0)
        try:
            with self._saver:
                if self.step == 0 and not self.group.any(self._stop.told):
                    with self.group.agreed(), writing(self.run_folder):
                        self._preview()
                while self.step < config.total_steps:
                    stopped = self.group.any(self._stop.told)
                    if stopped:
                        break
                    line = self._train_step()
                    progress.update()
                    shown = {k: "nan" if v is None else f"{v:.3g}" for k, v in line["loss"].items()}
                    progress.set_postfix(shown | {"sealed": self._saver.sealed}, refresh=False)
                    done = self.step == config.total_steps
                    with self.group.agreed(), writing(self.run_folder):  # one agreement a step, on all that may fail
                        self._log(line)
                        self._saver.check()
                    if done or self.step % config.preview_every == 0:
                        with self.group.agreed(), writing(self.run_folder):  # apart: a sharded student's is of all
                            self._preview()
                    if done or self.step % config.checkpoint_every == 0:
                        self._save()
                        last_save = self.step
                if stopped and self.step > last_save:
                    self._save()
                with self.group.agreed():  # the first to leave would have the launcher stop the others
                    self._saver.wait()
        finally:
            progress.close()
        return stopped

    def _train_step(self) -> dict:
        config, started = self.config, time.perf_counter()
        torch.manual_seed(_mix(config.seed, self.step, 0))  # equal on all processes: ``Batch.draws`` tells images apart
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
        torch.manual_seed(_mix(config.seed, self.step, -1))  # whatever was drawn before
        extra = self.recipe.end_step(self.step)
        self._update_ema()
        self.step += 1
        means = self.group.mean([v.item() for v in totals.values()])
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return {
            "step": self.step,
            "nimg": self.step * config.images_per_step * self.world_size,
            "seconds": round(self.seconds, 3),
            "inference_steps": config.stage(self.step - 1),
            "loss": {k: _finite(v) for k, v in zip(totals, means, strict=True)},
            "grad_norm": {k: _finite(v) for k, v in norms.items()},
            "lr_scale": round(rate, 6),
            "images_per_second": round(config.images_per_step * self.world_size / seconds, 2),
            "peak_memory_mb": _peak_memory_mb(self.device),
            **extra,
        }

    def _batch(self, micro: int) -> recipes.Batch:
        config = self.config
        turn = (self.step * config.accumulation + micro) * self.world_size + self.rank
        with self.group.agreed():  # a sample or a picture may be damaged, which only its reader meets
            samples = self.samples(turn * config.batch_size, config.batch_size)
        plan = torch.Generator().manual_seed(_mix(config.seed, self.step, micro + 1_000_000))
        return recipes.Batch(**samples, step=self.step, plan=plan, draws=self.group.draws)

    def _optimizer_step(self, phase: recipes.Phase, rate: float) -> float:
        self.group.average_gradients(phase)
        norm = self.group.clip_gradients(phase.module, self.config.clip_grad_norm)
        if math.isfinite(norm):
            for group in phase.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            parallel.step(phase.optimizer)
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
        averages = [parallel.local(v) for v in self.ema.values()]
        torch._foreach_lerp_(averages, [parallel.local(current[k]) for k in self.ema], 1 - decay)

    # ------------------------------------------------------------------ run folder

    def _components(self) -> dict[str, dict[str, torch.Tensor]]:
        parts = {"ema": self.ema, "rng": checkpoint.pack_rng()}
        for phase in self.recipe.phases:
            parts[phase.name] = phase.module.state_dict()
            state = checkpoint.pack_optimizer(phase.optimizer)
            parts[f"optimizer_{phase.name}"] = parallel.optimizer_whole(state, phase.optimizer)
        return {name: parallel.whole(part, keep=self.rank == 0) for name, part in parts.items()}

    def _save(self) -> None:
        components = self._components()  # of all processes: they gather what is sharded
        with self.group.agreed():
            if self.rank == 0:
                self._saver.save(self.step, components, self._state())

    def _state(self) -> dict:
        images = self.config.images_per_step * self.world_size
        return {
            "step": self.step,
            "nimg": self.step * images,
            "world_size": self.world_size,
            "images_per_step": images,
            "seconds": self.seconds,
            "bad_steps": dict(self.bad_steps),
            "identity": self._identity,
            "machine": self._machine(),
        }

    def _machine(self) -> dict:
        """What rounding depends on beside the software."""
        return {"device": self.device.type, "threads": torch.get_num_threads()}

    def _resume(self) -> None:
        for phase in self.recipe.phases:
            for group in phase.optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self._identity = identity(self.config, self.model.folder)
        if self.rank == 0:
            checkpoint.sweep(self.run_folder)
        folder, refused = checkpoint.latest(self.run_folder)
        for reason in refused if self.rank == 0 else ():
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
        lines = check_identity(folder, state, self._identity, self.allow_inexact)
        check_state(folder, state, list(self.bad_steps))
        check_layout(folder, state, self.config, self.world_size, self.allow_inexact)
        for line in [*lines, *other_rounding(folder, state, self._machine())] if self.rank == 0 else ():
            tqdm.write(line)
        with checkpoint.fitting(folder):
            for phase in self.recipe.phases:
                phase.module.load_state_dict(parallel.shard_like(parts[phase.name], phase.module.state_dict()))
                moments = parallel.optimizer_parts(parts[f"optimizer_{phase.name}"], phase.optimizer)
                checkpoint.unpack_optimizer(phase.optimizer, moments)
            ema = parallel.shard_like({k: parts["ema"][k] for k in self.ema}, self.ema)
            self.ema = {k: v.to(self.device) for k, v in ema.items()}
            checkpoint.unpack_rng(parts["rng"])
            self.step, self.seconds, self.bad_steps = state["step"], state["seconds"], state["bad_steps"]
            if folder.name != f"step-{self.step:06d}":  # a later save would take it for its own, and keep it
                raise ValueError(f"step {self.step} under another one's name")
        if self.rank == 0:
            truncate_log(self.run_folder / "log.jsonl", self.step)
            tqdm.write(f"resumed {folder}")

    def _check_position(self) -> None:
        """Processes that do not see the same folder stand at different steps."""
        with self.group.agreed():
            if any(step != self.step for step in self.group.mean([self.step])):
                raise CheckpointError(
                    f"train: {self.run_folder} must be one folder for all processes, got step {self.step} in one and "
                    "another step in others"
                )
            if self.allow_inexact and self.rank == 0:
                with writing(self.run_folder):
                    located(self.config).save(self.run_folder)  # from here on it is this configuration's

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

            # What a killed run wrote past its checkpoint is written again.
            self._writer = SummaryWriter(self.run_folder / "tensorboard", purge_step=line["step"])
        for group in ("loss", "grad_norm"):
            for name, value in line[group].items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, line["step"])
        self._writer.add_scalar("images_per_second", line["images_per_second"], line["step"])

    @torch.no_grad()
    def _preview(self) -> None:
        """Fixed prompts and noises at 1, 2 and 4 steps beside the teacher, drawn with the averaged student.

        A sharded student is drawn with by all processes, each the same pictures.
        """
        config, model = self.config, self.model
        if config.num_previews == 0 or self.rank and not self.sharded:
            return
        folder = self.run_folder / "previews"
        prompts = training_prompts(config, config.num_previews)
        cond = sdxl.encode_prompt(model, prompts)
        seeds = [_PREVIEW_SEED + i for i in range(config.num_previews)]
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
        if self.rank == 0:
            folder.mkdir(exist_ok=True)
            save_preview(folder / f"step-{self.step:06d}.png", rows)
            thin_previews(folder)


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


def _peak_memory_mb(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

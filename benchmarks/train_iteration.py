"""One training iteration: ours, and a straight eager implementation of the same mathematics, end to end.

    python -m benchmarks.train_iteration --json train_iteration.json        # the world's size, about four minutes
    python -m benchmarks.train_iteration --teacher SDXL_FOLDER --batch_size 5 --precision bf16    # on a GPU

Straight is what one writes first from the paper: diffusers' modules as they are, every head a module in a Python loop,
an encoder pass per task, image set and phase, torch.optim.AdamW over all heads. Its student is drawn once for both
phases and nothing that needs no graph has one, as a careful author would have it. Every variant runs in processes of
its own, in turns, with the same data, noises, heads and crops: their losses agree, and the record says how well.

    straight-online   the teacher drawn in every iteration, as the paper's method reads
    straight          its samples from the cache
    ours              nitrofusion.train, one process
    ours-2            the same batch in two processes of one thread each (CPU)

    images_per_second, ms    medians over all rounds, of whole iterations: data to averaged student
    peak_mb                  most resident (CUDA: allocated) memory of a process, over what it had before its models
    breakdown_ms             of one process, timed apart: exclusive milliseconds of each part
    flops_share              of this machine's matmul rate, by the plan's count (without heads)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from nitrofusion import losses, schedule
from nitrofusion.config import TrainConfig
from nitrofusion.models import sdxl
from nitrofusion.pool import HeadPool
from nitrofusion.presets import RUNS
from nitrofusion.recipes.nitrofusion import Plan, crop
from nitrofusion.student import choose_step, student_x0
from nitrofusion.train import plan
from nitrofusion.train.loop import Trainer, _mix

from . import records
from .records import machine

WARM_UP = 2
VARIANTS = ("straight-online", "straight", "ours", "ours-2")


class Straight:
    """The recipe's loss and updates as written in the paper (sections 3.2 to 3.4), one line after the other."""

    def __init__(self, config: TrainConfig):
        # The trainer of the eager backend lends its models and its data; nothing of its recipe trains.
        self.trainer = Trainer(dataclasses.replace(config, backend="ref"))
        self.config, self.model, self.student = config, self.trainer.model, self.trainer.student
        self.recipe = self.trainer.recipe
        self.heads = as_modules(self.recipe.pool)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.head_optimizer = torch.optim.AdamW(
            self.heads.parameters(), lr=config.head_lr, betas=config.head_betas, weight_decay=0.0
        )
        self.ema = {name: p.detach().clone() for name, p in self.student.named_parameters()}

    def step(self) -> dict[str, float]:
        trainer, config = self.trainer, self.config
        torch.manual_seed(_mix(config.seed, trainer.step, 0))  # the draws of ours
        batch = trainer._batch(0)
        plan = self.recipe._plan(batch)
        t_star = config.pool.t_star[plan.t_index]

        self.student.requires_grad_(True)
        self.heads.requires_grad_(False)
        with trainer.autocast:
            fake = student_x0(config, self.student, batch, self.model.alphas_cumprod, choose_step(config, batch))
            noise = self.noise(batch)
            g_loss = losses.generator_loss(config.loss, self.logits(fake, batch.cond, plan, t_star, noise)).mean()
        g_loss.backward()

        self.heads.requires_grad_(True)
        real_noise = self.noise(batch)
        with trainer.autocast:
            real_logits = self.logits(batch.real, batch.cond, plan, t_star, real_noise)
            fake_logits = self.logits(fake.detach(), batch.cond, plan, t_star, noise)
            d_loss = losses.discriminator_loss(config.loss, real_logits, fake_logits).mean()
        d_loss.backward()

        for parameters, optimizer in (
            (self.student.parameters(), self.optimizer), (self.heads.parameters(), self.head_optimizer)
        ):  # fmt: skip
            nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], config.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(config.ema_decay, (1 + trainer.step) / (10 + trainer.step))
        with torch.no_grad():
            for name, p in self.student.named_parameters():
                self.ema[name].lerp_(p, 1 - decay)
        trainer.step += 1
        return {"student.adversarial": g_loss.item(), "pool.adversarial": d_loss.item()}

    def noise(self, batch) -> dict[str, torch.Tensor]:
        """What x0 is re-noised with, by task."""
        size, tasks = self.config.crop_size, self.recipe.locals
        whole = torch.randn_like(batch.noise)
        crops = torch.randn(len(tasks) * len(whole), whole.shape[1], size, size, device=whole.device)
        return {"global-cond": whole, **dict(zip(tasks, crops.chunk(len(tasks)), strict=True))}

    def logits(self, x0, cond, plan: Plan, t_star: int, noise) -> torch.Tensor:
        """[B, heads]: one encoder pass for each task, one module after the other."""
        pool, size, out = self.config.pool, self.config.crop_size, []
        rows = plan.rows.view(len(pool.tasks), self.recipe.pool.num_levels, -1)
        t = torch.full((len(x0),), t_star, device=x0.device)
        for k, task in enumerate(pool.tasks):
            x, c = x0, cond
            if task != "global-cond":
                at = self.recipe.locals.index(task)
                top, left = plan.top[at], plan.left[at]
                x = crop(x0, top, left, size)
                c = cond if task == "local-cond" else cond.null()
                c = c.with_time_ids(self.model.time_ids(len(x0), top.cpu(), left.cpu(), size, size))
            x_t = schedule.add_noise(x, noise[task], t, self.model.alphas_cumprod)
            with contextlib.nullcontext() if x0.requires_grad else torch.no_grad():
                taps = sdxl.encoder_features(self.model.unet, x_t, t, c)
            for level, features in enumerate(taps):
                for row in rows[k, level].tolist():
                    out.append(self.heads[level][row](features).float().mean((1, 2, 3)))
        return torch.stack(out, 1)


def as_modules(pool: HeadPool) -> nn.ModuleList:
    """[levels][rows] heads with the pool's present weights."""
    levels = nn.ModuleList()
    for level, stack in enumerate(pool.stacks):
        heads = nn.ModuleList()
        for row in range(pool.rows):
            layers = []
            for d in range(pool.depths[level]):
                weight = stack[f"conv{d}"].data[row]
                conv = nn.Conv2d(weight.shape[1], weight.shape[0], 4, 2, 1, bias=False)
                norm = nn.GroupNorm(pool.num_groups, weight.shape[0])
                conv.weight.data = weight.clone()
                norm.weight.data = stack[f"norm_weight{d}"].data[row].clone()
                norm.bias.data = stack[f"norm_bias{d}"].data[row].clone()
                layers += [conv, norm, nn.SiLU()]
            logit = nn.Conv2d(pool.config.width, 1, 1)
            logit.weight.data = stack["logit_weight"].data[row].view(1, -1, 1, 1).clone()
            logit.bias.data = stack["logit_bias"].data[row].view(1).clone()
            heads.append(nn.Sequential(*layers, logit))
        levels.append(heads.to(stack["logit_bias"].device))
    return levels


class Ours:
    def __init__(self, config: TrainConfig):
        self.trainer = Trainer(config)

    def step(self) -> dict[str, float]:
        return self.trainer._train_step()["loss"]


class Clock:
    """Exclusive seconds of the functions it watches."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._inner = device, defaultdict(float), [0.0]

    def watch(self, owner, name: str, label: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            self._inner.append(0.0)
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                total = self.now() - started
                self.seconds[label] += total - self._inner.pop()
                self._inner[-1] += total

        setattr(owner, name, timed)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(variant: str, config: TrainConfig, iterations: int) -> dict:
    """One process's figures."""
    before = _peak_mb(None)
    runner = (Straight if variant.startswith("straight") else Ours)(config)
    device = runner.trainer.device
    losses_, seconds = [], []
    for i in range(WARM_UP + iterations):
        if runner.trainer.world_size > 1:
            torch.distributed.barrier()
        clock = Clock(device)
        started = clock.now()
        losses_.append(runner.step())
        if i >= WARM_UP:
            seconds.append(clock.now() - started)
    peak = _peak_mb(device) - before
    found = {"seconds": seconds, "losses": losses_, "peak_mb": round(peak)}
    if runner.trainer.world_size == 1:
        found["breakdown_ms"] = _breakdown(runner, clock)
    return found


def _breakdown(runner, clock: Clock, iterations: int = 3) -> dict[str, float]:
    trainer = runner.trainer
    clock.watch(trainer, "samples", "data and text encoders")
    clock.watch(trainer.student, "forward", "student forward")
    clock.watch(sdxl, "encoder_features", "encoder forward")
    clock.watch(torch.Tensor, "backward", "backward")
    if isinstance(runner, Straight):
        clock.watch(runner, "logits", "heads forward")
        optimizers = (runner.optimizer, runner.head_optimizer)
    else:
        clock.watch(trainer.recipe.pool, "logits", "heads forward")
        optimizers = [phase.optimizer for phase in trainer.recipe.phases]
    for optimizer in optimizers:
        clock.watch(optimizer, "step", "optimizers")
    started = clock.now()
    for _ in range(iterations):
        runner.step()
    total = clock.now() - started
    parts = dict(clock.seconds) | {"clipping, average, rest": total - sum(clock.seconds.values())}
    return {name: round(1000 * value / iterations, 1) for name, value in parts.items()}


def _peak_mb(device: torch.device | None) -> float:
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def child(variant: str, config: TrainConfig, iterations: int, threads: int) -> dict:
    """``measure`` in a process of its own, or in two."""
    with tempfile.TemporaryDirectory() as folder:
        order = Path(folder) / "order.json"
        out = Path(folder) / "found.json"
        processes = 2 if variant == "ours-2" else 1
        mine = dataclasses.replace(
            config, output=f"{folder}/run", batch_size=config.batch_size // processes,
            teacher_samples="online" if variant == "straight-online" else config.teacher_samples,
        )  # fmt: skip
        order.write_text(json.dumps([variant, mine.to_json(), iterations, str(out)]))
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "benchmarks.train_iteration", "--child", str(order)]
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // processes))}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{variant} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def compare(config: TrainConfig, variants: list[str], rounds: int, iterations: int, threads: int) -> dict:
    """Every variant's figures; each round runs all of them in a fresh order."""
    found = defaultdict(list)
    for r in range(rounds):
        for variant in random.Random(r).sample(variants, len(variants)):
            found[variant].append(child(variant, config, iterations, threads))
            print(f"round {r + 1}/{rounds} {variant:16} {_ms(found[variant][-1:]):8.1f} ms", file=sys.stderr)
    record = {}
    for variant in variants:
        parts, ms = found[variant], _ms(found[variant])
        record[variant] = {
            "ms": round(ms, 1),
            "images_per_second": round(1000 * config.batch_size / ms, 2),
            "peak_mb": max(part["peak_mb"] for part in parts),
        }
        if "breakdown_ms" in parts[0]:
            record[variant]["breakdown_ms"] = min((p["breakdown_ms"] for p in parts), key=lambda b: sum(b.values()))
    if {"ours", "straight"} <= found.keys():
        record["ratio_to_straight"] = {
            v: round(record["straight"]["ms"] / record[v]["ms"], 2) for v in variants if v != "straight"
        }
        record["loss_difference"] = difference(found["ours"][0]["losses"], found["straight"][0]["losses"])
    return record


def difference(ours: list[dict], straight: list[dict]) -> dict[str, float]:
    """By loss: the largest difference over the iterations, relative to its largest value."""
    return {
        name: max(abs(a[name] - b[name]) for a, b in zip(ours, straight, strict=True))
        / max(abs(b[name]) for b in straight)
        for name in straight[0]
    }


def _ms(parts: list[dict]) -> float:
    return 1000 * statistics.median(s for part in parts for s in part["seconds"])


def settings(args) -> TrainConfig:
    """The preset with the paper's loss alone: no anchor, no warm-up, no refresh (whose random numbers differ)."""
    base = RUNS[args.preset]
    pool = dataclasses.replace(base.pool, refresh_rate=0.0, sampled_per_cell=args.sampled_per_cell)
    steps = WARM_UP + args.iterations + 4
    return dataclasses.replace(
        base, teacher=args.teacher or base.teacher, pool=pool, images=None, teacher_samples="cache",
        num_teacher_samples=max(64, args.batch_size), batch_size=args.batch_size, accumulation=1, stages=(steps,),
        regression_weight=0.0, regression_features=0.0, discriminator_warmup=0, precision=args.precision,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="world", help="a nitrofusion preset")
    parser.add_argument("--teacher", help="a pipeline folder in place of the preset's")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--batch_size", type=records.count, default=32)
    parser.add_argument("--sampled_per_cell", type=int, default=1, help="heads of four that a step trains")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--iterations", type=records.count, default=10)
    parser.add_argument("--rounds", type=records.count, default=4)
    parser.add_argument("--threads", type=records.count, default=os.cpu_count())
    parser.add_argument("--json", type=records.output)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        variant, values, iterations, out = json.loads(Path(args.child).read_text())
        found = measure(variant, TrainConfig.from_json(values), iterations)
        if int(os.environ.get("RANK", "0")) == 0:
            Path(out).write_text(json.dumps(found))
        return
    config = settings(args)
    variants = args.variants or [v for v in VARIANTS if v != "ours-2" or not torch.cuda.is_available()]
    asked = vars(args) | {"variants": variants, "json": args.json and str(args.json)}
    record = {"machine": machine(args.threads), "settings": asked}
    record["iteration"] = compare(config, variants, args.rounds, args.iterations, args.threads)
    record["flops_per_iteration"] = plan(dataclasses.replace(config, output=tempfile.gettempdir() + "/plan"))[
        "flops_per_step"
    ]
    print(json.dumps(record["iteration"], indent=1))
    records.write(args.json, record)


if __name__ == "__main__":
    main()

"""One run's settings as a frozen dataclass: preset, then YAML, then command line; JSON in the run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError
from .pool import PoolConfig
from .storage import sync

MOST_PER_PREVIEW = 64  # pictures of a row, which are drawn as one batch
_LARGEST = 2**32  # of whole numbers: sizes that are made of several still fit into the 64 bits that torch counts in


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on.

    Attributes:
        output: run folder; the same command resumes it.
        recipe: distillation method, a name in ``recipes.RECIPES``.
        teacher: preset name or StableDiffusionXLPipeline folder; also the discriminator's backbone.
        teacher_unet: UNet file that replaces the folder's own, as few-step teachers are published.
        init: the student's first weights: preset name, UNet file or folder; None copies the teacher's UNet.
        backbone: another pipeline folder for the discriminator's features; None shares the teacher's.
        prompts: text, CSV, JSONL or Parquet file; None draws captions of the embedded world.
        images: real pictures with captions, which then are the prompts: a folder with ``metadata.jsonl`` (lines of
            file_name and text), or ``world`` for rendered scenes. None: the teacher's samples are what is real.
        teacher_samples: "cache" makes them once (see ``prepare``), "online" draws fresh ones every step, "none" is for
            recipes that learn from the teacher's scores.
        num_teacher_samples: size of the cache.
        cache: folder of the cache; None puts it into the run folder.
        teacher_steps: sampling steps of the teacher.
        teacher_batch_size: samples of the cache that are drawn at once.
        teacher_scheduler: folder uses the pipeline's own; lcm is DMD2's 999/749/499/249 with re-noising; ddim_trailing
            is Hyper-SDXL's 999, 874, ...: few-step teachers are published without one.
        guidance_scale: classifier-free guidance of the teacher; 1 or less turns it off.
        shifted_timestep: S of the timestep shift, 250 (Realism) or 500 (Vibrant).
        lora_rank: above 0 the student learns adapters of that rank on frozen weights.
        batch_size: images of one micro-batch, on each process.
        accumulation: micro-batches of one optimizer step.
        stages: optimizer steps spent on 1, 2, 3 and 4 inference steps (bottom-up refinement, section 3.5).
        first_step_weight: share of the micro-batches that train the first step, in each stage.
        loss: hinge, wgan or ns.
        lr: student's learning rate. betas, weight_decay: its AdamW.
        optimizer: adamw, or adamw8bit, whose state takes a quarter of the memory (extra ``8bit``).
        head_lr: heads' learning rate. head_betas: their AdamW.
        warmup_steps: optimizer steps of linear warm-up. lr_decay: none or cosine, to one hundredth.
        generator_interval: train the student every n-th optimizer step (the D:G ratio, the two time scales of DMD2).
        discriminator_warmup: optimizer steps in which only the heads or a second score learn; none is refreshed.
        clip_grad_norm: of each phase.
        ema_decay: of the averaged student.
        regression_weight: of the error to the teacher's x0 (0 is the paper); fades to 0 over regression_fade
            optimizer steps (0 never fades).
        regression_features: weight, beside the error in latents, of that in the teacher's encoder features.
        crop_size: side of the local tasks' crops, in latents.
        crop_time_ids: true_crop tells the backbone where the crop lies, constant says it is a whole picture.
        pool: the discriminator heads.
        pool_offload: their optimizer state lies in host memory; only what a step touches visits the device.
        options: the recipe's own, see ``Options`` in its file.
        parallel: of the processes that torchrun started: ddp averages gradients, fsdp2 also shards the student with its
            gradients, optimizer state and average; none refuses to be one of several. Alone they are the same.
        precision: fp32, or bf16 autocast; x0 and losses are fp32 either way.
        gradient_checkpointing: recompute activations of student and backbone.
        backend: of nitrokernels' ops: auto picks the fastest proven one for each; ref is eager PyTorch throughout.
        device: cpu, cuda, ...; None picks CUDA when there is one.
        seed: of everything random.
        num_previews: pictures in a row of a preview, at most 64; 0 draws none.
        preview_every, checkpoint_every: in optimizer steps.
        keep_checkpoints: the newest n stay.
        async_checkpoints: seal them while training goes on, from a copy of the state in host memory.
        nan_limit: consecutive non-finite steps before giving up.
        tensorboard: also write TensorBoard events.
    """

    output: str = "runs/train"
    recipe: str = "nitrofusion"
    teacher: str = "world-teacher"
    teacher_unet: str | None = None
    init: str | None = "world-start"
    backbone: str | None = None
    prompts: str | None = None
    images: str | None = None
    teacher_samples: str = "cache"
    num_teacher_samples: int = 2048
    cache: str | None = None
    teacher_steps: int = 8
    teacher_batch_size: int = 32
    teacher_scheduler: str = "folder"
    guidance_scale: float = 2.5
    shifted_timestep: int = 500
    lora_rank: int = 0
    batch_size: int = 5
    accumulation: int = 20
    stages: tuple[int, ...] = (1000,)
    first_step_weight: tuple[float, ...] = (1.0, 0.7, 0.6, 0.55)
    loss: str = "hinge"
    lr: float = 1e-6
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    head_lr: float = 1e-4
    head_betas: tuple[float, float] = (0.0, 0.99)
    warmup_steps: int = 0
    lr_decay: str = "none"
    generator_interval: int = 1
    discriminator_warmup: int = 0
    clip_grad_norm: float = 1.0
    ema_decay: float = 0.999
    regression_weight: float = 0.0
    regression_fade: int = 0
    regression_features: float = 0.0
    crop_size: int = 64
    crop_time_ids: str = "true_crop"
    pool: PoolConfig = field(default_factory=PoolConfig)
    pool_offload: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    parallel: str = "ddp"
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    backend: str = "auto"
    device: str | None = None
    seed: int = 0
    num_previews: int = 8
    preview_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    async_checkpoints: bool = True
    nan_limit: int = 10
    tensorboard: bool = False

    @property
    def total_steps(self) -> int:
        return sum(self.stages)

    @property
    def images_per_step(self) -> int:
        """Of one process."""
        return self.batch_size * self.accumulation

    def stage(self, step: int) -> int:
        """Inference steps trained at an optimizer step: 1 .. 4."""
        for n, length in enumerate(self.stages, start=1):
            if step < length:
                return n
            step -= length
        return len(self.stages)

    def validate(self) -> TrainConfig:
        """Returns self, or raises InputError naming the value and what was expected."""

        check_types(self)
        check_types(self.pool, "pool.")

        def expect(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise InputError(f"config: {name} must be {wanted}, got {getattr(self, name)!r}")

        for name in ("batch_size", "accumulation", "generator_interval", "checkpoint_every", "preview_every"):
            expect(getattr(self, name) >= 1, name, ">= 1")
        for name in ("keep_checkpoints", "teacher_steps", "num_teacher_samples", "nan_limit", "crop_size"):
            expect(getattr(self, name) >= 1, name, ">= 1")
        expect(self.teacher_batch_size >= 1, "teacher_batch_size", ">= 1")
        for name in ("regression_weight", "regression_fade", "regression_features", "discriminator_warmup"):
            expect(getattr(self, name) >= 0, name, ">= 0")
        for name in ("lora_rank", "warmup_steps", "weight_decay", "guidance_scale"):
            expect(getattr(self, name) >= 0, name, ">= 0")
        expect(0 <= self.num_previews <= MOST_PER_PREVIEW, "num_previews", f"in 0..{MOST_PER_PREVIEW}")
        for name in ("betas", "head_betas"):
            values = getattr(self, name)
            expect(len(values) == 2 and all(0 <= b < 1 for b in values), name, "two in [0, 1)")
        expect(bool(self.output), "output", "a folder")
        expect(self.prompts != "", "prompts", "a file, or unset")
        for name in ("cache", "images"):
            expect(getattr(self, name) != "", name, "a folder, or unset")
        for name in ("output", "cache", "prompts", "images"):
            expect("\0" not in (getattr(self, name) or ""), name, "a path")
        expect(self.teacher_steps <= 1000, "teacher_steps", "<= 1000")
        expect(0 <= self.seed < 2**32, "seed", "in 0..2^32 - 1")
        expect(1 <= len(self.stages) <= 4 and min(self.stages) >= 0, "stages", "1 to 4 numbers >= 0")
        expect(self.total_steps >= 1, "stages", "at least one step in all")
        expect(len(self.first_step_weight) >= len(self.stages), "first_step_weight", "one number per stage")
        expect(all(0 < w <= 1 for w in self.first_step_weight), "first_step_weight", "numbers in (0, 1]")
        shift = self.shifted_timestep
        expect(isinstance(shift, int) and 0 < shift <= 1000, "shifted_timestep", "an integer in 1..1000")
        expect(self.lr > 0 and self.head_lr > 0, "lr", "> 0, head_lr too")
        expect(self.clip_grad_norm > 0, "clip_grad_norm", "> 0")
        expect(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)")
        expect(self.images is None or self.prompts is None, "prompts", "unset beside images, whose captions are used")
        for name, choices in {
            "parallel": ("none", "ddp", "fsdp2"),
            "loss": ("hinge", "wgan", "ns"),
            "precision": ("fp32", "bf16"),
            "lr_decay": ("none", "cosine"),
            "backend": ("auto", "cuda", "triton", "cpu", "ref"),
            "crop_time_ids": ("true_crop", "constant"),
            "teacher_samples": ("cache", "online", "none"),
            "optimizer": ("adamw", "adamw8bit"),
            "teacher_scheduler": ("folder", "lcm", "ddim_trailing"),
        }.items():
            expect(getattr(self, name) in choices, name, "one of " + ", ".join(choices))
        if self.parallel == "fsdp2":  # adapters are small, and 8-bit state has no shape to shard
            expect(self.lora_rank == 0, "lora_rank", "0 with parallel fsdp2 (use ddp)")
            expect(self.optimizer == "adamw", "optimizer", "adamw with parallel fsdp2 (or use ddp)")
        self.pool.validate()
        return self

    def to_json(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_json(values: dict) -> TrainConfig:
        """The inverse of ``to_json``; unknown keys are an InputError."""
        values = dict(values)
        fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
        unknown = sorted(values.keys() - fields.keys())
        if unknown:
            raise InputError(f"config: keys must be those of TrainConfig, got {unknown[0]!r}")
        pool = values.pop("pool", {})
        if not isinstance(pool, dict) or not pool.keys() <= {f.name for f in dataclasses.fields(PoolConfig)}:
            raise InputError(f"config: pool must hold settings of PoolConfig, got {pool!r}")
        pool = {k: tuple(v) if isinstance(v, list) else v for k, v in pool.items()}
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return TrainConfig(**plain, pool=PoolConfig(**pool))

    def save(self, folder: Path) -> None:
        staged = folder / f".config-{os.getpid()}.tmp"  # several processes of one run may write it at once
        staged.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        sync(staged)  # or a machine that loses power is left with an empty one, and the run cannot go on
        os.replace(staged, folder / "config.json")
        sync(folder)


_TYPES = {
    "int": (int, "an integer"),
    "float": (float, "a finite number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
    "PoolConfig": (PoolConfig, "a PoolConfig"),
    "dict": (dict, "a dictionary"),
}


def check_types(values, prefix: str = "") -> None:
    """Raises InputError for a field of another type than it says, or a number that is not finite."""
    for f in dataclasses.fields(values):
        value, wanted = getattr(values, f.name), f.type
        if wanted.endswith(" | None"):
            if value is None:
                continue
            wanted = wanted.removesuffix(" | None")
        kind, _, inner = wanted.partition("[")
        if kind == "tuple":
            kind = inner.partition(",")[0].removesuffix("]")
            ok = isinstance(value, tuple | list) and all(_is_of(item, kind) for item in value)
            what = f"several numbers, each {_TYPES[kind][1]}" if kind in ("int", "float") else "a list"
        else:
            unclipped = f.name == "clip_grad_norm" and value == math.inf
            ok, what = _is_of(value, kind) or unclipped, _TYPES[kind][1]
        if not ok:
            raise InputError(f"config: {prefix}{f.name} must be {what}, got {value!r}")
        most = max(map(abs, value if isinstance(value, tuple | list) else (value,)), default=0) if kind == "int" else 0
        if most > _LARGEST:  # which may be too long to be shown
            raise InputError(f"config: {prefix}{f.name} must be at most 2^32, got one of {most.bit_length()} bits")


def _is_of(value, kind: str) -> bool:
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, _TYPES[kind][0]) and (kind == "bool" or not isinstance(value, bool))

"""Distillation methods: phases and losses. The loop in ``train`` knows none of them.

A recipe is one file: a ``Recipe`` with its ``Options``, found by the file's name through ``RECIPES``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..draws import ONE, Draws
from ..errors import InputError


@dataclass(frozen=True)
class Phase:
    """One optimizer's share of a training step.

    Attributes:
        name: what ``Recipe.loss`` is asked for, and the prefix of its log entries.
        module: the only module that requires gradients while the phase runs.
        interval: runs at optimizer steps divisible by it.
        start: first optimizer step at which it runs.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    interval: int = 1
    start: int = 0

    def due(self, step: int) -> bool:
        return step >= self.start and step % self.interval == 0


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        noise: [B, 4, h, w] the x_T both student and teacher start from.
        target: [B, 4, h, w] fp32, the teacher's x0 from ``noise``; None where ``teacher_samples`` is none.
        cond: conditioning of the prompts.
        step: optimizer step.
        plan: generator equal on all processes, for choices they must share.
        shared: work one phase did that another can use.
        image: [B, 4, h, w] fp32 latents of real pictures of the prompts, where the run has ``images``.
        prompts: what ``cond`` was made of.
        draws: draws what is random for each image; nothing else may.
    """

    noise: torch.Tensor
    target: torch.Tensor | None
    cond: object
    step: int
    plan: torch.Generator
    shared: dict = field(default_factory=dict)
    image: torch.Tensor | None = None
    prompts: list[str] | None = None
    draws: Draws = ONE

    @property
    def real(self) -> torch.Tensor:
        """What a discriminator is to take for real: pictures if the run has any, else the teacher's samples."""
        return self.target if self.image is None else self.image


@dataclass(frozen=True)
class NoOptions:
    """Of recipes that have none."""


class Recipe:
    """Protocol, and the empty defaults of its optional parts.

    Attributes:
        Options: dataclass of ``config.options``; its ``validate(config)``, if any, raises InputError.
        needs: what a batch must have: ``target``, ``real`` or neither.
        waits: whether ``discriminator_warmup`` and ``generator_interval`` say when its student is trained.
        phases: optimizers in the order in which they run.
    """

    Options: type = NoOptions
    needs: tuple[str, ...] = ()
    waits: bool = True
    phases: tuple[Phase, ...]

    def __init__(self, config, model, student):
        self.config, self.model, self.student = config, model, student
        self.options = options(config)

    def loss(self, phase: str, batch: Batch) -> dict[str, torch.Tensor]:
        """Named terms, weights applied, each [B]."""
        raise NotImplementedError

    def end_step(self, step: int) -> dict:
        """After all optimizers stepped; returns entries for the log."""
        return {}

    @classmethod
    def check(cls, config, unet) -> None:
        """Refuses, before any weight is read, what does not fit the teacher's UNet (on the meta device)."""

    @classmethod
    def extra_parameters(cls, config, unet) -> dict[str, int]:
        """Parameters that are trained beside the student's, by what they belong to."""
        return {}

    @classmethod
    def frozen_files(cls, config) -> dict[str, list[Path]]:
        """What the recipe itself reads, by its name: with others in their place it would be another run."""
        return {}


# Module and class of each method; a new one is a file and a line here.
RECIPES = {
    "add": "ADD",
    "dmd2": "DMD2",
    "nitrofusion": "NitroFusion",
    "pgsb": "PGSB",
    "regression": "Regression",
}


# What a value may be, by its option's default.
_KINDS = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "text"),
    tuple: ((list, tuple), "a list"),
}


def find(name: str) -> type[Recipe]:
    """The recipe's class; raises InputError where there is none of that name."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InputError(f"config: recipe must be {' or '.join(RECIPES)}, got {name!r}{hint}")
    return getattr(importlib.import_module(f".{name}", __name__), RECIPES[name])


def options(config):
    """``config.options`` as the recipe's own dataclass, or InputError naming the value and what was expected."""
    cls = find(config.recipe).Options
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in config.options.items():
        if name not in fields:
            known = ", ".join(fields) or "nothing"
            raise InputError(f"config: options of {config.recipe} must be among {known}, got {name!r}")
        each = value if isinstance(value, list | tuple) else (value,)
        plain = all(isinstance(v, str) or isinstance(v, int | float) and abs(v) <= sys.float_info.max for v in each)
        expect(plain, name, "made of text or finite numbers", value)
        default = fields[name].default
        if isinstance(value, list | tuple):
            kind = type(default[0]) if isinstance(default, tuple) and default else str | int | float
            accepted, called = _KINDS.get(kind, (kind, "text or a number"))
            fits = all(isinstance(v, accepted) and not isinstance(v, bool) for v in value)
            expect(fits or not isinstance(default, tuple), name, f"a list, each {called}", value)
        for kind, (accepted, called) in _KINDS.items():
            if isinstance(default, kind):
                if isinstance(value, bool) != (kind is bool) or not isinstance(value, accepted):
                    raise InputError(f"config: options.{name} must be {called}, got {value!r}")
                break
    made = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.options.items()})
    if hasattr(made, "validate"):
        made.validate(config)
    return made


def expect(ok: bool, name: str, wanted: str, got) -> None:
    """For ``Options.validate``: raises InputError unless ``ok``."""
    if not ok:
        raise InputError(f"config: options.{name} must be {wanted}, got {got!r}")


def check(config, unet) -> None:
    """Everything about the recipe that can be refused before a weight is read."""
    recipe = find(config.recipe)
    options(config)
    if config.teacher_samples == "none" and ("target" in recipe.needs or "real" in recipe.needs and not config.images):
        other = " (or give images)" if "target" not in recipe.needs else ""
        raise InputError(f"config: teacher_samples must be cache or online for {config.recipe}{other}, got 'none'")
    first = -(-config.discriminator_warmup // config.generator_interval) * config.generator_interval
    if recipe.waits and first >= config.total_steps:
        raise InputError(
            f"config: discriminator_warmup must leave one of {config.total_steps} steps to the student, which is "
            f"trained in every {config.generator_interval}. of generator_interval, got {config.discriminator_warmup}"
        )
    recipe.check(config, unet)


def build(config, model, student) -> Recipe:
    """The recipe ``config.recipe`` names, around a loaded teacher and a student UNet."""
    return find(config.recipe)(config, model, student)

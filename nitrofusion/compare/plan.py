"""Equal wall-clock: how many optimizer steps of a run fit into a number of seconds.

A probe runs a few steps of every kind a run has (a kind: whether the discriminator's warm-up lasts, and the stage) and
keeps the mean seconds of each kind. The plan is the largest number of steps whose kinds add up to the seconds.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from ..config import TrainConfig

_STEPS = 10  # timed of each kind: a whole number of periods for phases that run every 1, 2, 5 or 10 steps
_WARM_UP = 4  # of the discriminator, in a probe
MOST_STEPS = 1_000_000


def probe_config(config: TrainConfig) -> TrainConfig:
    """The run in miniature: every kind of step, each after one that is not timed."""
    warm = _WARM_UP if config.discriminator_warmup else 0
    stages = [_STEPS + 1 if length else 0 for length in config.stages]
    first = next(i for i, length in enumerate(stages) if length)
    stages[first] += warm
    return dataclasses.replace(
        config, stages=tuple(stages), discriminator_warmup=warm, num_previews=0, checkpoint_every=10**9
    )


def kind(config: TrainConfig, step: int) -> str:
    """What decides the seconds of optimizer step ``step``."""
    return f"{'warm-up' if step < config.discriminator_warmup else 'stage'} {config.stage(step)}"


def measured(config: TrainConfig, log: list[dict]) -> dict[str, float]:
    """Mean seconds of each kind of step in a probe's log, without the first of its kind (it allocates)."""
    ends = [0.0, *(line["seconds"] for line in log)]
    seconds: dict[str, list[float]] = {}
    for step in range(len(log)):
        seconds.setdefault(kind(config, step), []).append(ends[step + 1] - ends[step])
    return {name: sum(each[1:]) / len(each[1:]) for name, each in seconds.items()}


def scaled(config: TrainConfig, steps: int) -> TrainConfig:
    """The run in ``steps`` optimizer steps: stages keep their shares; warm-ups and fades only ever shrink with it."""
    total = config.total_steps
    ends = [round(sum(config.stages[: i + 1]) * steps / total) for i in range(len(config.stages))]
    shorter = lambda length: min(length, round(length * steps / total))  # noqa: E731
    last = (steps - 1) // config.generator_interval * config.generator_interval  # in which the student may be trained
    return dataclasses.replace(
        config,
        stages=tuple(end - start for start, end in zip([0, *ends], ends, strict=False)),
        discriminator_warmup=min(shorter(config.discriminator_warmup), last),
        warmup_steps=shorter(config.warmup_steps),
        regression_fade=max(shorter(config.regression_fade), min(config.regression_fade, 1)),  # 0 would never fade
        preview_every=steps,
        checkpoint_every=-(-steps // 5),
        keep_checkpoints=1,
    )


def seconds(config: TrainConfig, rates: dict[str, float]) -> float:
    """What all steps of ``config`` take at seconds per kind of step."""
    kinds = Counter(kind(config, step) for step in range(config.total_steps))
    return sum(count * rates[name] for name, count in kinds.items())


def steps_within(config: TrainConfig, rates: dict[str, float], budget: float) -> int:
    """The most optimizer steps that end within ``budget`` seconds, at least 1."""
    low, high = 1, 2
    while high < MOST_STEPS and seconds(scaled(config, high), rates) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(scaled(config, middle), rates) <= budget else (low, middle)
    return low

"""The dynamic discriminator pool (paper section 3.3): stacked heads, sampled, trained, partly re-initialised.

A cell is (task, t*, level); every cell holds ``heads_per_cell`` heads. 480 = 3 tasks x 4 t* x 10 levels x 4.
Level l keeps its heads in stacked parameters [P, ...], P = tasks * t* * heads_per_cell, row =
(task * num_t + t_index) * heads_per_cell + head. Nothing is ever moved: sampling is an index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from nitrokernels import head_pool, indexed_adamw_, refresh_rows_
from nitrokernels.ops.head_pool import LevelParams

from .errors import InputError

TASKS = ("global-cond", "local-cond", "local-uncond")
_LARGEST = 1 << 16  # of what shapes are made of: the largest stack still has a size that 64 bits count


@dataclass(frozen=True)
class PoolConfig:
    """Shape and dynamics of the pool.

    Attributes:
        heads_per_cell: heads in each (task, t*, level) cell; 4 makes the paper's 480, 1 is "no pool".
        sampled_per_cell: of those, how many judge one micro-batch.
        width: channels inside a head.
        max_depth: most stride-2 convs in a head; fewer where the crop's map would shrink under 2x2.
        refresh_rate: share of the pool re-initialised after each optimizer step; 0 is "no refresh".
        t_star: timesteps of re-noising before the backbone.
        t_star_weights: how often each is drawn.
        tasks: which of the three tasks take part.
        logit_init: a fresh head's logit weights, as a share of the usual range; at 0 it is silent until it has learnt,
            and pulls the student nowhere.
    """

    heads_per_cell: int = 4
    sampled_per_cell: int = 1
    width: int = 64
    max_depth: int = 4
    refresh_rate: float = 0.01
    t_star: tuple[int, ...] = (10, 250, 500, 750)
    t_star_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    tasks: tuple[str, ...] = TASKS
    logit_init: float = 1.0

    def validate(self) -> None:
        """Raises InputError naming the value and what was expected."""

        def expect(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise InputError(f"pool: {name} must be {wanted}, got {getattr(self, name)!r}")

        for name in ("heads_per_cell", "width", "max_depth"):
            expect(1 <= getattr(self, name) <= _LARGEST, name, f"in 1..{_LARGEST}")
        groups = num_groups(self.width)
        expect(self.width % groups == 0, "width", f"a multiple of its {groups} groups")
        expect(1 <= self.sampled_per_cell <= self.heads_per_cell, "sampled_per_cell", f"in 1..{self.heads_per_cell}")
        expect(0 <= self.refresh_rate <= 1, "refresh_rate", "in 0..1")
        expect(0 <= self.logit_init < math.inf, "logit_init", ">= 0 and finite")
        expect(len(self.t_star) >= 1 and all(0 <= t < 1000 for t in self.t_star), "t_star", "timesteps in 0..999")
        weights, count = self.t_star_weights, len(self.t_star)
        expect(len(weights) == count and min(weights) >= 0 < sum(weights) < math.inf, "t_star_weights",
               f"{count} numbers >= 0")  # fmt: skip
        expect(bool(self.tasks) and set(self.tasks) <= set(TASKS), "tasks", f"among {', '.join(TASKS)}")
        expect(len(set(self.tasks)) == len(self.tasks), "tasks", "each named once")


def num_groups(width: int) -> int:
    """GroupNorm's groups in heads of that width: 8 channels each, so that a 1x1 map is still normal, at most 32."""
    return max(1, min(32, width // 8))


class HeadPool(nn.Module):
    """Stacked heads for every tap of the backbone.

    Args:
        channels: channels of each tap, one per level.
        sides: side of each tap for the smallest input a head reads (the crop), one per level.
    """

    def __init__(self, config: PoolConfig, channels: list[int], sides: list[int]):
        super().__init__()
        config.validate()
        self.config = config
        self.num_levels = len(channels)
        self.rows = len(config.tasks) * len(config.t_star) * config.heads_per_cell
        self.num_groups = num_groups(config.width)
        self.depths = []
        self.stacks = nn.ModuleList()
        for c, side in zip(channels, sides, strict=True):
            depth = max(1, min(config.max_depth, int(math.log2(max(side, 1))) - 1))
            stack = nn.ParameterDict()
            for d in range(depth):
                stack[f"conv{d}"] = torch.empty(self.rows, config.width, c if d == 0 else config.width, 4, 4)
                stack[f"norm_weight{d}"] = torch.empty(self.rows, config.width)
                stack[f"norm_bias{d}"] = torch.empty(self.rows, config.width)
            stack["logit_weight"] = torch.empty(self.rows, config.width)
            stack["logit_bias"] = torch.empty(self.rows)
            self.depths.append(depth)
            self.stacks.append(stack)
        # Optimizer steps since each head was made; a head is the atom of refresh, on every level by itself.
        self.register_buffer("age", torch.zeros(self.num_levels, self.rows, dtype=torch.int64))
        every = torch.arange(self.rows)
        for level in range(0 if self.age.is_meta else self.num_levels):  # planning a run builds it on meta
            self.reset_rows_(level, every)

    @property
    def num_heads(self) -> int:
        return self.rows * self.num_levels

    def reset_rows_(self, level: int, rows: torch.Tensor, optimizer: RowAdamW | None = None) -> None:
        """Re-runs the constructor's initialisation (fan-in uniform) on the named rows of one level.

        Their optimizer state is forgotten. A parameter's values follow from one seed of torch's generator.
        """
        for name, stack in self.stacks[level].items():
            if name.startswith("conv"):
                high = math.sqrt(3 / stack[0, 0].numel())
            elif name == "logit_weight":
                high = self.config.logit_init / math.sqrt(stack.shape[1])
            else:
                high = 1.0 if name.startswith("norm_weight") else 0.0
            low = high if name.startswith("norm") or name == "logit_bias" else -high
            state = optimizer.state[stack] if optimizer is not None else {}
            moments = {key: state.get(key) for key in _MOMENTS}
            seed = int(torch.randint(2**63 - 1, ()))
            if optimizer is not None and optimizer.offload:
                for moment in moments.values():
                    moment[rows.to(moment.device)] = 0
                moments = dict.fromkeys(_MOMENTS)
            refresh_rows_(stack, *moments.values(), rows.to(stack.device), seed, low, high)
        self.age[level, rows.to(self.age.device)] = 0

    def params(self) -> list[LevelParams]:
        levels = []
        for stack, depth in zip(self.stacks, self.depths, strict=True):
            pick = lambda name: tuple(stack[f"{name}{d}"] for d in range(depth))  # noqa: E731, B023
            levels.append(
                LevelParams(
                    pick("conv"), pick("norm_weight"), pick("norm_bias"), stack["logit_weight"], stack["logit_bias"]
                )
            )
        return levels

    def sample(self, t_index: int) -> torch.Tensor:
        """[tasks * levels, sampled_per_cell] int64 rows for one micro-batch at t_star[t_index], without repeats.

        Entry order is task-major: the order in which ``logits`` takes feature maps.
        """
        c = self.config
        entries = len(c.tasks) * self.num_levels
        picks = torch.rand(entries, c.heads_per_cell).argsort(1)[:, : c.sampled_per_cell]
        task = torch.arange(len(c.tasks)).repeat_interleave(self.num_levels)
        base = (task * len(c.t_star) + t_index) * c.heads_per_cell
        return (base[:, None] + picks).to(self.age.device)

    def logits(self, features: list[list[torch.Tensor]], index: torch.Tensor) -> torch.Tensor:
        """[B, tasks, levels * sampled_per_cell] logits; ``features`` holds each task's list of taps."""
        flat = [x for taps in features for x in taps]
        levels = list(range(self.num_levels)) * len(features)
        # Heads are fp32 on every backend; there is no autocast on meta tensors, which `plan` rehearses with.
        with torch.autocast("cuda" if flat[0].is_cuda else "cpu", enabled=False):
            out = head_pool(flat, levels, index, self.params(), self.num_groups)
        return out.view(len(out), len(features), -1)

    def refresh(self, optimizer: RowAdamW | None = None) -> list[tuple[int, int]]:
        """Re-initialises ``refresh_rate`` of all heads, rounded up or down by chance, and their optimizer state.

        Returns:
            The (level, row) of each refreshed head.
        """
        expected = self.config.refresh_rate * self.num_heads
        count = int(expected) + int(torch.rand(()) < expected - int(expected))
        chosen = torch.randperm(self.num_heads)[:count].tolist()
        heads = sorted(divmod(head, self.rows) for head in chosen)
        for level in sorted({level for level, _ in heads}):
            rows = torch.tensor([row for at, row in heads if at == level])
            self.reset_rows_(level, rows, optimizer)
        return heads


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class RowAdamW(torch.optim.Optimizer):
    """AdamW that touches only the rows of stacked parameters that took part since the last step.

    Every row counts its own steps, so a refreshed head starts its bias correction anew.
    The training loop names the rows through ``mark_rows``.

    Args:
        offload: moments lie in host memory; those of the rows that took part visit the device for the step.
    """

    def __init__(
        self, params, lr: float, betas=(0.9, 0.99), eps: float = 1e-8, weight_decay: float = 0.0, offload: bool = False
    ):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self.offload = offload
        self._active: dict[int, torch.Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                device = "cpu" if offload else p.device
                self.state[p] = {
                    "step": torch.zeros(len(p), dtype=torch.int64, device=device),
                    "exp_avg": torch.zeros_like(p, device=device),
                    "exp_avg_sq": torch.zeros_like(p, device=device),
                }

    def mark_rows(self, param: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds ``rows`` [k] to those that the next step updates."""
        seen = self._active.setdefault(id(param), torch.zeros(len(param), dtype=torch.bool, device=param.device))
        seen[rows] = True

    def active_rows(self, param: torch.Tensor) -> torch.Tensor:
        """[k] int64 rows that the next step updates."""
        seen = self._active.get(id(param))
        none = torch.empty(0, dtype=torch.int64, device=param.device)
        return none if seen is None else seen.nonzero().squeeze(1)

    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and id(p) in self._active]
            rows = [self.active_rows(p) for p in params]
            if self.offload:
                for p, active in zip(params, rows, strict=True):  # one at a time: the device holds one's moments
                    self._visit(p, active, group)
            else:
                states = [self.state[p] for p in params]
                moments = ([state[key] for state in states] for key in _MOMENTS)
                self._update(params, [p.grad for p in params], moments, rows, group)
        self._active.clear()

    def _visit(self, p: torch.Tensor, rows: torch.Tensor, group: dict) -> None:
        """The same update of compact copies: row i of them is row rows[i]."""
        state, at = self.state[p], rows.cpu()
        visiting = {key: state[key][at].to(p.device) for key in _MOMENTS}
        values, every = p.detach()[rows], torch.arange(len(rows), device=p.device)
        self._update([values], [p.grad[rows]], ([visiting[key]] for key in _MOMENTS), [every], group)
        with torch.no_grad():
            p[rows] = values
        for key in _MOMENTS:
            state[key][at] = visiting[key].to(state[key].device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._active.clear()  # of a step that was skipped: those rows have no part in the next

    @staticmethod
    def _update(params, grads, moments, rows, group: dict) -> None:
        rates = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        indexed_adamw_(params, grads, *moments, rows, *rates)

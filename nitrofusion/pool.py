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

from nitrokernels import head_pool
from nitrokernels.ops.head_pool import LevelParams

TASKS = ("global-cond", "local-cond", "local-uncond")


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
    """

    heads_per_cell: int = 4
    sampled_per_cell: int = 1
    width: int = 64
    max_depth: int = 4
    refresh_rate: float = 0.01
    t_star: tuple[int, ...] = (10, 250, 500, 750)
    t_star_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    tasks: tuple[str, ...] = TASKS


class HeadPool(nn.Module):
    """Stacked heads for every tap of the backbone.

    Args:
        channels: channels of each tap, one per level.
        sides: side of each tap for the smallest input a head reads (the crop), one per level.
    """

    def __init__(self, config: PoolConfig, channels: list[int], sides: list[int]):
        super().__init__()
        unknown = [task for task in config.tasks if task not in TASKS]
        if unknown or not config.tasks:
            raise ValueError(f"pool: tasks must be among {TASKS}, got {config.tasks}")
        if len(config.t_star) != len(config.t_star_weights):
            raise ValueError(f"pool: t_star_weights must have {len(config.t_star)} values, got {config.t_star_weights}")
        if not 1 <= config.sampled_per_cell <= config.heads_per_cell:
            raise ValueError(
                f"pool: sampled_per_cell must be in 1..{config.heads_per_cell}, got {config.sampled_per_cell}"
            )
        self.config = config
        self.num_levels = len(channels)
        self.rows = len(config.tasks) * len(config.t_star) * config.heads_per_cell
        self.num_groups = max(1, min(32, config.width // 8))  # 8 channels a group, so that a 1x1 map is still normal
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
        for level in range(self.num_levels):
            self.reset_rows_(level, every)

    @property
    def num_heads(self) -> int:
        return self.rows * self.num_levels

    @torch.no_grad()
    def reset_rows_(self, level: int, rows: torch.Tensor) -> None:
        """Re-runs the constructor's initialisation (fan-in uniform) on the named rows of one level."""
        for name, stack in self.stacks[level].items():
            if name.startswith("conv") or name == "logit_weight":
                fan_in = stack[0, 0].numel() if name.startswith("conv") else stack.shape[1]
                bound = math.sqrt(3 / fan_in) if name.startswith("conv") else 1 / math.sqrt(fan_in)
                fresh = torch.rand(len(rows), *stack.shape[1:]) * 2 * bound - bound
            else:
                fresh = torch.full((len(rows), *stack.shape[1:]), 1.0 if name.startswith("norm_weight") else 0.0)
            stack[rows.to(stack.device)] = fresh.to(stack)
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
            self.reset_rows_(level, rows)
            if optimizer is not None:
                for stack in self.stacks[level].values():
                    optimizer.reset_rows_(stack, rows)
        return heads


class RowAdamW(torch.optim.Optimizer):
    """AdamW that touches only the rows of stacked parameters that took part since the last step.

    Every row counts its own steps, so a refreshed head starts its bias correction anew.
    The training loop names the rows through ``mark_rows``.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.99), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self._active: dict[int, torch.Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.zeros(len(p), dtype=torch.int64, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }

    def mark_rows(self, param: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds ``rows`` [k] to those that the next step updates."""
        seen = self._active.setdefault(id(param), torch.zeros(len(param), dtype=torch.bool, device=param.device))
        seen[rows] = True

    @torch.no_grad()
    def reset_rows_(self, param: torch.Tensor, rows: torch.Tensor) -> None:
        """Forgets the moments and step counts of ``rows`` [k] of one parameter."""
        for value in self.state[param].values():
            value[rows.to(value.device)] = 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                active = self._active.get(id(p))
                if p.grad is None or active is None:
                    continue
                rows = active.nonzero().squeeze(1)
                state = self.state[p]
                state["step"][rows] += 1
                like = (-1, *[1] * (p.ndim - 1))
                count = state["step"][rows].to(torch.float64)
                grad, value = p.grad[rows], p[rows]
                m = torch.lerp(state["exp_avg"][rows], grad, 1 - beta1)
                v = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                rate = (group["lr"] / (1 - beta1**count)).to(p.dtype).view(like)
                root = (1 - beta2**count).sqrt().to(p.dtype).view(like)
                value.mul_(1 - group["lr"] * group["weight_decay"])
                p[rows] = value - rate * m / (v.sqrt() / root + group["eps"])
                state["exp_avg"][rows], state["exp_avg_sq"][rows] = m, v
        self._active.clear()

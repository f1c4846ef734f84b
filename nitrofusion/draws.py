"""What is random for each image, as a function of the image and not of the process that has it.

torch's generators stand equally on all processes. Every one of them draws for the images of all, which costs next to
nothing, and keeps its own: so two processes with two images each draw what one with four does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draws:
    """Of process ``rank`` among ``world_size``."""

    rank: int = 0
    world_size: int = 1

    def total(self, count: int) -> int:
        """Images of all processes, where this one has ``count``: so many are to be drawn for."""
        return count * self.world_size

    def mine(self, values: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """[groups * count, ...] of values [groups * total(count), ...]: this process's images of each group."""
        count = len(values) // (groups * self.world_size)
        return values.unflatten(0, (groups, -1)).narrow(1, self.rank * count, count).flatten(0, 1)

    def randn_like(self, x: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """Normal noise like x [groups * count, ...], in which every group is of the same images."""
        return self.mine(torch.randn_like(x.new_empty(self.total(len(x)), *x.shape[1:])), groups)

    def randint(self, low: int, high: int, count: int, groups: int = 1, device="cpu") -> torch.Tensor:
        """[groups * count] int64 in low .. high - 1."""
        return self.mine(torch.randint(low, high, (groups * self.total(count),), device=device), groups)

    def rand(self, count: int, groups: int = 1, device="cpu") -> torch.Tensor:
        """[groups * count] fp32 in [0, 1)."""
        return self.mine(torch.rand(groups * self.total(count), device=device), groups)


ONE = Draws()

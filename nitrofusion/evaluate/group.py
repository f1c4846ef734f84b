"""The processes that torchrun started, or one alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from ..device import pick_device
from ..errors import InputError, NitroError
from ..torchrun import MOST_PROCESSES, told

_PATIENCE = timedelta(days=30)  # the others may have a long share


class Group:
    """Rank and size of this process's group, and what it says to the others (over gloo, as objects of ours)."""

    def __init__(self):
        self.size = told("evaluate", "WORLD_SIZE", 1, MOST_PROCESSES, otherwise=1)
        self.rank = told("evaluate", "RANK", 0, self.size - 1, otherwise=0 if self.size == 1 else None)
        self.local_size = told("evaluate", "LOCAL_WORLD_SIZE", 1, self.size, otherwise=1)
        self._own = self.size > 1 and not dist.is_initialized()
        if self._own:
            dist.init_process_group("gloo", timeout=_PATIENCE)
        self._gloo = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.size > 1 and not self._own else None

    def device(self, name: str | None) -> torch.device:
        """The named device; of several GPUs each process has its own."""
        device = pick_device(name)
        if device.type == "cuda" and device.index is None:
            return pick_device(f"cuda:{told('evaluate', 'LOCAL_RANK', 0, self.size - 1, otherwise=0)}")
        return device

    def first(self, make: Callable):
        """What ``make`` returns in rank 0, everywhere; its expected failures too."""
        if self.size == 1:
            return make()
        told = [None]
        if self.rank == 0:
            try:
                told = [(None, make())]
            except NitroError as error:
                told = [(error, None)]
        dist.broadcast_object_list(told, src=0, group=self._gloo)
        error, value = told[0]
        if error is not None:
            raise error
        return value

    def gather(self, value) -> list:
        """The value of every rank, in each; all have come here then."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value, group=self._gloo)
        return found

    def close(self) -> None:
        if self._own:
            dist.destroy_process_group()

    def check_shared(self, folder) -> None:
        """Refuses a folder that not every process sees."""
        if not all(self.gather(folder.is_dir())):
            raise InputError(f"evaluate: output must be a folder that all processes share, got {folder}")

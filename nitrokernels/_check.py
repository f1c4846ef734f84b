"""What every op asks of its arguments before it launches anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch


@dataclass(frozen=True)
class Check:
    """Raises a ValueError, ``op: X must be ..., got ...``, where an argument is not what it must be."""

    op: str

    def fail(self, name: str, expected: object, got: object) -> NoReturn:
        raise ValueError(f"{self.op}: {name} must be {expected}, got {got}")

    def tensor(
        self,
        name: str,
        value: object,
        shape: Sequence | None = None,
        beside: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A dense tensor of this dtype (None: floating point), on the device of ``beside``.

        ``shape`` may hold names, each of any size, and end with ``...``.
        """
        if not isinstance(value, torch.Tensor):
            self.fail(name, "a tensor", type(value).__name__)
        if value.layout != torch.strided:
            self.fail(name, "dense", value.layout)
        if shape is not None and not _fits(value.shape, shape):
            self.fail(name, f"[{', '.join('...' if n is ... else str(n) for n in shape)}]", list(value.shape))
        if not value.is_floating_point() if dtype is None else value.dtype != dtype:
            self.fail(name, "floating point" if dtype is None else _short(dtype), _short(value.dtype))
        if beside is not None and value.device != beside.device:
            self.fail(name, f"on the device of the others, {beside.device}", value.device)

    def number(self, name: str, value: object, low: float = -math.inf) -> None:
        """A number, at least ``low``."""
        if not (isinstance(value, (int, float)) and value >= low):
            self.fail(name, "a number" if low == -math.inf else f"a number >= {low}", repr(value))

    def rows(self, name: str, index: torch.Tensor, count: int) -> None:
        """Rows of a stack of ``count``; checked where reading them waits for no device."""
        wrong = [row for row in index.tolist() if not 0 <= row < count] if index.device.type == "cpu" else []
        if wrong:
            self.fail(name, f"in 0..{count - 1}", wrong[0])


def _fits(shape: torch.Size, wanted: Sequence) -> bool:
    size = len(wanted)
    if size and wanted[-1] is ...:
        size -= 1
    elif len(shape) != size:
        return False
    return len(shape) >= size and all(isinstance(wanted[i], str) or shape[i] == wanted[i] for i in range(size))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""What every op asks of its arguments before it launches anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # fp64 for exact references


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
        """A dense tensor of this dtype (None: one of FLOATS), on the device of ``beside``.

        ``shape`` may hold names, each of any size, and end with ``...``.
        """
        if not isinstance(value, torch.Tensor):
            self.fail(name, "a tensor", type(value).__name__)
        if value.layout != torch.strided or value.is_nested:
            self.fail(name, "dense", "a nested tensor" if value.is_nested else value.layout)
        if shape is not None and not _fits(value.shape, shape):
            self.fail(name, f"[{', '.join('...' if n is ... else str(n) for n in shape)}]", list(value.shape))
        if value.dtype not in FLOATS if dtype is None else value.dtype != dtype:
            self.fail(name, "fp32, fp16, bf16 or fp64" if dtype is None else _short(dtype), _short(value.dtype))
        if beside is not None and value.device != beside.device:
            self.fail(name, f"on the device of the others, {beside.device}", value.device)

    def number(self, name: str, value: object, low: float = -math.inf) -> None:
        """A number, at least ``low``."""
        if not (isinstance(value, (int, float)) and value >= low):
            self.fail(name, "a number" if low == -math.inf else f"a number >= {low}", repr(value))

    def divisor(self, name: str, value: object, number: int, words: str) -> None:
        """An int of which ``number``, in words, is a multiple."""
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 or number % value:
            self.fail(name, f"a divisor of {words}", repr(value))

    def sequence(self, name: str, value: object) -> None:
        """A list or the like, which can be read more than once; a tensor is none."""
        if not isinstance(value, Sequence) or isinstance(value, str):
            self.fail(name, "a list", type(value).__name__)

    def rows(self, name: str, index: torch.Tensor, count: int, once: bool = False) -> None:
        """Rows of a stack of ``count``, each named ``once``; checked where reading them waits for no device."""
        if index.device.type != "cpu":
            return
        rows = index.tolist()
        for row in rows:
            if not 0 <= row < count:
                self.fail(name, f"in 0..{count - 1}", row)
        if once and len(set(rows)) < len(rows):
            self.fail(name, "without repeats", rows)


def _fits(shape: torch.Size, wanted: Sequence) -> bool:
    size = len(wanted)
    if size and wanted[-1] is ...:
        size -= 1
    elif len(shape) != size:
        return False
    return len(shape) >= size and all(isinstance(wanted[i], str) or shape[i] == wanted[i] for i in range(size))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

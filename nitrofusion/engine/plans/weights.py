"""Weights by name, and which of them were asked for: what is left over was not understood."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ...models.weights import Weights as Mapped

_RELEASE = 16 << 20  # bytes


class Unsupported(Exception):
    """A network that plans do not cover; the message is the reason."""


class StateDict:
    """A state dict seen from one of its prefixes. Every tensor a plan takes is marked as used."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str = "", parent: StateDict | None = None):
        self.tensors, self.prefix = tensors, prefix
        self.used: set[str] = parent.used if parent else set()
        self.taken = parent.taken if parent else [0]

    def __call__(self, name: str) -> torch.Tensor:
        key = self.prefix + name
        if key not in self.tensors:
            raise Unsupported(f"there is no {key}")
        self.used.add(key)
        tensor = self.tensors[key]
        if isinstance(self.tensors, Mapped):
            self.taken[0] += tensor.nbytes
            if self.taken[0] > _RELEASE:  # packed copies and mapped pages together would be twice the weights
                self.tensors.release()
                self.taken[0] = 0
        return tensor

    def cat(self, *names: str) -> torch.Tensor:
        """Several of them along their first axis; convs 1x1 as matrices."""
        tensors = [self(name) for name in names]
        return torch.cat([t.flatten(1) if t.ndim > 1 else t for t in tensors])

    def cat_when_asked(self, *names: str) -> Callable[[], torch.Tensor]:
        """``cat`` for whoever may not need it; the tensors count as used at once."""
        for name in names:
            self(name)
        return lambda: self.cat(*names)

    def get(self, name: str) -> torch.Tensor | None:
        return self(name) if self.prefix + name in self.tensors else None

    def at(self, prefix: str) -> StateDict:
        return StateDict(self.tensors, f"{self.prefix}{prefix}.", self)

    def has(self, prefix: str) -> bool:
        return any(key.startswith(f"{self.prefix}{prefix}.") for key in self.tensors)

    def count(self, prefix: str) -> int:
        """How many of ``prefix.0``, ``prefix.1`` ... there are."""
        n = 0
        while self.has(f"{prefix}.{n}"):
            n += 1
        return n

    def ending(self, suffix: str) -> list[str]:
        """Prefixes, without the dot, of all keys that end in ``.suffix``, in order of their names."""
        return sorted(key[: -len(suffix) - 1] for key in self.tensors if key.endswith(f".{suffix}"))

    def check_all_used(self, *prefixes: str) -> None:
        """Raises Unsupported if a weight, of those that begin with one of ``prefixes``, was not asked for."""
        left = sorted(key for key in set(self.tensors) - self.used if key.startswith(prefixes or ""))
        if left:
            raise Unsupported(f"its weight {left[0]} has no place in a plan")

"""Weights by name, and which of them were asked for: what is left over was not understood."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Unsupported(Exception):
    """A network that plans do not cover; the message is the reason."""


class Weights:
    """A state dict seen from one of its prefixes. Every tensor a plan takes is marked as used."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str = "", used: set[str] | None = None):
        self.tensors, self.prefix, self.used = tensors, prefix, set() if used is None else used

    def __call__(self, name: str) -> torch.Tensor:
        key = self.prefix + name
        if key not in self.tensors:
            raise Unsupported(f"there is no {key}")
        self.used.add(key)
        return self.tensors[key]

    def get(self, name: str) -> torch.Tensor | None:
        return self(name) if self.prefix + name in self.tensors else None

    def at(self, prefix: str) -> Weights:
        return Weights(self.tensors, f"{self.prefix}{prefix}.", self.used)

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

    def check_all_used(self) -> None:
        left = sorted(set(self.tensors) - self.used)
        if left:
            raise Unsupported(f"its weight {left[0]} has no place in a plan")

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

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor of that name, which must have that shape if one is given."""
        key = self.prefix + name
        if key not in self.tensors:
            raise Unsupported(f"there is no {key}")
        self.used.add(key)
        tensor = self.tensors[key]
        if shape and tensor.shape != shape:
            raise Unsupported(f"its {key} has the shape {list(tensor.shape)}, not {list(shape)}")
        if isinstance(self.tensors, Mapped):
            self.taken[0] += tensor.nbytes
            if self.taken[0] > _RELEASE:  # packed copies and mapped pages together would be twice the weights
                self.tensors.release()
                self.taken[0] = 0
        return tensor

    def cat(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.Tensor:
        """Several of them along their first axis; ``shapes`` by name."""
        return torch.cat([self(name, *shape) for name, shape in shapes.items()])

    def cat_when_asked(self, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[], torch.Tensor]:
        """``cat`` for whoever may not need it; the tensors are checked and count as used at once."""
        for name, shape in shapes.items():
            self(name, *shape)
        return lambda: self.cat(shapes)

    def at(self, prefix: str) -> StateDict:
        return StateDict(self.tensors, f"{self.prefix}{prefix}.", self)

    def has(self, prefix: str) -> bool:
        return any(key.startswith(f"{self.prefix}{prefix}.") for key in self.tensors)

    def check_all_used(self, *prefixes: str) -> None:
        """Raises Unsupported if a weight, of those that begin with one of ``prefixes``, was not asked for."""
        left = sorted(key for key in set(self.tensors) - self.used if key.startswith(prefixes or ""))
        if left:
            raise Unsupported(f"its weight {left[0]} has no place in a plan")

"""Gradients that are themselves differentiated: every op takes them from its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def reference_gradients(
    ref: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor | None],
    wanted: Sequence[bool],
    grad: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Gradients of ``ref(*inputs)`` to the wanted inputs, None for the others, for create_graph."""
    # Views, so that a path from one input to another, or a tensor that is passed twice, does not count again.
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    asked = [t for t, w in zip(inputs, wanted, strict=True) if w]
    found = iter(torch.autograd.grad(ref(*inputs), asked, grad, create_graph=True, allow_unused=True))
    return [next(found) if w else None for w in wanted]

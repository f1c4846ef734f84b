"""Gradient checkpointing of a diffusers model whose second computation is the first one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

from torch.utils.checkpoint import checkpoint

import nitrokernels


def recompute_(model, during: Callable[[], contextlib.AbstractContextManager] | None = None) -> None:
    """Has ``model`` compute activations again when gradients need them, on the backends they were first computed on.

    Args:
        during: called at the first computation; the context of the second.
    """

    def contexts():
        first, again = nitrokernels.recomputation()
        return first, again if during is None else _both(again, during())

    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False, context_fn=contexts))


@contextlib.contextmanager
def _both(one, other):
    with one, other:
        yield

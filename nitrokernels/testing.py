"""Helpers for tests and benchmarks: poisoned outputs, error budgets. Needs no test framework."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Every ``torch.empty*`` inside the block returns NaN, so that an element nobody wrote shows."""
    names = ("empty", "empty_like", "empty_strided")
    originals = {name: getattr(torch, name) for name in names}

    def poisoned(make):
        def call(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    for name, make in originals.items():
        setattr(torch, name, poisoned(make))
    try:
        yield
    finally:
        for name, make in originals.items():
            setattr(torch, name, make)


def assert_within_budget(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, factor: float = 2.0) -> None:
    """The error against ``exact`` (fp64) is at most ``factor`` times that of eager PyTorch in the same precision.

    One unit in the last place of the output's type is always allowed: where eager happens to be exact, rounding once
    is no fault.
    """
    if not torch.isfinite(got).all():
        raise AssertionError(f"output must be finite, got {int((~torch.isfinite(got)).sum())} elements that are not")
    if got.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    allowed = factor * (eager.double() - exact).abs().max().item()
    allowed += torch.finfo(got.dtype).eps * exact.abs().max().item()
    if error > allowed:
        raise AssertionError(f"error must be <= {allowed:.3g}, got {error:.3g}")

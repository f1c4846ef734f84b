"""Helpers for tests and benchmarks: cases, poisoned outputs, error budgets. Needs no test framework."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call of an op, for the contract suite and the benchmarks; every op's file ends with its ``CASES``.

    Attributes:
        make: (dtype, device) -> the public function's positional arguments, fresh random values at every call.
        grads: positions of the arguments the op is differentiable in (tensors, or lists or dataclasses of tensors).
        mutated: positions of the arguments it writes; they are compared like outputs.
        dtypes: what ``make`` accepts.
    """

    make: Callable[[torch.dtype, str], tuple]
    grads: tuple[int, ...] = ()
    mutated: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = DTYPES


def map_tensors(fn: Callable[[torch.Tensor], torch.Tensor], value):
    """``value`` with ``fn`` applied to every tensor inside lists, tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(fn, v) for v in value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: map_tensors(fn, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def tensors(value) -> list[torch.Tensor]:
    """Every tensor inside lists, tuples and dataclasses, in order."""
    found: list[torch.Tensor] = []
    map_tensors(lambda t: found.append(t) or t, value)
    return found


def widen(value):
    """Floating-point tensors as fp64 copies; the input of an exact reference."""
    return map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t.detach().clone(), value)


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
    _judge(_errors(got, eager, exact), factor)


def assert_draws_within_budget(draw: Callable[[], list[tuple]], factor: float = 2.0, draws: int = 8) -> None:
    """The same for every (got, eager, exact) that ``draw()`` returns for fresh input.

    The reference's error is a maximum over a tensor's elements. Over few elements it is now and then close to zero by
    luck, so where one draw fails, the maxima of ``draws`` of them are compared.
    """
    errors = [_errors(*triple) for triple in draw()]
    try:
        for error in errors:
            _judge(error, factor)
    except AssertionError:
        for _ in range(draws - 1):
            more = [_errors(*triple) for triple in draw()]
            errors = [tuple(map(max, a, b)) for a, b in zip(errors, more, strict=True)]
        for error in errors:
            _judge(error, factor)


def _errors(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> tuple[float, float, float]:
    """(error of got, error of eager, one unit in the last place)."""
    if not (torch.isfinite(exact).all() and torch.isfinite(eager).all()):
        raise AssertionError("the reference must be finite: give the case other input")
    if not torch.isfinite(got).all():
        raise AssertionError(f"output must be finite, got {int((~torch.isfinite(got)).sum())} elements that are not")
    if got.numel() == 0:
        return 0.0, 0.0, 0.0
    unit = torch.finfo(got.dtype).eps * exact.abs().max().item()
    return (got.double() - exact).abs().max().item(), (eager.double() - exact).abs().max().item(), unit


def _judge(errors: tuple[float, float, float], factor: float) -> None:
    error, eager, unit = errors
    allowed = factor * eager + unit
    if error > allowed:
        raise AssertionError(f"error must be <= {allowed:.3g}, got {error:.3g}")

"""Which implementation of an op runs: an ordered list of backends, reasons, and no silent fallback.

The automatic order is cuda, triton, cpu, ref. A backend named by ``use("cpu")`` or ``NITROKERNELS_BACKEND=cpu`` never
falls back; a list, ``cpu,ref``, is an order. An implementation that has no record in ``verified.json`` of having passed
the contract suite on hardware of its kind runs only when it is named.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import forward_ad

from . import _native, _triton
from ._check import Check

BACKENDS = ("cuda", "triton", "cpu", "ref")
VERIFIED = frozenset(json.loads((Path(__file__).parent / "verified.json").read_text()))
OPS: dict[str, Op] = {}


class Refused(RuntimeError):
    """No backend among those named can run a call."""


class _State(threading.local):  # not a ContextVar: torch.compile cannot trace one
    def __init__(self):  # an attribute of each thread's own: torch.compile guards on no other
        self.order: tuple[str, ...] | None = None


_state = _State()


@dataclass(frozen=True)
class Impl:
    """One backend of one op.

    Attributes:
        supports: None, or why the call cannot run there.
        slower: None, or where eager PyTorch was measured to be faster; a backend that is named runs all the same.
    """

    run: Callable
    supports: Callable[..., str | None]
    slower: Callable[..., str | None] = lambda *args: None


class Op:
    """An op: its reference, the backends registered beside it, and ``check`` for its arguments."""

    def __init__(self, name: str, ref: Callable):
        self.name = name
        self.check = Check(name)
        self.impls = {"ref": Impl(ref, lambda *args: None)}
        OPS[name] = self

    def impl(self, backend: str, run: Callable, *asked: Callable[..., str | None]) -> None:
        """Registers ``backend``; ``asked`` are ``supports`` and, where there is one, ``slower`` of its Impl."""
        if backend not in BACKENDS:
            raise ValueError(f"{self.name}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.impls[backend] = Impl(run, *asked)

    def select(self, *args) -> tuple[str, Callable]:
        """(backend, function) for this call.

        Raises:
            Refused: the named backend cannot run it.
        """
        order = _current_order()
        reasons = []
        for backend in order or BACKENDS:
            reason = self._refusal(backend, named=order is not None, args=args)
            if reason is None:
                return backend, self.impls[backend].run
            reasons.append(f"{backend}: {reason}")
        got = "; ".join(reasons)
        raise Refused(f"{self.name}: a backend among {', '.join(order)} must run this call, got {got}")

    def _refusal(self, backend: str, named: bool, args: tuple) -> str | None:
        if backend not in self.impls:
            return "not implemented"
        if backend != "ref" and forward_ad._current_level >= 0:  # elsewhere tangents would be lost silently
            return "within forward-mode differentiation only ref has derivatives"
        reason = self.impls[backend].supports(*args)
        if reason is not None or named or backend == "ref":
            return reason
        if f"{self.name}.{backend}" not in VERIFIED:
            return "never passed the contract suite on its hardware; name it to use it"
        return self.impls[backend].slower(*args)


def pays_from(forward: int, gradients: int) -> Callable[..., str | None]:
    """A ``slower``: the elements of its first argument from which an op outruns eager PyTorch, measured.

    A call has a fixed cost, which with gradients is several times that of eager PyTorch.
    """

    def slower(x, *args) -> str | None:
        tensors = [t for t in (x, *args) if isinstance(t, torch.Tensor)]
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        wanted = gradients if trained else forward
        if x.numel() < wanted:
            return f"eager PyTorch is faster below {wanted} elements{' with gradients' * trained}, got {x.numel()}"
        return None

    return slower


def missing(backend: str, x: torch.Tensor) -> str | None:
    """Why ``backend`` cannot work where ``x`` is, or None; what every ``supports`` asks first."""
    if backend == "triton":
        return _triton.missing(x)
    if x.device.type != backend:
        return f"tensors must be on {backend}, got {x.device.type}"
    return _native.missing(backend)


def explain(op: str, *args) -> list[str]:
    """One line per backend for a call of ``op``: chosen, or why not."""
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}")
    order, lines, chosen = _current_order(), [], False
    try:
        for impl in OPS[op].impls.values():
            inspect.signature(impl.supports).bind(*args)
        reasons = {b: OPS[op]._refusal(b, named=order is not None, args=args) for b in order or BACKENDS}
    except (AttributeError, LookupError, TypeError) as error:  # explain checks no argument before it asks
        raise ValueError(f"explain: args must be those of a call of {op}, got {error}") from error
    for backend, reason in reasons.items():
        if reason is None:
            reason = "not needed" if chosen else "chosen"
            chosen = True
        lines.append(f"{backend}: {reason}")
    return lines


@contextlib.contextmanager
def use(*backends: str) -> Iterator[None]:
    """Runs ops on the named backend, or the first of several that can, inside a ``with`` block."""
    outer, _state.order = _state.order, _checked(backends)
    try:
        yield
    finally:
        _state.order = outer


class _Resumed:
    """A context, entered as often as wanted, in which ops run where they ran when it was made."""

    def __init__(self):
        self._order = _state.order

    def __enter__(self):
        self._outer, _state.order = _state.order, self._order

    def __exit__(self, *error):
        _state.order = self._outer


def recomputation() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """``context_fn`` of torch.utils.checkpoint: what is computed again runs on the backends it first ran on.

    Without it ``use`` must enclose the backward pass as well, and on a GPU even that does not help: autograd computes
    again in a thread of its own.
    """
    return contextlib.nullcontext(), _Resumed()


def _current_order() -> tuple[str, ...] | None:
    order = _state.order
    if order is None and (named := os.environ.get("NITROKERNELS_BACKEND")):
        order = _checked(tuple(part.strip() for part in named.split(",")))
    return order


def _checked(backends: tuple[str, ...]) -> tuple[str, ...]:
    for backend in backends:
        if backend not in BACKENDS:
            raise ValueError(f"nitrokernels: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backends

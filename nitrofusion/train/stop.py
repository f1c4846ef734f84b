"""Signals that ask a run to stop: the first is obeyed where nothing is lost, a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from ..errors import Preempted

# What schedulers send before they stop a job.
_STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
_ECHO = 1.0  # seconds in which a second signal is torchrun passing on the first


class StopSignals:
    """What one run was told.

    Attributes:
        told: number of the first signal; 0 before.
    """

    def __init__(self):
        self.told = 0
        self._told_at, self._at_once = 0.0, False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """In it signals only set ``told``; afterwards they are whose they were. Python tells its main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {s: signal.signal(s, self._on_signal) for s in _STOPPING}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Around what may take hours and may be left anywhere: a signal, or one told before, raises Preempted."""
        self._at_once = True
        try:
            if self.told:
                raise Preempted
            yield
        finally:
            self._at_once = False

    def _on_signal(self, signum, frame) -> None:
        now = time.monotonic()
        if self.told and ("TORCHELASTIC_RUN_ID" not in os.environ or now - self._told_at > _ECHO):
            os._exit(128 + signum)  # asked twice: stop at once; a checkpoint is sealed or absent, never half
        if self.told:
            return
        self.told, self._told_at = signum, now
        if self._at_once:
            raise Preempted

"""One call at a time."""

from __future__ import annotations

import threading


class Turns:
    """A lock that its owner's copy has anew; its owner cannot be pickled.

    The one attribute of an engine that says so in words, so it comes first: pickle stops there.
    """

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict) -> Turns:
        return Turns()

    def __reduce__(self):
        raise TypeError("an Engine cannot be pickled: load the model again in the other process")

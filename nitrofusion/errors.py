"""Expected failures: one line each, and the exit code the command line returns for it.

2 input, 3 storage, 4 checkpoint, 5 training, 6 metrics; 75 when a signal stopped a run after it saved.
"""

from __future__ import annotations

_OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError", "can't allocate memory", "Cannot allocate memory")


class Preempted(SystemExit):
    """A signal stopped a run after it saved; the same command goes on."""

    exit_code = 75  # sysexits' EX_TEMPFAIL

    def __init__(self):
        super().__init__(self.exit_code)


class NitroError(Exception):
    """Base of every failure a user can cause or meet; the message is one line."""

    exit_code = 1

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # quoted reasons of other libraries may have several


class InputError(NitroError, ValueError):
    """A file, option or prompt is not what it must be."""

    exit_code = 2


class StorageError(NitroError):
    """The disk is full or cannot be written; the message says how much is needed."""

    exit_code = 3


class CheckpointError(NitroError):
    """A checkpoint is incomplete or altered; the message names the file."""

    exit_code = 4


class TrainingError(NitroError):
    """Training diverged: gradients stayed NaN or infinite, and the guard gave up."""

    exit_code = 5


class MetricError(NitroError):
    """Some metrics of an evaluation failed; all others are in its record."""

    exit_code = 6


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or a GPU, did not suffice; PyTorch has no one type for it."""
    words = f"{type(error).__name__}: {error}"
    return any(sign in words for sign in _OUT_OF_MEMORY)


def of_exit_code(code: int) -> type[NitroError]:
    """The kind of failure that another process ended with."""
    kinds = {kind.exit_code: kind for kind in (*NitroError.__subclasses__(), NitroError)}  # last: 1 is its own
    return kinds.get(code, NitroError)

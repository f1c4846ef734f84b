"""What makes a file stay, how much of one is read, and whose unfinished files may be swept."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .errors import InputError

_LARGEST_JSON = 1 << 20  # bytes; the index of SDXL's shards has 0.16 MB, a manifest of a thousand files 0.1
_TEMPORARY = re.compile(r"\.tmp-(.*?)\.(\d{1,9})\.(.*)")  # .tmp-NAME.PID.HOST


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk, whatever happens to the machine."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_is_file(path: Path) -> None:
    """ValueError unless it is one: a pipe would be waited for, a device read without end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("a folder, a pipe or a device")


def read_small(path: Path) -> bytes:
    """What a file of JSON holds; ValueError where it is no file, or larger than JSON is here."""
    check_is_file(path)
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"more than {_LARGEST_JSON:,} bytes")
    return path.read_bytes()


class Taken(Exception):
    """Another process has the lock."""


def take_lock(path: Path) -> IO | None:
    """Locks a file until the result is closed or this process is gone; None, or no effect, without locks.

    Raises:
        Taken: another process did.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    lock = open(path, "a")  # noqa: SIM115
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            lock.close()
            raise Taken from error
    return lock


def hold_alone(folder: Path, what: str) -> IO | None:
    """Keeps other processes from working in a folder, as ``take_lock`` does.

    Raises:
        InputError: another one is there.
    """
    try:
        return take_lock(folder / ".lock")
    except Taken as error:
        raise InputError(f"{what}: {folder} must be of one process at a time, got one that is at work") from error


def temporary(path: Path) -> Path:
    """Where this process makes what is to be renamed to ``path``, and where ``sweep`` finds it if it is killed."""
    return path.with_name(f".tmp-{path.name}.{os.getpid()}.{platform.node()}")


def sweep(folder: Path, of_others: Callable[[Path, str], bool]) -> None:
    """Removes what killed processes left unfinished, and not what another live one of this machine is making.

    Args:
        of_others: says of what another machine left, and of the name it was to get, whether it may go.
    """
    for orphan in folder.glob(".tmp-*"):
        named = _TEMPORARY.fullmatch(orphan.name)
        if named is not None and named[3] == platform.node():
            goes = not is_other_process(int(named[2]))
        else:
            goes = named is None or of_others(orphan, named[1])
        if goes and orphan.is_dir():
            shutil.rmtree(orphan, ignore_errors=True)
        elif goes:
            with contextlib.suppress(OSError):  # it only takes up room
                orphan.unlink()


def is_other_process(pid: int) -> bool:
    """Whether another process of this machine, which may still be writing, has that number."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # alive, but another user's
    return pid != os.getpid()

"""What makes a file stay, and whose unfinished files may be swept."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync_folder(path: Path) -> None:
    """What was renamed into the folder stays there, whatever happens to the machine."""
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


def is_other_process(pid: int) -> bool:
    """Whether another process of this machine, which may still be writing, has that number."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # alive, but another user's
    return pid != os.getpid()

"""``python -m nitrofusion.torchrun``: torchrun, which ends with 1 whatever failed, with its processes' exit code."""

import os
import signal
import sys
import threading

from .errors import InputError, Preempted

MOST_PROCESSES = 1 << 20  # of one run
END_WITH_PARENT = "--end_with_parent"  # as the first argument; the others are torchrun's


def main(arguments: list[str]) -> int:
    """The exit code of the process that failed first, 128 + n if signal n ended it; 75 where one stopped torchrun."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if arguments[:1] == [END_WITH_PARENT]:
        arguments = arguments[1:]
        threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException:
        return Preempted.exit_code
    return 0


def told(what: str, name: str, least: int, most: int, otherwise: int | None = None) -> int:
    """The number that torchrun, or another launcher, left in the environment.

    Args:
        what: begins the message.
        otherwise: where nothing is there; without it that is an error.

    Raises:
        InputError: it is no number in least .. most.
    """
    value = os.environ.get(name, otherwise if otherwise is None else str(otherwise))
    if value is None or not value.isdecimal() or not least <= int(value) <= most:
        wanted = f"in {least}..{most}, as torchrun sets it"
        raise InputError(f"{what}: {name} must be {wanted}, got {'none' if value is None else repr(value)}")
    return int(value)


def _stop_with_parent() -> None:
    """When standard input closes, a pipe that the parent holds, it is gone: nobody waits for this, or could stop it."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m nitrofusion.torchrun``: torchrun, which ends with 1 whatever failed, with its processes' exit code."""

import sys

from .errors import Preempted


def main(arguments: list[str]) -> int:
    """The exit code of the process that failed first, negative if a signal ended it; 75 where one stopped torchrun."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException:
        return Preempted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

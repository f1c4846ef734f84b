"""``python -m nitrofusion.evaluate SPEC.json``: one process of an evaluation, started by ``jobs``."""

import json
import os
import sys
from pathlib import Path

from ..cli import QUIET
from ..errors import NitroError
from ..processes import end_with_parent
from .worker import work

if __name__ == "__main__":
    end_with_parent(sys.stdin.fileno())
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        work(json.loads(Path(sys.argv[1]).read_text()))
    except NitroError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)

"""``python -m nitrofusion.evaluate SPEC.json``: one process of an evaluation, started by ``jobs``."""

from ..processes import run
from .worker import work

if __name__ == "__main__":
    run(work)

"""``python -m nitrofusion.compare SPEC.json``: one process of a comparison, started by ``jobs``."""

from ..processes import run
from .worker import work

if __name__ == "__main__":
    run(work)

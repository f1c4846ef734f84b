"""A comparison of seconds: python -m tests.nitrofusion.compare_tiny FOLDER RUN...; its exit code is the command's."""

import dataclasses
import sys

from nitrofusion import cli
from nitrofusion.compare import runs
from nitrofusion.presets import RUNS

TINY = dataclasses.replace(RUNS["world-smoke"], stages=(4,), teacher_steps=2)
TINY_RUNS = {
    "nitrofusion": TINY,
    "broken": dataclasses.replace(TINY, crop_size=7),
}


def main(folder, *names) -> int:
    runs.configs = lambda: TINY_RUNS
    options = "--seeds 1 --minutes 0.03 --num_images 2 --steps 1 --jobs 1 --start world".split()
    return cli.main(["compare", "--output", str(folder), "--recipes", *names, *options])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""``python -m nitrofusion.train`` is ``nitrofusion train``."""

import sys

from ..cli import main

sys.exit(main(["train", *sys.argv[1:]]))

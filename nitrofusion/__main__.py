"""``python -m nitrofusion`` is ``nitrofusion``."""

import sys

from .cli import main

sys.exit(main())

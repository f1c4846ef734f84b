"""For tests of what only the native library does."""

import pytest

from nitrokernels import _native

NATIVE = pytest.mark.skipif(
    _native.missing("cpu") is not None, reason="needs the native library, which needs a C++ compiler"
)


# Between a picture drawn alone and in a batch: eager PyTorch rounds them differently, plans draw one at a time.
LEVELS_BY_BATCH = 1 if _native.missing("cpu") else 0


def backends(*names: str) -> list:
    """Parameters of a test: those that are made of native ops are skipped where there are none."""
    return [pytest.param(name, marks=NATIVE if name in ("cpu", "plan") else ()) for name in names]

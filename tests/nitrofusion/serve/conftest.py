"""The extra's packages, or a reason for every skip."""

import pytest

for _name in ("fastapi", "uvicorn", "websockets", "httpx"):
    pytest.importorskip(_name, reason=f"needs {_name} (the extras serve and dev)")

"""Shared by all tests: no network, steady threads, fresh seeds that a failure prints."""

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run, slowly, where there is no GPU

torch.set_num_threads(1)  # these models are small: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def seed(request):
    """Random input is fresh on every run; a failure prints the seed that repeats it."""
    value = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**31)))
    torch.manual_seed(value)
    random.seed(value)
    yield value
    if getattr(request.node, "failed", False):
        print(f"repeat with TEST_SEED={value}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    item.failed = getattr(item, "failed", False) or report.failed


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))

"""Shared by all benchmarks: thread count is recorded, the world's models are loaded once."""

import os

import pytest
import torch

from nitrofusion.models import sdxl
from nitrofusion.presets import MODELS


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["load_average"] = os.getloadavg()[0]
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info.pop("node", None)


@pytest.fixture(scope="session")
def world_teacher():
    return sdxl.load(MODELS["world-teacher"].folder)

"""Files that try to run code, crash, or take the machine: a few of what ``benchmarks/survival.py`` offers in number."""

import random

import pytest
import torch

from nitrofusion import checkpoint
from nitrofusion.errors import CheckpointError
from nitrofusion.models.weights import Weights

from . import hostile
from .tiny import tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"))


def test_mutated_safetensors(base, tmp_path):
    """Under a manifest none is accepted; without one each is read or refused in one line."""
    said = hostile.mutated(tmp_path, random.Random(), each=10)
    assert said["made"] == 70 and said["accepted under a manifest"] == 0 and said["crashed"] == []


def test_a_payload_bit_is_what_only_the_manifest_sees(tmp_path):
    folder = checkpoint.save(tmp_path, 1, {"student": {"a": torch.ones(4)}}, {})
    file = folder / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert not torch.equal(Weights(file)["a"], torch.ones(4))  # safetensors itself does not notice
    with pytest.raises(CheckpointError, match="student.safetensors does not match its digest"):
        checkpoint.load(folder)


def test_pickles_under_any_extension(base, tmp_path):
    said = hostile.unpickled(base, tmp_path, random.Random(), count=6)
    assert said["offers"] == 6 * 13 and said["ran"] == said["not refused"] == said["without how to convert"] == []


def test_folders_that_name_code(base, tmp_path):
    said = hostile.opened(base, tmp_path, random.Random(), count=6)
    assert said["folders"] == 6 and said["ran"] == said["crashed"] == []


def test_bombs(base, tmp_path):
    said = hostile.defused(base, tmp_path, random.Random(), count=8)
    assert said["bombs"] == 8 and said["not refused"] == [] and said["too dear"] == []

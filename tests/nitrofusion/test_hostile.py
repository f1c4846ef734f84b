"""Files that try to run code, crash, or take the machine: a few of what ``benchmarks/survival.py`` offers in number."""

import json
import os
import random
import struct

import pytest
import torch

from nitrofusion import checkpoint
from nitrofusion.config import TrainConfig
from nitrofusion.data import teacher_scheduler
from nitrofusion.engine import load
from nitrofusion.errors import CheckpointError, InputError
from nitrofusion.models.folder import check_sizes
from nitrofusion.models.weights import Weights, check, digest, read_json, read_pickle
from nitrofusion.presets import resolve_unet
from nitrofusion.train.run_folder import claim_folder

from . import bombs, hostile
from .tiny import tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"))


def test_mutated_safetensors(base, tmp_path):
    """Under a manifest none is accepted; without one each is read or refused in one line."""
    said = hostile.mutated(tmp_path, random.Random(), each=10)
    assert said["made"] == 80 and said["accepted under a manifest"] == 0 and said["crashed"] == []


def test_a_payload_bit_is_what_only_the_manifest_sees(tmp_path):
    folder = checkpoint.save(tmp_path, 1, {"student": {"a": torch.ones(4)}}, {})
    file = folder / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert not torch.equal(Weights(file)["a"], torch.ones(4))  # safetensors itself does not notice
    with pytest.raises(CheckpointError, match="student.safetensors does not match its digest"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "shape, says",
    [
        ([0, 2**63], "the shape [0, 9223372036854775808] of a"),
        ([0, 2**40, 2**40], "the shape [0, 1099511627776, 1099511627776] of a"),
        ([2**41, 0], "the shape [2199023255552, 0] of a"),
        ([1] * 9, "9 sides of a, more than 8"),
        ([1] * 2_000_000, "2,000,000 sides of a, more than 8"),
    ],
    ids=("a side of 2^63", "strides", "a side of 2^41", "nine sides", "4 MB of sides"),
)
def test_shapes_that_torch_cannot_compute_with(tmp_path, shape, says):
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * (0 not in shape)]}}
    file = tmp_path / "file.safetensors"
    file.write_bytes(hostile.file_of(header, bytes(4 * (0 not in shape))))
    what, seconds, size = bombs.measured(lambda: Weights(file))
    assert what == f"refused: load: {file} must be a readable safetensors file, got {says}"
    assert seconds < bombs.SECONDS and size < bombs.BYTES


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**40, 2**40]], ids=("a side of 2^63", "strides"))
def test_such_shapes_in_a_checkpoint_that_was_sealed_with_them(tmp_path, shape):
    folder = checkpoint.save(tmp_path, 1, {"student": {}}, {})
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    (folder / "student.safetensors").write_bytes(hostile.file_of({"a": entry}, b""))
    with pytest.raises(CheckpointError, match="student.safetensors must be readable, got"):
        checkpoint.load(hostile.reseal(folder))


@pytest.mark.parametrize("size", [640, 896, 1152, 1408, 19280, 640 + 65536])
def test_a_header_whose_length_begins_as_a_pickle_does(tmp_path, size):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(size).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + struct.pack("<f", 3))
    assert Weights(tmp_path / "a.safetensors")["a"].item() == 3
    folder = checkpoint.save(tmp_path, 1, {"student": {}}, {})
    (folder / "student.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    assert checkpoint.load(hostile.reseal(folder))[0]["student"]["a"].item() == 3


def test_what_does_not_fit_is_said_in_short():
    with pytest.raises(InputError, match=r"\(first: weight, \[1, 1, 1, [1, ]*\.\.\. instead of \[1, 1\]\)") as error:
        check(torch.nn.Linear(1, 1, bias=False), {"weight": torch.ones([1] * 60)}, "here", "UNet")
    assert len(str(error.value)) < 300


def test_pickles_under_any_extension(base, tmp_path):
    said = hostile.unpickled(base, tmp_path, random.Random(), count=6)
    assert said["offers"] == 6 * 13 and said["ran"] == said["not refused"] == said["without how to convert"] == []


def test_folders_that_name_code(base, tmp_path):
    said = hostile.opened(base, tmp_path, random.Random(), count=6)
    assert said["folders"] == 6 and said["ran"] == said["crashed"] == []


def test_bombs(base, tmp_path):
    said = bombs.defused(base, tmp_path, random.Random(), count=8)
    assert said["bombs"] == 8 and said["not refused"] == [] and said["too dear"] == []


def _piped(path):
    path.unlink()
    os.mkfifo(path)


def _endless(path):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("harm", [_piped, _endless], ids=("a pipe", "a device"))
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "ema.safetensors", "optimizer.safetensors"])
def test_what_is_no_file_in_a_strangers_run(base, tmp_path, name, harm):
    run, newest = _run(base, tmp_path)
    harm(newest / name)
    for call in (lambda: checkpoint.verify(newest), lambda: checkpoint.load(newest)):
        what, seconds, size = bombs.measured(call, limit=10)
        assert what == f"refused: checkpoint: {newest} must be as it was sealed, but {name} is no file"
        assert seconds < bombs.SECONDS and size < bombs.BYTES
    assert "must hold a finished checkpoint, got none, and 1 damaged" in bombs.measured(lambda: load(run), limit=30)[0]


@pytest.mark.parametrize("harm", [_piped, _endless], ids=("a pipe", "a device"))
def test_what_is_no_file_beside_it(base, tmp_path, harm):
    """Whatever opens a configuration or weights of a stranger's."""
    run, newest = _run(base, tmp_path)
    config, weights = run / "config.json", newest / "ema.safetensors"
    for path, call in (
        (config, lambda: read_json(config)),
        (config, lambda: claim_folder(TrainConfig(output=str(run), teacher=str(base), init=None))),
        (config, lambda: resolve_unet(str(run))),
        (weights, lambda: Weights(weights)),
        (weights, lambda: digest([weights])),
        (weights, lambda: read_pickle(weights, "load")),
    ):
        kept = path.read_bytes()
        harm(path)
        what, seconds, size = bombs.measured(call, limit=10)
        assert what.startswith("refused") and ("something else" in what or "a pipe or a device" in what)
        assert seconds < bombs.SECONDS and size < bombs.BYTES
        path.unlink()
        path.write_bytes(kept)


def test_lists_without_end_in_a_manifest(base, tmp_path):
    run, newest = _run(base, tmp_path)
    (newest / "manifest.json").write_text('{"files": [' + "[]," * (2 * 10**6) + "[]]}")
    what, seconds, size = bombs.measured(lambda: checkpoint.verify(newest))
    assert what.endswith("manifest.json must be readable, got more than 1,048,576 bytes")
    assert seconds < 0.1 and size < 10 << 20


def _run(base, folder):
    """A run folder with a checkpoint of nothing much, and that checkpoint."""
    run = folder / "run"
    newest = checkpoint.save(run, 1, {name: {"a": torch.zeros(2)} for name in ("ema", "optimizer")}, {"step": 1})
    hostile.put(run / "config.json", {"teacher": str(base), "shifted_timestep": 250})
    return run, newest


_UNET = {"block_out_channels": [320, 640, 1280], "down_block_types": ["..."] * 3, "layers_per_block": 2}


@pytest.mark.parametrize(
    "config, depth",
    [
        (_UNET | {"transformer_layers_per_block": [1, 2, 10]}, None),  # SDXL
        (_UNET | {"transformer_layers_per_block": [1, [2, 2], [4, 4]],  # SSD-1B
                  "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}, None),
        ({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}, None),  # its VAE
        ({"num_hidden_layers": 32}, None),  # its larger text encoder
        ({"num_hidden_layers": 40}, None),  # DINOv2's largest
        ({"num_encoder_blocks": [1, 3, 3, 3], "num_decoder_blocks": [3, 3, 3, 1]}, None),  # TAESD
        (bombs.stacked("vae", 64, 64), "4,096"),
        (bombs.stacked("vae", 64, 1), "64"),
        (bombs.stacked("unet", 6, 4, 8), "192"),
        (bombs.stacked("unet", 12, 16, 32), "6,144"),
        ({"layers_per_block": 13}, "52"),  # in blocks that are not told
        (_UNET | {"reverse_transformer_layers_per_block": [1, [8] * 3, 16]}, "50"),
        ({"depths": [2, 2, 18, 32]}, "54"),
        ({"n_layer": 100}, "100"),
    ],
)  # fmt: skip
def test_what_is_stacked_counts_as_often_as_it_is_built(config, depth):
    if depth is None:
        check_sizes(config, "here")
        return
    with pytest.raises(InputError, match=f"here must have a configuration of a model's size, got {depth} layers"):
        check_sizes(config, "here")


def test_a_schedulers_numbers_are_looked_at(base, tmp_path):
    folder = hostile.linked(base, tmp_path / "folder")
    path = folder / "scheduler/scheduler_config.json"
    hostile.edit(path, lambda_min_clipped=-float("inf"))  # as diffusers writes it
    teacher_scheduler(folder)
    hostile.edit(path, solver_order=5 * 10**7)
    what, seconds, size = bombs.measured(lambda: teacher_scheduler(folder))
    assert "scheduler must have a configuration of a model's size, got solver_order 50000000" in what
    assert seconds < bombs.SECONDS and size < bombs.BYTES

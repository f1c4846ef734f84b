"""The doctor's figures, its words, and that it finds a kernel that is wrong."""

import dataclasses
import importlib
import json

import pytest
import torch

from nitrofusion import doctor
from nitrofusion.cli import main
from nitrokernels import _native, dispatch
from nitrokernels.testing import map_tensors

OPS = "nitrokernels.ops."


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    monkeypatch.setattr(doctor, "LARGEST", 50_000)


def test_a_healthy_machine(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.strip().endswith("all fine") and max(map(len, text.splitlines())) <= 100
    for word in (*dispatch.OPS, "world-teacher", "shipped", torch.__version__, "cores"):
        assert word in text


def test_json(capsys):
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in report["ops"]} == set(dispatch.OPS) and report["faults"] == []
    for row in report["ops"]:
        assert row["error"] <= 2 * row["eager_error"] + 1.2e-7 and row["ms"] > 0 and row["eager_ms"] > 0
        chosen = [line.split(":")[0] for line in row["why"] if line.endswith(": chosen")]
        assert chosen == [row["backend"]]
    assert report["models"]["world"] == "shipped" and report["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("spoil", [lambda x: x * 1.00001, lambda x: x * float("nan")])
def test_a_wrong_kernel_is_a_fault(capsys, monkeypatch, spoil):
    module = importlib.import_module(OPS + "geglu")
    ref = module.OP.impls["ref"].run
    wrong = dataclasses.replace(module.OP.impls["ref"], run=lambda *args: spoil(ref(*args)))
    monkeypatch.setitem(module.OP.impls, "cpu", wrong)
    assert main(["doctor", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "x geglu" in text and "FAULT     geglu: error must be <=" in text and text.strip().endswith("1 faults")


@pytest.mark.skipif(_native.missing("cpu") is not None, reason="needs a C++ compiler at install time")
def test_what_runs_on_large_inputs_alone_is_checked(monkeypatch):
    module = importlib.import_module(OPS + "group_norm_silu")
    cpu = module.OP.impls["cpu"]
    wrong = dataclasses.replace(cpu, run=lambda *args: map_tensors(lambda x: x * 1.00001, cpu.run(*args)))
    monkeypatch.setitem(module.OP.impls, "cpu", wrong)
    monkeypatch.setattr(doctor, "LARGEST", 12_000_000)
    row = doctor.check_op(module, "cpu")
    assert row["backend"] == "cpu" and row["fault"].startswith("error must be <=")


def test_a_kernel_that_raises_is_a_fault(monkeypatch):
    module = importlib.import_module(OPS + "geglu")

    def broken(*args):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setitem(module.OP.impls, "cpu", dataclasses.replace(module.OP.impls["ref"], run=broken))
    row = doctor.check_op(module, "cpu")
    assert row["fault"] == "no such instruction"


def test_a_named_backend_that_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv("NITROKERNELS_BACKEND", "cuda")
    assert main(["doctor", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "NITROKERNELS_BACKEND=cuda overrides" in text and "tensors must be on cuda" in text
    assert max(map(len, text.splitlines())) <= 100


def test_bad_device(capsys):
    assert main(["doctor", "--device", "tpu"]) == 2
    assert capsys.readouterr().err.startswith("device: must be one this machine has")

"""Choosing a backend: order, reasons, no silent fallback."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nitrokernels import _native, dispatch, explain, use
from nitrokernels.dispatch import Op


@pytest.fixture
def op(monkeypatch):
    monkeypatch.setattr(dispatch, "OPS", {})
    monkeypatch.setattr(dispatch, "VERIFIED", frozenset({"toy.cpu"}))
    toy = Op("toy", ref=lambda x: ("ref", x))
    toy.impl("cpu", lambda x: ("cpu", x), lambda x: None if x > 0 else "x must be > 0")
    toy.impl("triton", lambda x: ("triton", x), lambda x: None)
    return toy


def test_the_first_that_can_and_was_verified(op):
    assert op.select(1)[0] == "cpu"
    assert op.select(-1)[0] == "ref"
    assert explain("toy", 1) == [
        "cuda: not implemented",
        "triton: never passed the contract suite on its hardware; name it to use it",
        "cpu: chosen",
        "ref: not needed",
    ]
    assert explain("toy", -1)[2:] == ["cpu: x must be > 0", "ref: chosen"]
    op.impl("triton", lambda x: x, lambda x: "triton is not installed")
    assert explain("toy", 1)[1] == "triton: triton is not installed"  # naming it would not help


def test_a_named_backend_never_falls_back(op):
    with use("cpu"):
        assert op.select(1)[0] == "cpu"
        with pytest.raises(RuntimeError, match="toy: a backend among cpu must run this call, got cpu: x must be > 0"):
            op.select(-1)
        assert explain("toy", -1) == ["cpu: x must be > 0"]
    with use("cuda"), pytest.raises(RuntimeError, match="cuda: not implemented"):
        op.select(1)
    assert op.select(-1)[0] == "ref"


def test_a_slower_backend_runs_only_when_named(op):
    op.impl("cpu", lambda x: ("cpu", x), lambda x: None, lambda x: "eager is faster below 5" if x < 5 else None)
    assert op.select(5)[0] == "cpu" and op.select(4)[0] == "ref"
    assert explain("toy", 4)[2:] == ["cpu: eager is faster below 5", "ref: chosen"]
    with use("cpu"):
        assert op.select(4)[0] == "cpu"


def test_an_unverified_backend_runs_when_named(op):
    with use("triton"):
        assert op.select(1)[0] == "triton"


def test_a_list_is_an_order(op, monkeypatch):
    with use("ref", "cpu"):
        assert op.select(1)[0] == "ref"
    monkeypatch.setenv("NITROKERNELS_BACKEND", "cpu, ref")
    assert op.select(1)[0] == "cpu" and op.select(-1)[0] == "ref"
    monkeypatch.setenv("NITROKERNELS_BACKEND", "cpu")
    with pytest.raises(RuntimeError):
        op.select(-1)


def test_a_compiled_function_follows_use(op):
    op.impl("cpu", lambda x: x + 1, lambda x: None)
    op.impl("ref", lambda x: x - 1, lambda x: None)

    def run():
        torch.compiler.reset()
        compiled = torch.compile(lambda x: op.select(x)[1](x) * 1, backend="eager", fullgraph=True)
        zero = torch.zeros(2)
        outputs = [compiled(zero)]
        with use("ref"):
            outputs.append(compiled(zero))
        return [int(y[0]) for y in [*outputs, compiled(zero)]]

    with ThreadPoolExecutor(1) as fresh_thread:  # one that no use() was called in
        assert fresh_thread.submit(run).result() == [1, -1, 1]


def test_unknown_names(op, monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, ref, got 'gpu'"), use("gpu"):
        pass
    monkeypatch.setenv("NITROKERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="got 'fast'"):
        op.select(1)
    monkeypatch.delenv("NITROKERNELS_BACKEND")
    with pytest.raises(ValueError, match="op must be one of toy, got 'tou'"):
        explain("tou")
    with pytest.raises(ValueError, match="args must be those of a call of toy, got missing a required argument: 'x'"):
        explain("toy")


@pytest.mark.skipif(_native.MISSING is not None, reason="needs the native library, which needs a C++ compiler")
@pytest.mark.parametrize("op, args", [("geglu", [None]), ("head_pool", [1, 2, 3, 4, 5]), ("head_pool", [[]] * 4 + [8])])
def test_explain_names_what_is_no_call(op, args):
    with use("cpu"), pytest.raises(ValueError, match=f"explain: args must be those of a call of {op}, got"):
        explain(op, *args)


def test_real_ops_are_registered():
    args = [torch.zeros(1, 4)] * 3 + [torch.ones(1)] * 4
    assert any(line.endswith("chosen") for line in explain("renoise", *args))
    assert {"renoise", "head_pool"} <= dispatch.OPS.keys()

"""What refresh_rows_ promises beyond the contract: published vectors, the same bits everywhere, uniform values."""

import math

import pytest
import torch

from nitrokernels import _native, refresh_rows_, use
from nitrokernels.ops.refresh_rows import CASES, OP, philox_ref

KNOWN = [  # Random123, kat_vectors, philox4x32-10: counter, key, words
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def make(case="small"):
    return CASES[case].make(torch.float32, "cpu")


@pytest.fixture(params=["ref", "cpu", "triton"])
def backend(request):
    if (reason := OP.impls[request.param].supports(*make())) is not None:
        pytest.skip(reason)
    with use(request.param):
        yield request.param


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_known_answers(counter, key, words):
    got = philox_ref([torch.tensor([c]) for c in counter], tuple(key))
    assert " ".join(f"{int(w):08x}" for w in got) == words


def test_known_answers_through_the_op(backend):
    """Row 0, seed 0: the first vector, its upper 24 bits as a fraction."""
    param = torch.zeros(1, 4)
    refresh_rows_(param, None, None, None, torch.tensor([0]), 0, 0.0, 1.0)
    assert param[0].tolist() == [(int(w, 16) >> 8) * 2.0**-24 for w in KNOWN[0][2].split()]


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-0.0123456789, 0.1), (1.0, 2.0), (-3e-39, 1e38), (5.0, 5.0)])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**63 - 1])
def test_the_same_bits_on_every_backend(backend, seed, low, high):
    got, wanted = torch.zeros(5, 1031), torch.zeros(5, 1031)
    rows = torch.tensor([4, 0, 2])
    refresh_rows_(got, None, None, None, rows, seed, low, high)
    with use("ref"):
        refresh_rows_(wanted, None, None, None, rows, seed, low, high)
    assert torch.equal(got, wanted)
    assert (got[rows] >= torch.tensor(low)).all() and ((got[rows] < high).all() or low == high)


def test_high_is_never_reached(backend):
    """1 - 2^-24 of [1, 2) rounds to 2 in fp32; such values, one in 2^24, become low. This seed has one early."""
    unit, param = torch.zeros(1, 167), torch.zeros(1, 167)
    refresh_rows_(unit, None, None, None, torch.tensor([0]), 5947, 0.0, 1.0)
    refresh_rows_(param, None, None, None, torch.tensor([0]), 5947, 1.0, 2.0)
    assert unit[0, -1] == 1 - 2.0**-24 and param[0, -1] == 1.0 and param.max() < 2


def test_a_row_does_not_depend_on_the_others(backend):
    together, alone = torch.zeros(6, 9), torch.zeros(6, 9)
    refresh_rows_(together, None, None, None, torch.tensor([5, 1, 3]), 11, 0.0, 1.0)
    refresh_rows_(alone, None, None, None, torch.tensor([3]), 11, 0.0, 1.0)
    assert torch.equal(together[3], alone[3])
    assert not torch.equal(together[3], together[5]) and (together[[0, 2, 4]] == 0).all()
    longer = torch.zeros(6, 30)
    refresh_rows_(longer, None, None, None, torch.tensor([3]), 11, 0.0, 1.0)
    assert torch.equal(longer[3, :9], alone[3])


def test_state_is_forgotten_and_other_rows_keep_every_bit(backend):
    args = make("odd")
    others = ~torch.isin(torch.arange(len(args[0])), args[4])
    args[1][others] = float("nan")
    before = [t.clone() for t in args[:4]]
    refresh_rows_(*args)
    for value, old in zip(args[:4], before, strict=True):
        assert torch.equal(value[others].view(torch.uint8), old[others].view(torch.uint8))
    assert all((value[~others] == 0).all() for value in args[1:4])


def test_values_are_uniform():
    """Moments, Kolmogorov-Smirnov, neighbours and rows, at five sigma."""
    param = torch.zeros(64, 4096)
    refresh_rows_(param, None, None, None, torch.arange(64), int(torch.randint(2**62, ())), -0.5, 1.5)
    x, n = (param.double().flatten() + 0.5) / 2, param.numel()
    assert 0 <= x.min() < 20 / n and 1 - 20 / n < x.max() < 1
    assert abs(x.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(x.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    distance = (x.sort().values - torch.arange(1, n + 1) / n).abs().max()
    assert distance < 2.6 / n**0.5  # probability 3e-6
    for a, b in ((param[:, 1:], param[:, :-1]), (param[1:], param[:-1])):
        correlation = ((a - 0.5).double() * (b - 0.5)).mean() * 3
        assert abs(correlation) < 5 / a.numel() ** 0.5


@pytest.mark.skipif(_native.MISSING is not None, reason="needs the native library, which needs a C++ compiler")
def test_threads_do_not_change_a_bit():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            param = torch.zeros(3, 100_003)
            with use("cpu"):
                refresh_rows_(param, None, None, None, torch.arange(3), 99, -1.0, 1.0)
            results.append(param)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_autograd_sees_the_write(backend):
    args = list(make())
    args[0].requires_grad_()
    version = args[0]._version
    refresh_rows_(*args)
    assert args[0].grad_fn is None and args[0]._version > version


def test_bad_input_is_named(backend):
    args = make()

    def call(**changes):
        names = ("param", "exp_avg", "exp_avg_sq", "step", "rows", "seed", "low", "high")
        refresh_rows_(**(dict(zip(names, args, strict=True)) | changes))

    before = [t.clone() for t in args[:4]]
    with pytest.raises(ValueError, match="refresh_rows_: rows must be int64, got float32"):
        call(rows=torch.zeros(2))
    with pytest.raises(ValueError, match=r"refresh_rows_: rows must be in 0..4, got 5"):
        call(rows=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"refresh_rows_: rows must be in 0..4, got -2"):
        call(rows=torch.tensor([0, -2]))
    with pytest.raises(ValueError, match=r"refresh_rows_: exp_avg must be \[5, 3, 2\], got \[5, 6\]"):
        call(exp_avg=torch.zeros(5, 6))
    with pytest.raises(ValueError, match=r"refresh_rows_: seed must be in 0..2\^63 - 1, got -1"):
        call(seed=-1)
    for low, high in ((1.0, 0.0), (-3e38, 3e38), (-1e39, 1e39), (1e39, 1e39), (-math.inf, 0.0), (10**400, 10**401)):
        with pytest.raises(ValueError, match="refresh_rows_: low and high must be low <= high, both .*, got"):
            call(low=low, high=high)
    assert all(torch.equal(a, b) for a, b in zip(args[:4], before, strict=True))

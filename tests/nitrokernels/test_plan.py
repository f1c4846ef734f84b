"""Each instruction of a plan against fp64, on every instruction set and number of threads; memory and errors."""

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nitrokernels import plan
from nitrokernels.ops.nag_combine import nag_combine_ref
from nitrokernels.plan import Builder

pytestmark = pytest.mark.skipif(plan.missing() is not None, reason="needs a C++ compiler at install time")


def nchw(x):
    return x.permute(2, 0, 1)[None]


def run(build, *inputs, threads=1):
    """The maps ``build(builder, *input maps)`` returns, from inputs [C, H, W]; all memory poisoned before."""
    b = Builder()
    maps = [b.map(x.shape[1], x.shape[2], x.shape[0], keep=True) for x in inputs]
    out = build(b, *maps)
    outs = [b.keep(m) for m in (out if isinstance(out, tuple) else (out,))]
    made = b.finish()
    made._arena.fill_(float("nan"))
    for m, x in zip(maps, inputs, strict=True):
        made.read(m).copy_(x.permute(1, 2, 0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made.run()
        first = [made.read(m).clone() for m in outs]
        made.run()  # again, over what the first run left
    finally:
        torch.set_num_threads(before)
    for m, x in zip(outs, first, strict=True):
        assert torch.equal(made.read(m), x)
    return [nchw(x) for x in first]


def check(build, reference, *inputs, error=3e-6):
    """Within ``error`` of the reference in fp64, relative to its largest value; the same bits on 1 to 7 threads."""
    expected = reference(*(x.double()[None] for x in inputs))
    (out,) = run(build, *inputs)
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= error * expected.abs().max().clamp_min(1)
    for threads in (2, 3, 7):
        assert torch.equal(run(build, *inputs, threads=threads)[0], out)


@pytest.mark.parametrize(
    "height,width,inputs,outputs",
    [(16, 16, 48, 48), (17, 16, 48, 48), (7, 9, 13, 20), (4, 4, 96, 96), (4, 4, 160, 96), (5, 3, 4, 4),
     (12, 14, 112, 200)],
)  # fmt: skip
@pytest.mark.parametrize("stride,padding", [(1, 1), (2, 1), (2, 0)])
def test_conv3(height, width, inputs, outputs, stride, padding):
    x, weight, bias = torch.randn(inputs, height, width), torch.randn(outputs, inputs, 3, 3), torch.randn(outputs)

    def reference(x):
        if padding == 0:  # below and right only, as in an autoencoder's encoder
            x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, weight.double(), bias.double(), stride, padding)

    check(
        lambda b, m: b.matmul(b.copy(m, border=True), weight, bias, stride=stride, padding=padding), reference, x
    )


@pytest.mark.parametrize(
    "height,width,inputs,outputs",
    [(8, 8, 16, 20), (8, 8, 48, 64), (10, 14, 48, 3), (22, 16, 80, 96), (32, 34, 272, 70), (64, 2, 32, 64),
     (32, 36, 80, 130), (20, 24, 32, 190)],
)  # fmt: skip
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv3_by_tiles(height, width, inputs, outputs, activation):
    """Channels in several rounds, blocks of tiles with a rest, columns that fill no panel; with a residual."""
    x, residual = torch.randn(inputs, height, width), torch.randn(outputs, height, width)
    weight, bias = torch.randn(outputs, inputs, 3, 3), torch.randn(outputs)

    def reference(x, residual):
        y = F.conv2d(x, weight.double(), bias.double(), padding=1)
        return (F.silu(y) if activation else y) + residual

    def build(b, m, r):
        out = b.matmul(b.copy(m, border=True), weight, bias, r, activation)
        assert [fields[0] for fields in b._code] == [plan.MAP, plan.CONV3]
        assert b._code[1][-1] == (2 if width % 4 else 4)
        return out

    check(build, reference, x, residual)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("outputs", [20, 96])
def test_conv3_by_tiles_of_parts_of_maps(outputs, activation):
    """As a UNet has them: channels of a wider map, with a part of a map for a bias, or with none."""
    x, residual, bias = torch.randn(64, 12, 10), torch.randn(200, 12, 10), torch.randn(200, 1, 1)
    weight = torch.randn(outputs, 32, 3, 3)
    act = F.gelu if activation else lambda x: x

    def reference(x, residual, bias):
        y = F.conv2d(x[:, 16:48], weight.double(), bias[0, 90 : 90 + outputs, 0, 0], padding=1)
        return act(y) + residual[:, 30 : 30 + outputs]

    def build(b, m, r, t):
        part = b.copy(m, border=True).columns(16, 32)
        return b.matmul(part, weight, t.columns(90, outputs), r.columns(30, outputs), activation)

    check(build, reference, x, residual, bias)
    check(
        lambda b, m: b.matmul(b.copy(m, border=True).columns(16, 32), weight, activation=activation),
        lambda x: act(F.conv2d(x[:, 16:48], weight.double(), padding=1)),
        x,
    )


@pytest.mark.parametrize(
    "height,width,channels,options",
    [(9, 8, 16, {}), (8, 9, 16, {}), (6, 10, 16, {}), (8, 8, 24, {}), (8, 8, 16, {"stride": 2}),
     (8, 8, 16, {"padding": 0})],
)  # fmt: skip
def test_other_convs_do_not_run_by_tiles(height, width, channels, options):
    b = Builder()
    b.matmul(b.map(height, width, channels, border=True), torch.randn(16, channels, 3, 3), **options)
    assert b._code[0][0] == plan.MATMUL


def test_a_plan_made_in_inference_mode_runs_outside_of_it():
    with torch.inference_mode():
        b = Builder()
        x = b.map(4, 4, 16, keep=True)
        y = b.keep(b.matmul(x, torch.eye(16)))
        made = b.finish()
        made.read(x).fill_(2)
        made.run()
    made.read(x).copy_(torch.full((4, 4, 16), 3.0))
    made.run()
    assert (made.read(y) == 3).all()


@pytest.mark.parametrize("rows", [1, 5, 77, 300])
@pytest.mark.parametrize("columns", [4, 16, 80, 100, 192, 320])
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "quick_gelu", "relu"])
def test_linear(rows, columns, activation):
    x, weight, bias = torch.randn(40, rows, 1), torch.randn(columns, 40), torch.randn(columns)
    act = {None: lambda x: x, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}
    act["quick_gelu"] = lambda x: x * torch.sigmoid(1.702 * x)

    def reference(x):
        return act[activation](F.conv2d(x, weight.double()[:, :, None, None], bias.double()))

    check(lambda b, m: b.matmul(m, weight, bias, activation=activation), reference, x)


@pytest.mark.parametrize("inputs,kernel", [(2560, 1), (1500, 1), (320, 3)])
def test_long_sums_lose_less_than_one_by_one(inputs, kernel):
    x, weight = torch.randn(inputs, 4, 4), torch.randn(32, inputs, kernel, kernel)
    columns = F.unfold(x[None], kernel, padding=kernel // 2)[0]
    rows, exact = weight.flatten(1), weight.double().flatten(1) @ columns.double()
    one_by_one = torch.zeros(exact.shape)
    for k in range(rows.shape[1]):
        one_by_one += rows[:, k : k + 1] * columns[k]
    (out,) = run(lambda b, m: b.matmul(b.copy(m, border=kernel > 1), weight), x)
    assert (out[0].flatten(1) - exact).square().mean() < 0.2 * (one_by_one - exact).square().mean()


@pytest.mark.parametrize("columns", [20, 32, 96, 256])
def test_geglu_and_residual(columns):
    x, residual = torch.randn(64, 50, 1), torch.randn(columns, 50, 1)
    weight, bias = torch.randn(2 * columns, 64), torch.randn(2 * columns)

    def reference(x, residual):
        value, gate = F.conv2d(x, weight.double()[:, :, None, None], bias.double()).chunk(2, 1)
        return value * F.gelu(gate) + residual

    check(lambda b, m, r: b.matmul(m, weight, bias, r, "geglu"), reference, x, residual)


def test_a_bias_that_is_a_map():
    x, bias, weight = torch.randn(8, 6, 6), torch.randn(40, 1, 1), torch.randn(20, 8)

    def reference(x, bias):
        return F.conv2d(x, weight.double()[:, :, None, None], bias[0, 20:, 0, 0])

    check(lambda b, m, t: b.matmul(m, weight, t.columns(20, 20)), reference, x, bias)


@pytest.mark.parametrize("channels,groups", [(48, 16), (20, 5), (320, 32), (7, 1), (64, 64)])
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm(channels, groups, silu):
    x, weight, bias = torch.randn(channels, 9, 16) * 3 + 20, torch.randn(channels), torch.randn(channels)

    def reference(x):
        y = F.group_norm(x, groups, weight.double(), bias.double(), 1e-5)
        return F.silu(y) if silu else y

    check(lambda b, m: b.group_norm(m, weight, bias, groups, 1e-5, silu), reference, x, error=2e-5)
    check(lambda b, m: b.group_norm(m, weight, bias, groups, 1e-5, silu, border=True), reference, x, error=2e-5)


@pytest.mark.parametrize("channels", [7, 48, 320])
def test_layer_norm(channels):
    x, weight, bias = torch.randn(channels, 33, 1) * 3 + 20, torch.randn(channels), torch.randn(channels)

    def reference(x):
        return F.layer_norm(x.movedim(1, -1), (channels,), weight.double(), bias.double(), 1e-5).movedim(-1, 1)

    check(lambda b, m: b.layer_norm(m, weight, bias, 1e-5), reference, x, error=2e-5)


@pytest.mark.parametrize("rows,keys,heads,dim", [(64, 20, 2, 32), (200, 200, 1, 64), (9, 3, 3, 8), (16, 130, 2, 40)])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_attention(rows, keys, heads, dim, size):
    q, k, v = (torch.randn(heads * dim, n, 1) for n in (rows, keys, keys))
    q *= size

    def reference(*qkv, causal=False):
        q, k, v = (x[0, :, :, 0].unflatten(0, (heads, dim)).transpose(1, 2)[None] for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)[0]
        return out.transpose(1, 2).flatten(0, 1)[None, ..., None]

    check(lambda b, q, k, v: b.attention(q, b.keys(k, v, heads), heads), reference, q, k, v, error=1e-5 * size)
    if rows == keys:
        check(
            lambda b, q, k, v: b.attention(q, b.keys(k, v, heads), heads, causal=True),
            lambda *qkv: reference(*qkv, causal=True),
            *(q, k, v),
            error=1e-5 * size,
        )


def test_zoom_and_concat():
    x, y = torch.randn(6, 3, 5), torch.randn(9, 6, 10)
    check(
        lambda b, m, n: b.concat(b.copy(m, zoom=2), n),
        lambda x, y: torch.cat([F.interpolate(x, scale_factor=2), y], 1),
        *(x, y),
    )


@pytest.mark.parametrize("height,width", [(6, 9), (5, 10), (5, 9)])
def test_zoom_to_an_odd_size(height, width):
    check(
        lambda b, m: b.copy(m, zoom=2, size=(height, width)),
        lambda x: F.interpolate(x, size=(height, width)),
        torch.randn(6, 3, 5),
        error=0,
    )
    b = Builder()
    m = b.map(3, 5, 6)
    for wrong in ((7, 10), (4, 10), (6, 8)):
        with pytest.raises(ValueError, match=f"copy size must be of 2 times 3x5, got {wrong[0]}x{wrong[1]}"):
            b.copy(m, zoom=2, size=wrong)


def test_borders_are_for_products():
    b = Builder()
    x, plain, ones = b.map(4, 4, 8, border=True), b.map(4, 4, 8), torch.ones(8)
    for call in (
        lambda: b.copy(x),
        lambda: b.group_norm(x, ones, ones, 2, 1e-5),
        lambda: b.layer_norm(x, ones, ones, 1e-5),
        lambda: b.keys(x, plain, 2),
        lambda: b.keys(plain, x, 2),
        lambda: b.attention(x, b.keys(plain, plain, 2), 2),
        lambda: b.combine(x, plain, b.map(1, 1, 4)),
        lambda: b.combine(plain, plain.columns(0, 4), b.map(1, 1, 4)),
    ):
        with pytest.raises(ValueError, match="plan: .* must be a (dense )?map"):
            call()


def test_maps_share_memory_only_when_they_may():
    """A long chain with skips of random length: one map written over while it is needed would change the sum."""
    weights = [torch.randn(32, 32) / 6 for _ in range(24)]
    skips = torch.randint(0, 24, (24,)).tolist()

    def chain(x, product):
        seen = [x]
        for weight, back in zip(weights, skips, strict=True):
            seen.append(product(seen[-1], weight, seen[max(0, len(seen) - 1 - back)]))
        return seen[-1]

    check(
        lambda b, m: chain(m, lambda x, w, r: b.matmul(x, w, None, r)),
        lambda x: chain(x, lambda x, w, r: F.conv2d(x, w.double()[:, :, None, None]) + r),
        torch.randn(32, 10, 10),
        error=1e-5,
    )


def test_the_arena_is_smaller_than_the_sum_of_its_maps():
    b = Builder()
    x = b.map(32, 32, 64, keep=True)
    for _ in range(20):
        x = b.matmul(x, torch.randn(64, 64))
    b.keep(x)
    assert b.finish()._arena.numel() < 5 * 32 * 32 * 64


def test_segments_run_alone():
    b = Builder()
    x = b.map(4, 4, 16, keep=True)
    b.segment("first")
    y = b.matmul(x, 2 * torch.eye(16))
    b.segment("second")
    z = b.keep(b.matmul(y, 3 * torch.eye(16)))
    made = b.finish()
    made.read(x).fill_(1)
    made.run("first")
    made.read(x).fill_(100)
    made.run("second")  # what segments share is kept
    made.run("second")
    assert (made.read(z) == 6).all()


@pytest.mark.parametrize("height,width,channels", [(32, 32, 3), (5, 7, 3), (64, 96, 3), (9, 1, 1)])
def test_levels(height, width, channels):
    """As torch rounds them, to the bit; NaN is counted."""
    x = torch.rand(channels, height, width) * 3 - 1.5
    halves = (torch.arange(x.numel()) % 255 + 0.5) / 255 * 2 - 1  # nearly at the edge of two levels
    x = torch.where(torch.rand(x.shape) < 0.5, x, halves.view(x.shape))
    expected = (x / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0)
    b = Builder()
    m = b.map(height, width, channels, keep=True)
    out, wrong = (b.keep(y) for y in b.levels(m))
    made = b.finish()
    for threads in (1, 2, 3):
        made._arena.fill_(float("nan"))
        made.read(m).copy_(x.permute(1, 2, 0))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            made.run()
        finally:
            torch.set_num_threads(before)
        assert torch.equal(made.read_bytes(out, height, width, channels), expected)
        assert made.read(wrong).sum() == 0
    for value, count, level in ((float("nan"), 1, 0), (float("inf"), 0, 255), (-float("inf"), 0, 0)):
        made.read(m)[height // 2, 0, channels - 1] = value
        made.run()
        assert made.read(wrong).sum() == count
        assert made.read_bytes(out, height, width, channels)[height // 2, 0, channels - 1] == level
    with pytest.raises(ValueError, match="dense map"):
        Builder().levels(Builder().map(4, 4, 3, border=True))


def test_errors_name_what_was_expected():
    b = Builder()
    x = b.map(4, 4, 16)
    with pytest.raises(ValueError, match="weight must fit 16 channels"):
        b.matmul(x, torch.randn(8, 15))
    with pytest.raises(ValueError, match="weight must fit 16 channels"):
        b.matmul(x, torch.randn(8, 16, 3, 3))  # a conv reads a map with a border
    with pytest.raises(ValueError, match="beside geglu"):
        b.matmul(x, torch.randn(8, 16), b.map(1, 1, 8), activation="geglu")


def test_the_fields_are_those_of_the_header():
    """Each field's name, order and type: a count packed as a double is read as another number, or as an address."""
    header = re.sub(r"//.*", "", (Path(__file__).parents[2] / "csrc/plan.h").read_text())
    kinds = dict(re.findall(r"k(\w+) = (\d+)", re.search(r"enum Kind {(.*?)}", header)[1]))
    assert sorted(map(int, kinds.values())) == sorted(plan.FIELDS)
    for name, kind in kinds.items():
        body = re.search(rf"struct {name.replace('Conv3', 'Matmul')} {{(.*?)}};", header, re.DOTALL)[1]
        declared = []
        for kind_of, names in re.findall(r"(int64_t|double|(?:const )?\w+ (?=\*))([^;]*);", body):
            for field in (n.strip() for n in names.split(",")):
                declared.append("." + field if kind_of == "double" else field)
        assert declared == ["kind", "tasks", *plan.FIELDS[int(kind)].split()]


@pytest.mark.parametrize("wrong", [16.0, 2.5, float("nan"), True, "4", None, 0, -1, 1 << 70])
def test_a_count_is_an_integer(wrong):
    b = Builder()
    x, w = b.map(4, 4, 16), torch.ones(16)
    for what, build in (
        ("group_norm groups", lambda: b.group_norm(x, w, w, wrong, 1e-5)),
        ("keys heads", lambda: b.keys(x, x, wrong)),
        ("attention heads", lambda: b.attention(x, b.keys(x, x, 1), wrong)),
        ("map channels", lambda: b.map(4, 4, wrong)),
    ):
        with pytest.raises(ValueError, match=f"plan: {what} must be an integer >= 1, got"):
            build()
    if wrong != 0:
        with pytest.raises(ValueError, match="plan: x_step must be an integer >= 0, got"):
            b._emit(plan.LAYER_NORM, 1, b._at(x), wrong, 1, 16, 1e-5, w, w, b._at(x), 16)


def test_an_integer_eps_is_a_number():
    x, weight, bias = torch.randn(32, 6, 6), torch.randn(32), torch.randn(32)
    check(
        lambda b, m: b.group_norm(m, weight, bias, 4, 1),
        lambda x: F.group_norm(x, 4, weight.double(), bias.double(), 1.0),
        x,
    )
    check(
        lambda b, m: b.layer_norm(m, weight, bias, 1),
        lambda x: F.layer_norm(x.movedim(1, -1), (32,), weight.double(), bias.double(), 1.0).movedim(-1, 1),
        x,
    )
    for wrong in ("1e-5", None, True):
        with pytest.raises(ValueError, match="plan: eps must be a number, got"):
            Builder().layer_norm(Builder().map(4, 1, 32), weight, bias, wrong)


def test_maps_and_weights_that_do_not_fit_are_refused():
    """Each would read or write beside its memory."""
    b = Builder()
    x, wide, other, w = b.map(4, 4, 16), b.map(4, 4, 24), b.map(4, 5, 16), torch.ones(16)
    square, packed = torch.randn(16, 16), b.keys(x, x, 2)
    for what, build in (
        ("matmul residual must be a map (4, 4, 16), got (4, 4, 24)", lambda: b.matmul(x, square, residual=wide)),
        ("matmul residual must be a map (4, 4, 16), got (4, 5, 16)", lambda: b.matmul(x, square, residual=other)),
        ("residual must be a dense map", lambda: b.matmul(x, square, residual=b.map(4, 4, 16, border=True))),
        ("matmul bias must be a map (1, 1, 16), got (1, 1, 8)", lambda: b.matmul(x, square, b.map(1, 1, 8))),
        ("bias must have 16 elements, got (16, 1)", lambda: b.matmul(x, square, torch.ones(16, 1))),
        ("weight must fit 16 channels", lambda: b.matmul(b.copy(x, border=True), torch.randn(8, 16, 3, 1))),
        ("group_norm groups must divide 16 channels, got 7", lambda: b.group_norm(x, w, w, 7, 1e-5)),
        ("group_norm groups must divide 16 channels, got 1000", lambda: b.group_norm(x, w, w, 1000, 1e-5)),
        ("keys heads must divide 16 channels, got 3", lambda: b.keys(x, x, 3)),
        ("keys v must be a map (4, 4, 16), got (4, 4, 24)", lambda: b.keys(x, wide, 2)),
        ("keys v must be a map (4, 4, 16), got (4, 5, 16)", lambda: b.keys(x, other, 2)),
        ("attention heads must divide 16 channels, got 3", lambda: b.attention(x, packed, 3)),
        ("attention keys must be a map (2, 12, 64), got (2, 8, 64)", lambda: b.attention(wide, packed, 2)),
        ("attention keys must be a map (4, 4, 64), got (2, 8, 64)", lambda: b.attention(x, packed, 4)),
        ("copy out must be a map (4, 5, 16), got (4, 4, 16)", lambda: b.concat(x, other)),
        ("combine negative must be a map", lambda: b.combine(x, wide, b.map(1, 1, 4))),
        ("combine how must be a map (1, 1, 4)", lambda: b.combine(x, x, b.map(1, 1, 3))),
    ):
        with pytest.raises(ValueError, match=re.escape(what)):
            build()


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_lesser_instruction_sets(isa):
    names = ["conv3", "linear", "geglu_and_residual", "group_norm", "layer_norm", "attention", "zoom", "combine"]
    names.append("levels")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, "-k"]
    done = subprocess.run(
        [*command, " or ".join(f"test_{n}" for n in names)],
        env={**os.environ, "NITROKERNELS_ISA": isa},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("channels", [7, 64, 100])
@pytest.mark.parametrize("how", [(2.0, 2.5, 0.5, 3.0), (0.3, float("inf"), 1.0, 1.0), (9.0, 1.2, 1.0, 10.0)])
def test_combine(channels, how):
    """NAG and NASA as the op defines them; a token of zeros stays finite."""
    p, n = torch.randn(channels, 50, 1), torch.randn(channels, 50, 1)
    p[:, 3] = 0
    settings = torch.tensor(how).view(4, 1, 1)

    def reference(p, n, settings):
        p, n = p.movedim(1, -1), n.movedim(1, -1)
        return nag_combine_ref(p, n, *how).movedim(-1, 1)

    check(lambda b, p, n, h: b.combine(p, n, h), reference, p, n, settings)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_plan_is_not_copied(copied):
    b = Builder()
    b.keep(b.copy(b.map(2, 2, 4, keep=True)))
    with pytest.raises(TypeError, match="a Plan cannot be copied or pickled"):
        copied(b.finish())

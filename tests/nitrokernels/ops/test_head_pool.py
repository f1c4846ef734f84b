"""What head_pool promises beyond the contract: threads, launches, either gradient alone, idle and repeated rows."""

import dataclasses

import pytest
import torch

from nitrokernels import _triton, head_pool, use
from nitrokernels.ops.head_pool import _OPERATORS, CASES, OP, HeadPoolFunction, _case, head_pool_ref
from nitrokernels.testing import assert_draws_within_budget, map_tensors, tensors, widen

FEATURES, INDEX, PARAMS = 0, 2, 3
# Rows and columns enough for the native convs by tiles; outside of CASES, as these shapes are slow on other backends.
TILED = {
    "tiles": _case(3, [(16, 20, 20), (32, 32, 16)], tasks=2, heads=3, sampled=2, width=16),
    "tiles, two blocks": _case(3, [(16, 40, 40), (3, 36, 36)], tasks=2, heads=3, sampled=2, width=16),
    "filters of 1 MB": _case(3, [(320, 8, 8), (256, 16, 16)], tasks=1, heads=3, sampled=2, width=64),
    "filters of 1 MB, two blocks": _case(9, [(256, 16, 16)], tasks=1, heads=2, sampled=2, width=64),
    "tiles in every layer": _case(1, [(16, 64, 64)], tasks=1, heads=1, sampled=1, width=32),
    "tiles of lanes": _case(32, [(16, 16, 16), (32, 8, 8), (16, 12, 12)], tasks=2, heads=3, sampled=2, width=16),
}


def make(name="small", dtype=torch.float32):
    return (CASES | TILED)[name].make(dtype, "cpu")


def native(*args):
    with use("cpu"):
        return head_pool(*args)


needs_native = pytest.mark.skipif(
    OP.impls["cpu"].supports(*make()) is not None, reason="needs the native library, which needs a C++ compiler"
)


@pytest.fixture(params=["cpu", "triton"])
def fused(request):
    """head_pool on one backend."""
    if (reason := OP.impls[request.param].supports(*make())) is not None:
        pytest.skip(reason)

    def run(*args):
        with use(request.param):
            return head_pool(*args)

    run.backend = request.param
    return run


def gradients(function, args, *positions):
    """Output and the gradients to every tensor of the named arguments."""
    args = [map_tensors(torch.Tensor.detach, a) for a in args]
    inputs = []
    for at in positions:
        args[at] = map_tensors(lambda t: t.clone().requires_grad_(), args[at])
        inputs += tensors(args[at])
    out = function(*args)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def assert_matches_reference(function, draw_args, *positions):
    def draw():
        args = draw_args()
        exact, eager = gradients(head_pool_ref, widen(args), *positions), gradients(head_pool_ref, args, *positions)
        return list(zip(gradients(function, args, *positions), eager, exact, strict=True))

    assert_draws_within_budget(draw, factor=3.0)


@needs_native
@pytest.mark.parametrize("name", ["small", "wide", "odd", "lanes", "many images", *TILED])
def test_threads_change_no_bit(name):
    args, threads, runs = make(name), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(gradients(native, args, FEATURES) + gradients(native, args, PARAMS))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_native
@pytest.mark.parametrize("name", ["odd", "lanes", "many images", *TILED])
@pytest.mark.parametrize("position", [FEATURES, PARAMS])
def test_either_gradient_alone_of_every_kind_of_block(name, position):
    assert_matches_reference(native, lambda: make(name), position)


@pytest.mark.parametrize("position", [FEATURES, PARAMS])
def test_either_gradient_alone(fused, position):
    assert_matches_reference(fused, make, position)


@pytest.mark.parametrize("position, other", [(FEATURES, "rows_bwd"), (PARAMS, "features_bwd")])
def test_only_the_gradients_asked_for_are_computed(fused, position, other, monkeypatch):
    monkeypatch.setitem(_OPERATORS[fused.backend], other, None)
    gradients(fused, make(), position)


def test_one_map_of_several_wants_a_gradient(fused):
    args = make()
    wanted = gradients(fused, args, FEATURES)[1:]
    features = [x.clone() for x in args[FEATURES]]
    features[1].requires_grad_()
    out = fused(features, *args[1:])
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape)
    assert torch.equal(torch.autograd.grad(out, features[1], upstream)[0], wanted[1])


def test_rows_nobody_sampled_get_exactly_zero(fused):
    args = make()
    _, levels, index, params, _ = args
    grads = iter(gradients(fused, args, PARAMS)[1:])
    for level, p in enumerate(params):
        sampled = {int(r) for at, rows in zip(levels, index, strict=True) if at == level for r in rows}
        idle = [r for r in range(len(p.logit_bias)) if r not in sampled]
        assert idle
        for _ in tensors(p):
            assert not next(grads)[idle].any()


@pytest.mark.parametrize("name", ["small", "lanes", "many images"])
def test_gradients_of_a_repeated_row_add_up(fused, name):
    if fused.backend == "triton" and _triton.INTERPRETED and name != "small":
        pytest.skip("needs an NVIDIA GPU: the interpreter takes the small case only")

    def all_row_0():
        args = list(make(name))
        args[INDEX] = torch.zeros_like(args[INDEX])
        return args

    assert_matches_reference(fused, all_row_0, FEATURES, PARAMS)


@needs_native
@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_channels_last_maps(name, dtype):
    def channels_last():
        args = list(make(name, dtype))
        args[FEATURES] = [x.to(memory_format=torch.channels_last) for x in args[FEATURES]]
        return args

    assert_matches_reference(native, channels_last, FEATURES, PARAMS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_channels_last_maps_get_channels_last_gradients(fused, dtype):
    args = list(make("small" if _triton.INTERPRETED else "lanes", dtype))
    args[FEATURES] = [x.to(memory_format=torch.channels_last) for x in args[FEATURES]]
    x = args[FEATURES][0].requires_grad_()
    (grad,) = torch.autograd.grad(fused(*args).sum(), x)
    assert grad.dtype == dtype and grad.is_contiguous(memory_format=torch.channels_last)


@needs_native
def test_mixed_dtypes_across_maps():
    def mixed():
        args = list(make())
        args[FEATURES] = [x.to(d) for x, d in zip(args[FEATURES], [torch.bfloat16, torch.float32] * 2, strict=True)]
        return args

    assert_matches_reference(native, mixed, FEATURES, PARAMS)


def test_backward_twice_gives_the_same(fused):
    args = list(make())
    args[PARAMS] = map_tensors(lambda t: t.requires_grad_(), args[PARAMS])
    inputs, out = tensors(args[PARAMS]), fused(*args).sum()
    runs = [torch.autograd.grad(out, inputs, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("position", [FEATURES, PARAMS])
def test_compiled_training_step_matches(fused, position):
    args = make()
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    runs = gradients(compiled, args, position), gradients(fused, args, position)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_graph_without_gradients(fused):
    assert fused(*make()).grad_fn is None
    args = list(make())
    args[FEATURES] = [x.requires_grad_() for x in args[FEATURES]]
    assert type(fused(*args).grad_fn).__name__ == HeadPoolFunction.__name__ + "Backward"


def first(params, **changed):
    """The stacks with another first one."""
    return [dataclasses.replace(params[0], **changed), params[1]]


BAD = {
    "rank": (0, lambda f: [f[0], f[1][0], *f[2:]], r"features of level 1 must be \[2, 5, H, W\], got \[5, 4, 4\]"),
    "channels": (0, lambda f: [f[1], *f[1:]], r"features of level 0 must be \[2, 3, H, W\], got \[2, 5, 4, 4\]"),
    "batch": (0, lambda f: [f[0], f[1][:1], *f[2:]], r"features of level 1 must be \[2, 5, H, W\], got \[1,"),
    "dtype": (0, lambda f: [f[0].int(), *f[1:]], "features of level 0 must be fp32, fp16, bf16 or fp64, got int32"),
    "device": (0, lambda f: [x.to("meta") for x in f], "index must be on the device of the others, meta, got"),
    "map too small": (0, lambda f: [f[0][..., :3, :3], *f[1:]], "features of level 0 must be at least 4x4, got 3x3"),
    "levels": (1, lambda levels: levels[:-1], r"levels must be one int per feature map, .*\(4\), got 3"),
    "level": (1, lambda levels: [0, 7, 0, 1], r"levels must be in 0\.\.1, got 7"),
    "index rank": (2, lambda i: i[:, 0], r"index must be \[4, n\], got \[4\]"),
    "one tensor": (0, lambda f: f[0], "features must be a list, got Tensor"),
    "float8": (0, lambda f: [f[0].to(torch.float8_e4m3fn), *f[1:]], "features of level 0 must be fp32, fp16, bf16 or"),
    "float level": (1, lambda levels: [0.0, 1, 0, 1], r"levels must be in 0\.\.1, got 0.0"),
    "named level": (1, lambda levels: ["a", 1, 0, 1], r"levels must be in 0\.\.1, got 'a'"),
    "no levels": (1, lambda levels: None, "levels must be a list, got NoneType"),
    "one level": (1, lambda levels: 0, "levels must be a list, got int"),
    "no rows": (2, lambda i: i[:, :0], r"index must be of at least one row per map, got \[4, 0\]"),
    "index dtype": (2, lambda i: i.int(), "index must be int64, got int32"),
    "row": (2, lambda i: i + 100, r"index of level 0 must be in 0\.\.5, got \[1"),
    "conv": (3, lambda p: first(p, conv=p[0].conv[::-1]), r"params\[0\].conv\[1\] must be \[6, 8, 8, 4, 4\], got"),
    "norm": (3, lambda p: first(p, norm_bias=[torch.zeros(6, 7)] * 2), r"params\[0\].norm_bias\[0\] must be \[6, 8\]"),
    "logit": (3, lambda p: first(p, logit_bias=torch.zeros(5)), r"params\[0\].logit_bias must be \[6\], got \[5\]"),
    "layers": (3, lambda p: first(p, norm_bias=()), r"params\[0\] must be as many .*, got 2, 2 and 0"),
    "one stack": (3, lambda p: p[0], "params must be a list, got LevelParams"),
    "a stack missing": (3, lambda p: [None, p[1]], r"params\[0\] must be LevelParams, got NoneType"),
    "convs missing": (3, lambda p: first(p, conv=None), r"params\[0\].conv must be a list, got NoneType"),
    "no stacks": (3, lambda p: [], "params must be one stack per level, at least one, got 0"),
    "groups by name": (4, lambda g: True, "num_groups must be a divisor of the width 8, got True"),
    "groups": (4, lambda g: 3, "num_groups must be a divisor of the width 8, got 3"),
}


def test_maps_have_channels():
    features, levels, index, params, groups = make()
    params = first(params, conv=(params[0].conv[0][:, :, :0], *params[0].conv[1:]))
    with pytest.raises(ValueError, match="head_pool: features of level 0 must be of at least one channel, got"):
        head_pool([features[0][:, :0], *features[1:]], levels, index, params, groups)


def test_one_value_per_group(fused):
    """One image, a last map of one position, groups of one channel: every normalised value is zero, on any backend."""
    x, p = torch.randn(1, 3, 2, 2), _case(1, [(3, 4, 4)], 1, 2, 1, width=8).make(torch.float32, "cpu")[PARAMS][0]
    args = [x], [0], torch.tensor([[1]]), [p], 8
    wanted = (torch.nn.functional.silu(p.norm_bias[0][1]) * p.logit_weight[1]).sum() + p.logit_bias[1]
    for run in (fused, head_pool_ref):
        torch.testing.assert_close(run(*args), wanted.view(1, 1))


@pytest.mark.parametrize("position, change, message", BAD.values(), ids=list(BAD))
def test_errors_name_the_argument(position, change, message):
    args = list(make())
    args[position] = change(args[position])
    with pytest.raises(ValueError, match="head_pool: " + message):
        head_pool(*args)


@needs_native
def test_what_it_cannot_run_has_a_reason():
    args = list(make())
    narrow = dataclasses.replace(args[PARAMS][0], logit_weight=torch.randn(6, 4))
    assert "multiple of 8" in OP.impls["cpu"].supports(*args[:3], [narrow, args[PARAMS][1]], 1)
    assert "fp32, fp16 or bf16" in OP.impls["cpu"].supports([x.double() for x in args[0]], *args[1:])
    assert "parameters must be fp32" in OP.impls["cpu"].supports(*args[:3], widen(args[3]), 1)
    assert "on meta" in OP.impls["cpu"].supports([x.to("meta") for x in args[0]], *args[1:])


def test_what_triton_cannot_run_has_a_reason():
    supports = OP.impls["triton"].supports
    args = [map_tensors(lambda t: t.to("meta"), a) for a in make()]
    if _triton.MISSING is None:
        assert "must be on cuda" in supports(*args)
    with _triton.record():
        if _triton.MISSING is not None:
            pytest.skip(_triton.MISSING)
        assert supports(*args) is None
        mixed = [args[FEATURES][0].half(), *args[FEATURES][1:]]
        assert "all fp32, all fp16 or all bf16" in supports(mixed, *args[1:])
        assert "parameters must be fp32" in supports(*args[:3], map_tensors(torch.Tensor.double, args[PARAMS]), 1)
        wide = dataclasses.replace(args[PARAMS][0], logit_weight=torch.empty(6, 256, device="meta"))
        assert "the same on every level" in supports(*args[:3], [wide, args[PARAMS][1]], 1)
        assert "at most 128" in supports(*args[:3], [wide], 1)
        assert "at most 480 tensors" in supports(args[FEATURES] * 200, *args[1:])


@pytest.mark.skipif(_triton.MISSING is not None, reason="needs triton")
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("position, most", [(PARAMS, 3), (FEATURES, 4)])
def test_launches_whatever_the_number_of_heads(heads, position, most):
    """A D step and a G step, forward and backward."""
    args = [map_tensors(lambda t: t.to("meta"), a) for a in make()]
    args[INDEX] = torch.zeros(len(args[FEATURES]), heads, dtype=torch.int64, device="meta")
    with use("triton"), _triton.record() as seen:
        gradients(head_pool, args, position)
    names = [launch.kernel.__name__ for launch in seen]
    assert names[:2] == ["_head_pool_first_kernel", "_head_pool_tail_kernel"]
    assert len(names) == 3 <= most

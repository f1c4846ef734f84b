"""The contract every op keeps on every backend this machine has: one suite over the registry.

An op is a file in nitrokernels/ops with ``OP``, ``CASES`` and a public function; nothing else is needed to be tested.
Input is fresh and random; exact values come from the reference in fp64, error budgets from the reference in the same
precision.
"""

import importlib
import itertools
import pkgutil

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import nitrokernels.ops
from nitrokernels import _native, _triton, use
from nitrokernels.testing import assert_draws_within_budget, map_tensors, poisoned_outputs, tensors, widen

NAMES = [m.name for m in pkgutil.iter_modules(nitrokernels.ops.__path__)]
MODULES = [importlib.import_module(f"nitrokernels.ops.{name}") for name in NAMES]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
CALLS = [
    pytest.param(module, case, dtype, id=f"{module.OP.name}-{name}-{str(dtype).removeprefix('torch.')}")
    for module in MODULES
    for name, case in module.CASES.items()
    for dtype in case.dtypes
]
ONE_CALL = [pytest.param(m, next(iter(m.CASES.values())), id=m.OP.name) for m in MODULES]


@pytest.fixture(autouse=True)
def exact_convs(monkeypatch):
    """What the eager convs beside us do on a GPU: fp32, in one order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.gpu
def test_both_backends_of_a_gpu_are_there():
    """Without them the cases below would find nothing to try."""
    assert _native.missing("cuda") is None and _triton.MISSING is None and not _triton.INTERPRETED


def public(module):
    return getattr(module, module.OP.name)


def backends(module, args) -> list[str]:
    return [b for b, impl in module.OP.impls.items() if b != "ref" and impl.supports(*args) is None]


def fresh(args):
    """The same values in memory of their own, detached; layouts are kept."""
    return map_tensors(lambda t: t.detach().clone(memory_format=torch.preserve_format), args)


def call(module, case, args, backend) -> list[torch.Tensor]:
    """Outputs of one call, arguments it writes included."""
    with use(backend):
        out = public(module)(*args)
    return tensors(out) + [t for i in case.mutated for t in tensors(args[i])]


def with_grads(case, args):
    """Arguments whose differentiable tensors ask for gradients, and those tensors."""
    inputs = []

    def ask(t):
        if not t.is_floating_point():
            return t
        inputs.append(t.requires_grad_())
        return t

    return [map_tensors(ask, a) if i in case.grads else a for i, a in enumerate(fresh(args))], inputs


def gradients(module, case, args, backend, seed, create_graph=False):
    args, inputs = with_grads(case, args)
    outputs = [o for o in call(module, case, args, backend) if o.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    before = [u.clone() for u in upstream]
    grads = torch.autograd.grad(outputs, inputs, upstream, create_graph=create_graph, allow_unused=True)
    assert all(torch.equal(u, b) for u, b in zip(upstream, before, strict=True)), "incoming gradients are not ours"
    return grads, inputs


def check_forward(module, case, dtype, device, change=lambda position, value: value):
    """Every backend's outputs; ``change`` gives an argument another layout."""

    def draw():
        args, triples = case.make(dtype, device), []
        exact = call(module, case, list(widen(args)), "ref")
        eager = call(module, case, list(fresh(args)), "ref")
        args = [change(i, a) for i, a in enumerate(args)]
        for backend in backends(module, args):
            kept = [fresh(a) if i in case.mutated else a for i, a in enumerate(args)]
            with poisoned_outputs():
                got = call(module, case, kept, backend)
            assert [(g.shape, g.dtype) for g in got] == [(e.shape, e.dtype) for e in eager], backend
            for triple in zip(got, eager, exact, strict=True):
                if triple[0].is_floating_point():
                    triples.append(triple)
                else:
                    assert torch.equal(*triple[:2])
        return triples

    assert_draws_within_budget(draw)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module, case, dtype", CALLS)
def test_forward(module, case, dtype, device):
    check_forward(module, case, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module, case, dtype", [c for c in CALLS if c.values[1].grads])
def test_gradients(module, case, dtype, device):
    def draw():
        args, triples = case.make(dtype, device), []
        exact, _ = gradients(module, case, widen(args), "ref", 1)
        eager, _ = gradients(module, case, args, "ref", 1)
        for backend in backends(module, args):
            with poisoned_outputs():
                got, inputs = gradients(module, case, args, backend, 1)
            for g, e, w, x in zip(got, eager, exact, inputs, strict=True):
                assert (g is None) == (e is None)
                if g is not None:
                    assert g.dtype == x.dtype and g.shape == x.shape
                    triples.append((g, e, w))
        return triples

    assert_draws_within_budget(draw, factor=3.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module, case", [c for c in ONE_CALL if c.values[1].grads])
def test_second_order(module, case, device):
    """R1 differentiates a gradient: through every backend it is the reference's own."""

    def twice(values, backend):
        grads, inputs = gradients(module, case, values, backend, 2, create_graph=True)
        total = sum(g.square().sum() for g in grads if g is not None and g.requires_grad)
        if not torch.is_tensor(total):
            return []  # linear: nothing to differentiate
        return torch.autograd.grad(total, inputs, allow_unused=True)

    def draw():
        args, triples = case.make(torch.float32, device), []
        exact, eager = twice(widen(args), "ref"), twice(args, "ref")
        for backend in backends(module, args):
            triples += [t for t in zip(twice(args, backend), eager, exact, strict=True) if t[1] is not None]
        return triples

    assert_draws_within_budget(draw, factor=4.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module, case", [c for c in ONE_CALL if c.values[1].grads])
def test_a_path_between_inputs_counts_once(module, case, device):
    """Every input computed from the one before it; create_graph changes no gradient."""

    def gradient(args, backend, create_graph):
        chain = []

        def follow(t):
            chain.append(t + 0.3 * chain[-1].tanh().mean().to(t) if chain else t.requires_grad_())
            return chain[-1]

        args = [map_tensors(follow, a) if i in case.grads else a for i, a in enumerate(fresh(args))]
        total = sum(o.square().sum() for o in call(module, case, args, backend))
        return torch.autograd.grad(total, chain[0], create_graph=create_graph)[0].detach()

    def draw():
        args, triples = case.make(torch.float32, device), []
        exact, eager = gradient(widen(args), "ref", False), gradient(args, "ref", False)
        for backend, create_graph in itertools.product(backends(module, args), (False, True)):
            triples.append((gradient(args, backend, create_graph), eager, exact))
        return triples

    assert_draws_within_budget(draw, factor=4.0)


@pytest.mark.parametrize("module, case", [c for c in ONE_CALL if c.values[1].grads])
def test_forward_mode_is_never_silently_zero(module, case):
    """A tangent has the derivative of reverse mode, through the reference; a backend named alone refuses."""
    args = case.make(torch.float32, "cpu")
    available = backends(module, args)
    grads, inputs = gradients(module, case, widen(args), "ref", 5)
    tangents = [torch.randn_like(x) for x in inputs]
    exact = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True) if g is not None)

    def along(backends):
        source = iter(tangents)
        with forward_ad.dual_level(), use(*backends):
            dual = lambda t: forward_ad.make_dual(t, next(source).to(t))  # noqa: E731
            own = [map_tensors(dual, a) if i in case.grads else a for i, a in enumerate(args)]
            return [forward_ad.unpack_dual(o).tangent for o in tensors(public(module)(*own))]

    found = along([*available, "ref"])
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(t.shape, generator=generator) for t in found]
    total = sum((u.double() * t.double()).sum() for u, t in zip(upstream, found, strict=True))
    torch.testing.assert_close(total, exact, rtol=1e-3, atol=1e-3)
    for backend in available:
        with pytest.raises(RuntimeError, match="within forward-mode differentiation only ref has derivatives"):
            along([backend])


@pytest.mark.parametrize("module, case", [c for c in ONE_CALL if c.values[1].grads])
def test_the_reference_by_finite_differences(module, case):
    small = module.CASES.get("small", case)
    args, inputs = with_grads(small, widen(small.make(torch.float32, "cpu")))

    def function(*values):
        source = iter(values)
        own = {id(t) for t in inputs}
        filled = map_tensors(lambda t: next(source) if id(t) in own else t, list(args))
        return tuple(o for o in call(module, small, filled, "ref") if o.requires_grad)

    fast = sum(t.numel() for t in inputs) > 60
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)


def strided(t):
    """Every second element of the last dimension of a larger tensor."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan") if t.is_floating_point() else 0)
    wide[..., ::2] = t
    return wide[..., ::2]


def unaligned(t):
    """One element past an aligned address."""
    room = t.new_full((t.numel() + 1,), float("nan") if t.is_floating_point() else 0)
    return room[1:].view(t.shape).copy_(t)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "strided": lambda t: strided(t) if t.ndim else t,
    "unaligned": unaligned,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else t,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.OP.name)
def test_layouts(module, layout, device):
    for case, dtype in itertools.product(list(module.CASES.values())[:2], (torch.float32, torch.bfloat16)):
        if dtype in case.dtypes:
            relay = lambda i, a: a if i in case.mutated else map_tensors(LAYOUTS[layout], a)  # noqa: E731, B023
            check_forward(module, case, dtype, device, relay)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module, case", ONE_CALL)
def test_repeats_bit_for_bit(module, case, device):
    args = case.make(torch.float32, device)
    for backend in backends(module, args):
        runs = [call(module, case, list(fresh(args)), backend) for _ in range(3)]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True)), backend
        if case.grads:
            runs = [gradients(module, case, args, backend, 3)[0] for _ in range(2)]
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(*runs, strict=True)), backend


BAD = {
    "rank": lambda t: t.new_zeros(()),
    "dtype": lambda t: t.int(),  # neither floating point nor an index
    "device": lambda t: t.to("meta"),
    "layout": lambda t: t.to_sparse(),
    "type": lambda t: t.tolist(),
}


def spoiled(args, position, change):
    """Copies of the arguments with one tensor changed, and the tensors that were copied."""
    copies = []

    def copy(t):
        copies.append(t.clone())
        return change(t) if len(copies) == position + 1 else copies[-1]

    return map_tensors(copy, list(args)), copies


@pytest.mark.parametrize("change", BAD)
@pytest.mark.parametrize("module, case", ONE_CALL)
def test_bad_input_is_one_clear_error(module, case, change):
    """Each tensor of a call in turn, on every backend: a ValueError, and nothing was written."""
    args = case.make(torch.float32, "cpu")
    kept = tensors(args)
    if change == "device" and len(kept) == 1:
        pytest.skip("one tensor is beside no other")
    for backend, position in itertools.product(["ref", *backends(module, args)], range(len(kept))):
        bad, copies = spoiled(args, position, BAD[change])
        with pytest.raises(ValueError, match=rf"^{module.OP.name}: .+ must be .+, got .+"):
            call(module, case, bad, backend)
        assert all(torch.equal(t, k) for t, k in zip(copies, kept, strict=True)), backend


class Calls(TorchDispatchMode):
    """Collects the calls of our registered operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nitrokernels":
            self.seen.append((func, fresh(list(args))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module, case", ONE_CALL)
def test_opcheck(module, case, device):
    """Schema, fake tensors and dispatch of every operator the op calls, forward and backward."""
    args = case.make(torch.float32, device)
    for backend in backends(module, args):
        with Calls() as calls:
            call(module, case, list(fresh(args)), backend)
            if case.grads:
                gradients(module, case, args, backend, 4)
        assert calls.seen, f"{module.OP.name}.{backend} must be a registered operator"
        for func, values in calls.seen:
            torch.library.opcheck(func, tuple(values))


@pytest.mark.parametrize("module, case", ONE_CALL)
def test_compiles_whole(module, case):
    """torch.compile sees no graph break on any backend."""
    args = case.make(torch.float32, "cpu")
    for backend in backends(module, args):
        with use(backend):
            torch.compiler.reset()
            compiled = torch.compile(public(module), backend="aot_eager", fullgraph=True)
            own = list(fresh(args))
            got = tensors(compiled(*own)) + [t for i in case.mutated for t in tensors(own[i])]
        wanted = call(module, case, list(fresh(args)), backend)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.gpu
@pytest.mark.parametrize("module, case", ONE_CALL)
def test_runs_on_the_current_stream(module, case):
    args = case.make(torch.float32, "cuda")
    for backend in backends(module, args):
        wanted = call(module, case, list(fresh(args)), backend)
        own, side = list(fresh(args)), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)  # whoever launches elsewhere reads or writes too early
            delayed = map_tensors(lambda t: t.clone(), own)
            map_tensors(lambda t: t.zero_() if t.is_floating_point() else t, own)
            got = call(module, case, delayed, backend)
        torch.cuda.current_stream().wait_stream(side)
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True)), backend


@pytest.mark.gpu
@pytest.mark.parametrize("module, case", [c for c in ONE_CALL if not c.values[1].mutated])
def test_is_captured_by_a_graph(module, case):
    args = case.make(torch.float32, "cuda")
    for backend in backends(module, args):
        call(module, case, args, backend)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(module, case, args, backend)
        other = case.make(torch.float32, "cuda")
        for t, o in zip(tensors(args), tensors(other), strict=True):
            t.copy_(o)
        graph.replay()
        wanted = call(module, case, args, backend)
        assert all(torch.equal(g, w) for g, w in zip(out, wanted, strict=True)), backend


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("module, case", ONE_CALL)
def test_runs_on_the_tensors_device(module, case):
    args = case.make(torch.float32, "cuda:1")
    for backend in backends(module, args):
        call(module, case, args, backend)
        assert torch.cuda.current_device() == 0

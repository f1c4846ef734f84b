"""What indexed_adamw_ promises beyond the contract: torch.optim.AdamW's bits, untouched rows, threads, errors."""

import pytest
import torch

from nitrokernels import _native, indexed_adamw_, use
from nitrokernels.ops.indexed_adamw import CASES, OP

BACKENDS = ["ref", "cpu", "triton"]
HYPER = dict(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if (reason := OP.impls[request.param].supports(*make())) is not None:
        pytest.skip(reason)
    with use(request.param):
        yield request.param


def make(case="small"):
    return CASES[case].make(torch.float32, "cpu")


def correct_sqrt(x):
    """Correctly rounded, which MKL's fp32 root is not: the one rounding the cpu backend does not share with PyTorch."""
    return torch.sqrt(x.double()).to(x.dtype)


def fresh_state(shapes):
    param = [torch.randn(shape) for shape in shapes]
    zeros = [torch.zeros(shape) for shape in shapes]
    return param, zeros, [z.clone() for z in zeros], [torch.zeros(shape[0], dtype=torch.int64) for shape in shapes]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1, beta2", [(0.0, 0.99), (0.5, 0.95), (0.9, 0.999)])
def test_equals_torch_on_the_rows_it_touches(backend, beta1, beta2, weight_decay, monkeypatch):
    """Every row against an optimizer of its own: the same bits, except Triton's, see the module's docstring."""
    if backend == "cpu":
        monkeypatch.setattr(torch.Tensor, "sqrt", correct_sqrt)
    shapes = [(4, 9, 31), (4, 5), (4,)]
    param, exp_avg, exp_avg_sq, step = fresh_state(shapes)
    theirs = [[torch.nn.Parameter(p[i].clone()) for i in range(4)] for p in param]
    options = dict(lr=3e-3, betas=(beta1, beta2), weight_decay=weight_decay, foreach=False, fused=False)
    optimizers = [[torch.optim.AdamW([r], **options) for r in rows] for rows in theirs]
    for _ in range(3 if backend == "triton" else 30):
        rows = [torch.randperm(4)[: torch.randint(0, 5, ())] for _ in shapes]
        grad = [torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-6, 1) for shape in shapes]
        indexed_adamw_(param, grad, exp_avg, exp_avg_sq, step, rows, 3e-3, beta1, beta2, 1e-8, weight_decay)
        for t, named in enumerate(rows):
            for i in named.tolist():
                theirs[t][i].grad = grad[t][i].clone()
                optimizers[t][i].step()
    for t in range(len(shapes)):
        for i in range(4):
            state = optimizers[t][i].state[theirs[t][i]]
            assert step[t][i] == (state["step"] if state else 0)
            pairs = [(param[t][i], theirs[t][i].data)]
            if state:
                pairs += [(exp_avg[t][i], state["exp_avg"]), (exp_avg_sq[t][i], state["exp_avg_sq"])]
            for got, wanted in pairs:
                if backend == "triton":
                    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
                else:
                    assert torch.equal(got, wanted)


def test_bias_correction_of_late_steps(backend, monkeypatch):
    """A row may have taken very many steps: one step from n equals torch.optim.AdamW's from n."""
    if backend == "cpu":
        monkeypatch.setattr(torch.Tensor, "sqrt", correct_sqrt)
    counts = torch.tensor([0, 1, 17, 999, 123456, 20_000_000])
    param, exp_avg, exp_avg_sq, step = fresh_state([(6, 33)])
    step[0].copy_(counts)
    exp_avg[0].normal_()
    exp_avg_sq[0].uniform_(0.1, 1)
    grad, wanted = torch.randn(6, 33), []
    for i, n in enumerate(counts.tolist()):
        row = torch.nn.Parameter(param[0][i].clone())
        optimizer = torch.optim.AdamW([row], lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1, foreach=False, fused=False)
        moments = dict(exp_avg=exp_avg[0][i].clone(), exp_avg_sq=exp_avg_sq[0][i].clone())
        optimizer.state[row] = dict(step=torch.tensor(n, dtype=torch.float64), **moments)
        row.grad = grad[i].clone()
        optimizer.step()
        wanted.append(row.data)
    indexed_adamw_(param, [grad], exp_avg, exp_avg_sq, step, [torch.arange(6)], **HYPER)
    assert torch.equal(step[0], counts + 1)
    if backend == "triton":
        torch.testing.assert_close(param[0], torch.stack(wanted), rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(param[0], torch.stack(wanted))


def test_one_step_is_within_an_ulp_of_torch(backend):
    """PyTorch's root included: 1 ulp of the parameter and, for the root and two divisions, 3 of the update."""
    row, grad = torch.nn.Parameter(torch.randn(5000)), torch.randn(5000)
    param, exp_avg, exp_avg_sq, step = fresh_state([(1, 5000)])
    param[0][0].copy_(row.data)
    optimizer = torch.optim.AdamW([row], lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1, foreach=False, fused=False)
    row.grad = grad.clone()
    optimizer.step()
    before = param[0].clone()
    indexed_adamw_(param, [grad[None]], exp_avg, exp_avg_sq, step, [torch.tensor([0])], **HYPER)
    update = (param[0] - before).abs()
    allowed = torch.finfo(torch.float32).eps * (param[0].abs() + 3 * update)[0]
    assert ((param[0][0] - row.data).abs() <= allowed).all()
    ulps = (exp_avg[0][0].view(torch.int32) - optimizer.state[row]["exp_avg"].view(torch.int32)).abs().max()
    assert ulps <= (backend == "triton")


def test_rows_not_named_keep_every_bit(backend):
    args = make("odd")
    poison = [~torch.isin(torch.arange(len(p)), at) for p, at in zip(args[0], args[5], strict=True)]
    for values in (args[1], args[2]):  # not even NaN of another row may leak
        for value, others in zip(values, poison, strict=True):
            value[others] = float("nan")
    before = [[t.clone() for t in values] for values in args[:5]]
    indexed_adamw_(*args)
    for values, olds in zip(args[:5], before, strict=True):
        for value, old, others in zip(values, olds, poison, strict=True):
            assert torch.equal(value[others].view(torch.uint8), old[others].view(torch.uint8))
    for values in (args[0], args[2], args[3]):
        assert all(torch.isfinite(v[~others]).all() for v, others in zip(values, poison, strict=True))


@pytest.mark.skipif(_native.MISSING is not None, reason="needs the native library, which needs a C++ compiler")
def test_threads_do_not_change_a_bit():
    shapes = [(3, 70_001), (5, 16), (4, 33_333), (7,)]
    results = []
    start = fresh_state(shapes)
    grad = [torch.randn(shape) for shape in shapes]
    rows = [torch.randperm(shape[0])[: shape[0] - 1] for shape in shapes]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            own = [[t.clone() for t in values] for values in start]
            with use("cpu"):
                for _ in range(2):
                    indexed_adamw_(own[0], grad, *own[1:], rows, **HYPER)
            results.append([t for values in own for t in values])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_parameters_that_ask_for_gradients_are_updated_in_place(backend):
    args = list(make())
    args[0] = [p.requires_grad_() for p in args[0]]
    versions = [p._version for p in args[0]]
    indexed_adamw_(*args)
    assert all(p.grad_fn is None for p in args[0])
    assert all(p._version > v for p, v in zip(args[0], versions, strict=True)), "autograd must see the write"


def test_no_tensor_at_all_is_fine():
    indexed_adamw_([], [], [], [], [], [], 1e-3)


def test_bad_input_is_named(backend):
    args = make()

    def call(position, value):
        changed = list(args)
        changed[position] = value
        before = [t.clone() for values in args[:5] for t in values]
        try:
            indexed_adamw_(*changed)
        finally:
            assert all(torch.equal(a, b) for a, b in zip([t for v in args[:5] for t in v], before, strict=True))

    rows = args[5]
    with pytest.raises(ValueError, match="indexed_adamw_: rows must be int64, got float32"):
        call(5, [rows[0].float(), rows[1]])
    with pytest.raises(ValueError, match=r"indexed_adamw_: rows\[0\] must be in 0..4, got 5"):
        call(5, [torch.tensor([1, 5]), rows[1]])
    with pytest.raises(ValueError, match=r"indexed_adamw_: rows\[1\] must be in 0..3, got -1"):
        call(5, [rows[0], torch.tensor([-1])])
    with pytest.raises(ValueError, match=r"indexed_adamw_: rows must be \[k\], got \[1, 1\]"):
        call(5, [rows[0], torch.zeros(1, 1, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"indexed_adamw_: grad must be \[5, 3, 2\], got \[5, 3\]"):
        call(1, [torch.zeros(5, 3), args[1][1]])
    with pytest.raises(ValueError, match=r"indexed_adamw_: step must be \[4\], got \[3\]"):
        call(4, [args[4][0], args[4][1][:3]])
    with pytest.raises(ValueError, match="indexed_adamw_: exp_avg must be a list of 2 tensors, got 1"):
        call(2, args[2][:1])
    with pytest.raises(ValueError, match=r"indexed_adamw_: rows\[1\] must be without repeats, got \[2, 0, 2\]"):
        call(5, [rows[0], torch.tensor([2, 0, 2])])
    with pytest.raises(ValueError, match="indexed_adamw_: param must be a list, got Tensor"):
        call(0, args[0][0])
    with pytest.raises(ValueError, match="indexed_adamw_: param must be a list, got generator"):
        call(0, (p for p in args[0]))
    with pytest.raises(ValueError, match="indexed_adamw_: rows must be a list, got NoneType"):
        call(5, None)


@pytest.mark.skipif(_native.MISSING is not None, reason="needs the native library, which needs a C++ compiler")
def test_strided_parameters_are_refused_by_name_and_fall_to_the_reference():
    args = list(make())
    args[0] = [args[0][0].transpose(1, 2).contiguous().transpose(1, 2), args[0][1]]
    with use("cpu"), pytest.raises(RuntimeError, match="must be contiguous"):
        indexed_adamw_(*args)
    indexed_adamw_(*args)

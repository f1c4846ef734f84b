"""The pool: heads against torch.nn modules, sampling frequencies, refresh, row-wise AdamW."""

import dataclasses

import pytest
import torch
from torch import nn

from nitrofusion.errors import InputError
from nitrofusion.pool import HeadPool, PoolConfig, RowAdamW
from nitrokernels.ops.head_pool import LevelParams, head_pool

CONFIG = PoolConfig(width=8, max_depth=2)
CHANNELS, SIDES = [6, 6, 10], [8, 4, 2]


def make_pool(**changes) -> HeadPool:
    return HeadPool(dataclasses.replace(CONFIG, **changes), CHANNELS, SIDES)


def as_module(pool: HeadPool, level: int, row: int) -> nn.Module:
    """One head rebuilt from torch.nn parts."""
    stack, width = pool.stacks[level], pool.config.width
    layers: list[nn.Module] = []
    for d in range(pool.depths[level]):
        conv = nn.Conv2d(stack[f"conv{d}"].shape[2], width, 4, stride=2, padding=1, bias=False)
        norm = nn.GroupNorm(pool.num_groups, width)
        conv.weight.data = stack[f"conv{d}"].data[row].clone()
        norm.weight.data, norm.bias.data = stack[f"norm_weight{d}"].data[row], stack[f"norm_bias{d}"].data[row]
        layers += [conv, norm, nn.SiLU()]
    logit = nn.Conv2d(width, 1, 1)
    logit.weight.data = stack["logit_weight"].data[row].view(1, width, 1, 1)
    logit.bias.data = stack["logit_bias"].data[row].view(1)
    return nn.Sequential(*layers, logit)


def test_480_heads():
    sdxl = HeadPool(PoolConfig(width=8), [8] * 10, [64, 64, 64, 32, 32, 32, 16, 16, 16, 16])
    assert sdxl.num_heads == 480
    assert sdxl.depths == [4, 4, 4, 4, 4, 4, 3, 3, 3, 3]


@pytest.mark.parametrize("width, groups", [(1, 1), (8, 1), (24, 3), (64, 8), (256, 32), (512, 32)])
def test_groups_of_eight_channels_and_at_most_32(width, groups):
    assert make_pool(width=width, max_depth=1).num_groups == groups


def test_every_timestep_may_be_a_t_star_and_no_other():
    PoolConfig(t_star=(0, 999), t_star_weights=(0, 1)).validate()
    for t in (-1, 1000):
        with pytest.raises(InputError, match="t_star must be timesteps in 0..999"):
            PoolConfig(t_star=(t,), t_star_weights=(1,)).validate()


def test_logits_equal_separate_modules():
    pool = make_pool(sampled_per_cell=2)
    with torch.no_grad():
        for p in pool.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    index = pool.sample(t_index=2)
    tasks = len(pool.config.tasks)
    features = [[torch.randn(3, c, s, s) for c, s in zip(CHANNELS, SIDES, strict=True)] for _ in range(tasks)]
    got = pool.logits(features, index).view(3, tasks, len(CHANNELS), 2)
    rows = index.view(tasks, len(CHANNELS), 2)
    for task in range(tasks):
        for level in range(len(CHANNELS)):
            for k in range(2):
                head = as_module(pool, level, int(rows[task, level, k]))
                wanted = head(features[task][level]).mean((1, 2, 3))
                torch.testing.assert_close(got[:, task, level, k], wanted, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    pool = HeadPool(PoolConfig(heads_per_cell=1, width=2, max_depth=1, t_star=(10,), t_star_weights=(1,)), [2], [4])
    pool.double()
    names = ("conv0", "norm_weight0", "norm_bias0", "logit_weight", "logit_bias")
    tensors = [pool.stacks[0][n].detach().requires_grad_() for n in names]
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0], [2], [1]])

    def run(x, conv, norm_weight, norm_bias, logit_weight, logit_bias):
        level = LevelParams((conv,), (norm_weight,), (norm_bias,), logit_weight, logit_bias)
        return head_pool([x, x, x], [0, 0, 0], index, [level], num_groups=1)

    assert torch.autograd.gradcheck(run, (x, *tensors))
    assert torch.autograd.gradgradcheck(run, (x, *tensors))


def test_sampling_visits_each_head_of_its_cell_equally_and_no_other():
    torch.manual_seed(0)
    pool = make_pool()
    counts = torch.zeros(len(CHANNELS), pool.rows)
    draws = 4000
    for _ in range(draws):
        index = pool.sample(t_index=1).view(len(pool.config.tasks), len(CHANNELS), -1)
        for level in range(len(CHANNELS)):
            counts[level, index[:, level].flatten()] += 1
    cell = torch.arange(pool.rows) // pool.config.heads_per_cell % len(pool.config.t_star)
    assert (counts[:, cell != 1] == 0).all()
    expected = draws / pool.config.heads_per_cell
    sigma = (draws * 0.25 * 0.75) ** 0.5
    assert ((counts[:, cell == 1] - expected).abs() < 5 * sigma).all()


def test_refresh_touches_its_rows_and_their_state_and_nothing_else():
    torch.manual_seed(3)
    pool = make_pool(refresh_rate=0.1)
    optimizer = RowAdamW(pool.parameters(), lr=1e-3)
    for p in pool.parameters():
        optimizer.state[p]["step"] += 7
        optimizer.state[p]["exp_avg"].normal_()
        optimizer.state[p]["exp_avg_sq"].uniform_(0.5, 1)
    pool.age += 5
    before = [{k: v.clone() for k, v in stack.items()} for stack in pool.stacks]
    state = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in pool.parameters()}
    heads = pool.refresh(optimizer)
    assert len(heads) in (14, 15) and len(set(heads)) == len(heads)  # 10 % of 144
    for level, stack in enumerate(pool.stacks):
        rows = torch.zeros(pool.rows, dtype=torch.bool)
        rows[[row for at, row in heads if at == level]] = True
        assert (pool.age[level][rows] == 0).all() and (pool.age[level][~rows] == 5).all()
        for name, p in stack.items():
            assert torch.equal(p[~rows], before[level][name][~rows])
            if name.startswith("conv"):
                changed = (p[rows] != before[level][name][rows]).flatten(1).float().mean(1)
                assert (changed > 0.99).all()
                bound = (3 / p[0, 0].numel()) ** 0.5
                assert p[rows].abs().max() <= bound if rows.any() else True
            for key, value in optimizer.state[p].items():
                assert (value[rows] == 0).all(), f"{name}.{key} must be forgotten"
                assert torch.equal(value[~rows], state[p][key][~rows])


def test_no_refresh_and_no_pool_are_config_values():
    assert make_pool(refresh_rate=0).refresh() == []
    assert make_pool(heads_per_cell=1).num_heads == 3 * 4 * 3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_row_adamw_equals_torch_on_the_rows_it_touches(weight_decay):
    torch.manual_seed(1)
    table = nn.Parameter(torch.randn(5, 3, 2))
    rows = [nn.Parameter(table.data[i].clone()) for i in range(5)]
    ours = RowAdamW([table], lr=3e-3, betas=(0.5, 0.95), weight_decay=weight_decay)
    theirs = [torch.optim.AdamW([r], lr=3e-3, betas=(0.5, 0.95), weight_decay=weight_decay) for r in rows]
    untouched = table.data[4].clone()
    for _ in range(12):
        active = torch.randperm(4)[:2]
        grad = torch.zeros_like(table)
        grad[active] = torch.randn(2, 3, 2)
        table.grad = grad
        ours.mark_rows(table, active)
        ours.step()
        for i in active.tolist():
            rows[i].grad = grad[i]
            theirs[i].step()
    for i in range(5):
        torch.testing.assert_close(table.data[i], rows[i].data, rtol=1e-6, atol=1e-7)
    assert torch.equal(table.data[4], untouched)


def test_offloaded_state_changes_no_bit():
    torch.manual_seed(2)
    values, pools = torch.randn(6, 5, 3), []
    for offload in (False, True):
        table = nn.Parameter(values.clone())
        pools.append((table, RowAdamW([table], lr=3e-3, betas=(0.5, 0.95), weight_decay=0.1, offload=offload)))
    for _ in range(9):
        active, grad = torch.randperm(6)[:3], torch.randn(3, 5, 3)
        for table, optimizer in pools:
            table.grad = torch.zeros_like(table)
            table.grad[active] = grad
            optimizer.mark_rows(table, active)
            optimizer.step()
    (a, plain), (b, offloaded) = pools
    assert torch.equal(a, b) and not torch.equal(a, values)
    for key, value in plain.state[a].items():
        assert torch.equal(value, offloaded.state[b][key])
        assert offloaded.state[b][key].device.type == "cpu"


def test_refresh_forgets_offloaded_state():
    pools = []
    for offload in (False, True):
        torch.manual_seed(3)
        pool = make_pool(refresh_rate=0.5)
        optimizer = RowAdamW(pool.parameters(), lr=1e-3, offload=offload)
        for p in pool.parameters():
            for value in optimizer.state[p].values():
                value.fill_(7)
        pool.refresh(optimizer)
        pools.append((pool, optimizer))
    (a, plain), (b, offloaded) = pools
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in plain.state[p].items():
            assert torch.equal(value, offloaded.state[q][key])
            assert {0, 7} == set(value.flatten().tolist())


def test_a_silent_head_pulls_nowhere_until_it_has_learnt():
    torch.manual_seed(5)
    loud, silent = make_pool(), make_pool(logit_init=0.0)
    features = [[torch.randn(3, c, s, s) for c, s in zip(CHANNELS, SIDES, strict=True)] for _ in range(3)]
    for pool, speaks in ((loud, True), (silent, False)):
        inputs = [[f.clone().requires_grad_() for f in taps] for taps in features]
        logits = pool.logits(inputs, pool.sample(1))
        logits.mean().backward()
        assert (logits.abs().max() > 0) == speaks
        assert (max(f.grad.abs().max() for taps in inputs for f in taps) > 0) == speaks
        weights = [stack["logit_weight"] for stack in pool.stacks]
        assert max(w.grad.abs().max() for w in weights) > 0  # it learns all the same


def test_bad_shapes_are_named():
    pool = make_pool()
    index = pool.sample(0)
    with pytest.raises(ValueError, match=r"features of level 0 must be \[2, 6, H, W\], got \[2, 7, 8, 8\]"):
        head_pool([torch.zeros(2, 7, 8, 8)], [0], index[:1], pool.params())
    with pytest.raises(ValueError, match="tasks must be among"):
        make_pool(tasks=("global",))
    with pytest.raises(ValueError, match="sampled_per_cell must be in"):
        make_pool(sampled_per_cell=9)

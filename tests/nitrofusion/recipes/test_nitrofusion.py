"""The recipe on a tiny SDXL-form model: who gets gradients, what the heads see, and a game that can be won."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nitrokernels
from nitrofusion import losses, schedule
from nitrofusion.config import TrainConfig
from nitrofusion.models import sdxl
from nitrofusion.pool import HeadPool, PoolConfig
from nitrofusion.presets import MODELS
from nitrofusion.recipes import Batch, build
from nitrofusion.recipes.nitrofusion import NitroFusion, crop

from ..test_pool import as_module
from ..tiny import tiny_folder, tiny_model

CONFIG = TrainConfig(
    batch_size=2,
    accumulation=4,
    stages=(3, 3, 3, 3),
    crop_size=8,
    precision="fp32",
    shifted_timestep=500,
    pool=PoolConfig(width=8, max_depth=2),
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def make(model, **changes) -> tuple[NitroFusion, torch.nn.Module]:
    student = type(model.unet).from_config(model.unet.config)
    student.load_state_dict(model.unet.state_dict())
    return build(dataclasses.replace(CONFIG, **changes), model, student), student


def make_batch(model, step=0, size=2, seed=0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    latents = (size, 4, model.latent_size, model.latent_size)
    cond = sdxl.encode_prompt(model, ["a red circle on a gray background"] * size)
    return Batch(torch.randn(latents, generator=g), torch.randn(latents, generator=g), cond, step, g)


def test_crops_against_slicing():
    x, top, left = torch.randn(5, 4, 16, 16), torch.randint(0, 9, (5,)), torch.randint(0, 9, (5,))
    wanted = torch.stack([im[:, t : t + 8, s : s + 8] for im, t, s in zip(x, top, left, strict=True)])
    assert torch.equal(crop(x, top, left, 8), wanted)


def test_time_ids_of_a_crop(model):
    rows = model.time_ids(2, torch.tensor([3, 0]), torch.tensor([5, 8]), 8, 8)
    scale, full = model.vae_scale, model.resolution
    assert rows.tolist() == [
        [full, full, 3 * scale, 5 * scale, 8 * scale, 8 * scale],
        [full, full, 0, 8 * scale, 8 * scale, 8 * scale],
    ]


def test_each_phase_moves_only_its_module(model):
    recipe, student = make(model)
    batch = make_batch(model)
    student.requires_grad_(True)
    recipe.pool.requires_grad_(False)
    sum(t.mean() for t in recipe.loss("student", batch).values()).backward()
    assert all(p.grad is None for p in recipe.pool.parameters())
    assert all(p.grad is None for p in model.unet.parameters())
    assert sum(p.grad is not None and bool(p.grad.abs().sum()) for p in student.parameters()) > 50
    student.zero_grad()
    student.requires_grad_(False)
    recipe.pool.requires_grad_(True)
    sum(t.mean() for t in recipe.loss("pool", batch).values()).backward()
    assert all(p.grad is None for p in student.parameters())
    rows = batch.shared["plan"].rows.view(3, 10, -1)
    for level, stack in enumerate(recipe.pool.stacks):
        touched = stack["conv0"].grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()
        assert set(touched) <= set(rows[:, level].flatten().tolist()) and touched


def test_logits_equal_a_straight_evaluation(model):
    """The shared encoder passes against one pass per task and image set, from the same noise."""
    recipe, _ = make(model)
    batch = make_batch(model)
    plan = recipe._plan(batch)
    recipe_noise = torch.Generator().manual_seed(5)
    drawn = []
    original = torch.randn_like

    def fixed(x):
        drawn.append(torch.randn(x.shape, generator=recipe_noise))
        return drawn[-1]

    torch.randn_like = fixed
    try:
        got = recipe._features(batch.target, batch, plan)
    finally:
        torch.randn_like = original
    t_star = CONFIG.pool.t_star[plan.t_index]
    t = torch.full((2,), t_star)
    full, crops = drawn
    x_t = schedule.add_noise(batch.target, full, t, model.alphas_cumprod)
    wanted = [sdxl.encoder_features(model.unet, x_t, t, batch.cond)]
    for k, cond in enumerate((batch.cond, batch.cond.null())):
        window = crop(batch.target, plan.top[k], plan.left[k], 8)
        x_t = schedule.add_noise(window, crops[2 * k : 2 * k + 2], t, model.alphas_cumprod)
        ids = model.time_ids(2, plan.top[k], plan.left[k], 8, 8)
        wanted.append(sdxl.encoder_features(model.unet, x_t, t, cond.with_time_ids(ids)))
    for a, b in zip(got, wanted, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tasks", [PoolConfig.tasks, ("global-cond",)])
def test_gradient_share_is_that_of_the_heads_in_their_features(model, tasks, monkeypatch):
    recipe, student = make(model, pool=dataclasses.replace(CONFIG.pool, tasks=tasks))
    assert recipe._gradient_share() == {}
    seen, features, wanted = [], recipe._features, {}
    monkeypatch.setattr(recipe, "_features", lambda *args: seen.append(features(*args)) or seen[-1])
    for seed in (1, 2):
        batch = make_batch(model, seed=seed)
        torch.manual_seed(seed)
        sum(t.mean() for t in recipe.loss("student", batch).values()).backward()
        plan = batch.shared["plan"]
        copies = [[f.detach().double().requires_grad_() for f in taps] for taps in seen[-1]]
        with nitrokernels.use("ref"):
            logits = recipe.pool.double().logits(copies, plan.rows)
        recipe.pool.float()
        (-logits).flatten(1).mean(1).mean().backward()
        for task, taps in zip(tasks, copies, strict=True):
            levels = wanted.setdefault(f"{task}/{CONFIG.pool.t_star[plan.t_index]}", [0.0] * len(taps))
            for level, f in enumerate(taps):
                levels[level] += f.grad.square().sum().item()
    total = sum(map(sum, wanted.values()))
    share = recipe.end_step(0)["gradient_share"]
    assert share.keys() == wanted.keys() and len(share) in (len(tasks), 2 * len(tasks))
    for name, levels in share.items():
        assert levels == pytest.approx([v / total for v in wanted[name]], rel=1e-3, abs=1e-5)
    assert sum(map(sum, share.values())) == pytest.approx(1, abs=1e-3) and "gradient_share" not in recipe.end_step(1)


def test_t_star_is_stratified_within_a_step(model):
    recipe, _ = make(model)
    for _ in range(5):
        seen = [recipe._plan(make_batch(model, seed=s)).t_index for s in range(4)]
        assert sorted(seen) == [0, 1, 2, 3]
    weighted, _ = make(model, accumulation=8, pool=PoolConfig(width=8, max_depth=2, t_star_weights=(5, 1, 1, 1)))
    seen = [weighted._plan(make_batch(model, seed=s)).t_index for s in range(8)]
    assert sorted(seen) == [0, 0, 0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("accumulation, sampled, touched", [(1, 1, 1 / 16), (1, 4, 1 / 4), (20, 1, 1 - (3 / 4) ** 5)])
def test_head_lives_follow_the_arithmetic(accumulation, sampled, touched):
    """At 1 % refresh a head lives 100 optimizer steps and is updated in ``touched`` of them."""
    pool = HeadPool(PoolConfig(width=8, max_depth=1, sampled_per_cell=sampled), [1] * 10, [4] * 10)
    assert pool.num_heads == 480
    drawer = SimpleNamespace(config=dataclasses.replace(CONFIG, accumulation=accumulation, pool=pool.config))
    updates, lives, refreshed = torch.zeros(10, pool.rows), [], 0
    for step in range(1800):
        active = torch.zeros_like(updates, dtype=torch.bool)
        for t_index in NitroFusion._shuffle_t(drawer):
            rows = pool.sample(t_index).view(3, 10, sampled)
            for level in range(10):
                active[level, rows[:, level].flatten()] = True
        updates += active
        pool.age += 1
        ages = pool.age.clone()
        for level, row in pool.refresh():
            assert pool.age[level, row] == 0
            if step > 600:  # lives that began with the pool are too short
                lives.append((int(ages[level, row]), int(updates[level, row])))
            updates[level, row] = 0
            refreshed += 1
    assert abs(refreshed / 1800 - 4.8) < 0.05
    age, count = torch.tensor(lives, dtype=torch.float64).mean(0).tolist()
    assert abs(age - 100) < 6  # the mean's standard error is 1.3
    assert abs(count - 100 * touched) < 0.07 * 100 * touched


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_stages_train_the_steps_of_their_trajectory(model, stage):
    from nitrofusion.student import choose_step

    step = 3 * (stage - 1)
    assert CONFIG.stage(step) == stage
    seen = [tuple(choose_step(CONFIG, make_batch(model, step=step, seed=s))) for s in range(400)]
    full = tuple(schedule.origin_timesteps(stage))
    assert set(seen) == {full[: k + 1] for k in range(stage)}
    share = sum(len(s) == 1 for s in seen) / len(seen)
    assert abs(share - CONFIG.first_step_weight[stage - 1]) < 0.12


@pytest.mark.parametrize("recipe, weight", [("regression", 0.0), ("nitrofusion", 2.0)])
def test_a_later_step_regresses_to_where_the_teacher_ends_from_there(model, recipe, weight, monkeypatch):
    """Against a DDIM loop written out, from the very latents the student's last call saw."""
    model = dataclasses.replace(model, folder=Path(MODELS["world-teacher"].folder))  # of the same betas
    recipe, student = make(model, recipe=recipe, teacher_scheduler="ddim_trailing", regression_weight=weight)
    path = [999, 749, 499]
    monkeypatch.setattr(f"{type(recipe).__module__}.choose_step", lambda *_: path)
    seen, inner = [], sdxl.denoise
    watched = "nitrofusion.sampling.denoise_unet"
    monkeypatch.setattr(watched, lambda u, x, t, c: seen.append((u, x, t)) or inner(u, x, t, c))
    batch = make_batch(model)
    value = recipe.loss("student", batch)["regression"]
    assert [int(t[0]) for u, _, t in seen if u is student] == [499, 374, 249]
    a, x = model.alphas_cumprod, [x for u, x, _ in seen if u is student][-1]
    with torch.no_grad():
        eps = inner(student, x, torch.full((2,), 249), batch.cond)
        x0 = (x - (1 - a[249]).sqrt() * eps) / a[249].sqrt()
        for t, t_next in ((499, 374), (374, 249), (249, 124), (124, 0)):
            bare, text = (inner(model.unet, x, torch.full((2,), t), c) for c in (batch.cond.null(), batch.cond))
            eps = bare + recipe.config.guidance_scale * (text - bare)
            x = a[t_next].sqrt() * (x - (1 - a[t]).sqrt() * eps) / a[t].sqrt() + (1 - a[t_next]).sqrt() * eps
    wanted = (x0 - x).square().flatten(1).mean(1)
    torch.testing.assert_close(value, max(weight, 1) * wanted, rtol=1e-4, atol=1e-5)


def test_two_samples_overfit(model):
    """Regression to two fixed targets goes to zero: gradients reach every weight that matters."""
    recipe, student = make(model, recipe="regression", lr=3e-3, betas=(0.9, 0.99))
    batch = make_batch(model)
    optimizer = recipe.phases[0].optimizer
    student.requires_grad_(True)
    losses = []
    for _ in range(250):
        value = recipe.loss("student", batch)["regression"].mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.02 * losses[0]


def test_heads_learn_to_tell_real_from_fake(model):
    one_cell = PoolConfig(width=8, max_depth=2, heads_per_cell=1, t_star=(10,), t_star_weights=(1.0,))
    recipe, student = make(model, head_lr=5e-3, pool=one_cell)
    student.requires_grad_(False)
    pool, optimizer = recipe.pool, recipe.phases[1].optimizer
    gaps = []
    for step in range(30):
        batch = make_batch(model, seed=100)
        batch.plan.manual_seed(step)
        torch.manual_seed(step)
        batch.target.mul_(2.0)  # an easy difference, and every head sees it every step
        value = recipe.loss("pool", batch)["adversarial"].mean()
        value.backward()
        optimizer.step()
        pool.zero_grad()
        gaps.append(value.item())
    assert sum(gaps[-5:]) / 5 < 0.8 * sum(gaps[:5]) / 5
    line = recipe.end_step(0)
    assert set(line["cells"]) <= {f"{task}/10" for task in CONFIG.pool.tasks}
    assert len(next(iter(line["cells"].values()))["real"]) == 10


@pytest.mark.parametrize("kind", ["hinge", "wgan", "ns"])
def test_misaligned_pairs_and_r1_against_a_straight_evaluation(model, kind, monkeypatch):
    """Every head by itself, with torch's own modules in fp64, on the features the recipe computed."""
    options = {"r1_weight": 0.7, "misaligned_weight": 0.3}
    recipe, _ = make(model, loss=kind, options=options, batch_size=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in recipe.pool.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    batch = make_batch(model, size=3)
    batch.cond = sdxl.encode_prompt(model, ["a red ring", "a blue star", "a green square on a navy background"])
    seen, inner = [], recipe._features

    def watched(x, of, plan):
        seen.append((x, of.cond, inner(x, of, plan)))
        return seen[-1][2]

    monkeypatch.setattr(recipe, "_features", watched)
    recipe.pool.requires_grad_(True)
    terms = recipe.loss("pool", batch)
    (_, _, fake), (_, _, real), (shown, rolled, wrong) = seen
    assert shown is batch.target and torch.equal(rolled.prompt_embeds, batch.cond.prompt_embeds[[2, 0, 1]])
    rows = batch.shared["plan"].rows.view(3, 10, -1)
    heads = [[as_module(recipe.pool, level, int(rows[k, level, 0])).double() for level in range(10)] for k in range(3)]

    def logits(taps):
        inputs = [[f.detach().double().requires_grad_() for f in task] for task in taps]
        each = [
            torch.stack([h(f).mean((1, 2, 3)) for h, f in zip(*pair, strict=True)], 1)
            for pair in zip(heads, inputs, strict=True)
        ]
        return torch.cat(each, 1), [f for task in inputs for f in task]

    with torch.no_grad():
        on_fake, on_wrong = logits(fake)[0], logits(wrong)[0][:, :20]  # global and local, not unconditional
    on_real, inputs = logits(real)
    close = {"rtol": 1e-3, "atol": 1e-4}
    wanted = losses.discriminator_loss(kind, on_real.detach(), on_fake)
    torch.testing.assert_close(terms["adversarial"].double(), wanted, **close)
    torch.testing.assert_close(terms["misaligned"].double(), 0.3 * losses.fake_loss(kind, on_wrong), **close)
    each = [torch.autograd.grad(on_real[:, i].sum(), f, create_graph=True)[0] for i, f in enumerate(inputs)]
    penalty = torch.stack([g.square().flatten(1).sum(1) for g in each]).mean(0)  # ADD: of each head in its own input
    torch.testing.assert_close(terms["r1"].double(), 0.7 * penalty, **close)
    # The fused heads' second order: gradients of the penalty in the weights.
    terms["r1"].mean().backward()
    (0.7 * penalty.mean()).backward()
    for level in (0, 4, 9):
        ours = recipe.pool.stacks[level]["conv0"].grad[int(rows[1, level, 0])]
        theirs = heads[1][level][0].weight.grad
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-3 * theirs.abs().max().item())


def test_unknown_recipe_suggests(model):
    with pytest.raises(Exception, match="did you mean nitrofusion"):
        make(model, recipe="nitrofuson")


def test_another_backbone_gives_the_features(model, tmp_path):
    own, _ = make(model)
    assert own.backbone is model.unet
    other, _ = make(model, backbone=str(tiny_folder(tmp_path, seed=1)))
    assert not torch.equal(other.backbone.conv_in.weight, model.unet.conv_in.weight)
    assert not any(p.requires_grad for p in other.backbone.parameters())


def test_r1_of_two_heads_on_a_map_is_that_of_each(model):
    """Sampling more heads changes how many are averaged over, not the size of the term."""
    pool = dataclasses.replace(CONFIG.pool, heads_per_cell=2, sampled_per_cell=2)
    recipe, _ = make(model, pool=pool, options={"r1_weight": 1.0})
    recipe.pool.requires_grad_(True)
    batch, kept, inner = make_batch(model), [], recipe.pool.logits

    def watched(features, rows):
        kept.append(([f for taps in features for f in taps], rows))
        return inner(features, rows)

    recipe.pool.logits = watched
    got = recipe.loss("pool", batch)["r1"]
    features, rows = kept[0]
    count, each = len(batch.noise), []
    for entry, (f, two) in enumerate(zip(features, rows, strict=True)):
        x = f[:count].detach().requires_grad_()
        for row in two.tolist():
            logit = as_module(recipe.pool, entry % 10, row)(x).mean((1, 2, 3))
            each.append(torch.autograd.grad(logit.sum(), x)[0].square().flatten(1).sum(1))
    torch.testing.assert_close(got, torch.stack(each).mean(0), rtol=1e-3, atol=1e-6)

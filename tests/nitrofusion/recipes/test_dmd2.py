"""DMD2: its gradient where it is known, the two scores under guidance, the head on the fake score's mid block."""

import dataclasses

import pytest
import torch
from torch import nn

from nitrofusion.config import TrainConfig
from nitrofusion.errors import NitroError
from nitrofusion.models import sdxl
from nitrofusion.pool import PoolConfig
from nitrofusion.recipes import build
from nitrofusion.student import make_student
from nitrofusion.train import plan, train
from nitrofusion.train.loop import Trainer

from ..tiny import tiny_folder
from .scores import (
    Gaussians,
    assert_resume_equals_uninterrupted,
    logged,
    make_batch,
    moved,
    overfit,
    require,
    run_config,
)

CONFIG = TrainConfig(
    recipe="dmd2", init=None, batch_size=3, precision="fp32", pool=PoolConfig(width=16, max_depth=2), head_lr=1e-3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("teacher"), loud=True)


@pytest.fixture(scope="module")
def model(folder):
    return sdxl.load(folder)


def make(model, options=None, **changes):
    config = dataclasses.replace(CONFIG, options=options or {}, **changes)
    student = make_student(config, model)
    recipe = build(config, model, student)
    with torch.no_grad():
        for weight in recipe.fake.parameters():  # as after some training: it begins as the teacher
            weight.add_(0.02 * torch.randn_like(weight))
    return recipe, student


def test_gradient_is_that_of_the_integrated_divergence(model, monkeypatch):
    """Student a z + b against data N(m, s^2), both scores known: d/da and d/db of sum_t c(t) KL_t, by differences."""
    recipe, _ = make(model, {"gan_weight": 0.0})
    toy = Gaussians(model.alphas_cumprod)
    a, b, draw = toy.install(monkeypatch, recipe)
    repeats = 4
    for _ in range(repeats):
        recipe.loss("student", draw())["dmd"].sum().backward()
    wanted = toy.gradient(toy.dmd_weight)
    assert (a.grad.item() / repeats, b.grad.item() / repeats) == pytest.approx(wanted, rel=0.03)


def test_descent_along_the_gradient_ends_at_the_data(model, monkeypatch):
    recipe, _ = make(model, {"gan_weight": 0.0})
    toy = Gaussians(model.alphas_cumprod)
    a, b, draw = toy.install(monkeypatch, recipe, side=4)
    optimizer = torch.optim.Adam([a, b], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        recipe.loss("student", draw())["dmd"].mean().backward()
        optimizer.step()
    assert a.item() == pytest.approx(toy.s, abs=0.05) and b.item() == pytest.approx(toy.m, abs=0.05)


@pytest.mark.parametrize("real_guidance, fake_guidance", [(8.0, 1.0), (1.0, 2.5)])
def test_gradient_against_each_score_by_itself(model, real_guidance, fake_guidance):
    """Image by image, prompt by prompt, in doubles around the UNets' calls."""
    recipe, _ = make(model, {"real_guidance": real_guidance, "fake_guidance": fake_guidance})
    batch, x0 = make_batch(model), torch.randn(3, 4, 16, 16)
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    got = recipe._gradient(x0, batch)
    torch.manual_seed(seed)
    t, noise = torch.randint(20, 981, (3,)), torch.randn_like(x0)
    for i in range(3):
        only, at = batch.cond[i : i + 1], t[i : i + 1]
        ab = model.alphas_cumprod[t[i]].double().item()
        x_t = ab**0.5 * x0[i : i + 1].double() + (1 - ab) ** 0.5 * noise[i : i + 1].double()

        def guess(unet, scale, x_t=x_t, at=at, only=only, ab=ab):
            null, text = (sdxl.denoise(unet, x_t.float(), at, c).detach().double() for c in (only.null(), only))
            return (x_t - (1 - ab) ** 0.5 * (null + scale * (text - null))) / ab**0.5

        real, fake = guess(model.unet, real_guidance), guess(recipe.fake, fake_guidance)
        wanted = (fake - real) / (x0[i : i + 1].double() - real).abs().mean()
        scale = wanted.abs().max().item()
        torch.testing.assert_close(got[i : i + 1].double(), wanted, rtol=2e-3, atol=2e-3 * scale)


def test_fake_score_learns_the_plain_epsilon_loss(model):
    recipe, _ = make(model, {"gan_weight": 0.0})
    batch = make_batch(model)
    x0 = batch.shared["x0"] = torch.randn(3, 4, 16, 16)
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    got = recipe.loss("fake", batch)["epsilon"]
    torch.manual_seed(seed)
    t, noise = torch.randint(0, 1000, (3,)), torch.randn_like(x0)
    for i in range(3):
        ab = model.alphas_cumprod[t[i]].double()
        x_t = (ab.sqrt() * x0[i].double() + (1 - ab).sqrt() * noise[i].double()).float()[None]
        eps = sdxl.denoise(recipe.fake, x_t, t[i : i + 1], batch.cond[i : i + 1])[0].detach().double()
        torch.testing.assert_close(got[i].double(), (eps - noise[i].double()).pow(2).mean(), rtol=1e-4, atol=1e-7)


def test_head_reads_what_the_decoder_would_get(model):
    """The mid block's output in diffusers' own forward, judged by torch.nn's parts; losses written out."""
    recipe, _ = make(model, {"gan_weight": 0.3, "classifier_weight": 0.7})
    batch, x0 = make_batch(model), torch.randn(3, 4, 16, 16)
    batch.shared["x0"] = x0
    stack, (depth,) = recipe.head.stacks[0], recipe.head.depths
    layers: list[nn.Module] = []
    for d in range(depth):
        conv = nn.Conv2d(stack[f"conv{d}"].shape[2], 16, 4, stride=2, padding=1, bias=False)
        norm = nn.GroupNorm(2, 16)
        conv.weight.data, norm.weight.data = stack[f"conv{d}"].data[0], stack[f"norm_weight{d}"].data[0]
        norm.bias.data = stack[f"norm_bias{d}"].data[0]
        layers += [conv, norm, nn.SiLU()]
    logit = nn.Conv2d(16, 1, 1)
    logit.weight.data = stack["logit_weight"].data[0].view(1, 16, 1, 1)
    logit.bias.data = stack["logit_bias"].data[0].view(1)
    judge = nn.Sequential(*layers, logit)

    def wanted(x, cond):
        t, noise = torch.randint(0, 1000, (len(x),)), torch.randn_like(x)
        ab = model.alphas_cumprod[t].view(-1, 1, 1, 1)
        seen = []
        hook = recipe.fake.mid_block.register_forward_hook(lambda _, __, out: seen.append(out))
        with torch.no_grad():
            sdxl.denoise(recipe.fake, ab.sqrt() * x + (1 - ab).sqrt() * noise, t, cond)
            out = judge(seen[0]).double().mean((1, 2, 3))
        hook.remove()
        return out

    seed = int(torch.randint(2**31, ()))
    with torch.no_grad():
        torch.manual_seed(seed)
        got = recipe._logits(x0, batch.cond, batch.draws)
    torch.manual_seed(seed)
    torch.testing.assert_close(got[:, 0].double(), wanted(x0, batch.cond), rtol=1e-3, atol=1e-4)

    torch.manual_seed(seed)
    term = recipe.loss("fake", batch)["gan"].detach().double()
    torch.manual_seed(seed)
    torch.randint(0, 1000, (3,)), torch.randn_like(x0)  # the epsilon loss's
    logits = wanted(torch.cat([batch.target, x0]), sdxl.Conditioning.cat([batch.cond, batch.cond]))
    loop = 0.7 * (torch.log1p(torch.exp(-logits[:3])) + torch.log1p(torch.exp(logits[3:])))
    torch.testing.assert_close(term, loop, rtol=1e-3, atol=1e-5)


def test_each_phase_moves_only_its_module(model):
    recipe, student = make(model)
    batch = make_batch(model)
    require(recipe, "student")
    terms = recipe.loss("student", batch)
    terms["gan"].mean().backward(retain_graph=True)
    assert moved(student) > 0.9 * len(list(student.parameters())), "through the fake score's encoder"
    terms["dmd"].mean().backward()
    assert not moved(recipe.phases[1].module) and not moved(model.unet)
    student.zero_grad()
    require(recipe, "fake")
    terms = recipe.loss("fake", batch)
    terms["gan"].mean().backward(retain_graph=True)
    assert moved(recipe.head) == len(list(recipe.head.parameters()))
    assert moved(recipe.fake.mid_block) and moved(recipe.fake.conv_in) and not moved(recipe.fake.conv_out)
    terms["epsilon"].mean().backward()
    assert moved(recipe.fake) > 0.9 * len(list(recipe.fake.parameters()))
    assert not moved(student) and not moved(model.unet)


def test_one_optimizer_holds_score_and_head(model):
    recipe, _ = make(model, {"fake_lr": 3e-5})
    groups = recipe.phases[1].optimizer.param_groups
    assert [g["lr"] for g in groups] == [3e-5, 1e-3]
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for p in [*recipe.fake.parameters(), *recipe.head.parameters()]}
    assert not {p.data_ptr() for p in recipe.fake.parameters()} & {p.data_ptr() for p in model.unet.parameters()}


def test_the_classifier_learns_and_the_student_is_told(model):
    """Real twice as bright as fake: the head sees it, and its gradient brightens the fake."""
    torch.manual_seed(0)
    recipe, _ = make(model, {"classifier_weight": 1.0, "gan_weight": 1.0})
    phase = require(recipe, "fake")
    optimizer = torch.optim.AdamW(phase.module.parameters(), lr=1e-3)
    batch = make_batch(model, seed=3)
    batch.shared["x0"] = torch.randn(3, 4, 16, 16)
    batch.target = 2 + batch.shared["x0"]
    values = []
    for step in range(60):
        torch.manual_seed(step % 4)
        terms = recipe.loss("fake", batch)
        values.append(terms["gan"].mean().item())
        optimizer.zero_grad()
        sum(v.mean() for v in terms.values()).backward()
        optimizer.step()
    assert sum(values[-8:]) < 0.7 * sum(values[:8])
    phase.module.requires_grad_(False)
    fake = batch.shared["x0"].clone().requires_grad_()
    torch.manual_seed(0)
    (grad,) = torch.autograd.grad(nn.functional.softplus(-recipe._logits(fake, batch.cond, batch.draws)).sum(), fake)
    assert grad.mean() < 0


def test_fake_score_overfits_its_samples(model):
    recipe, _ = make(model, {"gan_weight": 0.0})
    assert overfit(recipe, require(recipe, "fake"), make_batch(model, seed=1), lr=2e-3, steps=150) < 0.2


def test_backward_simulation_trains_later_steps(model, monkeypatch):
    recipe, student = make(model, {"gan_weight": 0.0}, stages=(0, 0, 0, 5), first_step_weight=(1.0, 1.0, 1.0, 0.25))
    told, inner = [], sdxl.denoise
    monkeypatch.setattr(
        "nitrofusion.sampling.denoise_unet", lambda u, x, t, c: told.append(t[0].item()) or inner(u, x, t, c)
    )
    seen = set()
    for seed in range(60):
        told.clear()
        require(recipe, "fake")
        recipe.loss("fake", make_batch(model, 1, seed=seed))
        seen.add(tuple(told))
    assert seen == {(499,), (499, 374), (499, 374, 249), (499, 374, 249, 124)}


@pytest.mark.parametrize("gan_weight", [5e-3, 0.0])
def test_resume_equals_uninterrupted(folder, tmp_path, gan_weight):
    """With rendered pictures as real; without a GAN none are asked for. Two fake updates for each of the student."""
    images = "world" if gan_weight else None
    options = {"gan_weight": gan_weight, "fake_lr": 1e-4}
    config = run_config(folder, tmp_path / "run", "dmd2", options=options, images=images, generator_interval=2)
    lines = assert_resume_equals_uninterrupted(config, tmp_path / "broken")
    for line in lines:
        wanted = {"fake.epsilon"} | ({"student.dmd"} if line["step"] % 2 else set())
        wanted |= {name.split(".")[0] + ".gan" for name in wanted} if gan_weight else set()
        assert line["loss"].keys() == wanted


def test_the_teacher_is_untouched_and_a_student_of_adapters_trains(folder, tmp_path):
    config = run_config(folder, tmp_path / "run", "dmd2", images="world", options={"fake_lr": 1e-3}, lora_rank=2)
    trainer = Trainer(config)
    teacher = {k: v.clone() for k, v in trainer.model.unet.state_dict().items()}
    base = {k: v.clone() for k, v in trainer.student.state_dict().items() if "lora_" not in k}
    trainer.run()
    assert all(torch.equal(v, teacher[k]) for k, v in trainer.model.unet.state_dict().items())
    assert all(torch.equal(v, base[k]) for k, v in trainer.student.state_dict().items() if k in base)
    state = trainer.recipe.phases[0].module.state_dict()
    assert sum(bool(v.abs().sum()) for k, v in state.items() if "lora_B" in k) > 0.9 * len(state) / 2
    assert any(not torch.equal(v, teacher[k]) for k, v in trainer.recipe.fake.state_dict().items())


@pytest.mark.parametrize(
    "change", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"optimizer": "adamw8bit"}, {"ema_decay": 0.5}]
)
def test_every_switch_trains(folder, tmp_path, change):
    if "optimizer" in change:
        pytest.importorskip("bitsandbytes", reason="the 8bit extra")
    lines = logged(train(run_config(folder, tmp_path / "run", "dmd2", images="world", **change)))
    assert all(line["grad_norm"][name] > 0 for line in lines for name in ("student", "fake"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, r"images must be given for dmd2 with options.gan_weight above 0 .*, got None"),
        ({"options": {"gan_weight": -1.0}}, "options.gan_weight must be >= 0, got -1.0"),
        ({"options": {"real_guidance": -1.0}}, "options.real_guidance must be >= 0, got -1.0"),
        ({"options": {"fake_lr": 0.0}}, "options.fake_lr must be > 0, got 0.0"),
        ({"options": {"classifier_weight": 0}}, "options.classifier_weight must be > 0, got 0"),
        ({"options": {"fake_lr": "fast"}}, "options.fake_lr must be a number, got 'fast'"),
        ({"images": "/nowhere"}, "/nowhere must be a folder with metadata.jsonl, got nothing"),
    ],
)
def test_bad_input_is_refused_before_any_work(folder, tmp_path, changes, message):
    config = run_config(folder, tmp_path / "run", "dmd2", **changes)
    for call in (plan, train):
        with pytest.raises(NitroError, match=message) as caught:
            call(config)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_plan_counts_score_and_head(folder, tmp_path, model):
    config = run_config(folder, tmp_path / "run", "dmd2", images="world")
    memory = plan(config)["memory_bytes"]
    recipe, _ = make(model, pool=config.pool)
    for name, module in (("fake score", recipe.fake), ("classifier head", recipe.head)):
        weights = 4 * sum(p.numel() for p in module.parameters())
        assert memory[name] == weights and memory[f"{name} AdamW"] == 2 * weights
    without = plan(dataclasses.replace(config, images=None, options={"gan_weight": 0.0}))
    assert "classifier head" not in without["memory_bytes"]

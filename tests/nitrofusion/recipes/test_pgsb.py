"""PG-SB: its gradient where it is known, guidance, negative prompts, the LoRA teacher beside the teacher."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from nitrofusion.adapters import STUDENT_LAYERS, Adapters
from nitrofusion.config import TrainConfig
from nitrofusion.errors import NitroError
from nitrofusion.models import sdxl
from nitrofusion.models.nasa import Nasa
from nitrofusion.recipes import build
from nitrofusion.student import make_student, student_x0
from nitrofusion.train import plan, train
from nitrofusion.train.loop import Trainer

from ..test_negative import Equations
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

OPTIONS = {"teacher_rank": 4}
CONFIG = TrainConfig(recipe="pgsb", init=None, teacher_samples="none", batch_size=3, precision="fp32", options=OPTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("teacher"), loud=True)


@pytest.fixture(scope="module")
def model(folder):
    return sdxl.load(folder)


@pytest.fixture(scope="module")
def negatives(tmp_path_factory):
    file = tmp_path_factory.mktemp("negatives") / "negatives.txt"
    file.write_text("a striped green ring on a gray background\na white cross\n")
    return str(file)


def make(model, options=None, **changes):
    config = dataclasses.replace(CONFIG, options=OPTIONS | (options or {}), **changes)
    student = make_student(config, model)
    return build(config, model, student), student


def waken(adapters: Adapters) -> None:
    """Adapters as after some training: PEFT begins with what adds nothing."""
    with torch.no_grad():
        for weight in adapters.parameters():
            weight.add_(0.05 * torch.randn_like(weight))


def merged(model, adapters: Adapters, scale: float):
    """A plain UNet with the adapters' product added to its weights, in doubles."""
    unet = type(model.unet).from_config(model.unet.config)
    state = {k: v.double() for k, v in model.unet.state_dict().items()}
    lora = {k: v.double() for k, v in adapters.state_dict().items()}
    for name in lora:
        if name.endswith("lora_A.weight"):
            key = name.removeprefix("unet.").replace("lora_A.weight", "weight")
            state[key] = state[key] + scale * lora[name.replace("lora_A", "lora_B")] @ lora[name]
    unet.load_state_dict({k: v.float() for k, v in state.items()})
    return unet


@pytest.mark.parametrize("weighting", ["sigma2", "dmd"])
def test_gradient_is_that_of_the_integrated_divergence(model, monkeypatch, weighting):
    """Student a z + b against data N(m, s^2), both scores known: d/da and d/db of sum_t c(t) KL_t, by differences."""
    recipe, _ = make(model, {"weighting": weighting})
    toy = Gaussians(model.alphas_cumprod)
    a, b, draw = toy.install(monkeypatch, recipe)
    repeats = 4
    for _ in range(repeats):
        recipe.loss("student", draw())["vsd"].sum().backward()
    wanted = toy.gradient(toy.sigma2_weight if weighting == "sigma2" else toy.dmd_weight)
    assert (a.grad.item() / repeats, b.grad.item() / repeats) == pytest.approx(wanted, rel=0.03)


def test_descent_along_the_gradient_ends_at_the_data(model, monkeypatch):
    recipe, _ = make(model, {"weighting": "dmd"})
    toy = Gaussians(model.alphas_cumprod)
    a, b, draw = toy.install(monkeypatch, recipe, side=4)
    optimizer = torch.optim.Adam([a, b], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        recipe.loss("student", draw())["vsd"].mean().backward()
        optimizer.step()
    assert a.item() == pytest.approx(toy.s, abs=0.05) and b.item() == pytest.approx(toy.m, abs=0.05)


@pytest.mark.parametrize("weighting, negative", [("sigma2", False), ("dmd", False), ("dmd", True)])
def test_gradient_under_a_known_guidance(model, negatives, weighting, negative):
    """Image by image, prompt by prompt, with the adapters merged into a plain UNet; negatives lead away psi alone."""
    recipe, _ = make(model, {"weighting": weighting, "negative_prompts": negatives if negative else ""})
    adapters = recipe.phases[1].module
    waken(adapters)
    plain = merged(model, adapters, recipe.options.teacher_scale)
    batch, x0 = make_batch(model), torch.randn(3, 4, 16, 16)
    if negative:
        batch.shared["negative"] = sdxl.encode_prompt(model, ["a white cross"] * 3)
    kappa = torch.rand(3) * 4
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    got = recipe._gradient(x0, batch, kappa)

    torch.manual_seed(seed)
    t, noise = torch.randint(20, 981, (3,)), torch.randn_like(x0)
    for i in range(3):
        only, at, k = batch.cond[i : i + 1], t[i : i + 1], kappa[i].item()
        ab = model.alphas_cumprod[t[i]].double().item()
        x_t = ab**0.5 * x0[i : i + 1].double() + (1 - ab) ** 0.5 * noise[i : i + 1].double()
        away = batch.shared["negative"][i : i + 1] if negative else only.null()
        ask = lambda unet, cond: sdxl.denoise(unet, x_t.float(), at, cond).detach().double()  # noqa: B023, E731
        real = (1 - k) * ask(model.unet, away) + k * ask(model.unet, only)
        fake = (1 - k) * ask(plain, only.null()) + k * ask(plain, only)
        wanted = (1 - ab) * (real - fake)
        if weighting == "dmd":
            x0_real, x0_fake = ((x_t - (1 - ab) ** 0.5 * eps) / ab**0.5 for eps in (real, fake))
            wanted = (x0_fake - x0_real) / (x0[i : i + 1].double() - x0_real).abs().mean()
        scale = wanted.abs().max().item()
        torch.testing.assert_close(got[i : i + 1].double(), wanted, rtol=2e-3, atol=2e-3 * scale)


def test_both_teachers_share_each_samples_guidance_and_t_is_in_range(model, monkeypatch):
    recipe, _ = make(model, {"kappa_min": 0.5, "kappa_max": 4.0})
    calls = []
    monkeypatch.setattr("nitrofusion.recipes.pgsb.guided_eps", lambda *args: calls.append(args) or args[1])
    batch, x0 = make_batch(model), torch.randn(3, 4, 16, 16)
    monkeypatch.setattr("nitrofusion.recipes.pgsb.student_x0", lambda *_: x0.requires_grad_())
    for _ in range(300):
        recipe.loss("student", batch)
    real, fake = calls[::2], calls[1::2]
    assert all(r[0] is model.unet and f[0] is recipe.lora_teacher for r, f in zip(real, fake, strict=True))
    assert all(torch.equal(r[k], f[k]) for r, f in zip(real, fake, strict=True) for k in (1, 2, 4))
    kappa, t = (torch.stack([r[k] for r in real]) for k in (4, 2))
    assert 0.5 <= kappa.min() < 0.6 and 3.9 < kappa.max() <= 4.0
    assert (kappa[:, 0] != kappa[:, 1]).all(), "drawn for each sample"
    assert kappa.mean().item() == pytest.approx(2.25, abs=0.2)
    assert 20 <= t.min() < 60 and 940 < t.max() <= 980


@pytest.mark.parametrize("encoded", [False, True])
def test_lora_teacher_learns_the_plain_epsilon_loss(model, encoded):
    """Against a plain UNet with merged adapters, 10 % null prompts replayed, both sides times alpha_t."""
    recipe, _ = make(model, {"prompt_dropout": 0.5})
    adapters = recipe.phases[1].module
    waken(adapters)
    plain = merged(model, adapters, recipe.options.teacher_scale)
    batch = make_batch(model)
    if encoded:  # a teacher whose unconditional prompt is not zeros
        nothing = sdxl.encode_prompt(model, [""])
        batch.cond = dataclasses.replace(
            batch.cond, no_prompt=(5 * nothing.prompt_embeds, 5 * nothing.pooled_prompt_embeds)
        )
    x0 = batch.shared["x0"] = torch.randn(3, 4, 16, 16)
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    got = recipe.loss("lora_teacher", batch)["epsilon"]
    torch.manual_seed(seed)
    t, noise, kept = torch.randint(0, 1000, (3,)), torch.randn_like(x0), torch.rand(3) >= 0.5
    for i in range(3):
        ab = model.alphas_cumprod[t[i]].double()
        x_t = (ab.sqrt() * x0[i].double() + (1 - ab).sqrt() * noise[i].double()).float()[None]
        cond = batch.cond[i : i + 1] if kept[i] else batch.cond[i : i + 1].null()
        eps = sdxl.denoise(plain, x_t, t[i : i + 1], cond)[0].detach().double()
        wanted = (ab.sqrt() * eps - ab.sqrt() * noise[i].double()).pow(2).mean()
        torch.testing.assert_close(got[i].double(), wanted, rtol=1e-3, atol=1e-7)


def test_at_first_both_teachers_agree_and_share_every_weight(model):
    recipe, _ = make(model)
    theirs = dict(model.unet.named_parameters())
    names = {n.replace(".base_layer", ""): p for n, p in recipe.lora_teacher.named_parameters() if "lora_" not in n}
    assert names.keys() == theirs.keys()
    assert all(p.data_ptr() == theirs[n].data_ptr() for n, p in names.items())
    assert not any("lora" in n for n, _ in model.unet.named_modules())
    terms = recipe.loss("student", make_batch(model))
    assert (terms["vsd"] < 1e-9).all(), "the LoRA teacher begins as the teacher"


def test_each_phase_moves_only_its_module(model):
    recipe, student = make(model)
    adapters = recipe.phases[1].module
    waken(adapters)
    batch = make_batch(model)
    for name, mine, others in (
        ("student", student, (adapters, recipe.lora_teacher, model.unet)),
        ("lora_teacher", adapters, (student, model.unet)),
    ):
        require(recipe, name)
        sum(v.mean() for v in recipe.loss(name, batch).values()).backward()
        count = len(list(mine.parameters()))
        assert moved(mine) > 0.9 * count
        assert not any(moved(other) for other in others)
        base = [p for n, p in recipe.lora_teacher.named_parameters() if "lora_" not in n]
        assert all(p.grad is None for p in base)
        mine.zero_grad()
    assert not any(p.grad is not None for e in model.text_encoders for p in e.parameters())


def test_lora_teacher_overfits_its_samples(model):
    recipe, _ = make(model, {"prompt_dropout": 0.0, "teacher_rank": 16, "teacher_layers": STUDENT_LAYERS})
    assert overfit(recipe, require(recipe, "lora_teacher"), make_batch(model, seed=1), lr=3e-3, steps=60) < 0.3


def test_the_teacher_is_untouched_by_training(folder, tmp_path):
    """Its weights and what it predicts, to the bit, though the LoRA teacher hangs on the same tensors."""
    trainer = Trainer(run_config(folder, tmp_path / "run", "pgsb", options=OPTIONS | {"teacher_lr": 1e-2}))
    batch = make_batch(trainer.model)
    ask = torch.no_grad()(lambda unet: sdxl.denoise(unet, batch.noise, torch.tensor([1, 400, 999]), batch.cond))
    before, state = ask(trainer.model.unet), {k: v.clone() for k, v in trainer.model.unet.state_dict().items()}
    assert torch.equal(before, ask(trainer.recipe.lora_teacher))
    trainer.run()
    assert torch.equal(before, ask(trainer.model.unet))
    assert all(torch.equal(v, state[k]) for k, v in trainer.model.unet.state_dict().items())
    assert not torch.equal(before, ask(trainer.recipe.lora_teacher))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nasa_against_the_equations(folder, checkpointing):
    """A per-image alpha, outputs and gradients, image by image in doubles; outside of the context, nothing."""
    model, plain = sdxl.load(folder), sdxl.load(folder)
    model.unet.requires_grad_(True)
    plain.unet.requires_grad_(True)
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    batch, t, alpha = make_batch(model), torch.tensor([100, 500, 900]), torch.rand(3)
    away = sdxl.encode_prompt(model, ["a white cross", "a ring", "a blue star"])
    with torch.no_grad():
        before = sdxl.denoise(model.unet, batch.noise, t, batch.cond)
    nasa = Nasa(model.unet)
    with nasa.negative(away.prompt_embeds, alpha):
        got = sdxl.denoise(model.unet, batch.noise, t, batch.cond)
    direction = torch.randn_like(got)
    (got * direction).sum().backward()
    with torch.no_grad():
        assert torch.equal(before, sdxl.denoise(model.unet, batch.noise, t, batch.cond))
    for i in range(3):
        equations = Equations(away.prompt_embeds[i : i + 1], "nasa", alpha[i].item())
        processors = {k: equations if ".attn2." in k else v for k, v in plain.unet.attn_processors.items()}
        plain.unet.set_attn_processor(processors)
        wanted = sdxl.denoise(plain.unet, batch.noise[i : i + 1], t[i : i + 1], batch.cond[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], wanted, rtol=1e-4, atol=1e-5)
        (wanted * direction[i : i + 1]).sum().backward()
    assert (before - got).abs().max() > 1e-2
    theirs = dict(plain.unet.named_parameters())
    for name, p in model.unet.named_parameters():
        wanted = theirs[name].grad
        torch.testing.assert_close(p.grad, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_negative_prompts_act_in_student_and_teacher(model, negatives, monkeypatch):
    recipe, student = make(model, {"negative_prompts": negatives, "nasa_alpha": 0.5})
    seen = []
    inner = student_x0

    def spy(*args):
        seen.append(recipe.nasa._now)
        return inner(*args)

    monkeypatch.setattr("nitrofusion.recipes.pgsb.student_x0", spy)
    batch = make_batch(model)
    require(recipe, "student")
    recipe.loss("student", batch)
    (embeds, alpha), = seen  # fmt: skip
    assert torch.equal(embeds, batch.shared["negative"].prompt_embeds) and recipe.nasa._now is None
    assert (alpha >= 0).all() and (alpha <= 0.5).all() and alpha.unique().numel() == 3
    known = sdxl.encode_prompt(model, Path(negatives).read_text().splitlines()).prompt_embeds
    for row in embeds:
        assert min((row - k).abs().max().item() for k in known) < 1e-5
    off, _ = make(model, {"negative_prompts": negatives, "nasa_alpha": 0.0})
    assert off.nasa is None and off.negative is not None


def clip_folder(folder: Path, tokenizer: CLIPTokenizer) -> Path:
    """A random CLIP for 32x32 pictures."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_term_against_transformers(model, tmp_path, monkeypatch):
    folder = clip_folder(tmp_path / "clip", model.tokenizers[0])
    recipe, student = make(model, {"clip_model": str(folder), "clip_tau": 0.9, "clip_weight": 0.5}, stages=(8,))
    require(recipe, "student")
    batch = make_batch(model, step=2)
    terms = recipe.loss("student", batch)
    theirs = CLIPModel.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pixels = model.vae.decode(batch.shared["x0"] / model.vae.config.scaling_factor).sample.detach()
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    pixels = ((pixels + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    ids = tokenizer(batch.prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=pixels)
    cos = (out.logits_per_image / theirs.logit_scale.exp()).diagonal().double()
    wanted = 0.5 * (1 - 2 / 8) * (0.9 - cos).clamp(min=0)
    assert (wanted > 0).any()
    torch.testing.assert_close(terms["clip"].detach().double(), wanted, rtol=1e-3, atol=1e-5)
    terms["clip"].sum().backward()
    assert moved(student) > 0.9 * len(list(student.parameters()))
    assert not moved(recipe.clip.model) and not moved(model.vae)


def test_resume_equals_uninterrupted(folder, tmp_path, negatives):
    options = OPTIONS | {"negative_prompts": negatives, "weighting": "dmd"}
    config = run_config(folder, tmp_path / "run", "pgsb", options=options)
    lines = assert_resume_equals_uninterrupted(config, tmp_path / "broken")
    assert all({"student.vsd", "lora_teacher.epsilon"} <= line["loss"].keys() for line in lines)


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"generator_interval": 2}, {"gradient_checkpointing": True}])
def test_every_switch_trains(folder, tmp_path, negatives, change):
    options = OPTIONS | {"negative_prompts": negatives}
    lines = logged(train(run_config(folder, tmp_path / "run", "pgsb", options=options, **change)))
    for line in lines:
        assert line["grad_norm"]["lora_teacher"] > 0
        assert ("student" in line["grad_norm"]) == ("generator_interval" not in change or line["step"] % 2 == 1)
    assert lines[2]["grad_norm"]["student"] > 0


def test_gradient_checkpointing_changes_no_number(folder, tmp_path, negatives):
    options = OPTIONS | {"negative_prompts": negatives, "teacher_lr": 1e-2}
    a, b = (
        logged(train(run_config(folder, tmp_path / str(on), "pgsb", options=options, gradient_checkpointing=on)))
        for on in (False, True)
    )
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3, abs=2e-6)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3, abs=2e-6)


def test_a_student_of_adapters(folder, tmp_path):
    """Two adapters: the student's on its own weights, the LoRA teacher's on the teacher's."""
    trainer = Trainer(run_config(folder, tmp_path / "run", "pgsb", options=OPTIONS, lora_rank=2))
    base = {k: v.clone() for k, v in trainer.student.state_dict().items() if "lora_" not in k}
    trainer.run()
    assert all(torch.equal(v, base[k]) for k, v in trainer.student.state_dict().items() if k in base)
    student, teacher = (phase.module for phase in trainer.recipe.phases)
    for adapters, rank in ((student, 2), (teacher, 4)):
        state = adapters.state_dict()
        assert {v.shape[0] for k, v in state.items() if "lora_A" in k} == {rank}
        assert sum(bool(v.abs().sum()) for k, v in state.items() if "lora_B" in k) > 0.9 * len(state) / 2
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kappa_min": -1.0}, "options.kappa_min must be >= 0, got -1.0"),
        ({"kappa_min": 3.0, "kappa_max": 2.0}, "options.kappa_max must be >= kappa_min, got 2.0"),
        ({"weighting": "snr"}, "options.weighting must be sigma2 or dmd, got 'snr'"),
        ({"teacher_rank": 0}, "options.teacher_rank must be >= 1, got 0"),
        ({"teacher_layers": ["to_q", "to_x"]}, "options.teacher_layers must be ends of .*, got 'to_x'"),
        ({"teacher_layers": []}, "options.teacher_layers must be at least one layer"),
        ({"prompt_dropout": 1.0}, r"options.prompt_dropout must be in \[0, 1\), got 1.0"),
        ({"negative_prompts": "/nowhere.txt"}, "nowhere.txt must be .*, got nothing"),
        ({"clip_model": "/nowhere"}, "clip: /nowhere must be a folder with a CLIP model"),
        ({"clip_model": "nobody/no-clip"}, "nobody/no-clip must be a folder or a hub id in the local cache"),
        ({"kapa": 1.0}, "must be among kappa_min"),
    ],
)
def test_bad_options_are_refused_before_any_work(folder, tmp_path, options, message):
    config = run_config(folder, tmp_path / "run", "pgsb", options=options)
    for call in (plan, train):
        with pytest.raises(NitroError, match=message) as caught:
            call(config)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_folder_of_another_model_is_no_clip(folder, tmp_path):
    for name in ("model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    config = run_config(folder, tmp_path / "run", "pgsb", options={"clip_model": str(tmp_path)})
    with pytest.raises(NitroError, match="must hold a model of type clip, got 'bert'"):
        plan(config)


def test_plan_counts_the_adapters(folder, tmp_path, model):
    values = plan(run_config(folder, tmp_path / "run", "pgsb", options=OPTIONS))
    recipe, _ = make(model)
    count = sum(p.numel() for p in recipe.phases[1].module.parameters())
    memory = values["memory_bytes"]
    assert memory["LoRA teacher"] == 4 * count and memory["LoRA teacher AdamW"] == 8 * count

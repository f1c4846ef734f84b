"""Adversarial diffusion distillation: its losses in fp64, its heads against plain PyTorch, who learns from what."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline

from nitrofusion import losses, schedule
from nitrofusion.config import TrainConfig
from nitrofusion.errors import InputError
from nitrofusion.models import sdxl
from nitrofusion.presets import RUNS
from nitrofusion.recipes import Batch, build
from nitrofusion.recipes import check as check_recipe
from nitrofusion.recipes.add import ADD, Head
from nitrofusion.train import plan, train

from ..test_train import digest, logged
from ..tiny import tiny_features, tiny_folder, tiny_model

ALPHAS = schedule.make_alphas_cumprod().double()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return tiny_features(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def config(network) -> TrainConfig:
    return TrainConfig(
        recipe="add",
        init=None,
        images="world",
        teacher_samples="none",
        shifted_timestep=500,
        batch_size=2,
        accumulation=1,
        stages=(4,),
        crop_size=8,
        precision="fp32",
        lr=1e-4,
        head_lr=1e-3,
        num_previews=1,
        preview_every=100,
        checkpoint_every=1,
        device="cpu",
        options={"features": network, "head_width": 8, "r1_weight": 1e-2},
    )


def with_options(config, **options) -> TrainConfig:
    return dataclasses.replace(config, options=config.options | options)


def make(config, model) -> tuple[ADD, torch.nn.Module]:
    student = type(model.unet).from_config(model.unet.config)
    student.load_state_dict(model.unet.state_dict())
    return build(config, model, student), student


def make_batch(model, size=2, seed=0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    noise, image = (torch.randn(size, 4, model.latent_size, model.latent_size, generator=g) for _ in range(2))
    cond = sdxl.encode_prompt(model, ["a red circle on a gray background", "a blue ring on a pink background"] * size)
    return Batch(noise, None, cond[torch.arange(size)], 0, g, image=0.5 * image)


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize("kind", ["exponential", "sds", "nfsd"])
def test_the_weight_against_a_loop(kind):
    t = torch.randint(1000, (50,))
    got = losses.distillation_weight(kind, ALPHAS[t].sqrt(), (1 - ALPHAS[t]).sqrt())
    for value, index in zip(got.tolist(), t.tolist(), strict=True):
        alpha, sigma = math.sqrt(ALPHAS[index]), math.sqrt(1 - ALPHAS[index])
        assert value == pytest.approx(alpha if kind == "exponential" else alpha / (2 * sigma) * sigma**2, rel=1e-12)
    with pytest.raises(ValueError, match="kind must be exponential, sds or nfsd, got 'l2'"):
        losses.distillation_weight("l2", ALPHAS[:1], ALPHAS[:1])


def test_the_target_is_the_teachers_x0():
    x0, noise, eps = (torch.randn(6, 4, 3, 3, dtype=torch.float64) for _ in range(3))
    t = torch.randint(1000, (6,))
    alpha, sigma = ALPHAS[t].sqrt(), (1 - ALPHAS[t]).sqrt()
    got = losses.distillation_target(x0.requires_grad_(), eps - noise, alpha, sigma)
    assert not got.requires_grad
    for i in range(6):
        x_t = alpha[i] * x0[i] + sigma[i] * noise[i]
        torch.testing.assert_close(got[i], ((x_t - sigma[i] * eps[i]) / alpha[i]).detach(), rtol=1e-9, atol=1e-9)


def test_with_the_sds_weight_the_gradient_is_sds():
    """w(t) (eps_psi - noise) over the number of elements, which the mean divides by; w = sigma^2."""
    x0, noise, eps = (torch.randn(5, 4, 3, 3, dtype=torch.float64) for _ in range(3))
    t = torch.randint(1000, (5,))
    alpha, sigma = ALPHAS[t].sqrt(), (1 - ALPHAS[t]).sqrt()
    x0.requires_grad_()
    target = losses.distillation_target(x0, eps - noise, alpha, sigma)
    distance = (x0 - target).square().flatten(1).mean(1)  # ``regression_loss`` is this in fp32
    (losses.distillation_weight("sds", alpha, sigma) * distance).sum().backward()
    wanted = (sigma**2).view(-1, 1, 1, 1) * (eps - noise) / 36
    torch.testing.assert_close(x0.grad, wanted, rtol=1e-8, atol=1e-12)


def test_nfsd_against_a_loop():
    null, text, negative = (torch.randn(40, 4, 2, 2) for _ in range(3))
    t = torch.tensor([0, 199, 200, 999] * 10)
    got = losses.nfsd_direction(null, text, negative, t, 7.5)
    for i in range(40):
        clean = null[i] if t[i] < 200 else null[i] - negative[i]
        torch.testing.assert_close(got[i], clean + 7.5 * (text[i] - null[i]))
    same = losses.nfsd_direction(null, text, null, t, 0.0)
    assert same[t >= 200].abs().max() == 0  # without a negative prompt nothing but guidance is left there


@pytest.mark.parametrize("scale", [0.0, 3.0])
@pytest.mark.parametrize("kind", ["exponential", "sds", "nfsd"])
@pytest.mark.parametrize("distance", ["pixels", "latents"])
def test_distillation_against_the_formula(config, model, kind, distance, scale, monkeypatch):
    """The whole term and its gradient in x0, from the teacher's calls written out one by one."""
    negative = "a white ring on a navy background"
    config = with_options(config, distill_kind=kind, distance=distance, negative_prompt=negative)
    recipe, _ = make(dataclasses.replace(config, guidance_scale=scale), model)
    batch, t = make_batch(model, size=4), torch.tensor([3, 199, 420, 901])
    noise = torch.randn_like(batch.noise)
    monkeypatch.setattr(torch, "randint", lambda *a, **k: t)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    x0 = batch.image.clone().requires_grad_()
    got = recipe._distillation(batch, x0, sdxl.decode_with_gradient(model, x0))
    (gradient,) = torch.autograd.grad(got.sum(), x0)

    bad = sdxl.encode_prompt(model, [negative])
    x = batch.image.clone().requires_grad_()
    wanted = []
    for i, step in enumerate(t.tolist()):
        ab = model.alphas_cumprod[step]
        alpha, sigma = ab.sqrt(), (1 - ab).sqrt()
        x_t, one = alpha * x[i : i + 1].detach() + sigma * noise[i : i + 1], torch.tensor([step])
        cond = batch.cond[[i]]
        with torch.no_grad():
            text, null, neg = (sdxl.denoise(model.unet, x_t, one, c) for c in (cond, cond.null(), bad))
            if kind == "nfsd":
                step_down = (null if step < 200 else null - neg) + scale * (text - null)
                target = x[i : i + 1].detach() - sigma / alpha * step_down
            else:
                eps = null + scale * (text - null) if scale > 1 else text
                target = (x_t - sigma * eps) / alpha
        c = alpha if kind == "exponential" else alpha * sigma / 2
        a, b = x[i : i + 1], target
        if distance == "pixels":
            a, b = (model.vae.decode(v / model.vae.config.scaling_factor).sample for v in (a, b))
        wanted.append(c * (a - b).square().mean())
    wanted = torch.stack(wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    (reference,) = torch.autograd.grad(wanted.sum(), x)
    torch.testing.assert_close(gradient, reference, rtol=2e-3, atol=1e-6 + 1e-3 * reference.abs().max().item())


# ------------------------------------------------------------------ heads


def plain_head(head: Head, maps, conditions):
    """The same arithmetic in PyTorch's own operators, token by token."""

    def norm(x, k):
        return F.silu(F.group_norm(x, head.groups, head.scales[k], head.biases[k], 1e-5))

    x = norm(torch.einsum("oc,bcn->bon", head.point.weight[:, :, 0], maps.flatten(2)) + head.point.bias[:, None], 0)
    around = torch.stack([x.roll(4 - k, 2) for k in range(9)], -1)  # around[..., n, k] = x[..., n + k - 4]
    y = norm(torch.einsum("ock,bcnk->bon", head.line.weight, around) + head.line.bias[:, None], 1)
    x = (y + x) / 2**0.5
    raw = head.last.parametrizations.weight.original
    logits = []
    for n in range(x.shape[2]):
        f = x[:, :, n] @ (raw / torch.linalg.svdvals(raw)[0]).T + head.last.bias
        mapped = sum(value @ head.mapped[name].weight.T for name, value in conditions.items())
        logits.append((f * (head.always + mapped)).sum(1) / len(head.always) ** 0.5)
    return torch.stack(logits).mean(0)


def settled_head(channels=48, width=8) -> Head:
    head = Head(channels, {"text": 6, "image": 10}, width)
    for p in [*head.scales, *head.biases]:
        torch.nn.init.normal_(p, 0.5)
    for _ in range(200):  # power iterations
        head.last.weight  # noqa: B018
    return head.eval()


def test_head_and_r1_against_plain_pytorch_in_fp64():
    """Logits, R1 and the gradient of R1 in every parameter; fused ops in fp32 against a double backward in fp64."""
    head = settled_head()
    maps = torch.randn(3, 48, 5, 5)
    conditions = {"text": torch.randn(3, 6), "image": torch.randn(3, 10)}
    own = maps.clone().requires_grad_()
    logits = head(own, conditions)
    penalty = losses.r1_penalty(logits[:, None], [own])
    params = dict(head.named_parameters())
    got = torch.autograd.grad(penalty.sum(), list(params.values()), allow_unused=True)

    wide = settled_head().double()
    wide.load_state_dict({k: v.double() for k, v in head.state_dict().items()})
    x = maps.double().requires_grad_()
    reference = plain_head(wide, x, {k: v.double() for k, v in conditions.items()})
    torch.testing.assert_close(logits.double(), reference, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(reference.sum(), x, create_graph=True)
    wanted = gradient.square().flatten(1).sum(1)
    torch.testing.assert_close(penalty.double(), wanted, rtol=1e-4, atol=1e-7)
    found = torch.autograd.grad(wanted.sum(), list(wide.parameters()), allow_unused=True)
    moved = 0
    for (name, _), a, b in zip(params.items(), got, found, strict=True):
        if b is None:
            continue
        tolerance = 1e-3 * b.abs().max().item() + 1e-9
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=tolerance, msg=name)
        moved += bool(b.abs().max() > 1e-8)
    assert moved >= 8


def test_r1_is_the_mean_of_each_heads_own(config, model):
    recipe, _ = make(config, model)
    batch = make_batch(model)
    recipe.heads.eval()  # no power iteration between the two evaluations
    seen = []
    maps_of = recipe._maps
    recipe._maps = lambda pixels, batch: seen.append(maps_of(pixels, batch)) or seen[-1]
    got = recipe.loss("heads", batch)["r1"]
    real = seen[-1]
    wanted = []
    for head, m in zip(recipe.heads, real, strict=True):
        x = m.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(head(x, batch.shared["conditions"]).sum(), x)
        wanted.append(g.square().flatten(1).sum(1))
    torch.testing.assert_close(got, 1e-2 * torch.stack(wanted).mean(0), rtol=1e-4, atol=1e-8)


def test_heads_learn_to_tell_real_from_fake(config, model):
    recipe, _ = make(dataclasses.replace(with_options(config, augment=["cutout"]), head_lr=3e-3), model)
    stripes = (torch.arange(32) // 4 % 2 * 2 - 1).float().expand(4, 3, 32, 32)
    values = []
    for step in range(30):
        torch.manual_seed(step)
        batch = make_batch(model, size=4)
        recipe._prepare(batch)
        batch.shared["real"] = stripes  # an easy difference
        loss = recipe.loss("heads", batch)["adversarial"].mean()
        loss.backward()
        recipe.phases[1].optimizer.step()
        recipe.heads.zero_grad()
        values.append(loss.item())
    assert sum(values[-5:]) < 0.6 * sum(values[:5])
    line = recipe.end_step(0)["logits"]
    assert len(line["real"]) == len(line["fake"]) == 4 and sum(line["real"]) > sum(line["fake"])


# ------------------------------------------------------------------ the recipe


def test_each_phase_moves_only_its_module(config, model):
    recipe, student = make(config, model)
    batch = make_batch(model)
    frozen = [*model.unet.parameters(), *model.vae.parameters(), *recipe.features.parameters()]
    student.requires_grad_(True)
    recipe.heads.requires_grad_(False)
    for name in ("adversarial", "distillation"):  # either reaches the student, through decoder and vision network
        fresh = Batch(batch.noise, None, batch.cond, 0, batch.plan, image=batch.image)
        recipe.loss("student", fresh)[name].mean().backward()
        assert sum(p.grad is not None and bool(p.grad.abs().sum()) for p in student.parameters()) > 50
        assert all(p.grad is None for p in [*recipe.heads.parameters(), *frozen])
        student.zero_grad()
    student.requires_grad_(False)
    recipe.heads.requires_grad_(True)
    sum(t.mean() for t in recipe.loss("heads", fresh).values()).backward()
    assert all(p.grad is None for p in [*student.parameters(), *frozen])
    assert all(p.grad is not None for p in recipe.heads.parameters())


def test_what_the_student_is_given(config, model, monkeypatch):
    """Noise alone at 999, the noised real latents elsewhere, the shifted timestep, and the shifted alphas."""
    recipe, student = make(config, model)
    seen, inner = [], sdxl.denoise
    monkeypatch.setattr(
        "nitrofusion.sampling.denoise_unet", lambda u, x, t, c: seen.append((x, t)) or inner(u, x, t, c)
    )
    batch = make_batch(model, size=4)
    batch.shared["timesteps"] = torch.tensor([999, 749, 499, 249])
    got = recipe._student_x0(batch)
    ((x, told),) = seen
    assert told.tolist() == [499, 374, 249, 124]
    for i, t in enumerate((999, 749, 499, 249)):
        ab, near = model.alphas_cumprod[t], model.alphas_cumprod[told[i]]
        noised = ab.sqrt() * batch.image[i] + (1 - ab).sqrt() * batch.noise[i]
        wanted = batch.noise[i] if t == 999 else noised
        torch.testing.assert_close(x[i], wanted)
        eps = inner(student, x[i : i + 1], told[i : i + 1], batch.cond[[i]])[0]
        torch.testing.assert_close(got[i], (wanted - (1 - near).sqrt() * eps) / near.sqrt(), rtol=1e-4, atol=1e-4)


def test_timesteps_are_drawn_as_asked(config, model):
    def shares(**options):
        recipe, _ = make(with_options(config, text_condition=False, image_condition=False, **options), model)
        drawn = []
        for seed in range(40):
            batch = make_batch(model, size=16, seed=seed)
            recipe._prepare(batch)
            drawn.append(batch.shared["timesteps"])
        drawn = torch.cat(drawn)
        return {t: (drawn == t).float().mean().item() for t in drawn.unique().tolist()}

    assert shares() == pytest.approx({999: 0.25, 749: 0.25, 499: 0.25, 249: 0.25}, abs=0.07)
    weighted = shares(student_timesteps=[999, 499], timestep_weights=[3, 1])
    assert weighted == pytest.approx({999: 0.75, 499: 0.25}, abs=0.07)


def test_heads_are_told_of_the_real_picture_only_where_the_student_saw_it(config, model):
    recipe, _ = make(config, model)
    batch = make_batch(model, size=64)  # one in four starts from pure noise
    recipe._prepare(batch)
    told, hidden = batch.shared["conditions"], batch.shared["timesteps"] == 999
    assert told.keys() == {"text", "image"} and hidden.any() and not hidden.all()
    assert told["image"][hidden].abs().max() == 0 and bool((told["image"][~hidden].abs().sum(1) > 1).all())
    for names in ((), ("text",), ("image",)):
        other, _ = make(with_options(config, **{f"{n}_condition": n in names for n in ("text", "image")}), model)
        other._prepare(batch)
        assert set(batch.shared["conditions"]) == set(names) == set(other.heads[0].mapped)


def test_one_pair_overfits(config, model):
    """Distillation alone, towards a teacher that always answers with one picture, ends at that picture."""
    wanted = 0.3 * torch.randn(1, 4, 16, 16)

    class Stub(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x_t, t, *_, **__):
            ab = model.alphas_cumprod[t].view(-1, 1, 1, 1)
            return ((x_t - ab.sqrt() * wanted) / (1 - ab).sqrt(),)

    changes = dict(lr=2e-3, betas=(0.9, 0.99), guidance_scale=0.0)
    recipe, student = make(dataclasses.replace(with_options(config, distance="latents"), **changes), model)
    recipe.model = dataclasses.replace(model, unet=Stub())
    student.requires_grad_(True)
    batch = make_batch(model, size=1)
    batch.shared["timesteps"] = torch.tensor([999])
    errors = []
    for step in range(250):
        torch.manual_seed(step)
        x0 = recipe._student_x0(batch)
        loss = recipe._distillation(batch, x0, None).mean()
        recipe.phases[0].optimizer.zero_grad()
        loss.backward()
        recipe.phases[0].optimizer.step()
        errors.append((x0 - wanted).square().mean().item())
    assert errors[-1] < 0.02 * errors[0]


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("teacher")))


def test_resumed_equals_uninterrupted(config, teacher, tmp_path):
    config = dataclasses.replace(config, teacher=teacher, output=str(tmp_path / "whole"))
    whole = train(config)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for step in (3, 4):
        shutil.rmtree(broken / "checkpoints" / f"step-{step:06d}")
    (broken / "config.json").write_text(json.dumps(config.to_json() | {"output": str(broken)}))
    train(dataclasses.replace(config, output=str(broken)))
    assert digest(broken) == digest(whole) and logged(broken) == logged(whole)
    for line in logged(whole):
        assert line["loss"].keys() == {"student.adversarial", "student.distillation", "heads.adversarial", "heads.r1"}
        assert len(line["logits"]["real"]) == 4


@pytest.mark.parametrize("change", [
    {"lora_rank": 2}, {"generator_interval": 2}, {"precision": "bf16"}, {"gradient_checkpointing": True},
    {"distill_kind": "nfsd"}, {"distill_weight": 0.0}, {"distance": "latents"}, {"images": None},
])  # fmt: skip
def test_every_switch_trains(config, teacher, tmp_path, change):
    own = {k: v for k, v in change.items() if not hasattr(config, k)}
    config = dataclasses.replace(with_options(config, **own), **{k: v for k, v in change.items() if k not in own})
    if config.images is None:  # what is real are the teacher's samples
        config = dataclasses.replace(config, teacher_samples="online", teacher_steps=2)
    run = train(dataclasses.replace(config, teacher=teacher, output=str(tmp_path / "run"), stages=(2,)))
    lines = logged(run)
    assert len(lines) == 2 and all(v is not None for line in lines for v in line["loss"].values())
    if "lora_rank" in change:
        from safetensors.torch import load_file

        state = load_file(run / "checkpoints" / "step-000002" / "student.safetensors")
        assert all(".lora_" in name for name in state) and any(v.abs().max() > 0 for k, v in state.items() if "_B" in k)


def test_the_plan_counts_the_heads(config, teacher, tmp_path, model):
    config = dataclasses.replace(config, teacher=teacher, output=str(tmp_path / "run"))
    recipe, _ = make(config, model)
    count = sum(p.numel() for p in recipe.heads.parameters())
    memory = plan(config)["memory_bytes"]
    assert memory["heads"] == 4 * count and memory["heads AdamW"] == 8 * count
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distill_kind": "vsd"}, "distill_kind must be one of exponential, sds, nfsd, got 'vsd'"),
        ({"distance": "lpips"}, "distance must be one of pixels, latents"),
        ({"distill_weight": -1.0}, "distill_weight must be >= 0"),
        ({"r1_weight": -1.0}, "r1_weight must be >= 0"),
        ({"augment": ["flip"]}, "augment must be among color, translation, cutout"),
        ({"feature_crop": 2.0}, r"feature_crop must be in 0\.\.1"),
        ({"student_timesteps": []}, r"student_timesteps must be whole numbers in 0\.\.999"),
        ({"student_timesteps": [1000]}, r"student_timesteps must be whole numbers in 0\.\.999"),
        ({"timestep_weights": ["a"] * 4}, "timestep_weights must be empty or 4 numbers >= 0"),
        ({"timestep_weights": [1.0]}, "timestep_weights must be empty or 4 numbers >= 0"),
        ({"head_width": 0}, "head_width must be >= 1"),
        ({"feature_size": 30}, "size must be a multiple of the patch of .*, 4, got 30"),
        ({"feature_size": 8}, "must give 3 x 3 tokens or more, got 2 x 2"),
        ({"features": "/nowhere"}, "must be the folder of a vision transformer, got nothing"),
        ({"features": "nobody/nothing"}, "hf download nobody/nothing"),
        ({"lambda": 2.5}, "options of add must be among features, .*, got 'lambda'"),
    ],
)
def test_bad_options_are_one_line_before_any_work(config, teacher, tmp_path, options, message):
    bad = dataclasses.replace(with_options(config, **options), teacher=teacher, output=str(tmp_path / "run"))
    for call in (plan, train):
        with pytest.raises(InputError, match=message) as caught:
            call(bad)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_presets_are_valid(model):
    for name in ("add-world", "add-sdxl"):
        config = RUNS[name].validate()
        assert config.recipe == "add" and config.images
        assert TrainConfig.from_json(config.to_json()).options == config.options
    check_recipe(RUNS["add-world"], model.unet)
    assert RUNS["add-sdxl"].options["features"] == "facebook/dinov2-small"


def test_decoding_with_a_gradient_is_the_decoders(model, tmp_path):
    latents = torch.randn(2, 4, 16, 16, requires_grad=True)
    pixels = sdxl.decode_with_gradient(model, latents)
    pixels.square().mean().backward()
    assert latents.grad.abs().min() > 0
    torch.testing.assert_close(sdxl.decode(model, latents), pixels.detach().clamp(-1, 1))
    folder = tiny_folder(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    wanted = pipeline.vae.decode(latents.detach() / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(sdxl.decode_with_gradient(sdxl.load(folder), latents.detach()), wanted)

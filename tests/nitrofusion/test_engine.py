"""The engine against plain diffusers, seeds and batches, the backbone's taps, pictures on disk, bad input."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

from nitrofusion import checkpoint, presets
from nitrofusion.engine import Engine, load
from nitrofusion.engine.png import MAX_SETTINGS, read_settings, save_png
from nitrofusion.errors import InputError
from nitrofusion.models import sdxl
from nitrofusion.scheduler import TimestepShiftLCMScheduler

from ..native import backends
from .tiny import PROMPTS, generators, plain_pipeline, rescheduled, tiny_folder

LEVEL = 2 / 255  # one grey level of rounding on either side, for pictures in [0, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student_folder(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("models") / "student"
    return rescheduled(folder, copy, TimestepShiftLCMScheduler(shifted_timestep=500))


@pytest.fixture(scope="module")
def teacher(folder):
    return load(folder)


@pytest.fixture(scope="module")
def student(student_folder):
    return load(student_folder)


def test_teacher_draws_what_diffusers_draws(folder, teacher):
    ours = teacher.generate(PROMPTS, num_inference_steps=8, guidance_scale=2.0, seed=3, output_type="pt") / 2 + 0.5
    options = {"num_inference_steps": 8, "guidance_scale": 2.0, "generator": generators([3, 4, 5]), "output_type": "pt"}
    theirs = plain_pipeline(folder)(PROMPTS, **options).images
    assert theirs.std() > 0.01  # a picture, not a constant
    assert (ours - theirs).abs().max() <= LEVEL


def test_stochastic_teacher_draws_what_diffusers_draws(folder, tmp_path):
    scheduler = EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    copy = rescheduled(folder, tmp_path / "euler", scheduler)
    ours = load(copy).generate(PROMPTS, num_inference_steps=3, guidance_scale=0, seed=3, output_type="latent")
    options = {"num_inference_steps": 3, "guidance_scale": 0, "generator": generators([3, 4, 5])}
    theirs = plain_pipeline(copy, scheduler=scheduler)(PROMPTS, **options, output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4])
def test_student_draws_what_diffusers_draws(student_folder, student, steps):
    ours = student.generate(PROMPTS[0], steps, seed=9, num_images_per_prompt=2)
    scheduler = TimestepShiftLCMScheduler.from_pretrained(student_folder, subfolder="scheduler")
    pipeline = plain_pipeline(student_folder, scheduler=scheduler)
    options = {"num_inference_steps": steps, "guidance_scale": 0, "generator": generators([9, 10])}
    theirs = pipeline(PROMPTS[0], num_images_per_prompt=2, **options).images
    for a, b in zip(ours, theirs, strict=True):
        a, b = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).int() for x in (a, b))
        assert (a - b).abs().max() <= 2


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_batch_never_changes_a_picture(request, which, batch_size):
    engine = request.getfixturevalue(which)
    together = engine.generate(PROMPTS[:1] * 5, 3, seed=[8, 7, 6, 5, 7], output_type="pt", batch_size=batch_size)
    alone = engine.generate(PROMPTS[0], 3, seed=7, output_type="pt")
    assert (together[[1, 4]] - alone).abs().max() <= 1e-5
    assert (together[0] - alone[0]).abs().max() > 1e-2


def test_one_seed_counts_up_over_prompts_and_their_pictures(student):
    counted = student.generate(PROMPTS[:2], seed=4, num_images_per_prompt=2, output_type="latent")
    named = student.generate([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, seed=[4, 5, 6, 7], output_type="latent")
    assert torch.equal(counted, named)


def test_output_types(student):
    (picture,) = student.generate(PROMPTS[0])
    assert picture.size == (32, 32) and picture.mode == "RGB"
    pixels = student.generate(PROMPTS[0], output_type="pt")
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.float32 and pixels.abs().max() <= 1
    latents = student.generate(PROMPTS[0], output_type="latent")
    assert latents.shape == (1, 4, 16, 16) and not latents.is_inference()


@pytest.mark.parametrize("backend", backends("plan", "ref"))
def test_threads_wait_for_each_other(student_folder, backend):
    engine = load(student_folder, "cpu", backend=backend)
    negatives = (None, PROMPTS[2])
    calls = [[(f"{PROMPTS[0]} {i}", 1 + i % 2, 20 * i + j, negatives[j % 2]) for j in range(20)] for i in range(3)]

    def drawn(calls):
        pictures = [engine.generate(*call)[0].tobytes() for call in calls]
        return pictures + [one.image.tobytes() for one in engine.stream(*calls[0][:1], 3)]

    wanted = [drawn(one) for one in calls]
    engine._prompts.clear()
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(drawn, calls)) == wanted


@pytest.mark.parametrize("backend", backends("plan", "ref"))
def test_a_copy_of_an_engine_is_one_of_its_own(student_folder, backend):
    engine = load(student_folder, "cpu", backend=backend)
    twin = copy.deepcopy(engine)
    draws = [[one.generate(p, 2, output_type="latent") for one in (engine, twin)] for p in PROMPTS]
    assert all(torch.equal(*pair) for pair in draws) and not torch.equal(draws[0][0], draws[1][0])
    del engine
    assert torch.equal(twin.generate(PROMPTS[0], 2, output_type="latent"), draws[0][0])


@pytest.mark.parametrize("backend", backends("plan", "ref"))
def test_an_engine_is_not_pickled(student_folder, backend):
    with pytest.raises(TypeError, match="cannot be pickled: load the model again in the other process"):
        pickle.dumps(load(student_folder, "cpu", backend=backend))


def test_prompt_cache_is_bounded_and_exact(student, monkeypatch):
    monkeypatch.setattr("nitrofusion.engine.engine.PROMPT_CACHE", 2)
    engine = Engine(student.source, student.executor)
    first = engine.generate(PROMPTS[0], output_type="latent")
    engine.generate(["b", PROMPTS[0], "c"])  # "b" is then the one used longest ago
    assert list(engine._prompts) == [PROMPTS[0], "c"]
    engine.generate(["d", "e"])
    assert torch.equal(engine.generate(PROMPTS[0], output_type="latent"), first)


def test_encoder_features_are_what_the_full_unet_hands_over(teacher):
    unet, taps = teacher.model.unet, []
    hooks = [unet.conv_in.register_forward_hook(lambda m, a, out: taps.append(out))]
    hooks += [b.register_forward_hook(lambda m, a, out: taps.extend(out[1])) for b in unet.down_blocks]
    hooks += [unet.mid_block.register_forward_hook(lambda m, a, out: taps.append(out))]
    cond = sdxl.encode_prompt(teacher.model, PROMPTS[:2])
    x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([250, 749])
    with torch.no_grad():
        sdxl.denoise(unet, x_t, t, cond)
        for hook in hooks:
            hook.remove()
        ours = sdxl.encoder_features(unet, x_t, t, cond)
    assert len(ours) == len(taps) == 10
    assert [(x.shape[1], x.shape[2]) for x in ours] == sdxl.feature_shapes(unet, 16)
    for a, b in zip(ours, taps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_run_draws_with_its_newest_averaged_student(folder, student, tmp_path, monkeypatch):
    run, sealed = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000002"
    sealed.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"teacher": str(folder), "shifted_timestep": 500}))
    monkeypatch.setattr(checkpoint, "latest", lambda run: (None, []))
    with pytest.raises(InputError, match="must hold a finished checkpoint, got none"):
        load(run)
    monkeypatch.setattr(checkpoint, "latest", lambda run: (sealed, []))
    save_file({k: v * 1.01 for k, v in student.model.unet.state_dict().items()}, sealed / "ema.safetensors")
    ours, base = (e.generate(PROMPTS[0], 2, output_type="latent") for e in (load(run), student))
    assert ours.shape == base.shape and (ours - base).abs().max() > 1e-3


def test_a_preset_is_its_folder_with_its_unet(folder, student, tmp_path, monkeypatch):
    save_file(dict(student.model.unet.state_dict()), tmp_path / "unet.safetensors")
    preset = presets.ModelPreset("tiny", str(folder), str(tmp_path / "unet.safetensors"), 500, 2)
    monkeypatch.setitem(presets.MODELS, "tiny", preset)
    wanted = student.generate(PROMPTS[0], 2, output_type="latent")
    assert torch.equal(load("tiny").generate(PROMPTS[0], output_type="latent"), wanted)


def test_a_hub_preset_without_network_is_one_line(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(InputError, match="nitrosd-vibrant must be .* ChenDY/NitroFusion, got no network"):
        load("nitrosd-vibrant")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"prompt": []}, "generate: prompt must be a string or a list of at least one"),
        ({"prompt": ["a", 3]}, "generate: prompt "),
        ({"prompt": None}, "generate: prompt "),
        ({"num_inference_steps": 5}, "generate: num_inference_steps must be an integer in 1..4, got 5"),
        ({"num_inference_steps": 0}, "generate: num_inference_steps "),
        ({"num_inference_steps": 1.5}, "generate: num_inference_steps "),
        ({"seed": [1, 2]}, "generate: seed must be one integer or one for each of the 1 pictures, got 2"),
        ({"seed": -1}, "generate: seed "),
        ({"seed": "x"}, "generate: seed "),
        ({"num_images_per_prompt": 0}, "generate: num_images_per_prompt must be an integer in 1..10000, got 0"),
        ({"batch_size": 0}, "generate: batch_size "),
        ({"guidance_scale": 7.5}, "guidance_scale must be in 0..1 .a student draws without guidance., got 7.5"),
        ({"negative_prompt": "a", "nag_tau": 10**400}, "generate: nag_tau must be above 0"),
        ({"guidance_scale": float("nan")}, "generate: guidance_scale "),
        ({"output_type": "jpg"}, "generate: output_type must be one of pil, np, pt, latent, got 'jpg'"),
    ],
)
def test_bad_calls(student, options, words):
    with pytest.raises(InputError, match=words) as error:
        student.generate(**({"prompt": "a ring"} | options))
    assert "\n" not in str(error.value)


def test_an_unknown_option_is_the_callers(student):
    for name in ("stream", "settings"):
        for option in ("foo", "batch_size", "source"):
            with pytest.raises(TypeError, match=rf"Engine.{name}\(\) got an unexpected keyword argument '{option}'"):
                getattr(student, name)("a ring", **{option: 1})


def test_bad_models(folder, tmp_path):
    with pytest.raises(InputError, match="'wrld' .did you mean world"):
        load("wrld")
    with pytest.raises(InputError, match="without model_index.json or checkpoints"):
        load(tmp_path)
    for bad in (None, 3, ""):
        with pytest.raises(InputError, match="must be a preset name"):
            load(bad)
    with pytest.raises(InputError, match="device: "):
        load(folder, device="gpu9")
    copy = rescheduled(folder, tmp_path / "copy", TimestepShiftLCMScheduler())
    config = copy / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"shifted_timestep": 0}))
    with pytest.raises(InputError, match="shifted_timestep in 1..1000, got 0"):
        load(copy)
    config.write_text(json.dumps({**values, "_class_name": "os.system", "shifted_timestep": None}))
    with pytest.raises(InputError, match="must name a diffusers scheduler, got 'os.system'"):
        load(copy)


def test_png_remembers_how_it_was_drawn(student, tmp_path):
    prompt = "ein blauer Kreis, größer\nals 雪"
    path = save_png(student.generate(prompt, seed=7)[0], tmp_path / "a" / "b.png", student.settings(prompt, seed=7))
    settings = read_settings(path)
    assert settings["prompt"] == prompt and settings["unet"] == student.unet_digest and len(settings["unet"]) == 12
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["height"]) == (1, 0.0, 32)
    again = student.generate(settings["prompt"], settings["num_inference_steps"], settings["seed"])[0]
    with Image.open(path) as image:
        assert image.tobytes() == again.tobytes()
        assert image.info["parameters"].startswith(prompt + "\nSteps: 1, CFG scale: 0.0, Seed: 7, Size: 32x32, ")
    assert [p.name for p in path.parent.iterdir()] == ["b.png"]


def test_bad_pngs(tmp_path):
    image = Image.new("RGB", (4, 4))
    with pytest.raises(InputError, match="must end in .png"):
        save_png(image, tmp_path / "a.jpg", {})
    with pytest.raises(InputError, match="at most"):
        save_png(image, tmp_path / "a.png", {"prompt": "x" * MAX_SETTINGS})
    image.save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    whole = save_png(image, tmp_path / "whole.png", {"prompt": "x" * 1000}).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:200])
    for name in ("plain.png", "text.png", "cut.png", "absent.png"):
        with pytest.raises(InputError, match="png: "):
            read_settings(tmp_path / name)

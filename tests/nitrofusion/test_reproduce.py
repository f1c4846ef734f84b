"""Pictures drawn again from their PNG, and PNGs that mean harm."""

import dataclasses
import json
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from nitrofusion import presets
from nitrofusion.cli import main
from nitrofusion.engine import load, reproduce
from nitrofusion.engine.images import digest
from nitrofusion.engine.png import KEY, read_settings, save_png
from nitrofusion.errors import InputError
from nitrofusion.presets import WORLD
from nitrofusion.world import zoo

PROMPT = "a red circle on a navy background"
OPTIONS = {
    "plain": {},
    "four steps": {"num_inference_steps": 4, "seed": 2**40},
    "wide": {"height": 24, "width": 40},
    "nag": {"negative_prompt": 'a green: "ring"\nSteps: 9', "nag_scale": 1.5, "nag_steps": 1, "num_inference_steps": 2},
    "nasa": {"negative_prompt": "", "negative": "nasa", "nasa_scale": 0.25},
}


@pytest.fixture(scope="module")
def engine():
    return load("world")


@pytest.fixture
def loaded(engine, monkeypatch):
    """The same engine instead of a new one: loading is tested elsewhere."""
    monkeypatch.setattr(reproduce, "load", lambda model, **how: engine)
    return engine


def drawn(engine, path, **options):
    (image,) = engine.generate(PROMPT, **options)
    return save_png(image, path, engine.settings(PROMPT, **options))


def spoilt(path, folder, **changes):
    """The picture with other settings; None takes one away."""
    with Image.open(path) as image:
        settings = json.loads(image.info[KEY]) | changes
        return write(image, folder / "spoilt.png", json.dumps({k: v for k, v in settings.items() if v is not None}))


def write(image, path, text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, text)
    image.save(path, pnginfo=info)
    return path


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(path, *chunks, width=4, height=4):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("name", OPTIONS)
def test_draws_the_same_picture(loaded, tmp_path, name):
    path = drawn(loaded, tmp_path / "a.png", **OPTIONS[name])
    again = reproduce.reproduce(path, tmp_path / "b" / "again.png")
    assert again.is_exact and again.changed == [] and again.report() == "every pixel is the same"
    assert read_settings(tmp_path / "b" / "again.png") == read_settings(path) == again.settings_now
    with Image.open(path) as a, Image.open(tmp_path / "b" / "again.png") as b:
        assert a.tobytes() == b.tobytes() == again.image.tobytes()


def test_a_teachers_picture(tmp_path):
    options = {"num_inference_steps": 3, "negative_prompt": "a ring", "guidance_scale": 2.0}
    path = drawn(load("world-teacher"), tmp_path / "a.png", **options)
    assert read_settings(path)["negative"] == "cfg"
    assert reproduce.reproduce(path).is_exact


def test_every_refinement_of_a_stream(loaded, tmp_path):
    for drawing in loaded.stream(PROMPT, seed=3, negative_prompt="a ring"):
        options = {"num_inference_steps": drawing.num_inference_steps, "seed": 3, "negative_prompt": "a ring"}
        path = save_png(drawing.image, tmp_path / "a.png", loaded.settings(PROMPT, **options))
        assert reproduce.reproduce(path).is_exact


def test_says_what_changed(loaded, tmp_path):
    path = drawn(loaded, tmp_path / "a.png")
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[3, 5, 1] ^= 128
    pixels[9, 9] ^= 1
    old = json.dumps(read_settings(path) | {"version": "0.0.1", "unet": "0123456789ab", "dtype": "float16"})
    again = reproduce.reproduce(write(Image.fromarray(pixels), tmp_path / "old.png", old))
    assert (again.pixels_different, again.largest_difference) == (2, 128) and not again.is_exact
    lines = again.report().splitlines()
    assert lines[0] == "2 of 1024 pixels differ, by at most 128 of 255"
    assert lines[1].startswith("version: 0.0.1 then, ") and lines[2].startswith("weights: 0123456789ab then, ")
    assert lines[3] == "precision: float16 then, float32 now" and len(lines) == 4


def test_pictures_of_an_older_version(loaded, tmp_path):
    """Before negative prompts and images, settings had no device and no precision."""
    path = spoilt(drawn(loaded, tmp_path / "a.png"), tmp_path, device=None, dtype=None, version="0.0.9")
    again = reproduce.reproduce(path)
    assert again.is_exact and len(again.changed) == 1


def test_image_to_image_needs_its_image(loaded, tmp_path):
    source = Image.fromarray(np.random.default_rng().integers(0, 256, (24, 40, 3), dtype=np.uint8))
    path = drawn(loaded, tmp_path / "a.png", image=source, num_inference_steps=4, strength=0.5)
    assert read_settings(path)["image"] == digest(source)
    with pytest.raises(InputError, match="must be the one this picture was drawn from .*does not hold, got none"):
        reproduce.reproduce(path)
    with pytest.raises(InputError, match="must be the one with digest .*, got another"):
        reproduce.reproduce(path, image=source.rotate(180))
    source.save(tmp_path / "source.bmp")
    assert reproduce.reproduce(path, image=tmp_path / "source.bmp").is_exact
    tensor = loaded.generate(PROMPT, output_type="latent")
    path = drawn(loaded, tmp_path / "b.png", image=tensor)
    assert reproduce.reproduce(path, image=tensor[0]).is_exact
    path = drawn(loaded, tmp_path / "c.png")
    with pytest.raises(InputError, match="must be left out, got one for a picture that was drawn from noise"):
        reproduce.reproduce(path, image=source)
    for bad in (b"x", 3):
        with pytest.raises(InputError, match="reproduce: image must be a PIL image, a tensor or a file, got"):
            reproduce.reproduce(tmp_path / "a.png", image=bad)


@pytest.fixture(scope="module")
def lora(engine, tmp_path_factory):
    file = tmp_path_factory.mktemp("lora") / "a.safetensors"
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    rows, columns = engine.model.unet.get_submodule(name).weight.shape
    sides = {"A": torch.randn(4, columns), "B": torch.randn(rows, 4)}
    save_file({f"unet.{name}.lora_{side}.weight": 0.3 * t for side, t in sides.items()}, file)
    return file


def test_a_loras_picture_names_it_and_needs_it(lora, tmp_path, capsys):
    engine = load("world", lora=[(lora, 0.5)])
    path = drawn(engine, tmp_path / "a.png")
    (named,) = read_settings(path)["loras"]
    assert named["name"] == "a.safetensors" and named["scale"] == 0.5 and len(named["digest"]) == 12
    engine.set_lora([(lora, 0.25)])
    assert engine.settings(PROMPT)["loras"] == [named | {"scale": 0.25}]
    engine.set_lora()
    assert "loras" not in engine.settings(PROMPT)
    assert reproduce.reproduce(path, lora=[(lora, 0.5)]).report() == "every pixel is the same"
    line = f"LoRAs: a.safetensors x 0.5 ({named['digest']}) then, "
    again = reproduce.reproduce(path, lora=[(lora, 0.25)])
    assert again.changed == [f"{line}a.safetensors x 0.25 ({named['digest']}) now"]
    assert main(["reproduce", str(path)]) == 0
    assert f"{line}none named now (give them: --lora a.safetensors:0.5, or lora=" in capsys.readouterr().out
    assert main(["reproduce", str(path), "--lora", f"{lora}:0.5"]) == 0
    assert capsys.readouterr().out.strip() == "every pixel is the same"
    again = reproduce.reproduce(drawn(load("world"), tmp_path / "b.png"), lora=lora)
    assert again.changed[-1].startswith("LoRAs: none named then, a.safetensors x 1")


def test_another_decoders_picture_names_it_and_needs_it(tmp_path, capsys):
    zoo.new_vae().save_pretrained(tmp_path / "vae")
    engine = load("world", vae=tmp_path / "vae")
    path = drawn(engine, tmp_path / "a.png")
    digest = read_settings(path)["vae"]
    assert len(digest) == 12 and "vae" not in load("world").settings(PROMPT)
    assert main(["reproduce", str(path), "--vae", str(tmp_path / "vae")]) == 0
    assert capsys.readouterr().out.strip() == "every pixel is the same"
    (line,) = reproduce.reproduce(path).changed
    assert line == f"VAE: {digest} then, none named now (give it: --vae FILE, or vae=...)"


def test_the_decoder_that_a_preset_names_is_its_own(engine, monkeypatch, tmp_path):
    preset = dataclasses.replace(presets.MODELS["world"], name="with-vae", vae=str(WORLD / "teacher" / "vae"))
    monkeypatch.setitem(presets.MODELS, "with-vae", preset)
    assert "vae" not in load("with-vae").settings(PROMPT)
    zoo.new_vae().save_pretrained(tmp_path)
    assert "vae" in load("with-vae", vae=tmp_path).settings(PROMPT)


def test_a_model_in_a_file_on_this_machine(tmp_path):
    shutil.copy(load("world").source.unet_files[0], tmp_path / "unet.safetensors")
    path = drawn(load(tmp_path / "unet.safetensors"), tmp_path / "a.png")
    assert reproduce.reproduce(path).is_exact


def test_a_hub_id_is_one_of_the_cache(engine, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(reproduce, "load", lambda model, **how: asked.append(model) or engine)
    monkeypatch.setattr(reproduce, "cached_folder", lambda repo, parts: tmp_path if repo == "some/model" else None)
    picture = drawn(engine, tmp_path / "a.png")
    reproduce.reproduce(spoilt(picture, tmp_path, model="some/model"))
    assert asked == ["some/model"]
    with pytest.raises(InputError, match="on this machine, got 'other/model'"):
        reproduce.reproduce(spoilt(picture, tmp_path, model="other/model"))


def test_a_terminal_is_shown_no_words_of_the_file_as_they_are(loaded, tmp_path):
    lora = {"name": "\x1b[2Ja", "digest": "\n", "scale": 10**300}
    changes = {"unet": "\x1b[31m", "version": "\nFAKE LINE", "dtype": "x" * 50000, "vae": "\r", "loras": [lora]}
    again = reproduce.reproduce(spoilt(drawn(loaded, tmp_path / "a.png"), tmp_path, **changes))
    assert len(again.changed) == 5 and all(line.isprintable() and len(line) < 400 for line in again.changed)
    image = {"image": "\x1b[31m", "strength": 0.5}
    with pytest.raises(InputError) as error:
        reproduce.reproduce(spoilt(drawn(loaded, tmp_path / "a.png"), tmp_path, **image))
    assert str(error.value).isprintable()


def test_a_digest_is_of_pixels_and_size():
    pixels = np.random.default_rng().integers(0, 256, (6, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert digest(image) == digest(image.convert("RGBA")) != digest(Image.fromarray(pixels.reshape(4, 6, 3)))
    tensor = torch.rand(3, 4, 6)
    assert digest(tensor) == digest(tensor.double()) != digest(tensor.reshape(3, 6, 4))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": float("nan")}, "must be JSON, got NaN, which JSON does not have"),
        ({"seed": float("inf")}, "must be JSON, got Infinity"),
        ({"seed": 1.0}, "must have an integer as seed, got 1.0"),
        ({"seed": True}, "must have an integer as seed, got True"),
        ({"seed": -1}, "seed must be an integer in 0..2"),
        ({"seed": 10**400}, "seed must be an integer in 0..2"),
        ({"seed": [1]}, "must have an integer as seed, got .1."),
        ({"prompt": ["a"]}, "must have text as prompt"),
        ({"prompt": "x" * 6000}, "prompt must be at most 5000 characters"),
        ({"prompt": "\ud800"}, "prompt must be valid Unicode"),
        ({"num_inference_steps": 10**9}, "num_inference_steps must be an integer in 1..4"),
        ({"num_inference_steps": None}, "must have num_inference_steps, got none"),
        ({"height": 8192}, "must be as large as its settings say .32x8192., got 32x32"),
        ({"width": 10**30}, "must be as large as its settings say"),
        ({"width": -32}, "must be as large as its settings say"),
        ({"strength": "0.6", "image": "0"}, "must have a number as strength"),
        ({"strength": 0.6}, "must have both image and strength or neither"),
        ({"image": "ab"}, "must have both image and strength or neither"),
        ({"negative": "slg"}, "must have one of nag, nasa, cfg as negative"),
        ({"negative_prompt": {"a": 1}}, "must have text as negative_prompt"),
        ({"nag_tau": 0, "negative_prompt": "a"}, "nag_tau must be above 0"),
        ({"nag_tau": 10**400, "negative_prompt": "a"}, "nag_tau must be above 0"),
        ({"loras": "a"}, "must have a list of objects with name, digest, scale as loras, got 'a'"),
        ({"loras": [{"name": "a", "digest": "b"}]}, "must have a list of objects"),
        ({"loras": [{"name": "a", "digest": "b", "scale": True}]}, "must have a list of objects"),
        ({"vae": 3}, "must have text as vae"),
        ({"sampler": "Euler"}, "must be those of nitrofusion .* or earlier, got 'sampler'"),
        ({"__class__": {}}, "must be those of nitrofusion .* or earlier, got '__class__'"),
        ({"model": 3}, "must have text as model"),
        ({"model": "/nowhere"}, "model must be a preset or a folder on this machine, got '/nowhere'"),
        ({"model": "someone/some-model"}, "model must be a preset or a folder on this machine"),
        ({"model": "~nobody-like-that/x"}, "model must be a preset or a folder on this machine"),
        ({"model": "x" * 60000}, "model must be a preset or a folder on this machine, got 'x*[.]{3}"),
        ({"model": "\u0000"}, "model must be a preset or a folder on this machine"),
        ({"model": ""}, "model: must be a preset"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_settings_that_mean_harm(engine, tmp_path, changes, words):
    path = spoilt(drawn(engine, tmp_path / "a.png"), tmp_path, **changes)
    if changes == {"num_inference_steps": None}:
        assert "num_inference_steps" not in read_settings(path)
    start = time.perf_counter()
    with pytest.raises(InputError, match=words) as error:
        reproduce.reproduce(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.perf_counter() - start < 30


def test_files_that_mean_harm(engine, tmp_path, capsys):
    whole = drawn(engine, tmp_path / "a.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        text = image.info[KEY].encode()
        image.load()
        settings = json.loads(text)
        bad = {
            "deep": write(image, tmp_path / "deep.png", "[" * 60000),
            "list": write(image, tmp_path / "list.png", "[1]"),
            "long": write(image, tmp_path / "long.png", json.dumps(settings | {"prompt": "x" * 70000})),
            "digits": write(image, tmp_path / "digits.png", '{"seed": ' + "9" * 10000 + "}"),
            "bare": tmp_path / "bare.png",
        }
        image.save(bad["bare"])
    bad["cut"] = tmp_path / "cut.png"
    bad["cut"].write_bytes(whole[: len(whole) - 400])
    bad["flipped"] = tmp_path / "flipped.png"
    at = whole.index(b"IDAT") + 20
    bad["flipped"].write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    bad["empty"] = tmp_path / "empty.png"
    bad["empty"].write_bytes(b"")
    bad["folder"] = tmp_path
    bomb = zlib.compress(b"x" * 200_000_000, 9)
    bad["text bomb"] = raw_png(tmp_path / "bomb.png", chunk(b"iTXt", KEY.encode() + b"\0\1\0\0\0" + bomb))
    bad["ztxt bomb"] = raw_png(tmp_path / "bomb2.png", chunk(b"zTXt", KEY.encode() + b"\0\0" + bomb))
    itxt = chunk(b"iTXt", KEY.encode() + b"\0\0\0\0\0" + json.dumps(settings | {"width": 60000}).encode())
    bad["pixel bomb"] = raw_png(tmp_path / "huge.png", itxt, chunk(b"IDAT", bomb[:1000]), width=60000, height=60000)
    large = json.dumps(settings | {"width": 9999, "height": 9999}).encode()
    itxt = chunk(b"iTXt", KEY.encode() + b"\0\0\0\0\0" + large)
    bad["large"] = raw_png(tmp_path / "large.png", itxt, chunk(b"IDAT", bomb[:1000]), width=9999, height=9999)
    for name, path in bad.items():
        start = time.perf_counter()
        assert main(["reproduce", str(path)]) == 2, name
        err = capsys.readouterr().err.strip()
        assert err and "\n" not in err and "Traceback" not in err and len(err) < 400, (name, err)
        assert time.perf_counter() - start < 10, name


def test_the_text_for_web_interfaces(engine, tmp_path):
    options = {"negative_prompt": "a ring", "image": Image.new("RGB", (32, 32)), "seed": 5}
    with Image.open(drawn(engine, tmp_path / "a.png", **options)) as image:
        lines = image.info["parameters"].split("\n")
    assert lines[:2] == [PROMPT, "Negative prompt: a ring"]
    assert lines[2].startswith("Steps: 1, CFG scale: 0.0, Seed: 5, Size: 32x32, Model hash: ")
    assert ", Denoising strength: 0.6, Negative guidance: nag, NAG scale: 2.0, " in lines[2]
    settings = engine.settings(PROMPT) | {"model": 'a, b: "c"'}
    with Image.open(save_png(Image.new("RGB", (2, 2)), tmp_path / "b.png", settings)) as image:
        assert r'Model: "a, b: \"c\"", Version' in image.info["parameters"]

"""Pictures drawn again from their PNG, and PNGs that mean harm."""

import json
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from nitrofusion.cli import main
from nitrofusion.engine import load, reproduce
from nitrofusion.engine.images import digest
from nitrofusion.engine.png import KEY, read_settings, save_png
from nitrofusion.errors import InputError

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
    monkeypatch.setattr(reproduce, "load", lambda model, device=None, dtype=None: engine)
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

"""Real pictures: captions, files and latents."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nitrofusion.config import TrainConfig
from nitrofusion.data import Samples, training_prompts
from nitrofusion.errors import InputError
from nitrofusion.models import sdxl
from nitrofusion.pictures import Pictures, read_captions
from nitrofusion.world.render import render
from nitrofusion.world.scenes import sample_scenes

from .tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def write(folder, lines):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_folder_gives_captions_and_latents_of_the_middle_square(tmp_path, model):
    pixels = np.random.default_rng(3).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels[:, :32]).convert("RGBA").save(tmp_path / "square.png")
    write(tmp_path, [{"file_name": "wide.png", "text": "wide"}, {"file_name": "square.png", "text": " square "}])
    assert [caption for _, caption in read_captions(tmp_path)] == ["wide", "square"]
    config = TrainConfig(images=str(tmp_path), teacher_samples="none")
    assert training_prompts(config, 3) == ["wide", "square", "wide"]
    got = Pictures(str(tmp_path), model, 0)([0, 3])
    images = torch.from_numpy(np.stack([pixels[:, 8:40], pixels[:, :32]])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        wanted = model.vae.encode(images).latent_dist.mean * model.vae.config.scaling_factor
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_worlds_pictures_are_the_scenes_of_the_prompts(model):
    config = TrainConfig(images="world", teacher_samples="none", seed=5)
    batch = Samples(config, model, None)(7, 3)
    scenes = sample_scenes(3, 3, start=7)
    assert batch["target"] is None
    with torch.no_grad():
        wanted = model.vae.encode(render(scenes)).latent_dist.mean
    torch.testing.assert_close(batch["image"], wanted * model.vae.config.scaling_factor, rtol=1e-4, atol=1e-4)
    cond = sdxl.encode_prompt(model, scenes.captions())
    torch.testing.assert_close(batch["cond"].prompt_embeds, cond.prompt_embeds)
    noise = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5 * 1_000_003 + i)) for i in (7, 8, 9)]
    assert torch.equal(batch["noise"], torch.cat(noise))


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "must hold at least one prompt"),
        ([{"file_name": "a.png", "caption": "a"}], "must have a column text"),
        ([{"file_name": "missing.png", "text": "a"}], "must name pictures of its folder, got 'missing.png'"),
        ([{"file_name": "../a.png", "text": "a"}], "must name pictures of its folder, got '../a.png'"),
        (["words", {"file_name": "a.png", "text": "a"}], "must hold lines of file_name and text, got 'words'"),
        ([{"file_name": "a\0.png", "text": "a"}], "must name pictures of its folder, got 'a.x00.png'"),
        ([{"file_name": "\ud800", "text": "a"}], "must name pictures of its folder, got '.ud800'"),
        ([{"file_name": "a" * 5000, "text": "a"}], "must name pictures of its folder, got 'aaa"),
        ([{"text": "a"}], "must name pictures of its folder, got None"),
    ],
)
def test_bad_folders(tmp_path, lines, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(InputError, match=message):
        read_captions(write(inner, lines))


def test_a_picture_that_is_none_is_named(tmp_path, model):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    write(tmp_path, [{"file_name": "a.png", "text": "a"}])
    with pytest.raises(InputError, match="a.png must be a readable picture"):
        Pictures(str(tmp_path), model, 0)([0])


def test_captions_with_a_mark_and_lines_inside(tmp_path):
    """A byte order mark, as Windows writes, and characters that only Python takes for the end of a line."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    text = '{"file_name": "a.png", "text": "one\u2028line"}\r\n\r\n{"file_name": "a.png", "text": " "}\r\n'
    (tmp_path / "metadata.jsonl").write_bytes(("\ufeff" + text).encode())
    assert [caption for _, caption in read_captions(tmp_path)] == ["one\u2028line"]


def test_photographs_are_turned_and_16_bits_are_not_white(tmp_path, model):
    side = model.resolution
    ramp = np.linspace(0, 65535, side * side).astype(np.uint16).reshape(side, side)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    turned = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "levels.tiff")
    names = ("deep.png", "turned.png", "levels.tiff")
    write(tmp_path, [{"file_name": name, "text": "a"} for name in names])
    pictures = Pictures(str(tmp_path), model, 0)
    deep, shown = ((pictures._open(i).permute(1, 2, 0).numpy() + 1) * 127.5 for i in (0, 1))
    assert np.abs(deep - ramp[..., None] / 257).max() < 0.51
    assert np.abs(shown - np.rot90(turned, -1)).max() < 1e-3
    with pytest.raises(InputError, match="levels.tiff must be a readable picture, got Pillow's mode F"):
        pictures([2])


def test_a_picture_with_broken_chunks_is_named(tmp_path, model):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    write(tmp_path, [{"file_name": "a.png", "text": "a"}])
    for at in (8, 30, 45):  # a chunk's length, its checksum, its data
        (tmp_path / "a.png").write_bytes(data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :])
        with pytest.raises(InputError, match="a.png must be a readable picture"):
            Pictures(str(tmp_path), model, 0)([0])

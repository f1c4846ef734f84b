"""Vision networks: what they give is a straight transformers call's, and what does not fit is refused."""

import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from nitrofusion.errors import InputError
from nitrofusion.models import features
from nitrofusion.presets import resolve_folder
from nitrofusion.world.render import render
from nitrofusion.world.scenes import sample_scenes

from .tiny import tiny_features


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return tiny_features(tmp_path_factory.mktemp("features"))


@pytest.mark.parametrize("kind", [(Dinov2Model, Dinov2Config), (ViTModel, ViTConfig)])
def test_features_equal_a_straight_call(tmp_path, kind):
    folder = tiny_features(tmp_path / "net", *kind, num_hidden_layers=6)
    (tmp_path / "net" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [2, 3, 4]}'
    )
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    form = features.check(folder)
    assert form == features.Form(32, 8, 1, 32, (0, 2, 3, 5, 6))
    maps, embedding = features.load(folder)(pixels)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [2.0, 3.0, 4.0]))
    with torch.no_grad():
        out = AutoModel.from_pretrained(folder)((pixels / 2 + 0.5 - mean) / std, output_hidden_states=True)
    torch.testing.assert_close(embedding, out.last_hidden_state[:, 0])
    for depth, found in zip(form.depths, maps, strict=True):
        assert found.shape == (3, 32, 8, 8)
        state = out.hidden_states[depth]
        for row, col in ((0, 0), (3, 5), (7, 7)):
            torch.testing.assert_close(found[:, :, row, col], state[:, 1 + 8 * row + col] + state[:, 0])


def test_twelve_blocks_are_kept_as_in_stylegan_t():
    assert features.depths_of(12) == (0, 3, 6, 9, 12) and features.depths_of(24) == (0, 6, 12, 18, 24)
    assert features.depths_of(2) == (0, 1, 2)


def test_other_sizes_are_resized_and_other_token_grids_interpolated(tmp_path, network):
    net = features.load(network)
    large = torch.rand(2, 3, 64, 64) * 2 - 1
    mean = large.view(2, 3, 32, 2, 32, 2).mean((3, 5))
    torch.testing.assert_close(net(large)[0][2], net(mean)[0][2], rtol=1e-4, atol=1e-5)
    assert net(torch.rand(2, 3, 20, 20))[0][0].shape == (2, 32, 8, 8)
    for kind in ((Dinov2Model, Dinov2Config), (ViTModel, ViTConfig)):
        folder = tiny_features(tmp_path / kind[0].__name__, *kind)
        wide = features.load(folder, size=48)
        assert wide(large)[0][0].shape == (2, 32, 12, 12)
    torch.manual_seed(1)
    cut = [net(large, crop=1.0)[0][0] for _ in range(2)]
    assert not torch.equal(*cut) and not torch.equal(cut[0], net(large)[0][0])


def test_gradients_reach_the_pixels(network):
    net = features.load(network)
    pixels = (torch.rand(2, 3, 40, 40) * 2 - 1).requires_grad_()
    maps, _ = net(pixels, features.AUGMENTATIONS)
    sum(m.square().mean() for m in maps).backward()
    assert torch.isfinite(pixels.grad).all() and (pixels.grad.abs().sum(1) > 0).float().mean() > 0.5
    assert all(p.grad is None for p in net.parameters())


def test_augmentation_against_a_loop():
    pixels = torch.rand(12, 3, 16, 24) * 2 - 1
    moved = features.augmented(pixels, ("translation",))
    shifts = set()
    for image, original in zip(moved, pixels, strict=True):
        found = []
        for down in range(-2, 3):
            for right in range(-3, 4):
                wanted = F.pad(original, (3, 3, 2, 2))[:, 2 - down : 18 - down, 3 - right : 27 - right]
                found += [(down, right)] * torch.equal(image, wanted)
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) > 6
    cut = features.augmented(pixels, ("cutout",))
    assert bool(((cut == pixels) | (cut == 0)).all()) and 0 < (cut == 0).float().mean() < 0.08
    torch.manual_seed(5)
    colored = features.augmented(pixels, ("color",))
    torch.manual_seed(5)
    bright, saturation, contrast = torch.rand(12) - 0.5, torch.rand(12) * 2, torch.rand(12) + 0.5
    for i in range(12):
        x = pixels[i] + bright[i]
        x = x.mean(0) + (x - x.mean(0)) * saturation[i]
        torch.testing.assert_close(colored[i], x.mean() + (x - x.mean()) * contrast[i])
    assert torch.equal(features.augmented(pixels, ()), pixels)


def test_the_worlds_network_is_found_and_says_what_is_where():
    """Of its tokens a linear map tells the background; the judge has no part in it."""
    net = features.load(resolve_folder("world-features"))
    scenes = sample_scenes(400, 77_000)
    embedding = net(render(scenes))[1]
    truth = F.one_hot(torch.from_numpy(scenes.attributes()[:, 0]), 3).float()
    x = torch.cat([embedding, torch.ones(400, 1)], 1)
    fit = torch.linalg.lstsq(x[:300], truth[:300]).solution
    assert ((x[300:] @ fit).argmax(1) == truth[300:].argmax(1)).float().mean() > 0.9


def test_networks_that_do_not_fit_are_refused(network, tmp_path):
    def refused(folder, message):
        with pytest.raises(InputError, match=message) as caught:
            features.check(str(folder))
        assert "\n" not in str(caught.value)

    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path / "cnn")
    refused(tmp_path / "cnn", "must be a vision transformer that transformers knows")
    bare = tmp_path / "bare"
    shutil.copytree(network, bare)
    (bare / "model.safetensors").unlink()
    refused(bare, "must hold safetensors weights, got none")
    (bare / "pytorch_model.bin").write_bytes(b"no pickle is read")
    refused(bare, "got the pickle pytorch_model.bin")
    foreign = tmp_path / "foreign"
    shutil.copytree(network, foreign)
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (foreign / "config.json").write_text(json.dumps(code))
    (foreign / "mine.py").write_text("raise SystemExit('remote code ran')")
    refused(foreign, "must be a vision transformer that transformers knows")
    gray = tmp_path / "gray"
    shutil.copytree(network, gray)
    (gray / "preprocessor_config.json").write_text('{"image_mean": 0.5}')
    refused(gray, "must have an image_mean and image_std of three numbers, got 0.5")
    (gray / "preprocessor_config.json").write_text('{"image_std": [0.5, 0, 0.5]}')
    refused(gray, "must have an image_std above 0, got .0.5, 0, 0.5.")
    (gray / "preprocessor_config.json").write_text('{"image_mean": [0.5, NaN, 0.5]}')
    refused(gray, "must have an image_mean and image_std of three numbers, got .0.5, nan, 0.5.")
    half = tmp_path / "half"
    shutil.copytree(network, half)
    state = load_file(half / "model.safetensors")
    del state["encoder.layer.1.mlp.fc1.weight"]
    save_file(state, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="must hold all weights, got none for 1, first encoder.layer.1.mlp.fc1.weight"):
        features.load(str(half))


@pytest.mark.parametrize(
    "states, last, grid, words",
    [
        ([(1, 17, 8), (1, 17, 8)], (1, 17, 6), 4, "a class token and 4x4 tokens at every block"),
        ([(1, 17, 8), (1, 5, 8)], (1, 17, 8), 4, "a class token and 4x4 tokens at every block"),
        ([(1, 16, 8)] * 3, (1, 16, 8), 4, "a class token and 4x4 tokens at every block"),
        ([(1, 17, 8)], (1, 17, 8), 4, "a class token and 4x4 tokens at every block"),
        ([(1, 8, 4, 4)] * 3, (1, 8, 4, 4), 4, "a class token and 4x4 tokens at every block"),
        ([(1, 5, 8)] * 3, (1, 5, 8), 2, "3 x 3 tokens or more, got 2 x 2"),
    ],
)
def test_what_a_network_gives_has_to_be_tokens(states, last, grid, words):
    with pytest.raises(InputError, match=words):
        features._form("net", [torch.empty(s) for s in states], torch.empty(last), 14 * grid, 14)


def test_timm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"needs timm, got .*nitrofusion\[timm\]"):
        features.check("timm:vit_small_patch14_dinov2.lvd142m")

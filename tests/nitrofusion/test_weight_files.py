"""The published weight files: found, checked by digest, read as tensors only, refused in one clear line."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nitrofusion.errors import InputError
from nitrofusion.evaluate import weights
from nitrofusion.evaluate.weights import WEIGHTS, digest, list_weights, locate, tensors

PICKLED = ("inception", "aesthetic", "image-reward", "hpsv2")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with a small aesthetic file, and the table as if its authors had published that one."""
    path = tmp_path / WEIGHTS["aesthetic"].file
    torch.save({"layers.0.weight": torch.randn(3, 4)}, path)
    entry = replace(WEIGHTS["aesthetic"], sha256=sha256(path), bytes=path.stat().st_size)
    monkeypatch.setitem(weights.WEIGHTS, "aesthetic", entry)
    return path


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_weights_are_named_with_where_they_are_from(tmp_path, name):
    with pytest.raises(InputError) as error:
        locate(name, tmp_path)
    assert WEIGHTS[name].file in str(error.value) and WEIGHTS[name].url in str(error.value)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="weights must be one of inception, .*got 'vgg'"):
        locate("vgg", tmp_path)


def test_the_published_file_is_found_and_read(published):
    path = locate("aesthetic", published.parent)
    assert path == published and digest(path) == sha256(published)
    assert torch.equal(tensors("aesthetic", path)["layers.0.weight"], torch.load(published)["layers.0.weight"])


def test_files_from_before_torch_1_6_are_read(published, monkeypatch):
    state = {"layers.0.weight": torch.randn(3, 4)}
    torch.save(state, published, _use_new_zipfile_serialization=False)
    entry = replace(WEIGHTS["aesthetic"], sha256=sha256(published), bytes=published.stat().st_size)
    monkeypatch.setitem(weights.WEIGHTS, "aesthetic", entry)
    assert torch.equal(tensors("aesthetic", published)["layers.0.weight"], state["layers.0.weight"])


def test_another_digest_is_refused_before_anything_is_read(published, monkeypatch):
    expected = WEIGHTS["aesthetic"].sha256
    content = bytearray(published.read_bytes())
    content[len(content) // 2] ^= 1
    published.write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("read"))
    for attempt in (lambda: locate("aesthetic", published.parent), lambda: tensors("aesthetic", published)):
        with pytest.raises(InputError, match=f"SHA-256 {expected}, got {sha256(published)}"):
            attempt()
    with pytest.raises(InputError, match="SHA-256"):  # nor does asking for unknown ones help
        locate("aesthetic", published.parent, allow_unknown_digest=True)
    published.write_bytes(content[:-1])
    with pytest.raises(InputError, match="bytes, got"):
        locate("aesthetic", published.parent)


@pytest.mark.parametrize("name", ["image-reward", "hpsv2"])
def test_a_pickle_without_a_known_digest_is_refused_unless_asked_for(tmp_path, name):
    assert WEIGHTS[name].sha256 is None
    path = tmp_path / WEIGHTS[name].file
    state = {"a": torch.randn(2), "b": torch.randn(2, 3).half().T}
    torch.save({"epoch": 1, "state_dict": state}, path)
    with pytest.raises(InputError, match="weights convert .*safetensors"):
        locate(name, tmp_path)
    found = tensors(name, locate(name, tmp_path, allow_unknown_digest=True))
    assert all(torch.equal(found[k], v) for k, v in state.items())
    target = path.with_suffix(".safetensors")
    command = [sys.executable, "-m", "nitrofusion.evaluate.weights", "convert", str(path), str(target)]
    subprocess.run(command, check=True)
    assert all(torch.equal(load_file(target)[k], v) for k, v in state.items())
    path.unlink()
    assert locate(name, tmp_path) == target
    assert all(torch.equal(tensors(name, target)[k], v) for k, v in state.items())


@pytest.mark.parametrize("name", PICKLED)
def test_the_safetensors_form_is_taken_with_any_digest(tmp_path, name):
    path = (tmp_path / WEIGHTS[name].file).with_suffix(".safetensors")
    save_file({"a": torch.ones(2)}, path)
    assert locate(name, tmp_path) == path and digest(path) == sha256(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="readable safetensors"):
        tensors(name, path)


class Touch:
    """Unpickled, it runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_that_run_code_do_not(tmp_path, monkeypatch):
    path, touched = tmp_path / "ImageReward.pt", tmp_path / "touched"
    torch.save({"a": Touch(touched)}, path)
    with pytest.raises(InputError, match="pickle of tensors only"):
        tensors("image-reward", locate("image-reward", tmp_path, allow_unknown_digest=True))
    with pytest.raises(InputError, match="pickle of tensors only"):
        weights.convert(path, tmp_path / "x.safetensors")
    assert not touched.exists()


@pytest.fixture
def clip_folder(tmp_path):
    folder = tmp_path / "clip-vit-base-patch32"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    return folder


def test_a_model_folder_is_found_and_its_digest_is_of_all_that_counts(clip_folder):
    assert locate("clip-vit-base-patch32", clip_folder.parent) == clip_folder
    first = digest(clip_folder)
    (clip_folder / "README.md").write_text("of no account")
    assert digest(clip_folder) == first
    (clip_folder / "config.json").write_text(json.dumps({"a": 1}))
    assert digest(clip_folder) != first
    (clip_folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="got no preprocessor_config.json"):
        locate("clip-vit-base-patch32", clip_folder.parent)


def test_a_model_folder_with_the_published_pickle_only_needs_its_digest(clip_folder, monkeypatch):
    (clip_folder / "model.safetensors").unlink()
    file = clip_folder / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file)
    with pytest.raises(InputError, match="605,247,071 bytes"):
        locate("clip-vit-base-patch32", clip_folder.parent)
    monkeypatch.setitem(weights._CLIP_PICKLES, "clip-vit-base-patch32", (sha256(file), file.stat().st_size))
    assert torch.equal(tensors("clip-vit-base-patch32", locate("clip-vit-base-patch32", clip_folder.parent))["a"],
                       torch.ones(2))  # fmt: skip
    clip_folder.rename(clip_folder.parent / "clip-vit-large-patch14")
    with pytest.raises(InputError, match="pytorch_model.bin"):
        locate("clip-vit-large-patch14", clip_folder.parent)


def test_digest_follows_the_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    assert digest(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"three")
    assert digest(path) == hashlib.sha256(b"three").hexdigest()


def test_the_list_says_what_is_there(published):
    folder = published.parent
    lines = list_weights(folder)
    assert all(weight.url in lines and weight.file in lines for weight in WEIGHTS.values())
    assert "aesthetic: present, as published" in lines and "inception: missing" in lines
    published.write_bytes(b"other")
    assert "aesthetic: not usable: " in list_weights(folder)
    save_file({"a": torch.ones(2)}, folder / "ImageReward.safetensors")
    assert "image-reward: present as ImageReward.safetensors" in list_weights(folder)
    assert "no folder given" in list_weights()


def test_digests_are_digests():
    for weight in WEIGHTS.values():
        assert weight.sha256 is None or (len(weight.sha256) == 64 and int(weight.sha256, 16))
        assert (weight.sha256 is None) == (weight.bytes is None)
    assert WEIGHTS["inception"].sha256[:8] in WEIGHTS["inception"].file  # torch.hub's way of naming files

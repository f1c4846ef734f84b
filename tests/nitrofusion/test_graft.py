"""Weight differences on other checkpoints: against the formula, in every layout, and every refusal."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nitrofusion import presets
from nitrofusion.cli import main
from nitrofusion.engine import load
from nitrofusion.engine.export import export
from nitrofusion.engine.graft import REPORT, graft
from nitrofusion.errors import InputError, StorageError
from nitrofusion.models.weights import Weights

from .tiny import PROMPTS, nudged, plain_pipeline, published, sdxl_folder

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(custom folder, preset of a student beside its base's folder)."""
    root = tmp_path_factory.mktemp("graft")
    base, custom = sdxl_folder(root / "base"), sdxl_folder(root / "custom", seed=5)
    state = load_file(base / UNET)
    save_file(nudged(state, 1), root / "student.safetensors")
    save_file({k: v.half() for k, v in nudged(state, 2, 0.05).items()}, custom / UNET)
    presets.MODELS["tiny"] = presets.ModelPreset("tiny", str(base), str(root / "student.safetensors"), 500)
    yield custom, presets.MODELS["tiny"]
    del presets.MODELS["tiny"]


def expected(models, strength=1.0):
    custom, student = models
    c, n, b = (load_file(p) for p in (custom / UNET, student.unet, f"{student.folder}/{UNET}"))
    return {k: c[k].double() + strength * (n[k].double() - b[k].double()) for k in c}


def assert_is(path, wanted, dtype=torch.float16):
    got = load_file(path)
    assert got.keys() == wanted.keys() and {v.dtype for v in got.values()} == {dtype}
    unit = torch.finfo(dtype).eps
    for k, v in wanted.items():
        assert (got[k].double() - v).abs().max() <= unit * v.abs().max().clamp(min=1e-3), k


def test_a_folder(models, tmp_path):
    custom, student = models
    wanted = expected(models)
    report = graft(custom, tmp_path / "out", student="tiny")
    assert_is(tmp_path / "out" / UNET, wanted)
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        for file in (custom / part).iterdir():
            made = tmp_path / "out" / part / file.name
            if part == "text_encoder" and file.name == "model.safetensors":  # under its published names
                got, stored = load_file(made), published(load_file(file))
                assert got.keys() == stored.keys() and all(torch.equal(got[k], stored[k]) for k in stored)
            else:
                assert file.read_bytes() == made.read_bytes()
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler" and scheduler["shifted_timestep"] == 500
    assert "shifted_timestep=500" in (tmp_path / "out" / "README.md").read_text()
    plain_pipeline(tmp_path / "out")  # nothing is missing for diffusers
    engine = load(tmp_path / "out")
    assert engine.is_student and engine.source.shifted_timestep == 500
    engine.generate(PROMPTS[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

    saved = json.loads((tmp_path / "out" / REPORT).read_text())
    c, b = (load_file(p) for p in (custom / UNET, f"{student.folder}/{UNET}"))
    for layer in saved["layers"]:
        name = layer["name"]
        step = wanted[name] - c[name].double()
        assert layer["change"] == pytest.approx((step.norm() / c[name].double().norm()).item(), rel=1e-4)
        distance, size = (c[name].double() - b[name].double()).norm(), b[name].double().norm()
        assert layer["distance"] == pytest.approx((distance / size).item() if size else 1.0, rel=1e-4)
    assert saved["kept"] == 0 and saved["tensors"] == len(c) and "mid_block" in str(report)


@pytest.mark.parametrize("strength, dtype", [(0.0, None), (-0.5, "float32"), (0.7, "bfloat16")])
def test_strength_and_precision(models, tmp_path, strength, dtype):
    graft(models[0], tmp_path / "unet.safetensors", student="tiny", strength=strength, dtype=dtype)
    wanted = getattr(torch, dtype) if dtype else torch.float16
    assert_is(tmp_path / "unet.safetensors", expected(models, strength), wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unet.graft.json", "unet.safetensors"]


def test_single_files_are_the_same(models, tmp_path):
    """Custom, student and base as ComfyUI files, with and without prefix, give what folders give."""
    custom, student = models
    full = export(custom, tmp_path / "full", format="comfyui", full=True) / "custom_comfyui.safetensors"
    one = export("tiny", tmp_path / "one", format="comfyui") / "tiny_comfyui.safetensors"
    bare = {k.removeprefix("model.diffusion_model."): v for k, v in load_file(one).items()}
    save_file(bare, tmp_path / "bare.safetensors")
    base = export(student.folder, tmp_path / "base", format="comfyui") / "base_comfyui.safetensors"
    graft(full, tmp_path / "a.safetensors", student=one, base=base)  # our header says the shift
    graft(full, tmp_path / "b.safetensors", student=tmp_path / "bare.safetensors", base=base, shifted_timestep=250)
    assert_is(tmp_path / "a.safetensors", expected(models))
    assert_is(tmp_path / "b.safetensors", expected(models))

    graft(full, tmp_path / "folder", student="tiny")
    assert_is(tmp_path / "folder" / UNET, expected(models))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(plain_pipeline(f), part).state_dict() for f in (tmp_path / "folder", custom))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), part


def test_odd_tensors_are_kept_and_reported(models, tmp_path):
    custom, _ = models
    state = load_file(custom / UNET)
    state["mid_block.extra.weight"] = torch.ones(3)
    state["up_blocks.2.resnets.0.conv2.bias"] = torch.ones(7, dtype=torch.float16)
    save_file(state, tmp_path / "odd.safetensors")
    report = graft(tmp_path / "odd.safetensors", tmp_path / "new.safetensors", student="tiny")
    kept = {layer.name: layer.kept for layer in report.layers if layer.kept}
    assert kept.keys() == {"mid_block.extra.weight", "up_blocks.2.resnets.0.conv2.bias"}
    assert kept["mid_block.extra.weight"] == "the student has no such tensor"
    assert kept["up_blocks.2.resnets.0.conv2.bias"] == "[7] here, [48] in the student"
    assert "kept as it is: mid_block.extra.weight" in str(report)
    assert torch.equal(load_file(tmp_path / "new.safetensors")["mid_block.extra.weight"], torch.ones(3))


def altered(custom, folder, **changes):
    state = load_file(custom / UNET)
    for name, value in changes.items():
        state[name.replace("__", ".")] = value
    save_file(state, folder / "altered.safetensors")
    return folder / "altered.safetensors"


def test_refusals(models, tmp_path):
    custom, student = models
    wide = torch.zeros(48, 9, 3, 3)
    v_folder = tmp_path / "v"
    shutil.copytree(custom, v_folder)
    config = v_folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    (tmp_path / "half.safetensors").write_bytes((custom / UNET).read_bytes()[:5000])
    small = {k: v for k, v in load_file(custom / UNET).items() if not k.startswith("add_embedding")}
    save_file(small, tmp_path / "sd15.safetensors")
    (tmp_path / "m").mkdir()
    marked = altered(custom, tmp_path / "m", v_pred=torch.zeros(0))
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out.safetensors"
    inpaint = {"conv_in__weight": wide}
    for change, options, words in (
        (inpaint, {}, "custom must have 4 input channels, got 9 (an inpainting model)"),
        ({"add_embedding__linear_1__weight": torch.zeros(8, 8)}, {}, "custom must have the form of base, got add_emb"),
        (None, {"custom": tmp_path / "sd15.safetensors"}, "custom must be SDXL's UNet"),
        (None, {"custom": v_folder}, "must predict epsilon"),
        (None, {"custom": marked}, "custom must predict epsilon, got v_prediction"),
        (None, {"custom": tmp_path / "half.safetensors"}, "must be a readable safetensors file"),
        (None, {"custom": tmp_path / "none.safetensors"}, "custom must be a preset, a folder or a safetensors file"),
        (None, {"custom": "world-teacher"}, "custom must have the form of base"),
        (None, {"student": student.unet}, "shifted_timestep must be given in 1..1000"),
        (None, {"student": student.unet, "shifted_timestep": 500}, "base must be given"),
        (None, {"shifted_timestep": 0}, "shifted_timestep must be given in 1..1000 (250 Realism, 500 Vibrant), got 0"),
        (None, {"strength": float("nan")}, "strength must be a finite number, got nan"),
        (None, {"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, got 'int8'"),
        (None, {"output": custom}, "output must be a new or empty folder"),
        (None, {"output": custom / UNET}, "output must be a new file"),
        (None, {"strength": 1e9}, "must fit float16"),
        (None, {"output": tmp_path / "o", "custom": custom / UNET}, "custom must be a full checkpoint"),
    ):
        (tmp_path / "x").mkdir()
        given = {"custom": altered(custom, tmp_path / "x", **change) if change else custom, "output": out}
        with pytest.raises(InputError, match=re.escape(words)):
            graft(**({"student": "tiny"} | given | options))
        shutil.rmtree(tmp_path / "x")
        assert sorted(tmp_path.rglob("*")) == before, words
    with pytest.raises((InputError, StorageError)):
        graft(custom, "/proc/none/out.safetensors", student="tiny")


def test_the_command(models, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["graft", "--custom", str(models[0]), "--student", "tiny", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "most changed" in text and text.strip().endswith(str(out)) and max(map(len, text.splitlines())) <= 100
    assert main(["graft", "--custom", str(models[0]), "--student", "tiny", "--output", str(out)]) == 2
    assert "graft: output must be a new or empty folder" in capsys.readouterr().err
    assert main(["graft", "--custom", "/nowhere", "--student", "tiny", "--output", str(tmp_path / "b")]) == 2
    assert main(["graft", "--student", "tiny"]) == 2


def test_mapped_files_are_only_read(models, tmp_path, monkeypatch):
    """Writing to a mapped tensor would copy its pages, and the next reader would see other numbers."""
    seen, read = [], Weights._map

    def spy(self, *args):
        mapped = read(self, *args)
        seen.extend((tensor, tensor.clone()) for tensor in mapped.values())
        return mapped

    wide = {k: v.float() for k, v in load_file(models[0] / UNET).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    monkeypatch.setattr(Weights, "_map", spy)
    graft(tmp_path / "wide.safetensors", tmp_path / "out.safetensors", student="tiny")
    assert len(seen) >= 3 * len(wide) and all(torch.equal(*pair) for pair in seen)

"""Exported folders in plain diffusers draw the engine's pictures."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from nitrofusion import presets
from nitrofusion.engine import load
from nitrofusion.engine.export import export
from nitrofusion.errors import InputError

from .tiny import PROMPTS, SnippetScheduler, generators, plain_pipeline, tiny_folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A preset whose UNet is a half-precision file beside a float32 folder."""
    root = tmp_path_factory.mktemp("student")
    folder = tiny_folder(root / "teacher")
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({k: (1.01 * v).half() for k, v in state.items()}, root / "unet.safetensors")
    presets.MODELS["tiny"] = presets.ModelPreset("tiny", str(folder), str(root / "unet.safetensors"), 500)
    yield "tiny"
    del presets.MODELS["tiny"]


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    return export(student, tmp_path_factory.mktemp("export") / "deep" / "model")


def test_the_snippet_draws_the_engines_pictures(student, exported):
    scheduler = SnippetScheduler.from_pretrained(exported, subfolder="scheduler", shifted_timestep=500)
    scheduler.config.original_inference_steps = 4
    pipeline = DiffusionPipeline.from_pretrained(exported, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    engine = load(student)
    for steps in (1, 2, 3, 4):
        options = {"num_inference_steps": steps, "guidance_scale": 0, "generator": generators([11, 12, 13])}
        theirs = pipeline(PROMPTS, **options, output_type="pt").images
        ours = engine.generate(PROMPTS, steps, seed=11, output_type="pt") / 2 + 0.5
        assert theirs.std() > 0.01
        assert (ours - theirs).abs().max() <= 2 / 255, steps


def test_the_folder_is_a_plain_pipeline(exported):
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert isinstance(plain_pipeline(exported), StableDiffusionXLPipeline)
    assert [p.name for p in exported.parent.iterdir()] == ["model"]
    assert not list(exported.rglob("*.bin"))
    assert (exported / "tokenizer" / "vocab.json").is_file() and (exported / "tokenizer_2" / "merges.txt").is_file()
    assert len({path.stat().st_mode for path in exported.rglob("*.*") if path.is_file()}) == 1


def test_each_part_keeps_its_stored_precision(exported):
    unet = load_file(exported / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(exported / "text_encoder" / "model.safetensors")
    assert {v.dtype for v in unet.values()} == {torch.float16}
    assert {v.dtype for v in text.values() if v.is_floating_point()} == {torch.float32}


def test_text_encoders_have_their_published_names(student, exported):
    """Without the prefix, as recent transformers write the first, earlier ones would load random weights."""
    for part in ("text_encoder", "text_encoder_2"):
        names = load_file(exported / part / "model.safetensors").keys()
        assert all(name.startswith("text_model.") or name == "text_projection.weight" for name in names)
    stored = load_file(Path(presets.MODELS[student].folder) / "text_encoder" / "model.safetensors")
    loaded = load_file(exported / "text_encoder" / "model.safetensors")
    plain = {name.removeprefix("text_model."): value for name, value in stored.items()}
    assert plain.keys() == {name.removeprefix("text_model.") for name in loaded}
    assert all(torch.equal(plain[name.removeprefix("text_model.")], value) for name, value in loaded.items())


def test_the_engine_draws_the_same_from_the_exported_folder(student, exported):
    ours, again = (load(m).generate(PROMPTS[0], 2, seed=3, output_type="pt") for m in (student, exported))
    assert torch.equal(ours, again)


def test_half_precision_of_everything(student, tmp_path):
    folder = export(student, tmp_path / "half", dtype="float16")
    assert {v.dtype for v in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    images = load(folder).generate(PROMPTS[0], output_type="pt")
    assert (images - load(student).generate(PROMPTS[0], output_type="pt")).abs().max() < 0.1


def test_a_teacher_keeps_its_scheduler(student, tmp_path):
    folder = presets.MODELS[student].folder
    copy = export(folder, tmp_path / "copy")
    assert json.loads((copy / "model_index.json").read_text())["scheduler"][1] == "DPMSolverMultistepScheduler"
    ours, again = (load(m).generate(PROMPTS[0], 2, output_type="latent") for m in (folder, copy))
    assert torch.equal(ours, again)


def test_bad_calls(student, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "keep.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for bad, options, words in (
        (full, {}, "output must be a new or empty folder"),
        (tmp_path / "file", {}, "output must be a new or empty folder"),
        (tmp_path / "file" / "x", {}, "output must be a folder that can be made"),
        (tmp_path / "new", {"format": "onnx"}, "format must be one of diffusers, comfyui, lora, got 'onnx'"),
        (tmp_path / "new", {"dtype": "int4"}, "dtype must be one of float16, bfloat16, float32, got 'int4'"),
    ):
        with pytest.raises(InputError, match=words):
            export(student, bad, **options)
    with pytest.raises(InputError, match="did you mean tiny"):
        export("tinny", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"] and (full / "keep.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (export(student, tmp_path / "empty") / "model_index.json").is_file()

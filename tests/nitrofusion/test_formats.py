"""ComfyUI files and LoRAs, read back by plain diffusers and PEFT."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nitrofusion import TimestepShiftLCMScheduler, presets
from nitrofusion.engine import load
from nitrofusion.engine.export import LORA_FILE, LORA_REPORT, export
from nitrofusion.engine.lora_by_svd import low_rank
from nitrofusion.errors import InputError

from .tiny import PROMPTS, generators, nudged, plain_pipeline, sdxl_folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A preset: a student's UNet beside its teacher's folder."""
    root = tmp_path_factory.mktemp("formats")
    folder = sdxl_folder(root / "teacher")
    save_file(nudged(unet_state(folder), 1), root / "student.safetensors")
    presets.MODELS["tiny"] = presets.ModelPreset("tiny", str(folder), str(root / "student.safetensors"), 500)
    yield presets.MODELS["tiny"]
    del presets.MODELS["tiny"]


def unet_state(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def draw(pipeline, prompt=PROMPTS[0]):
    """[3, H, W] in [0, 1], one shifted step."""
    pipeline.scheduler = TimestepShiftLCMScheduler.from_config(
        pipeline.scheduler.config, shifted_timestep=500, original_inference_steps=4
    )
    options = {"num_inference_steps": 1, "guidance_scale": 0, "generator": generators([7]), "output_type": "pt"}
    return pipeline(prompt, **options).images[0]


def test_a_comfyui_unet_in_diffusers(student, tmp_path):
    folder = export("tiny", tmp_path / "out", format="comfyui")
    path = folder / "tiny_comfyui.safetensors"
    state, exact = load_file(path), load_file(student.unet)
    assert all(name.startswith("model.diffusion_model.") for name in state)
    assert "model.diffusion_model.input_blocks.3.0.op.weight" in state
    assert "model.diffusion_model.output_blocks.2.2.conv.weight" in state

    config = json.loads((presets.Path(student.folder) / "unet" / "config.json").read_text())
    again = convert_ldm_unet_checkpoint(dict(state), config)
    assert again.keys() == exact.keys() and all(torch.equal(again[k], exact[k]) for k in exact)
    unet = UNet2DConditionModel.from_single_file(str(path), config=student.folder, subfolder="unet")
    theirs = draw(plain_pipeline(student.folder, unet=unet))
    ours = load("tiny").generate(PROMPTS[0], seed=7, output_type="pt")[0] / 2 + 0.5
    assert ours.std() > 0.01 and (ours - theirs).abs().max() <= 1 / 255


def test_a_full_comfyui_checkpoint_in_diffusers(student, tmp_path):
    path = export("tiny", tmp_path / "out", format="comfyui", full=True) / "tiny_comfyui.safetensors"
    single = StableDiffusionXLPipeline.from_single_file(str(path), config=student.folder)
    single.set_progress_bar_config(disable=True)
    for part in ("text_encoder", "text_encoder_2", "vae"):
        ours, theirs = (getattr(p, part).state_dict() for p in (plain_pipeline(student.folder), single))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), part
    # As the originals are: attention of the VAE as 1x1 convolutions, OpenCLIP's fused projection, x @ text_projection.
    state = load_file(path)
    assert state["first_stage_model.decoder.mid.attn_1.q.weight"].ndim == 4
    assert state["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (192, 64)
    projection = load_file(f"{student.folder}/text_encoder_2/model.safetensors")["text_projection.weight"]
    assert torch.equal(state["conditioner.embedders.1.model.text_projection"], projection.T)
    ours = load("tiny").generate(PROMPTS[0], seed=7, output_type="pt")[0] / 2 + 0.5
    assert (ours - draw(single)).abs().max() <= 1 / 255


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_precision_and_header(student, tmp_path, dtype):
    for format, file in (("comfyui", "tiny_comfyui.safetensors"), ("lora", LORA_FILE)):
        path = export("tiny", tmp_path / format, format=format, dtype=dtype, rank=4) / file
        assert {str(v.dtype) for v in load_file(path).values()} == {f"torch.{dtype}"}
        spec = header(path)
        assert spec["modelspec.sai_model_spec"] == "1.0.0" and spec["modelspec.prediction_type"] == "epsilon"
        assert spec["modelspec.architecture"] == "stable-diffusion-xl-v1-base" + "/lora" * (format == "lora")
        assert spec["modelspec.resolution"] == "32x32" and spec["modelspec.license"] == "apache-2.0"
        assert spec["nitrofusion.shifted_timestep"] == "500"


def test_a_lora_of_full_rank_is_the_student(student, tmp_path):
    """Linear layers and convolutions become the student's; pictures then differ by norms and biases alone."""
    pytest.importorskip("peft")
    folder = export("tiny", tmp_path / "out", format="lora", rank=10_000)
    base, exact = unet_state(presets.Path(student.folder)), load_file(student.unet)
    # Others' ranks beside it are what diffusers before 0.40 reads wrong.
    assert len({v.shape[0] for k, v in load_file(folder / LORA_FILE).items() if "lora_A" in k}) == 1
    pipeline = plain_pipeline(student.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's way of saying that a key found no layer
        pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    pipeline.fuse_lora()
    state = {k.replace(".base_layer", ""): v for k, v in pipeline.unet.state_dict().items() if ".lora_" not in k}
    for name, tensor in exact.items():
        adapted = tensor.ndim in (2, 4)
        expected = tensor if adapted else base[name]
        assert (state[name] - expected).abs().max() < 1e-5, name
    unet = UNet2DConditionModel.from_pretrained(student.folder, subfolder="unet")
    unet.load_state_dict({k: v if v.ndim in (2, 4) else base[k] for k, v in exact.items()})
    assert (draw(pipeline) - draw(plain_pipeline(student.folder, unet=unet))).abs().max() < 1e-3
    report = json.loads((folder / LORA_REPORT).read_text())
    assert all(layer["kept"] > 1 - 1e-9 for layer in report["layers"] if layer["rank"])
    lost = sum(layer["energy"] for layer in report["layers"] if not layer["rank"])
    assert abs((1 - report["energy_kept"]) * sum(layer["energy"] for layer in report["layers"]) - lost) < 1e-6


def test_a_lora_keeps_what_it_says(student, tmp_path):
    """Every layer's product against numpy's SVD, and its energy against the definition."""
    folder = export("tiny", tmp_path / "out", format="lora", rank=6, dtype="float32")
    base, exact = unet_state(presets.Path(student.folder)), load_file(student.unet)
    state, report = load_file(folder / LORA_FILE), json.loads((folder / LORA_REPORT).read_text())
    convs = 0
    for layer in report["layers"]:
        name = layer["name"]
        delta = (exact[name].double() - base[name].double()).numpy()
        np.testing.assert_allclose(layer["energy"], (delta**2).sum(), rtol=1e-6)
        if not layer["rank"]:
            assert delta.ndim == 1
            continue
        down, up = (state[f"unet.{name.removesuffix('.weight')}.lora_{x}.weight"].double().numpy() for x in "AB")
        assert down.shape[1:] == delta.shape[1:] and up.shape[0] == delta.shape[0]
        convs += delta.ndim == 4 and delta.shape[-1] == 3
        flat = delta.reshape(len(delta), -1)
        u, s, v = np.linalg.svd(flat, full_matrices=False)
        best = (u[:, :6] * s[:6]) @ v[:6]
        product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        np.testing.assert_allclose(product, best, atol=2e-5 * s[0])
        np.testing.assert_allclose(layer["kept"], (s[:6] ** 2).sum() / (s**2).sum(), rtol=1e-5)
    assert convs > 20
    card = (folder / "README.md").read_text()
    assert f"{report['energy_kept']:.1%}" in card


def test_low_rank_of_odd_matrices():
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 5), (5, 1), (3, 3)):
        matrix = torch.randn(shape, generator=generator)
        up, down, kept = low_rank(matrix, 99)
        assert torch.allclose(up @ down, matrix.double(), atol=1e-12) and kept > 1 - 1e-12
    up, down, kept = low_rank(torch.outer(torch.arange(4.0), torch.ones(9)), 2)  # rank 1, asked for 2
    assert torch.isfinite(up).all() and torch.isfinite(down).all() and kept > 1 - 1e-12


def test_a_layer_that_does_not_differ_is_left_out(student, tmp_path):
    state = load_file(student.unet)
    state["conv_in.weight"] = unet_state(presets.Path(student.folder))["conv_in.weight"]
    save_file(state, tmp_path / "same.safetensors")
    presets.MODELS["same"] = presets.ModelPreset("same", student.folder, str(tmp_path / "same.safetensors"), 500)
    try:
        folder = export("same", tmp_path / "out", format="lora", rank=2)
    finally:
        del presets.MODELS["same"]
    assert "unet.conv_in.lora_A.weight" not in load_file(folder / LORA_FILE)


def test_the_card_names_what_one_needs(student, tmp_path):
    for format in ("diffusers", "comfyui", "lora"):
        card = (export("tiny", tmp_path / format, format=format, rank=1) / "README.md").read_text()
        assert re.match(r"---\nlicense: apache-2.0\n", card)
        assert "shifted_timestep=500" in card and "num_inference_steps=1" in card and "guidance_scale=0" in card
        assert ("ComfyUI" in card) == (format == "comfyui")
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        compile(code, "card", "exec")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"format": "lora", "rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"format": "lora", "base": "/nowhere.safetensors"}, "base must be a preset, a folder or a UNet file"),
        ({"format": "lora", "base": "tiny"}, "base must be another UNet than the model's"),
        ({"format": "lora", "base": "world"}, "base must be a UNet of the same form"),
        ({"format": "comfyui", "base": "world"}, "base must be given with format lora, got comfyui"),
        ({"format": "lora", "full": True}, "full must be given with format comfyui, got lora"),
    ],
)
def test_bad_options(student, tmp_path, options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        export("tiny", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_number_too_large_for_the_precision(student, tmp_path):
    state = load_file(student.unet)
    state["conv_in.weight"][0, 0, 0, 0] = 1e6
    save_file(state, tmp_path / "large.safetensors")
    presets.MODELS["large"] = presets.ModelPreset("large", student.folder, str(tmp_path / "large.safetensors"), 500)
    try:
        with pytest.raises(InputError, match="must fit float16, got values up to 1e\\+06"):
            export("large", tmp_path / "out", format="comfyui", dtype="float16")
    finally:
        del presets.MODELS["large"]
    assert [p.name for p in tmp_path.iterdir()] == ["large.safetensors"]

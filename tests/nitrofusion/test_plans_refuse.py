"""What plans must not draw: configurations and weights that modules refuse are refused in the same words."""

import inspect
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from nitrofusion.engine import load
from nitrofusion.engine.plans import clip, unet, vae
from nitrofusion.engine.plans.executor import Plans
from nitrofusion.errors import InputError
from nitrofusion.presets import WORLD
from nitrokernels import plan
from nitrokernels.plan import Builder

pytestmark = pytest.mark.skipif(plan.missing() is not None, reason="needs a C++ compiler at install time")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(WORLD / "teacher", tmp_path / "model")


def told(folder, part, **values):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weights(folder, part, change):
    path = next((folder / part).glob("*.safetensors"))
    state = load_file(path)
    change(state)
    save_file({name: t.contiguous() for name, t in state.items()}, path)


def without(*pieces):
    def change(state):
        names = [name for name in state if any(piece in name for piece in pieces)]
        assert names
        for name in names:
            del state[name]

    return change


def outcome(folder, backend):
    """A picture, or what is wrong."""
    try:
        engine = load(folder, device="cpu", backend=backend)
        return engine, engine.generate("a red ring", 1, seed=3, guidance_scale=2.0, output_type="pt")
    except (InputError, TypeError, ValueError) as error:
        return type(error), str(error)


def refused_alike(folder):
    expected, got = outcome(folder, "ref"), outcome(folder, "auto")
    assert isinstance(expected[1], str), "modules draw it"
    assert got == expected


@pytest.mark.parametrize(
    "part,pieces",
    [
        ("unet", ["conv_in.bias"]),
        ("unet", ["to_out.0.bias"]),
        ("unet", ["conv2.bias"]),
        ("unet", ["conv_shortcut."]),
        ("unet", ["mid_block."]),
        ("unet", ["up_blocks.1.attentions.2."]),
        ("unet", ["down_blocks.1.downsamplers."]),
        ("unet", ["add_embedding."]),
        ("vae", ["post_quant_conv."]),
        ("vae", ["post_quant_conv.bias"]),
        ("vae", ["decoder.conv_in.bias"]),
        ("vae", ["decoder.up_blocks.0.upsamplers."]),
        ("text_encoder", ["final_layer_norm.bias"]),
        ("text_encoder", ["encoder.layers.2.mlp."]),
        ("text_encoder", ["layers.0.mlp.fc1.bias"]),
        ("text_encoder_2", ["text_projection."]),
    ],
)
def test_a_missing_weight(folder, part, pieces):
    weights(folder, part, without(*pieces))
    refused_alike(folder)


@pytest.mark.parametrize(
    "part,name,shape",
    [
        ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.weight", (128, 64)),
        ("unet", "down_blocks.1.attentions.0.proj_in.weight", (64, 64, 1, 1)),
        ("unet", "down_blocks.0.resnets.0.time_emb_proj.bias", (1,)),
        ("unet", "time_embedding.linear_1.bias", (192, 1)),
        ("unet", "strange.weight", (1,)),
        ("vae", "decoder.conv_in.weight", (64, 4, 3, 1)),
        ("text_encoder", "strange.weight", (1,)),
        ("text_encoder", "text_projection.weight", (64, 64)),
    ],
)
def test_a_weight_of_another_shape_or_name(folder, part, name, shape):
    weights(folder, part, lambda state: state.update({name: torch.zeros(shape)}))
    refused_alike(folder)


@pytest.mark.parametrize(
    "part,values",
    [
        ("unet", {"attention_head_dim": 5}),
        ("unet", {"attention_head_dim": 1000}),
        ("unet", {"attention_head_dim": [1, 2]}),
        ("unet", {"transformer_layers_per_block": [1]}),
        ("unet", {"transformer_layers_per_block": [1, 2, 1]}),
        ("unet", {"layers_per_block": 1}),
        ("unet", {"layers_per_block": [2, 2]}),
        ("unet", {"block_out_channels": [48, 64, 64]}),
        ("unet", {"mid_block_type": None}),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}),
        ("unet", {"use_linear_projection": False}),
        ("unet", {"time_embedding_dim": 96}),
        ("unet", {"time_cond_proj_dim": 8}),
        ("unet", {"encoder_hid_dim": 8}),
        ("unet", {"out_channels": 8}),
        ("unet", {"norm_num_groups": 7}),
        ("unet", {"norm_num_groups": 1000}),
        ("unet", {"norm_num_groups": 2.5}),
        ("unet", {"norm_num_groups": 16.0}),
        ("unet", {"block_out_channels": [48, 64.0, 96]}),
        ("unet", {"norm_num_groups": float("nan")}),
        ("vae", {"norm_num_groups": 5}),
        ("vae", {"norm_num_groups": 2.5}),
        ("vae", {"layers_per_block": 2}),
        ("vae", {"mid_block_add_attention": True}),
        ("text_encoder", {"num_hidden_layers": 2}),
        ("text_encoder", {"num_hidden_layers": 0}),
        ("text_encoder", {"num_attention_heads": 3}),
        ("text_encoder", {"hidden_size": 32}),
        ("text_encoder_2", {"projection_dim": 32}),
        ("text_encoder_2", {"layer_norm_eps": "x"}),
        ("text_encoder_2", {"layer_norm_eps": 1}),
    ],
)
def test_a_configuration_that_does_not_fit(folder, part, values):
    told(folder, part, **values)
    refused_alike(folder)


def test_what_modules_refuse_only_when_they_draw(folder):
    """By their ops, which are not those of ``ref`` and have words of their own."""
    told(folder, "unet", norm_eps="x")
    for backend in ("ref", "auto"):
        assert isinstance(outcome(folder, backend)[1], str)


def test_too_little_memory_is_no_reason_to_take_modules(folder, monkeypatch):
    def short(builder):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Builder, "finish", short)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load(folder, "cpu")


def test_an_integer_eps_is_drawn_as_modules_draw_it(folder):
    before = outcome(folder, "ref")[1]
    told(folder, "unet", norm_eps=1)
    (_, expected), (engine, got) = outcome(folder, "ref"), outcome(folder, "plan")
    assert isinstance(engine.executor, Plans)
    assert (got - expected).abs().max() <= 1e-3 < 1e-2 < (expected - before).abs().max()


@pytest.mark.parametrize(
    "silent,model",
    [(unet._SILENT, UNet2DConditionModel), (vae._SILENT, AutoencoderKL), (vae._TINY_SILENT, AutoencoderTiny)],
)
def test_what_a_silent_configuration_means_is_diffusers_default(silent, model):
    taken = inspect.signature(model.__init__).parameters
    assert silent == {name: taken[name].default for name in silent}


def test_what_a_silent_text_configuration_means_is_transformers_default():
    config = CLIPTextConfig()
    assert clip._SILENT == {name: getattr(config, name) for name in clip._SILENT}

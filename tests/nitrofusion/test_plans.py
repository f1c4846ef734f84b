"""Plans of UNets, decoders and text encoders against diffusers and transformers."""

import subprocess
import sys
import types

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from nitrofusion import accelerate
from nitrofusion.engine import load
from nitrofusion.engine.plans.clip import TextPlan
from nitrofusion.engine.plans.unet import UNetPlan
from nitrofusion.engine.plans.vae import DecoderPlan, EncoderPlan, TinyDecoderPlan, TinyEncoderPlan
from nitrofusion.engine.plans.weights import Unsupported
from nitrokernels import plan
from nitrokernels.ops.nag_combine import nag_combine_ref

from .unets import random_unet

pytestmark = pytest.mark.skipif(plan.missing() is not None, reason="needs a C++ compiler at install time")


def call_unet(unet, inputs, t):
    added = {"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]}
    return unet(inputs["sample"], t, inputs["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False)[0]


def call_plan(made, inputs, t):
    return made(
        inputs["sample"][0], t, inputs["encoder_hidden_states"][0], inputs["text_embeds"][0], inputs["time_ids"][0]
    )


@pytest.mark.parametrize("seed", range(50))
def test_any_unet(seed):
    unet, inputs = random_unet(seed)
    expected = call_unet(unet, inputs, 499)
    height, width = inputs["sample"].shape[2:]
    made = UNetPlan(unet.config, unet.state_dict(), height, width, inputs["encoder_hidden_states"].shape[1])
    made._plan._arena.fill_(float("nan"))
    out = call_plan(made, inputs, 499)
    assert expected.std() > 1e-3
    assert (out - expected[0]).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", [1, 3])
def test_what_is_made_of_half_precision_weights_is_made_in_fp32(seed, dtype):
    unet, inputs = random_unet(seed)
    state = {name: tensor.to(dtype) for name, tensor in unet.state_dict().items()}
    unet.load_state_dict(state)
    eager = call_unet(unet, inputs, 499)[0]
    exact = call_unet(unet.double(), {name: tensor.double() for name, tensor in inputs.items()}, 499)[0]
    height, width = inputs["sample"].shape[2:]
    made = UNetPlan(unet.config, state, height, width, inputs["encoder_hidden_states"].shape[1])
    assert (call_plan(made, inputs, 499) - exact).abs().max() <= 3 * (eager - exact).abs().max()


def test_another_prompt_timestep_or_size_is_seen():
    unet, inputs = random_unet(3)
    height, width = inputs["sample"].shape[2:]
    made = UNetPlan(unet.config, unet.state_dict(), height, width, inputs["encoder_hidden_states"].shape[1])
    for name in ("sample", "encoder_hidden_states", "text_embeds", "time_ids", None):
        t = 499 if name else 62
        if name:
            inputs[name] = torch.rand_like(inputs[name]) * inputs[name].abs().max()
        out, expected = call_plan(made, inputs, t).clone(), call_unet(unet, inputs, t)[0]
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)
        assert torch.equal(call_plan(made, inputs, t), out)


def test_a_call_that_failed_leaves_nothing_for_the_next():
    unet, inputs = next((u, i) for u, i in map(random_unet, range(50)) if u.config.addition_embed_type)
    height, width = inputs["sample"].shape[2:]
    made = UNetPlan(unet.config, unet.state_dict(), height, width, inputs["encoder_hidden_states"].shape[1])
    call_plan(made, inputs, 499)
    other = inputs | {"encoder_hidden_states": torch.randn_like(inputs["encoder_hidden_states"])}
    with pytest.raises(RuntimeError):
        call_plan(made, other | {"text_embeds": torch.randn(1, 3)}, 499)
    expected = call_unet(unet, inputs, 499)[0]
    assert (call_plan(made, inputs, 499) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)


def test_what_plans_do_not_cover_is_said():
    unet, _ = random_unet(0)
    state = unet.state_dict()
    for change, reason in (
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"down_block_types": ["AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
    ):
        with pytest.raises(Unsupported, match=reason):
            UNetPlan({**unet.config, **change}, state, 8, 8, 5)
    with pytest.raises(Unsupported, match="strange.weight has no place"):
        UNetPlan(unet.config, {**state, "strange.weight": torch.zeros(1)}, 8, 8, 5)
    for name in ("conv_out.bias", "conv_norm_out.weight", "conv_norm_out.bias"):
        with pytest.raises(Unsupported, match=rf"its {name} has the shape \[1\], not \["):
            UNetPlan(unet.config, {**state, name: torch.zeros(1)}, 8, 8, 5)
    del state["conv_in.weight"]
    with pytest.raises(Unsupported, match="no conv_in.weight"):
        UNetPlan(unet.config, state, 8, 8, 5)


def test_a_silent_configuration_means_diffusers_defaults():
    torch.manual_seed(0)
    kinds = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    said = {"block_out_channels": [32], "cross_attention_dim": 24, **kinds, "layers_per_block": 1}
    unet = UNet2DConditionModel(sample_size=8, **said).eval().requires_grad_(False)
    x_t, context = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 24)
    expected = unet(x_t, 7, context).sample[0]
    out = UNetPlan(said | {"mid_block_type": "UNetMidBlock2DCrossAttn"}, unet.state_dict(), 8, 8, 3)(
        x_t[0], 7, context[0]
    )
    assert (out - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("attention", [False, True])
def test_decoder(attention):
    torch.manual_seed(attention)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=attention,
    ).eval()
    latents = torch.randn(1, 4, 6, 10)
    made = DecoderPlan(vae.config, vae.state_dict(), 6, 10)
    made._plan._arena.fill_(float("nan"))
    with torch.no_grad():
        expected = vae.decode(latents).sample[0]
    assert (made(latents[0]) - expected).abs().max() <= 1e-5


def test_tiny_decoder():
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (24, 24, 24), "decoder_block_out_channels": (24, 24, 24)}
    vae = AutoencoderTiny(**channels, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 2, 1)).eval()
    latents = 2 * torch.randn(1, 4, 6, 10)
    made = TinyDecoderPlan(vae.config, vae.state_dict(), 6, 10)
    made._plan._arena.fill_(float("nan"))
    with torch.no_grad():
        expected = vae.decode(latents).sample[0]
    assert expected.shape == (3, 24, 40)
    assert (made(latents[0]) - expected).abs().max() <= 1e-5
    latents[0, 2, 3, 4] = float("nan")
    assert made(latents[0]).isnan().all()
    assert (made(torch.zeros(4, 6, 10)) - vae.decode(torch.zeros(1, 4, 6, 10)).sample[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("attention,quant_conv,layers", [(False, True, 2), (True, False, 1)])
def test_encoder(attention, quant_conv, layers):
    torch.manual_seed(layers)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=layers,
        norm_num_groups=8,
        mid_block_add_attention=attention,
        use_quant_conv=quant_conv,
    ).eval()
    with torch.no_grad():
        (vae.quant_conv if quant_conv else vae.encoder.conv_out).bias[-1] = 25  # a variance of more than the limit
        image = torch.rand(1, 3, 24, 40) * 2 - 1
        expected = vae.encode(image).latent_dist
    made = EncoderPlan(vae.config, vae.state_dict(), 6, 10)
    made._plan._arena.fill_(float("nan"))
    mean, std = made(image)
    assert mean.shape == std.shape == (1, 4, 6, 10) and std.max() > 2e4
    assert (mean - expected.mean).abs().max() <= 1e-5 and ((std - expected.std) / expected.std).abs().max() <= 1e-5
    kept = mean.clone()
    made(-image)
    assert torch.equal(mean, kept), "the first image's latents are not the plan's memory"


def test_tiny_encoder():
    torch.manual_seed(1)
    channels = {"encoder_block_out_channels": (24, 24, 24), "decoder_block_out_channels": (24, 24, 24)}
    vae = AutoencoderTiny(**channels, num_encoder_blocks=(1, 2, 1), num_decoder_blocks=(1, 1, 1)).eval()
    image = torch.rand(1, 3, 24, 40) * 2 - 1
    made = TinyEncoderPlan(vae.config, vae.state_dict(), 6, 10)
    made._plan._arena.fill_(float("nan"))
    with torch.no_grad():
        expected = vae.encode(image).latents
    latents, std = made(image)
    assert std is None and expected.shape == (1, 4, 6, 10)
    assert (latents - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("how", [(2.0, 2.5, 0.5, 3.0), (0.4, float("inf"), 1.0, 1.0)])
def test_a_negative_prompt(seed, how):
    """Against diffusers' own attention, doubled by a processor written here."""
    unet, inputs = random_unet(seed)
    height, width = inputs["sample"].shape[2:]
    tokens = inputs["encoder_hidden_states"].shape[1]
    made = UNetPlan(unet.config, unet.state_dict(), height, width, tokens)
    against = torch.randn_like(inputs["encoder_hidden_states"][0])
    plain = call_plan(made, inputs, 499).clone()
    told = inputs["sample"][0], 499, inputs["encoder_hidden_states"][0], inputs["text_embeds"][0], inputs["time_ids"][0]
    out = made(*told, against, how).clone()
    assert torch.equal(call_plan(made, inputs, 499), plain)

    class Both(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            attend, last = super().__call__, attn.to_out
            attn.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
            p, n = (attend(attn, hidden_states, context) for context in (encoder_hidden_states, against[None]))
            attn.to_out = last
            return last[0](nag_combine_ref(p, n, *how))

    layers = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    for layer in layers:
        layer.processor = Both()
    expected = call_unet(unet, inputs, 499)[0]
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)
    assert not layers or not torch.equal(out, plain)


@pytest.mark.parametrize("act,eos", [("quick_gelu", 2), ("gelu", 49)])
@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_encoder(kind, act, eos):
    torch.manual_seed(eos)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=11, projection_dim=16, hidden_act=act, eos_token_id=eos, bos_token_id=48,
    )  # fmt: skip
    encoder, pooled = kind(config).eval(), kind is CLIPTextModelWithProjection
    made = TextPlan(config.to_dict(), encoder.state_dict(), pooled)
    for length in (3, 9):
        ids = [48, *torch.randint(0, 40, (length - 2,)).tolist(), 49] + [49] * (11 - length)
        with torch.no_grad():
            expected = encoder(torch.tensor([ids]), output_hidden_states=True)
        states, projected = made(ids)
        assert (states - expected.hidden_states[-2][0]).abs().max() <= 1e-5
        if pooled:
            assert (projected - expected.text_embeds[0]).abs().max() <= 1e-5


def test_plans_of_several_sizes_hold_the_weights_once():
    unet, inputs = random_unet(1)
    tokens, step = inputs["encoder_hidden_states"].shape[1], 2 ** (len(unet.config.block_out_channels) - 1)
    packed: dict = {}
    plans = {side: UNetPlan(unet.config, unet.state_dict(), side, side, tokens, packed) for side in (step, 2 * step)}
    first, second = ({w.data_ptr() for w in p._plan._weights} for p in plans.values())
    assert len(packed) > 10 and {w.data_ptr() for w, *_ in packed.values()} <= first & second
    for side, made in plans.items():
        inputs["sample"] = torch.randn(1, 4, side, side)
        expected = call_unet(unet, inputs, 99)[0]
        assert (call_plan(made, inputs, 99) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("seed,height,width", [(2, 9, 14), (5, 13, 7), (9, 1, 3), (11, 15, 16)])
def test_sides_that_are_not_halved_evenly(seed, height, width):
    unet, inputs = random_unet(seed)
    inputs["sample"] = torch.randn(1, 4, height, width)
    expected = call_unet(unet, inputs, 499)[0]
    made = UNetPlan(unet.config, unet.state_dict(), height, width, inputs["encoder_hidden_states"].shape[1])
    made._plan._arena.fill_(float("nan"))
    out = call_plan(made, inputs, 499)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("dtype,device", [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")])
def test_defaults_set_for_other_tensors_change_nothing(monkeypatch, dtype, device):
    image, before = Image.effect_noise((32, 32), 60), torch.get_default_dtype()
    options = {"image": image, "negative_prompt": "a star", "num_inference_steps": 2, "output_type": "pt"}
    expected = load("world", "cpu", backend="plan").generate("a ring", **options)
    pipe = types.SimpleNamespace(unet=random_unet(3)[0])
    inputs = random_unet(3)[1]
    with torch.no_grad():
        eps = call_unet(pipe.unet, inputs, 499)
        accelerate(pipe)
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                out = load("world", "cpu", backend="plan").generate("a ring", **options)
                planned = call_unet(pipe.unet, inputs, 499)
        finally:
            torch.set_default_dtype(before)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    assert planned.dtype == torch.float32 and (planned - eps).abs().max() <= 1e-5 * eps.abs().max().clamp_min(1)


def test_the_size_used_longest_ago_makes_room(monkeypatch):
    engine, made = load("world", "cpu", backend="plan"), []
    for name in ("_make_unet", "_make_vae"):
        make = getattr(engine.executor, name)
        monkeypatch.setattr(engine.executor, name, lambda *args, make=make: (made.append(args), make(*args))[1])
    for other in range(6):
        for side in (32, 36 + 4 * other):
            engine.generate("a ring", height=side, width=32)
    assert len(made) == 2 * 6


def test_neither_prompts_nor_images_need_modules_or_the_libraries_they_are_of():
    code = """if True:
        import sys
        import nitrofusion
        from PIL import Image
        engine = nitrofusion.load("world")
        (picture,) = engine.generate("a red ring")
        engine.generate("a blue ring", image=picture.resize((51, 37)))
        sys.exit("modules" in vars(engine.executor) or "diffusers" in sys.modules or "transformers" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

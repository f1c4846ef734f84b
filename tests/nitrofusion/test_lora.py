"""LoRA files of every layout, merged: against the sum written out, and against diffusers with PEFT."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nitrofusion.engine import load
from nitrofusion.errors import InputError

from . import ldm
from .tiny import PROMPTS, generators, plain_pipeline, tiny_folder

# Linear layers, a convolution, layers outside of the blocks; both text encoders.
UNET = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.2.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "mid_block.attentions.0.proj_in",
    "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_v",
    "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2",
    "down_blocks.0.resnets.1.conv2",
    "up_blocks.2.resnets.0.conv_shortcut",
)
TEXT = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.2.self_attn.out_proj", "encoder.layers.1.mlp.fc1")
RANK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def engine(folder):
    return load(folder, backend="ref")


def weight(engine, part, layer):
    module = {"unet": engine.model.unet, "text_encoder": engine.model.text_encoders[0]}.get(part)
    state = (module if module is not None else engine.model.text_encoders[1]).state_dict()
    return next(v for k, v in state.items() if k.removeprefix("text_model.") == f"{layer}.weight")


@pytest.fixture(scope="module")
def layers(engine):
    """{(part, layer): (down, up)}, big enough to be seen."""
    torch.manual_seed(1)
    places = [("unet", layer) for layer in UNET]
    places += [(part, layer) for part in ("text_encoder", "text_encoder_2") for layer in TEXT]
    out = {}
    for part, layer in places:
        shape = weight(engine, part, layer).shape
        up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2))
        out[part, layer] = (torch.randn(RANK, *shape[1:]) * 0.1, up * 0.1)
    return out


def peft(layers):
    full = {(p, layer if p == "unet" else f"text_model.{layer}"): v for (p, layer), v in layers.items()}
    out = {f"{part}.{layer}.lora_A.weight": down for (part, layer), (down, _) in full.items()}
    return out | {f"{part}.{layer}.lora_B.weight": up for (part, layer), (_, up) in full.items()}


def old(layers):
    """diffusers before PEFT."""
    out = {}
    for (part, layer), (down, up) in layers.items():
        if part == "unet":
            out |= {f"unet.{layer}.lora.down.weight": down, f"unet.{layer}.lora.up.weight": up}
        else:
            name = f"{part}.text_model.{layer}.lora_linear_layer"
            out |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return out


def kohya(layers, alpha):
    out, prefixes = {}, {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    for (part, layer), (down, up) in layers.items():
        name = ldm.unet_name(f"{layer}.weight").removesuffix(".weight") if part == "unet" else f"text_model.{layer}"
        name = f"{prefixes[part]}_{name.replace('.', '_')}"
        out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return out


def prefixed(layers):
    return {k.replace("unet.", "base_model.model.unet.", 1): v for k, v in peft(layers).items()}


def bare(layers):
    """PEFT's names of the UNet alone, as ``unet.save_lora_adapter`` writes them."""
    return {k.removeprefix("unet."): v for k, v in peft(layers).items() if k.startswith("unet.")}


PARTS = ("unet", "text_encoder", "text_encoder_2")
METADATA = {"lora_adapter_metadata": json.dumps({f"{part}.lora_alpha": 8.0 for part in PARTS})}


@pytest.mark.parametrize(
    "layout, make, factor, metadata",
    [
        ("peft", peft, 1.0, None),
        ("peft with alpha in the header", peft, 8.0 / RANK, METADATA),
        ("peft with its own prefix", prefixed, 1.0, None),
        ("unet alone", bare, 1.0, None),
        ("old diffusers", old, 1.0, None),
        ("kohya", lambda layers: kohya(layers, 2.0), 2.0 / RANK, None),
    ],
)
def test_every_layout_is_the_sum_written_out(folder, engine, layers, tmp_path, layout, make, factor, metadata):
    file = tmp_path / "style.safetensors"
    tensors = make(layers)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata=metadata)
    merged = load(folder, lora=[(file, 0.5)], backend="ref")
    (report,) = merged.model.loras
    assert (report.applied, report.total, report.unused) == (len(tensors), len(tensors), ())
    assert str(report) == f"style.safetensors x 0.5: {len(tensors)} of {len(tensors)} keys applied"
    changed = 0
    for (part, layer), (down, up) in layers.items():
        base, ours = (weight(e, part, layer).double() for e in (engine, merged))
        if layout == "unet alone" and part != "unet":
            assert torch.equal(base, ours)
            continue
        delta = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double())
        torch.testing.assert_close(ours, base + 0.5 * factor * delta.reshape(base.shape), rtol=1e-6, atol=1e-6)
        changed += 1
    pairs = zip(engine.model.unet.state_dict().values(), merged.model.unet.state_dict().values(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in pairs) == sum(part == "unet" for part, _ in layers)
    assert changed in (len(layers), len(UNET))


def test_a_file_and_two_files_and_half_precision(folder, engine, layers, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(peft(layers), file)
    one, two = load(folder, lora=file), load(folder, lora=[(file, 0.25), (str(file), 0.75)])
    for place in layers:
        torch.testing.assert_close(weight(one, *place), weight(two, *place), rtol=1e-5, atol=1e-6)
    half = load(folder, lora=file, dtype=torch.float16)
    assert torch.equal(weight(half, "unet", UNET[0]), weight(one, "unet", UNET[0]).half())


def test_diffusers_draws_the_same(folder, layers, tmp_path):
    pytest.importorskip("peft")
    save_file(kohya(layers, 3.0), tmp_path / "a.safetensors")
    pipeline = plain_pipeline(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": generators([3]), "output_type": "latent"}
    theirs = pipeline(PROMPTS[0], **options).images
    merged = load(folder, lora=tmp_path / "a.safetensors", backend="ref")
    ours = merged.generate(PROMPTS[0], 3, seed=3, guidance_scale=2.0, output_type="latent")
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    plain = load(folder, backend="ref").generate(PROMPTS[0], 3, seed=3, guidance_scale=2.0, output_type="latent")
    assert (plain - ours).abs().max() > 0.1


def test_layers_this_model_lacks_are_counted(folder, layers, tmp_path):
    file = tmp_path / "a.safetensors"
    strange = {("unet", "up_blocks.3.attentions.0.proj_in"): (torch.ones(4, 8), torch.ones(8, 4))}
    save_file(peft(layers | strange), file)
    (report,) = load(folder, lora=file).model.loras
    assert (report.applied, report.total) == (2 * len(layers), 2 * len(layers) + 2)
    assert report.unused == ("unet.up_blocks.3.attentions.0.proj_in",)
    save_file(peft(strange), file)
    refuses(r"a.safetensors must fit this model, got 0 of 2 keys applied .first: unet.up_blocks.3", folder, file)


def refuses(words, folder, lora):
    with pytest.raises(InputError, match=words) as error:
        load(folder, lora=lora)
    assert "\n" not in str(error.value)


def test_bad_loras(folder, layers, tmp_path):
    file = tmp_path / "a.safetensors"
    wrong = {("unet", UNET[0]): (torch.ones(4, 9), torch.ones(32, 4))}
    save_file(peft(wrong), file)
    refuses(r"got \[32, 4\] x \[4, 9\] for unet.down_blocks.1.*attn1.to_q, whose weight is \[32, 32\]", folder, file)
    state = peft(layers)
    save_file({k: v for k, v in state.items() if "lora_B" in k or "attn1" not in k}, file)
    refuses("must have a down and an up for every layer", folder, file)
    for name, kind in (("lora_unet_x.hada_w1_a", "LoHa"), ("lora_unet_x.lokr_w1", "LoKr"), ("x.dora_scale", "DoRA")):
        save_file(state | {name: torch.ones(2)}, file)
        refuses(f"must be a plain LoRA, got {kind}", folder, file)
    save_file({"conv_in.weight": torch.ones(2)}, file)
    refuses("must be a LoRA, got 1 tensors without one", folder, file)
    broken = kohya(layers, 1.0)
    del broken[next(k for k in broken if k.endswith("lora_up.weight"))]
    save_file(broken, file)
    refuses("must be a LoRA in a layout diffusers reads", folder, file)
    save_file(state | {"unet.conv_in.lora_A.weight": torch.full((4, 4, 3, 3), float("nan"))} | {
        "unet.conv_in.lora_B.weight": torch.ones(16, 4, 1, 1)
    }, file)
    refuses("a.safetensors must hold finite weights, got NaN or infinity in unet.conv_in.lora_A.weight", folder, file)
    save_file(kohya(layers, float("nan")), file)
    refuses("a.safetensors must hold finite weights, got NaN or infinity in lora_.*alpha", folder, file)
    save_file(kohya(layers, [1.0, 2.0]), file)
    refuses(r"a.safetensors must have one number as lora_.*alpha, got \[2\]", folder, file)
    first = next(key for key in state if "lora_A" in key)
    for shape in ((), (4,), (0, 32)):
        save_file(state | {first: torch.ones(shape)}, file)
        refuses("a.safetensors must have matrices or kernels of rank 1 or more, got .* in unet.", folder, file)
    save_file(state | {first.replace("A.weight", "B.bias"): torch.ones(32)}, file)
    refuses("a.safetensors must be a LoRA without biases, got unet.down_blocks.1", folder, file)
    alpha = json.dumps({"unet.lora_alpha": float("nan")})
    save_file(state, file, metadata={"lora_adapter_metadata": alpha})
    refuses("must have a readable lora_adapter_metadata, got an alpha of nan", folder, file)
    save_file(state, file, metadata={"lora_adapter_metadata": "{"})
    refuses("must have a readable lora_adapter_metadata", folder, file)
    file.write_bytes(b"x" * 100)
    refuses("a.safetensors must be a readable safetensors file", folder, file)
    refuses("lora must be a .safetensors file, got nothing", folder, tmp_path / "none.safetensors")
    refuses("lora must be a file, or a list of .file, scale.", folder, [(file, 1.0, 2)])
    for given in (5, [5], [(5, 1.0)], [None]):
        refuses("lora must be a file, or a list of .file, scale., got ", folder, given)
    refuses("a LoRA's scale must be a number in -1000..1000, got 'much'", folder, [(file, "much")])


@pytest.mark.parametrize("way", ["adapter", "pipeline"])  # without and with the name of the part, in keys and header
def test_scales_that_peft_writes_into_the_header(folder, engine, tmp_path, way):
    """Another alpha, another rank, and alpha / sqrt(rank) instead of alpha / rank, against PEFT's own sum."""
    lora = pytest.importorskip("peft")
    pipeline = plain_pipeline(folder)
    layers = [*UNET[:3], UNET[6]]
    others = {"alpha_pattern": {UNET[1]: 10}, "rank_pattern": {UNET[2]: 9}}
    config = lora.LoraConfig(r=4, lora_alpha=6, target_modules=layers, use_rslora=True, **others)
    pipeline.unet.add_adapter(config)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if way == "adapter":
        pipeline.unet.save_lora_adapter(tmp_path)
    else:
        told = {"unet_lora_adapter_metadata": pipeline.unet.peft_config["default"].to_dict()}
        pipeline.save_lora_weights(tmp_path, unet_lora_layers=lora.get_peft_model_state_dict(pipeline.unet), **told)
    merged = load(folder, lora=tmp_path / "pytorch_lora_weights.safetensors", backend="ref")
    for layer in layers:
        module = pipeline.unet.get_submodule(layer)
        wanted = module.base_layer.weight + module.get_delta_weight("default")
        torch.testing.assert_close(weight(merged, "unet", layer), wanted.detach(), rtol=1e-5, atol=1e-6)
        assert (wanted - weight(engine, "unet", layer)).abs().max() > 0.01

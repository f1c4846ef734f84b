"""An accelerated pipeline draws what the plain one does: random UNets, adapters, image-to-image, batches, and back."""

import copy

import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from nitrofusion import accelerate, restore
from nitrofusion.engine.accelerate import PlannedUNet, effective_state
from nitrofusion.errors import InputError
from nitrokernels import plan

from .tiny import PROMPTS, generators, plain_pipeline, tiny_folder
from .unets import random_unet

pytestmark = pytest.mark.skipif(plan.missing() is not None, reason="needs a C++ compiler at install time")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("teacher"))


def draw(pipe, **options):
    call = {"prompt": PROMPTS[:2], "num_inference_steps": 2, "guidance_scale": 3.0, "generator": generators([3, 4])}
    return pipe(**call | {"output_type": "pt"} | options).images


def runs_planned(pipe, monkeypatch, **options):
    """The pictures, and how many UNet calls ran as a plan."""
    count = []
    run = PlannedUNet._run
    monkeypatch.setattr(PlannedUNet, "_run", staticmethod(lambda *args: (count.append(1), run(*args))[1]))
    return draw(pipe, **options), len(count)


@pytest.mark.parametrize("seed", range(50))
def test_any_unet(seed):
    unet, inputs = random_unet(seed)
    added = ("text_embeds", "time_ids") if unet.config.addition_embed_type else ()
    sample = torch.cat([inputs["sample"], -inputs["sample"]])

    def call():
        return unet(
            sample,
            torch.tensor(499),
            encoder_hidden_states=inputs["encoder_hidden_states"].repeat(2, 1, 1),
            added_cond_kwargs={k: inputs[k].repeat(2, 1) for k in added},
        ).sample

    class Pipe:
        pass

    pipe = Pipe()
    pipe.unet = unet
    with torch.no_grad():
        expected = call()
        accelerate(pipe)
        out = call()
        assert isinstance(unet.forward, PlannedUNet)
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)
        restore(pipe)
        assert "forward" not in vars(unet) and type(unet) is UNet2DConditionModel
        assert torch.equal(call(), expected)


def test_pipeline(folder, monkeypatch):
    expected = draw(plain_pipeline(folder))
    pipe = accelerate(plain_pipeline(folder))
    pictures, planned = runs_planned(pipe, monkeypatch)
    assert planned == 2
    assert (pictures - expected).abs().max() <= 1e-5
    assert torch.equal(draw(pipe), pictures)
    assert torch.equal(draw(restore(pipe)), expected)


def test_image_to_image(folder, monkeypatch):
    plain = StableDiffusionXLImg2ImgPipeline(**plain_pipeline(folder).components)
    plain.set_progress_bar_config(disable=True)
    options = {"image": torch.rand(2, 3, 32, 32), "strength": 0.5, "num_inference_steps": 4}
    expected = draw(plain, **options)
    pictures, planned = runs_planned(accelerate(plain), monkeypatch, **options)
    assert planned == 2
    assert (pictures - expected).abs().max() <= 1e-5


def test_adapters(folder, monkeypatch):
    peft = pytest.importorskip("peft")
    pipe = plain_pipeline(folder)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.0.proj", "proj_in"]
    for name in ("one", "two"):
        pipe.unet.add_adapter(peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False), name)

    plain = copy.deepcopy(pipe)
    accelerate(pipe)
    for names, weights in ((["one"], [1.0]), (["one", "two"], [0.4, -0.7]), (["two"], [0.1])):
        plain.unet.set_adapters(names, weights)
        pipe.unet.set_adapters(names, weights)
        expected = draw(plain)
        pictures, planned = runs_planned(pipe, monkeypatch)
        assert planned == 2
        assert (pictures - expected).abs().max() <= 1e-5
    plain.unet.disable_adapters()
    pipe.unet.disable_adapters()
    assert (draw(pipe) - draw(plain)).abs().max() <= 1e-5
    assert set(effective_state(pipe.unet)) == set(plain_pipeline(folder).unet.state_dict())


def test_a_changed_weight_is_seen(folder):
    plain, pipe = plain_pipeline(folder), accelerate(plain_pipeline(folder))
    before = draw(pipe)
    for p in (plain, pipe):
        with torch.no_grad():
            p.unet.conv_in.weight.mul_(1.5)
            p.vae.decoder.conv_in.bias.add_(0.3)
    assert (draw(pipe) - draw(plain)).abs().max() <= 1e-5
    assert not torch.equal(draw(pipe), before)


def test_hooks_and_gradients_are_served_without_a_plan(folder, monkeypatch):
    pipe = accelerate(plain_pipeline(folder))
    seen = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda *args: seen.append(1))
    _, planned = runs_planned(pipe, monkeypatch)
    assert len(seen) == 2 and planned == 0
    handle.remove()
    sample = torch.randn(1, 4, 16, 16, requires_grad=True)
    added = {"text_embeds": torch.randn(1, 64), "time_ids": torch.zeros(1, 6)}
    pipe.unet(sample, 5, torch.randn(1, 20, 128), added_cond_kwargs=added).sample.sum().backward()
    assert sample.grad.abs().sum() > 0


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(InputError, match="accelerate: pipe must have"):
        accelerate(object())


def test_the_pipeline_class_stays(folder):
    pipe = plain_pipeline(folder)
    keys = list(pipe.unet.state_dict())
    assert accelerate(pipe) is pipe and isinstance(pipe, StableDiffusionXLPipeline)
    assert list(pipe.unet.state_dict()) == keys and isinstance(pipe.unet, UNet2DConditionModel)

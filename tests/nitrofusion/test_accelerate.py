"""An accelerated pipeline draws what the plain one does: random UNets, adapters, image-to-image, batches, and back."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel

from nitrofusion import accelerate, restore
from nitrofusion.engine.accelerate import PlannedUNet, _made, _Planned, effective_state
from nitrofusion.engine.plans.vae import DecoderPlan, EncoderPlan
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


def same_change(folder, change, monkeypatch, planned):
    """Draws, changes a plain and an accelerated pipeline alike, and draws again: what both drew last is the same."""
    plain, pipe = plain_pipeline(folder), accelerate(plain_pipeline(folder))
    before = draw(plain)
    assert (draw(pipe) - before).abs().max() <= 1e-5
    change(plain), change(pipe)
    expected = draw(plain)
    assert (expected - before).abs().max() > 1e-4  # it does change the picture
    pictures, count = runs_planned(pipe, monkeypatch)
    assert (pictures - expected).abs().max() <= 1e-5
    assert count == planned
    return plain, pipe, before


def copy_average(pipe):
    average = EMAModel(torch.nn.Parameter(p * 0.8) for p in pipe.unet.parameters())
    average.copy_to(pipe.unet.parameters())


def write_data(pipe):
    pipe.unet.up_blocks[0].resnets[0].conv1.weight.data.mul_(3)


def write_one_bias(pipe):
    pipe.vae.decoder.conv_in.bias.data[3] += 1


def write_far_rows(pipe):
    pipe.unet.conv_out.weight.data[-1:].mul_(-1)


@pytest.mark.parametrize("change", [copy_average, write_data, write_one_bias, write_far_rows])
def test_a_write_that_no_version_counts_is_seen(folder, monkeypatch, change):
    same_change(folder, change, monkeypatch, planned=2)


def test_channels_last_weights_are_seen(folder):
    plain, pipe = plain_pipeline(folder), plain_pipeline(folder)
    pipe.unet.to(memory_format=torch.channels_last)
    draw(accelerate(pipe))
    for p in (plain, pipe):
        p.unet.conv_in.weight.data.mul_(2)
    assert (draw(pipe) - draw(plain)).abs().max() <= 1e-5


def test_a_fused_and_unloaded_adapter_is_seen(folder, monkeypatch, tmp_path):
    peft = pytest.importorskip("peft")
    source = plain_pipeline(folder)
    torch.manual_seed(5)
    source.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(source.unet, adapter_name="default")
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)

    def fuse(pipe):
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        pipe.fuse_lora()
        pipe.unload_lora_weights()

    same_change(folder, fuse, monkeypatch, planned=2)


def free_u(pipe):
    pipe.enable_freeu(0.6, 0.4, 1.1, 1.2)


def tile(pipe):
    for part in (pipe.unet, pipe.vae):
        for module in part.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.padding_mode = "circular"


def patch(pipe):
    block = pipe.unet.mid_block
    forward = block.forward
    block.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


class Doubled(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(pipe):
    pipe.unet.conv_in.__class__ = Doubled


def drop(pipe):
    torch.manual_seed(1)
    pipe.unet.mid_block.resnets[0].dropout.p = 0.5
    pipe.unet.mid_block.train()


@pytest.mark.parametrize("change", [free_u, tile, patch, subclass])
def test_a_changed_module_runs(folder, monkeypatch, change):
    same_change(folder, change, monkeypatch, planned=0)


def test_dropout_in_training_runs(folder, monkeypatch):
    pipe = accelerate(plain_pipeline(folder))
    drop(pipe)
    assert runs_planned(pipe, monkeypatch)[1] == 0


def test_free_u_off_again_is_planned(folder, monkeypatch):
    pipe = accelerate(plain_pipeline(folder))
    before = draw(pipe)
    free_u(pipe)
    draw(pipe)
    pipe.disable_freeu()
    pictures, planned = runs_planned(pipe, monkeypatch)
    assert planned == 2 and torch.equal(pictures, before)


def test_another_pipeline_of_the_same_parts(folder, monkeypatch):
    options = {"image": torch.rand(2, 3, 32, 32), "strength": 0.5, "num_inference_steps": 4}
    plain = StableDiffusionXLImg2ImgPipeline.from_pipe(plain_pipeline(folder))
    pipe = StableDiffusionXLImg2ImgPipeline.from_pipe(accelerate(plain_pipeline(folder)))
    for p in (plain, pipe):
        p.set_progress_bar_config(disable=True)
    pictures, planned = runs_planned(pipe, monkeypatch, **options)
    assert planned == 2 and (pictures - draw(plain, **options)).abs().max() <= 1e-5


def test_saved_as_diffusers_saves_it(folder, tmp_path):
    expected = draw(plain_pipeline(folder))
    accelerate(plain_pipeline(folder)).save_pretrained(tmp_path)
    for file in ("model_index.json", "unet/config.json", "vae/config.json"):
        assert "Planned" not in (tmp_path / file).read_text() and "nitrofusion" not in (tmp_path / file).read_text()
    assert torch.equal(draw(plain_pipeline(tmp_path)), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_a_copy_is_planned_with_its_own_weights(folder, monkeypatch, copied):
    pipe, other = accelerate(plain_pipeline(folder)), accelerate(plain_pipeline(folder))
    before = draw(pipe)
    other.unet, other.vae = copied(pipe.unet), copied(pipe.vae)
    assert torch.equal(draw(other), before)
    write_data(other)
    plain = plain_pipeline(folder)
    write_data(plain)
    pictures, planned = runs_planned(other, monkeypatch)
    assert planned == 2 and (pictures - draw(plain)).abs().max() <= 1e-5
    assert torch.equal(draw(pipe), before)


def test_a_module_goes_with_its_last_name(folder):
    pipe = accelerate(plain_pipeline(folder))
    draw(pipe)
    unet = weakref.ref(pipe.unet)
    gc.collect()
    gc.disable()
    try:
        pipe.unet = None
        assert unet() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("hooked_first", [False, True])
def test_hooks_of_the_accelerate_package(folder, monkeypatch, hooked_first):
    hooks = pytest.importorskip("accelerate.hooks")
    expected = draw(plain_pipeline(folder))
    pipe = plain_pipeline(folder)
    if not hooked_first:
        accelerate(pipe)
    hooks.add_hook_to_module(pipe.unet, hooks.ModelHook())
    accelerate(pipe)
    pictures, planned = runs_planned(pipe, monkeypatch)
    assert planned == (0 if hooked_first else 2)
    assert (pictures - expected).abs().max() <= 1e-5
    pictures, planned = runs_planned(restore(pipe), monkeypatch)
    assert planned == 0 and torch.equal(pictures, expected)
    hooks.remove_hook_from_module(pipe.unet)
    assert torch.equal(draw(pipe), expected)


def test_a_compiled_or_traced_unet(folder):
    pipe = accelerate(plain_pipeline(folder))
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor(5), torch.randn(1, 20, 128))
    added = {"text_embeds": torch.randn(1, 64), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        expected = pipe.unet(*inputs, added_cond_kwargs=added).sample
        out = torch.compile(pipe.unet, backend="eager")(*inputs, added_cond_kwargs=added).sample
        assert (out - expected).abs().max() <= 1e-5

        class Wrapped(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.unet = pipe.unet

            def forward(self, *inputs):
                return self.unet(*inputs, added_cond_kwargs=added, return_dict=False)[0]

        traced = torch.jit.trace(Wrapped(), inputs, check_trace=False)
        assert (traced(*inputs) - expected).abs().max() <= 1e-5


def test_weights_made_in_inference_mode(folder, monkeypatch):
    with torch.inference_mode():
        pipe = accelerate(plain_pipeline(folder))
    pictures, planned = runs_planned(pipe, monkeypatch)
    assert planned == 2 and (pictures - draw(plain_pipeline(folder))).abs().max() <= 1e-5


def test_the_encoder_is_planned_with_its_weights_of_now(folder, monkeypatch):
    plain, vae = plain_pipeline(folder).vae, accelerate(plain_pipeline(folder)).vae
    ran = []
    monkeypatch.setattr(EncoderPlan, "moments", spied(EncoderPlan.moments, ran))
    image, latents = torch.rand(2, 3, 48, 32) * 2 - 1, torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        for planned in (2, 4):
            vae.decode(latents)  # its weights are others
            (dist,), expected = vae.encode(image, return_dict=False), plain.encode(image).latent_dist
            assert len(ran) == planned
            assert (dist.mean - expected.mean).abs().max() <= 1e-5 * expected.mean.abs().max().clamp_min(1)
            assert ((dist.std - expected.std) / expected.std).abs().max() <= 1e-4
            for one in (vae, plain):
                one.encoder.conv_out.weight.mul_(1.5)
        odd = torch.rand(1, 3, 33, 47)
        assert torch.equal(vae.encode(odd).latent_dist.mean, plain.encode(odd).latent_dist.mean) and len(ran) == 4
        vae.enable_tiling()
        vae.encode(image)
        assert len(ran) == 4
    assert vae.encode(image).latent_dist.mean.requires_grad and len(ran) == 4


def spied(function, calls):
    return lambda *args: (calls.append(1), function(*args))[1]


def test_what_does_not_fit_is_refused_as_without_plans(folder):
    plain, pipe = plain_pipeline(folder), accelerate(plain_pipeline(folder))
    added = {"text_embeds": torch.randn(1, 64), "time_ids": torch.zeros(1, 6)}
    sample, context = torch.randn(1, 4, 16, 16), torch.randn(1, 20, 128)

    def refused(p, call):
        with torch.no_grad(), pytest.raises(RuntimeError) as caught:
            call(p)
        return str(caught.value)

    for call in (
        lambda p: p.unet(sample[:, :1], 5, context, added_cond_kwargs=added),
        lambda p: p.unet(sample, 5, context.repeat(2, 1, 1), added_cond_kwargs=added),
        lambda p: p.unet(sample.repeat(2, 1, 1, 1), 5, context, added_cond_kwargs=added),
        lambda p: p.unet(sample, 5, context[..., :1], added_cond_kwargs=added),
        lambda p: p.unet(sample, 5, context.half(), added_cond_kwargs=added),
        lambda p: p.unet(sample, 5, context, added_cond_kwargs=added | {"text_embeds": torch.randn(1, 1)}),
        lambda p: p.vae.decode(sample[:, :1]),
        lambda p: p.vae.encode(torch.rand(1, 1, 32, 32)),
    ):
        assert refused(pipe, call) == refused(plain, call)


def hook_of_all_modules():
    return torch.nn.modules.module.register_module_forward_hook(lambda *args: None)


@pytest.mark.parametrize("inside", [lambda: torch.autocast("cpu", torch.bfloat16), hook_of_all_modules])
def test_what_acts_on_every_module_acts(folder, monkeypatch, inside):
    plain, pipe = plain_pipeline(folder), accelerate(plain_pipeline(folder))
    ran, image, latents = [], torch.rand(1, 3, 32, 32), torch.randn(1, 4, 16, 16)
    monkeypatch.setattr(_Planned, "_own", spied(_Planned._own, ran))
    added = {"text_embeds": torch.randn(1, 64), "time_ids": torch.zeros(1, 6)}
    context = torch.randn(1, 20, 128)
    with torch.no_grad(), inside():
        for call in (
            lambda p: p.unet(latents, 5, context, added_cond_kwargs=added).sample,
            lambda p: p.vae.decode(latents).sample,
            lambda p: p.vae.encode(image).latent_dist.mean,
        ):
            out, expected = call(pipe), call(plain)
            assert out.dtype == expected.dtype
            assert (out - expected).abs().max() <= (0.1 if out.dtype == torch.bfloat16 else 1e-5) * expected.abs().max()
    assert not ran


def test_within_a_transform_of_functions(folder):
    unet, plain = accelerate(plain_pipeline(folder)).unet, plain_pipeline(folder).unet
    context = torch.randn(1, 20, 128)
    added = {"text_embeds": torch.randn(1, 64), "time_ids": torch.zeros(1, 6)}
    samples = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        outs = [
            torch.vmap(lambda x, u=u: u(x[None], 5, context, added_cond_kwargs=added).sample[0])(samples)
            for u in (unet, plain)
        ]
    assert (outs[0] - outs[1]).abs().max() <= 1e-5 * outs[1].abs().max().clamp_min(1)


def test_another_precision_lets_go_of_what_was_packed(folder):
    vae, latents = accelerate(plain_pipeline(folder)).vae, torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        assert vae in _made
        vae.to(torch.bfloat16).decode(latents.bfloat16())
        assert vae not in _made
        assert (vae.float().decode(latents).sample - expected).abs().max() <= 0.1 and vae in _made


def test_the_size_used_longest_ago_makes_room(folder, monkeypatch):
    vae, made = accelerate(plain_pipeline(folder)).vae, []
    monkeypatch.setattr(DecoderPlan, "__init__", spied(DecoderPlan.__init__, made))
    with torch.no_grad():
        for other in range(6):
            for side in (8, 9 + other):
                vae.decode(torch.randn(1, 4, side, 8))
    assert len(made) == 7

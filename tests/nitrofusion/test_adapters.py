"""Students of adapters: what trains, what is stored, and that every other program reads it."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from nitrofusion import checkpoint
from nitrofusion.adapters import STUDENT_LAYERS, Adapters
from nitrofusion.config import TrainConfig
from nitrofusion.engine import load
from nitrofusion.engine.export import export
from nitrofusion.errors import InputError
from nitrofusion.models import sdxl
from nitrofusion.pool import PoolConfig
from nitrofusion.presets import resolve_unet
from nitrofusion.student import make_student, trainable
from nitrofusion.train import train
from nitrofusion.train.memory import trained_parameters

from .recipes.scores import run_config
from .tiny import PROMPTS, plain_pipeline, tiny_folder, tiny_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def config(teacher, tmp_path) -> TrainConfig:
    return run_config(
        teacher, tmp_path / "run", "nitrofusion", teacher_samples="cache", cache=str(teacher / "cache"),
        num_teacher_samples=8, lora_rank=3, accumulation=1, stages=(3,), lr=1e-2, ema_decay=0.1, checkpoint_every=1,
        pool=PoolConfig(heads_per_cell=1, width=8, max_depth=1),
    )  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
def test_a_fresh_student_is_its_base_and_only_adapters_get_gradients(config, fused):
    model = tiny_model()
    student = make_student(config, model, fused)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([5, 400])
    cond = sdxl.encode_prompt(model, PROMPTS[:2])
    call = lambda unet: sdxl.denoise(unet, x, t, cond)  # noqa: E731
    torch.testing.assert_close(call(student), call(model.unet), rtol=1e-4, atol=1e-5)
    module = trainable(student)
    module.requires_grad_(True)
    for name, weight in module.state_dict().items():
        if "lora_B" in name:
            weight.normal_(std=0.1)
    call(student).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    own = {id(p) for p in module.parameters()}
    assert all(p.grad is None for p in student.parameters() if id(p) not in own)
    assert sum(p.numel() for p in module.parameters()) == trained_parameters(config, model.unet)


def test_scale_and_layers():
    model = tiny_model()
    adapters = Adapters(model.unet, 2, ("to_q",), scale=4.0, name="other")
    assert adapters.names and all(".to_q.lora_" in name for name in adapters.names)
    layer = next(m for n, m in model.unet.named_modules() if n.endswith("attn1.to_q"))
    down, up = layer.lora_A["other"].weight, layer.lora_B["other"].weight
    up.data.normal_()
    x = torch.randn(3, down.shape[1])
    wanted = x @ layer.base_layer.weight.T + 4 * (x @ down.T @ up.T)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="names must agree"):
        adapters.load_state_dict({"unet.x": down})


def test_the_run_draws_what_diffusers_draws_with_its_lora(config, teacher, tmp_path):
    run = train(config)
    newest, _ = checkpoint.latest(run)
    stored = load_file(newest / "ema.safetensors")
    assert all(name.startswith("unet.") and ".lora_" in name for name in stored)
    assert {name.split(".lora_")[0].endswith(STUDENT_LAYERS) for name in stored} == {True}
    assert max(w.abs().max().item() for name, w in stored.items() if "lora_B" in name) > 1e-3
    engine = load(run)
    assert engine.unet_digest != load(teacher).unet_digest  # what reproduce compares
    drawn = engine.generate(PROMPTS[:2], seed=3, num_inference_steps=2, output_type="pt")
    folder = export(run, tmp_path / "lora", format="lora")
    assert {k: v.tolist() for k, v in load_file(folder / "pytorch_lora_weights.safetensors").items()} == {
        k: v.tolist() for k, v in stored.items()
    }
    plain = plain_pipeline(teacher)
    plain.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    plain.fuse_lora()
    whole = export(run, tmp_path / "whole", format="diffusers")
    theirs, ours = dict(plain.unet.named_parameters()), plain_pipeline(whole).unet
    for name, value in ours.named_parameters():
        other = theirs.get(name, theirs.get(name.replace(".weight", ".base_layer.weight")))
        other = theirs[name.replace(".bias", ".base_layer.bias")] if other is None else other
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
    again = load(whole).generate(PROMPTS[:2], seed=3, num_inference_steps=2, output_type="pt")
    torch.testing.assert_close(again, drawn, rtol=1e-4, atol=1e-4)
    bare = load(teacher).generate(PROMPTS[:2], seed=3, num_inference_steps=2, guidance_scale=1, output_type="pt")
    assert (bare - drawn).abs().max() > 1e-3
    with pytest.raises(InputError, match="must be a run of whole weights, got one of adapters"):
        resolve_unet(str(run))


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw8bit", "pool_offload": True}])
def test_resume_equals_uninterrupted(config, tmp_path, changes):
    if changes:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    config = dataclasses.replace(config, **changes)
    whole = checkpoint.load(checkpoint.latest(train(config))[0])[0]
    halved = dataclasses.replace(config, output=str(tmp_path / "halved"), keep_checkpoints=9)
    run = train(halved)
    for step in (3, 2):
        torch.manual_seed(step)
        for file in (run / "checkpoints" / f"step-{step:06d}").iterdir():
            file.unlink()
        (run / "checkpoints" / f"step-{step:06d}").rmdir()
    resumed = checkpoint.load(checkpoint.latest(train(halved))[0])[0]
    assert resumed.keys() == whole.keys()
    for part in whole:
        assert whole[part].keys() == resumed[part].keys()
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), (part, name)

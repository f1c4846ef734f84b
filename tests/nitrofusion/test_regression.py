"""The regression recipe: its error in latents and in the teacher's features."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from nitrofusion.config import TrainConfig
from nitrofusion.draws import ONE
from nitrofusion.models import sdxl
from nitrofusion.models.conditioning import Conditioning
from nitrofusion.recipes import Batch
from nitrofusion.student import regression_error, student_x0

from .tiny import PROMPTS, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def diffusers_features(unet, x_t, t, cond):
    """What diffusers' own UNet hands from its encoder on, by hooks: conv_in, each down block, the mid block."""
    seen, hooks = [], []
    for module in (unet.conv_in, *unet.down_blocks, unet.mid_block):
        hooks.append(module.register_forward_hook(lambda _, __, out: seen.append(out)))
    added = {"text_embeds": cond.pooled_prompt_embeds, "time_ids": cond.time_ids}
    with torch.no_grad():
        unet(x_t, t, encoder_hidden_states=cond.prompt_embeds, added_cond_kwargs=added)
    for hook in hooks:
        hook.remove()
    conv_in, *down, mid = seen
    return [f.double() for f in (conv_in, *(f for _, residuals in down for f in residuals), mid)]


def test_error_is_that_of_latents_and_of_the_teachers_features(model):
    cond = sdxl.encode_prompt(model, PROMPTS)
    target = torch.randn(3, 4, 16, 16)
    x0 = (target + 0.3 * torch.randn_like(target)).requires_grad_()
    seed = int(torch.randint(2**31, ()))
    batch = Batch(torch.randn_like(target), target, cond, 0, torch.Generator().manual_seed(seed))
    config = dataclasses.replace(TrainConfig(), regression_features=2.5)

    torch.manual_seed(seed)
    got = regression_error(config, model, batch, x0, [999])
    (grad,) = torch.autograd.grad(got.sum(), x0)
    assert torch.isfinite(grad).all() and (grad != 0).any()
    assert all(p.grad is None for p in model.unet.parameters())

    torch.manual_seed(seed)
    noise = torch.randn_like(target)
    t = (10, 250)[int(torch.randint(2, (), generator=torch.Generator().manual_seed(seed)))]
    a = model.alphas_cumprod[t].double().item()
    see = lambda x: diffusers_features(  # noqa: E731
        model.unet, (a**0.5 * x.detach().double() + (1 - a) ** 0.5 * noise.double()).float(), t, cond
    )
    fake, real = see(x0), see(target)
    assert len(real) == 10
    size = lambda x: x.pow(2).flatten(1).mean(1)  # noqa: E731
    each = [size(f - r) / size(r) for f, r in zip(fake, real, strict=True)]
    wanted = (x0.detach() - target).double().pow(2).flatten(1).mean(1) + 2.5 * sum(each) / 10
    torch.testing.assert_close(got.detach().double(), wanted, rtol=1e-4, atol=1e-7)


def test_no_error_where_the_student_draws_the_teachers_picture(model):
    target = torch.randn(2, 4, 16, 16)
    batch = Batch(target, target, sdxl.encode_prompt(model, PROMPTS[:2]), 0, torch.Generator())
    config = dataclasses.replace(TrainConfig(), regression_features=1.0)
    assert (regression_error(config, model, batch, target.clone(), [999]) == 0).all()


def test_the_last_of_several_calls_has_gradients_under_autocast():
    """The calls before it have none, and autocast keeps the casts of weights that they made."""
    model = tiny_model()
    cond = Conditioning(torch.randn(2, 20, 128), torch.randn(2, 64), model.time_ids(2))
    batch = SimpleNamespace(noise=torch.randn(2, 4, 16, 16), cond=cond, draws=ONE, shared={})
    unet = model.unet.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        x0 = student_x0(SimpleNamespace(shifted_timestep=500), unet, batch, model.alphas_cumprod, [999, 499])
    x0.square().mean().backward()
    assert all(p.grad is not None for p in unet.parameters())

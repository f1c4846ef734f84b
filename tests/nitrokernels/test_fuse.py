"""fuse_ and unfuse_ on diffusers models: same pictures, same gradients, same keys."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import nitrokernels
from nitrokernels import fuse_, unfuse_, use
from nitrokernels.dispatch import Op

from ..native import backends

diffusers = pytest.importorskip("diffusers")
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402


def unet(**options):
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16, use_linear_projection=True, **options,
    )  # fmt: skip


def vae():
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=8, **blocks)


def run_unet(model, x, prompt):
    return model(x, torch.tensor([3, 700]), prompt).sample


@pytest.fixture
def inputs():
    return torch.randn(2, 4, 16, 16), torch.randn(2, 5, 32)


def fused_names(model):
    return {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("nitrokernels")}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_unet_and_its_gradients(inputs, layout):
    eager = unet().to(memory_format=layout)
    fused = fuse_(copy.deepcopy(eager))
    assert fused_names(fused) == {
        "FusedResnetBlock2D", "FusedGEGLU", "GroupNorm", "LayerNorm", "GroupNormSilu", "NormalisedSilu",
    }  # fmt: skip
    assert list(fused.state_dict()) == list(eager.state_dict())
    x = [inputs[0].clone(memory_format=layout).requires_grad_() for _ in range(2)]
    wanted, got = run_unet(eager, x[0], inputs[1]), run_unet(fused, x[1], inputs[1])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(wanted)
    wanted.backward(upstream)
    got.backward(upstream)
    torch.testing.assert_close(x[1].grad, x[0].grad, rtol=1e-3, atol=1e-5)
    for (name, a), b in zip(eager.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_unfuse_restores_the_model(inputs):
    eager = unet()
    model = copy.deepcopy(eager)
    model = unfuse_(fuse_(model))
    assert [type(m) for m in model.modules()] == [type(m) for m in eager.modules()]
    assert torch.equal(run_unet(model, *inputs), run_unet(eager, *inputs))


def test_the_reference_backend_is_eager_pytorch(inputs):
    eager = unet()
    with use("ref"):
        got = run_unet(fuse_(copy.deepcopy(eager)), *inputs)
    torch.testing.assert_close(got, run_unet(eager, *inputs), rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_and_training_mode(inputs):
    model = fuse_(unet()).train()
    run_unet(model, *inputs).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.enable_gradient_checkpointing()
    run_unet(model, *inputs).square().sum().backward()
    for p, w in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, w)


@pytest.mark.parametrize("named", backends("cpu", "ref"))
def test_what_is_computed_again_runs_where_it_first_ran(inputs, named):
    """In autograd's own thread, which a GPU has, and outside of ``use``; twice, if the graph is kept."""
    model = fuse_(unet()).train()
    model.requires_grad_(True)
    model.enable_gradient_checkpointing(
        functools.partial(checkpoint, use_reentrant=False, context_fn=nitrokernels.recomputation)
    )
    ran = []
    with mock.patch.object(Op, "select", lambda op, *args, f=Op.select: ran.append(f(op, *args)) or ran[-1]):
        with use(named):
            out = run_unet(model, *inputs).square().sum()
        before = len(ran)
        for _ in range(2):
            thread = ThreadPoolExecutor(1)
            thread.submit(out.backward, retain_graph=True).result()
    assert len(ran) > 2 * before - 10 and {backend for backend, _ in ran} == {named}


def test_a_hooked_norm_is_left_alone(inputs):
    model = unet()
    block = model.down_blocks[0].resnets[0]
    seen = []
    block.norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    block.register_forward_hook(lambda module, args, out: seen.append(out))
    fuse_(model)
    run_unet(model, *inputs)
    assert len(seen) == 2, "hooks on a norm and on a block must both run"


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_they_would_without_fusion(inputs, kind, when):
    """On what fusion skips, set before it or after it; gone once they are removed."""
    names = ("down_blocks.0.resnets.0.norm1", "down_blocks.0.resnets.0.nonlinearity", "conv_norm_out", "conv_act")
    for name in names:
        eager = unet()
        fused = copy.deepcopy(eager)
        seen = {id(eager): [], id(fused): []}

        def watch(model, name=name, seen=seen):
            told = seen[id(model)]
            return getattr(model.get_submodule(name), kind)(lambda module, *values: told.extend(values[-1]))

        if when == "before":
            handle = watch(fused)
            fuse_(fused)
        else:
            fuse_(fused)
            handle = watch(fused)
        watch(eager)
        for model in (eager, fused):
            run_unet(model, *inputs).square().sum().backward()
        expected, got = seen[id(eager)], seen[id(fused)]
        assert expected and len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        handle.remove()
        torch.testing.assert_close(run_unet(fused, *inputs), run_unet(eager, *inputs), rtol=1e-4, atol=1e-5)


def test_a_fused_model_can_be_pickled(inputs):
    model = fuse_(unet())
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
        assert copied.conv_norm_out.partner is copied.conv_act and copied.conv_act.partner is copied.conv_norm_out
        assert torch.equal(run_unet(copied, *inputs), run_unet(model, *inputs))


def test_a_norm_without_positions():
    eager = torch.nn.Sequential(torch.nn.GroupNorm(2, 8))
    x = torch.randn(4, 8)
    expected = eager(x)
    assert torch.equal(fuse_(eager)(x), expected)


@pytest.mark.parametrize("batch,embeddings", [(2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("temb_channels,shape", [(24, (24,)), (None, (32, 1, 1)), (None, (32, 8, 8))])
def test_embeddings_broadcast_as_in_eager(batch, embeddings, temb_channels, shape):
    eager = ResnetBlock2D(in_channels=16, out_channels=32, groups=8, temb_channels=temb_channels)
    x, temb = torch.randn(batch, 16, 8, 8), torch.randn(embeddings, *shape)
    fused = fuse_(copy.deepcopy(eager))
    assert type(fused).__name__ == "FusedResnetBlock2D"
    torch.testing.assert_close(fused(x, temb), eager(x, temb), rtol=1e-4, atol=1e-5)


def test_a_lora_layer_inside_a_block(inputs):
    """An adapter replaces a submodule, as PEFT does; the fused block calls whatever is there."""

    class Lora(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.delta = torch.nn.Conv2d(base.in_channels, base.out_channels, 1)

        def forward(self, x):
            return self.base(x) + self.delta(x)

    eager = unet()
    eager.down_blocks[0].resnets[0].conv1 = Lora(eager.down_blocks[0].resnets[0].conv1)
    fused = fuse_(copy.deepcopy(eager))
    torch.testing.assert_close(run_unet(fused, *inputs), run_unet(eager, *inputs), rtol=1e-4, atol=1e-5)


def test_scale_shift_blocks_stay_eager(inputs):
    eager = unet(resnet_time_scale_shift="scale_shift")
    fused = fuse_(copy.deepcopy(eager))
    assert "FusedResnetBlock2D" not in fused_names(fused)
    torch.testing.assert_close(run_unet(fused, *inputs), run_unet(eager, *inputs), rtol=1e-4, atol=1e-5)


def test_autoencoders():
    x = torch.randn(2, 3, 32, 32)
    eager = vae()
    fused = fuse_(copy.deepcopy(eager))
    torch.testing.assert_close(fused(x).sample, eager(x).sample, rtol=1e-4, atol=1e-5)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    wanted = tiny(x).sample
    assert torch.equal(fuse_(tiny)(x).sample, wanted)


def test_importing_does_not_import_diffusers():
    import subprocess
    import sys

    code = "import sys, nitrokernels; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

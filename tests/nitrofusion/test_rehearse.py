"""What the meta device is taught of CUDA, against what PyTorch decides for tensors of CUDA without memory."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses import FakeTensorMode

import nitrokernels
from nitrofusion.cli import main
from nitrofusion.errors import InputError
from nitrofusion.models.folder import config_of
from nitrofusion.train import train
from nitrofusion.train.plan import format_plan, plan
from nitrofusion.train.rehearse import _HIGH_ON_CUDA, _LOW, OnMeta
from nitrokernels import dispatch

from ..native import NATIVE
from .recipes.scores import run_config
from .tiny import tiny_folder

absent = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("rehearse") / "teacher")


@contextlib.contextmanager
def cuda_as_pytorch_knows_it():
    """Tensors of CUDA without memory, whose types PyTorch's own autocast chooses."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        kept = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)  # torch.autocast itself refuses where there is no CUDA
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", kept[0])
            torch.set_autocast_dtype("cuda", kept[1])


@contextlib.contextmanager
def cuda_as_rehearsed():
    with torch.device("meta"), torch.no_grad(), OnMeta(torch.device("cuda"), int) as mode, mode.autocast(True):
        yield


def types(model: torch.nn.Module, *args) -> dict[str, torch.dtype]:
    """Of what each of its modules returns."""
    found = {}

    def note(name):
        def hook(module, args, out):
            if isinstance(out, torch.Tensor):
                found[name] = out.dtype

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    model(*args)
    return found


def made(kind, config, dtype):
    """On the device that is the default; fake tensors take no values, so initialisation is left to meta."""
    device = torch.get_default_device()
    with torch.device("meta"):
        model = kind.from_config(config)
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(
                torch.empty(value.shape, dtype=dtype, device=device), requires_grad=False
            )
    return model


def unet_types(folder, dtype):
    """Of a transformer and what makes maps larger; a whole UNet indexes tensors, which needs CUDA itself."""
    unet = made(UNet2DConditionModel, config_of(folder, "unet/config.json"), dtype)
    x = torch.empty(2, unet.config.block_out_channels[-1], 4, 4, dtype=dtype)
    cond = torch.empty(2, 7, unet.config.cross_attention_dim, dtype=dtype)
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    return types(block, x.flatten(2).mT, None, cond) | types(unet.up_blocks[0].upsamplers[0], x)


def decoder_types(folder, dtype):
    vae = made(AutoencoderKL, config_of(folder, "vae/config.json"), dtype)
    return types(vae.decoder, torch.empty(2, vae.config.latent_channels, 8, 8, dtype=dtype))


@pytest.mark.parametrize("of", [unet_types, decoder_types])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_chooses_types_as_on_cuda(teacher, of, dtype):
    with cuda_as_pytorch_knows_it():
        expected = of(teacher, dtype)
    with cuda_as_rehearsed():
        found = of(teacher, dtype)
    assert found == expected
    assert {torch.float32, torch.bfloat16} <= set(expected.values())  # norms in the one, convolutions in the other


LEFT_ALONE = (F.silu, F.gelu, F.relu, torch.tanh, torch.sqrt, torch.abs, torch.mean, F.logsigmoid)


@pytest.mark.parametrize("function", sorted(_HIGH_ON_CUDA, key=str) + list(LEFT_ALONE), ids=lambda f: f.__name__)
def test_functions_in_fp32(function):
    extra = {"group_norm": (4,), "layer_norm": ((16,),), "softmax": (-1,), "log_softmax": (-1,)}
    extra |= {"pow": (2,), "__pow__": (2,)}
    given = {"interpolate": {"scale_factor": 2.0}}.get(function.__name__, {})
    chosen = []
    for context in (cuda_as_pytorch_knows_it, cuda_as_rehearsed):
        with context():
            x = torch.empty(2, 8, 16, 16, dtype=torch.bfloat16)
            pair = (x,) * (function.__name__ in ("mse_loss", "l1_loss", "smooth_l1_loss", "cosine_similarity"))
            chosen.append(function(x, *pair, *extra.get(function.__name__, ()), **given).dtype)
    assert chosen == [torch.bfloat16 if function in LEFT_ALONE else torch.float32] * 2
    assert function not in _LOW


@absent
@NATIVE
def test_a_plan_for_cuda_where_there_is_none(teacher, tmp_path, monkeypatch):
    """Ops that never ran on a GPU are not chosen there: norms are eager PyTorch's, which autocast computes in fp32."""
    monkeypatch.delenv("NITROKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "VERIFIED", frozenset(v for v in dispatch.VERIFIED if v.endswith(".cpu")))
    config = run_config(teacher, tmp_path / "run", "nitrofusion", precision="bf16", teacher_samples="online")
    plans = {
        (device, backend): plan(dataclasses.replace(config, device=device, backend=backend))
        for device in ("cpu", "cuda")
        for backend in ("auto", "ref", "cpu" if device == "cpu" else "triton")
    }
    moments = {which: found["moments_bytes"]["student"] for which, found in plans.items()}
    assert moments["cuda", "auto"] == moments["cuda", "ref"] > 1.05 * moments["cpu", "ref"]
    # What makes maps larger is computed in fp32 on CUDA as well.
    assert 1 < moments["cuda", "triton"] / moments["cpu", "cpu"] < 1.05
    assert moments["cuda", "triton"] < moments["cpu", "ref"]
    found = plans["cuda", "auto"]
    assert found["device"] == "cuda" and found["estimated_hours"] is None
    assert found["flops_per_step"] == plans["cpu", "ref"]["flops_per_step"]
    assert found["hours_at_100_tflops"] == pytest.approx(found["flops_per_step"] * config.total_steps / 1e14 / 3600)
    assert "100 TFLOP/s" in format_plan(found) and "this machine" not in format_plan(found)
    assert plans["cpu", "ref"]["estimated_hours"] > 0 and "this machine" in format_plan(plans["cpu", "ref"])
    with pytest.raises(InputError, match="device: must be one this machine has"):
        train(dataclasses.replace(config, device="cuda"))
    assert not (tmp_path / "run").exists()


@absent
def test_the_commands_plan_for_cuda(teacher, tmp_path, capsys):
    small = ["--preset", "world-smoke", "--teacher", str(teacher), "--output", str(tmp_path / "run"), "--init", "null"]
    for command in (["plan"], ["prepare", "--dry_run"], ["train", "--dry_run"]):
        assert main([*command, *small, "--device", "cuda:1"]) == 0
        assert "100 TFLOP/s" in capsys.readouterr().out
        assert main([*command, *small, "--device", "bogus"]) == 2
        assert "device: must be one this machine has" in capsys.readouterr().err


@NATIVE
def test_fusing_asks_every_op_it_puts_in(monkeypatch):
    with nitrokernels.use("ref"):
        assert nitrokernels.fusible("cpu") is False
    for name in ("group_norm_silu", "layer_norm", "geglu"):
        kept = dispatch.OPS[name].impls
        monkeypatch.setattr(dispatch.OPS[name], "impls", {"ref": kept["ref"]})
        with nitrokernels.use("cpu"), pytest.raises(RuntimeError, match=f"{name}: a backend among cpu must run"):
            nitrokernels.fusible("cpu")
        monkeypatch.setattr(dispatch.OPS[name], "impls", kept)

"""fp8 linears: e4m3 by its definition, scales by timestep, calibrations that fit, LoRAs on top."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from nitrofusion.cli import main
from nitrofusion.engine import Engine, load
from nitrofusion.engine.calibrate import calibrate
from nitrofusion.engine.graphs import Graphs
from nitrofusion.errors import InputError
from nitrofusion.models import fp8
from nitrokernels import quantize_e4m3

from .test_graphs import Recorded
from .test_switch import addresses
from .tiny import PROMPTS, student_folder, tiny_folder
from .unets import random_unet

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return student_folder(tiny_folder(root / "teacher", loud=True), root / "student")


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / "scales.json"
    calibrate(folder, path, PROMPTS, seeds=1, device="cpu")
    return path


def skip_unless_the_product_runs() -> None:
    """The call that a GPU runs, on this CPU."""
    rows, weight = torch.ones(16, 16).to(fp8.E4M3), torch.ones(32, 16).to(fp8.E4M3)
    try:
        fp8.scaled_mm(rows, weight, torch.ones(16, 1), torch.ones(1, 32), None)
    except RuntimeError as error:
        pytest.skip(f"PyTorch {torch.__version__} has no torch._scaled_mm with a scale for each row on CPUs: {error}")


def e4m3_values():
    """{value: mantissa} of all finite numbers: 4 bits of exponent with bias 7, 3 of mantissa; the last code is NaN."""
    values = {}
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):
                fraction = mantissa / 8 + (exponent > 0)
                for sign in (1, -1):
                    values[sign * math.ldexp(fraction, max(exponent, 1) - 7)] = mantissa
    return values


def nearest(x, values):
    """By distance in fp64, then an even mantissa; the largest value for whatever is beyond it."""
    return min(values, key=lambda v: (abs(v - x), values[v] % 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_the_definition(dtype):
    values = e4m3_values()
    assert len(values) == 253 and max(values) == fp8.LARGEST  # 254 codes, two of them zero
    grid = sorted(values)
    middles = [(a + b) / 2 for a, b in zip(grid, grid[1:], strict=False)]
    spread = (torch.randn(3000, dtype=torch.float64) * torch.logspace(-4, 4, 3000, dtype=torch.float64)).tolist()
    x = torch.tensor(grid + middles + spread + [1e9, -1e9, 464.0, -480.0, 0.0]).to(dtype)
    for scale in (1.0, 0.125, 32.0):
        got = quantize_e4m3(x * scale, torch.tensor([1 / scale])).view(fp8.E4M3)
        wanted = [nearest(v, values) for v in x.double().tolist()]
        assert torch.equal(got.double(), torch.tensor(wanted, dtype=torch.float64))


def test_scales_are_the_smallest_power_of_two_that_fits():
    largest = torch.cat([torch.rand(500) * torch.logspace(-20, 20, 500), torch.tensor([448.0, 224.0, 449.0, 0.0])])
    for limit in (448.0, 224.0):
        for value, scale in zip(largest.tolist(), fp8.power_of_two(largest, limit).tolist(), strict=True):
            assert math.frexp(scale)[0] == 0.5 and value / scale <= limit
            assert value == 0 and scale == 1 or value / (scale / 2) > limit


def quantised(linear, largest, timesteps, emulated=True):
    """A UNet of one layer, as far as ``quantize_`` looks."""
    unet = torch.nn.Module()
    unet.block = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([linear])})
    made = fp8.Calibration(fp8.fingerprint(unet), timesteps, {"block.transformer_blocks.0": largest}, (), 1)
    return fp8.quantize_(unet, made, emulated, "x.json")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("emulated", [False, True])
def test_a_layer_is_the_product_of_quantised_factors(bias, emulated):
    """In fp64, from numbers that are looked up; a new PyTorch runs ``scaled_mm`` on the CPU too."""
    if not emulated:
        skip_unless_the_product_runs()
    values, x = e4m3_values(), torch.randn(2, 5, 32).bfloat16()
    x[0, 0, 0] = 1000  # beyond what calibration saw: saturates
    linear = torch.nn.Linear(32, 48, bias=bias).requires_grad_(False).bfloat16()
    linear.weight *= torch.logspace(-2, 2, 48)[:, None]
    weight, added = linear.weight.double(), linear.bias.double() if bias else 0.0
    scales = quantised(linear, [3.0, 60.0], (499, 249), emulated)
    for t, scale in ((499, 2.0**-6), (249, 2.0**-1), (260, 2.0**-1)):  # 3 / 224 and 60 / 224, rounded up
        scales.select(torch.tensor([t, t]))
        rows = torch.tensor([[nearest(v / scale, values) * scale for v in row] for row in x.flatten(0, 1).tolist()])
        columns = []
        for channel in weight:
            own = 2.0 ** math.ceil(math.log2(channel.abs().max() / 448))
            columns.append([nearest(v / own, values) * own for v in channel.tolist()])
        wanted = rows.double() @ torch.tensor(columns, dtype=torch.float64).T + added
        got = linear(x)
        assert got.shape == (2, 5, 48) and got.dtype == torch.bfloat16
        torch.testing.assert_close(got.flatten(0, 1).double(), wanted, rtol=2**-7, atol=1e-4)
        assert (got.flatten(0, 1)[0].double() - linear_exact(x, weight, added)[0]).abs().max() > 1  # it did saturate


def linear_exact(x, weight, added):
    return x.flatten(0, 1).double() @ weight.T + added


def test_which_layers():
    unet, _ = random_unet(4)
    found = fp8.layers(unet)
    for name, module in unet.named_modules():
        fits = isinstance(module, torch.nn.Linear) and not (module.in_features % 16 or module.out_features % 16)
        assert (name in found) == (fits and ".transformer_blocks." in name)
    student = load(backend="ref").model.unet
    assert len(fp8.layers(student)) == 110 and len(fp8.layers(student, (".ff.",))) == 88
    assert not any("time_emb" in name or "conv" in name or "proj_in" in name for name in fp8.layers(student))


def test_a_calibration_is_reproducible_and_right(folder, file, tmp_path):
    made = calibrate(folder, tmp_path / "again.json", PROMPTS, seeds=1, device="cpu")
    assert (tmp_path / "again.json").read_text() == file.read_text() and fp8.Calibration.load(file) == made
    assert made.timesteps == (499, 374, 249, 124) and made.pictures == 12
    engine, seen = load(folder, "cpu", backend="ref"), []
    layer = engine.model.unet.get_submodule(LAYER)
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(float(args[0].abs().max())))
    engine.generate(PROMPTS, 4, batch_size=8)
    hook.remove()
    for saw, largest in zip(seen, made.largest[LAYER], strict=True):
        assert saw <= largest <= 2 * saw  # of fewer trajectories


def test_pictures_stay_close_and_scales_follow_the_timestep(folder, file):
    exact, ours = load(folder, "cpu", backend="ref"), load(folder, "cpu", torch.float32, backend="ref", fp8=file)
    for steps in (1, 4):
        a, b = (e.generate(PROMPTS, steps, seed=2, output_type="latent") for e in (exact, ours))
        assert 0 < (a - b).norm() < 0.05 * a.norm()
    assert type(ours.model.unet.get_submodule(LAYER)) is fp8.Fp8Linear
    assert ours.model.unet.conv_in.weight.dtype == torch.float32
    settings = ours.settings(PROMPTS[0])
    assert settings["dtype"] == "float32+fp8" and exact.settings(PROMPTS[0])["dtype"] == "float32"
    scales = ours.executor.fp8
    scales.select(torch.tensor([374]))
    assert torch.equal(scales.inverse, 1 / scales.table[1])
    # the table is what decides: with scales far too small everything saturates
    scales.table[1] *= 2.0**-12
    a, b = (ours.generate(PROMPTS, steps, seed=2, output_type="latent") for steps in (1, 4))
    exact_a, exact_b = (exact.generate(PROMPTS, steps, seed=2, output_type="latent") for steps in (1, 4))
    assert (a - exact_a).norm() < 0.05 * a.norm() and (b - exact_b).norm() > 0.05 * b.norm()


def test_the_product_a_gpu_runs(folder, file, monkeypatch):
    """A new PyTorch runs ``scaled_mm`` on the CPU too: the same call, whole pictures, against the emulation."""
    skip_unless_the_product_runs()
    emulated = load(folder, "cpu", torch.bfloat16, backend="ref", fp8=file)
    monkeypatch.setattr(fp8, "missing", lambda device: None)
    ours = load(folder, "cpu", torch.bfloat16, fp8=file)
    assert not ours.executor.fp8.emulated and emulated.executor.fp8.emulated
    for steps in (1, 3):
        a, b = (e.generate(PROMPTS, steps, seed=2, output_type="latent") for e in (ours, emulated))
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_lora_under_fp8(folder, file, tmp_path):
    lora = tmp_path / "a.safetensors"
    sides = {"A": 0.3 * torch.randn(4, 32), "B": 0.3 * torch.randn(32, 4)}
    save_file({f"unet.{LAYER}.lora_{side}.weight": t for side, t in sides.items()}, lora)
    options = {"device": "cpu", "dtype": torch.bfloat16, "backend": "ref", "fp8": file}
    engine, fresh = load(folder, **options), load(folder, lora=lora, **options)
    original, before = engine.generate(PROMPTS[0], output_type="pt"), addresses(engine)
    assert engine.set_lora(lora).written == 1 and engine.source == fresh.source
    drawn = engine.generate(PROMPTS[0], output_type="pt")
    assert torch.equal(drawn, fresh.generate(PROMPTS[0], output_type="pt")) and not torch.equal(drawn, original)
    engine.set_lora()
    assert torch.equal(engine.generate(PROMPTS[0], output_type="pt"), original) and addresses(engine) == before
    with pytest.raises(InputError, match="switch: model must be the one fp8 is calibrated for"):
        engine.switch("world")


def test_a_compiler_sees_the_product_whole():
    """torch.compile of a layer is one graph; tracing alone, so any CPU will do."""
    linear = torch.nn.Linear(32, 48).requires_grad_(False).bfloat16()
    quantised(linear, [3.0], (499,), emulated=False)
    skip_unless_the_product_runs()
    with torch.inference_mode():
        seen = torch._dynamo.explain(linear)(torch.randn(2, 5, 32).bfloat16())
    assert seen.graph_break_count == 0 and seen.graph_count == 1


def test_a_graph_of_fp8(folder, file, monkeypatch):
    monkeypatch.setattr(Recorded, "captured", [])
    plain = load(folder, "cpu", torch.float32, backend="ref", fp8=file)
    graphs = Engine(plain.source, Graphs(plain.model, Recorded), "ref")
    graphs.executor.fp8 = plain.executor.fp8
    for seed in (1, 2):
        ours, wanted = (e.generate(PROMPTS[0], 3, seed=seed, output_type="pt") for e in (graphs, plain))
        assert torch.equal(ours, wanted)
    assert len(Recorded.captured) == 2


def test_what_does_not_fit_is_refused(folder, file, tmp_path):
    def refuses(words, call):
        with pytest.raises(InputError, match=words) as error:
            call()
        assert "\n" not in str(error.value)

    def changed(layers=None, **entries):
        values = json.loads(file.read_text()) | entries
        values["largest"] = dict(list(values["largest"].items())[:layers])
        (tmp_path / "changed.json").write_text(json.dumps(values))
        return tmp_path / "changed.json"

    ref = {"device": "cpu", "backend": "ref"}
    other = student_folder(tiny_folder(tmp_path / "other", seed=5), tmp_path / "other-student")
    digests = "[0-9a-f]{12}, got [0-9a-f]{12}"
    refuses(f"scales.json must be of this model's weights, {digests}", lambda: load(other, fp8=file, **ref))
    refuses("must be of this model's 110 layers, got 55 of another's", lambda: load(folder, fp8=changed(55), **ref))
    refuses("must be a calibration .nitrofusion calibrate., got another format",
            lambda: load(folder, fp8=changed(format=2), **ref))  # fmt: skip
    refuses("a layer without a number for each timestep", lambda: load(folder, fp8=changed(timesteps=[1]), **ref))
    slower = student_folder(tmp_path / "other", tmp_path / "slower", shifted_timestep=250)
    refuses(r"timesteps .*slower is told, \[249, 187, 124, 62\], got \[499, 374, 249, 124\]",
            lambda: load(slower, fp8=file, **ref))  # fmt: skip
    refuses("fp8 must be a file of calibrate, got True", lambda: load(folder, fp8=True, **ref))
    refuses("must be JSON, got", lambda: load(folder, fp8=tmp_path / "none.json", **ref))
    refuses("must be where PyTorch multiplies it, or emulated by backend ref: it must be on CUDA, got cpu",
            lambda: load(folder, "cpu", torch.bfloat16, fp8=file))  # fmt: skip
    refuses("fp8 must be beside bfloat16 or float32, got torch.float16",
            lambda: load(folder, dtype=torch.float16, fp8=file, **ref))  # fmt: skip
    refuses("fp8 must be with auto, graph, ref .* got plan", lambda: load(folder, "cpu", backend="plan", fp8=file))
    teacher = tmp_path / "other"
    refuses("fp8 must be of a student", lambda: load(teacher, fp8=file, **ref))
    refuses("calibrate: model must be a student", lambda: calibrate(teacher, device="cpu"))
    refuses("calibrate: output must be a file, got the folder", lambda: calibrate(folder, tmp_path, device="cpu"))
    refuses("skip must leave a layer", lambda: calibrate(folder, skip=("attn", "ff"), device="cpu"))
    made = calibrate(folder, prompts="a ring", seeds=1, skip="ff.net.2", device="cpu")  # not a letter each
    assert made.pictures == 4 and made.skip == ("ff.net.2",)


def test_calibrate_on_the_command_line(folder, tmp_path, capsys):
    texts = tmp_path / "prompts.txt"
    texts.write_text(PROMPTS[0])
    out = tmp_path / "scales.json"
    words = ["--model", str(folder), "--device", "cpu", "--output"]
    assert main(["calibrate", *words, str(out), "--prompts", str(texts)]) == 0
    assert f"{out}: 110 layers at 4 timesteps" in capsys.readouterr().out
    made = json.loads(out.read_text())
    assert made["pictures"] == 8
    picture = tmp_path / "a.png"
    words = ["generate", PROMPTS[0], *words, str(picture), "--fp8", str(out)]
    assert main([*words, "--backend", "ref"]) == 0 and picture.is_file()
    assert main(words) == 2
    assert "or emulated by backend ref" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_scaled_mm_on_a_gpu_is_what_is_emulated(folder, file):
    if (reason := fp8.missing(torch.device("cuda"))) is not None:
        pytest.skip(reason)
    for backend in ("auto", "graph"):
        ours, emulated = (load(folder, "cuda", backend=b, fp8=file) for b in (backend, "ref"))
        for steps in (1, 3):
            a, b = (e.generate(PROMPTS, steps, seed=2, output_type="latent") for e in (ours, emulated))
            assert (a - b).norm() < 0.02 * b.norm()

"""Other weights in a loaded engine: the pictures of a freshly loaded one, in the same memory."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nitrofusion.engine import Engine, load
from nitrofusion.engine.graphs import Graphs
from nitrofusion.errors import InputError

from ..native import NATIVE, backends
from .test_graphs import Recorded
from .tiny import PROMPTS, nudged, student_folder, tiny_folder

UNET = "unet/diffusion_pytorch_model.safetensors"
LAYERS = ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in",
          "down_blocks.0.resnets.1.conv2", "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_v")  # fmt: skip
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return student_folder(tiny_folder(root / "teacher", loud=True), root / "student")


@pytest.fixture(scope="module")
def other(folder, tmp_path_factory):
    """The same form with another UNet; the other parts are the very same files."""
    copy = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(folder, copy, symlinks=True)
    (copy / "unet").unlink()
    shutil.copytree((folder / "unet").resolve(), copy / "unet")
    save_file(nudged(load_file(folder / UNET), 3), copy / UNET)
    return copy


@pytest.fixture(scope="module")
def loras(folder, tmp_path_factory):
    """Three files: for the UNet and a text encoder, for some of the same layers, and one that holds NaN."""
    root, state = tmp_path_factory.mktemp("loras"), load_file(folder / UNET)
    generator = torch.Generator().manual_seed(1)

    def write(name, layers, size):
        tensors = {}
        for layer in layers:
            shape = (64, 64) if layer == TEXT else state[f"{layer}.weight"].shape
            key = f"text_encoder.{layer}" if layer == TEXT else f"unet.{layer}"
            tensors[f"{key}.lora_A.weight"] = size * torch.randn(4, *shape[1:], generator=generator)
            up = size * torch.randn(shape[0], 4, *[1] * (len(shape) - 2), generator=generator)
            tensors[f"{key}.lora_B.weight"] = up
        save_file(tensors, root / name)
        return root / name

    bad = write("bad.safetensors", LAYERS[1:3], 0.3)
    tensors = load_file(bad)
    tensors[f"unet.{LAYERS[2]}.lora_A.weight"][:] = float("nan")
    save_file(tensors, bad)
    return write("a.safetensors", (*LAYERS, TEXT), 0.3), write("b.safetensors", LAYERS[:2], 0.3), bad


def addresses(engine):
    """Where every weight lies."""
    tensors = {}
    for part, module in engine.model.parts.items():
        tensors |= {(part, name): t.data_ptr() for name, t in module.state_dict().items()}
    return tensors


def weights(engine):
    return {(p, n): t.clone() for p, module in engine.model.parts.items() for n, t in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def draw(engine):
    return engine.generate(PROMPTS[:2], 2, seed=3, output_type="pt")


@pytest.mark.parametrize("backend", backends("ref", "cpu", "plan", "float16"))
def test_a_lora_and_back(folder, loras, backend):
    options = {"dtype": torch.float16, "backend": "ref"} if backend == "float16" else {"backend": backend}
    if backend != "float16":
        options["dtype"] = torch.float32
    engine = load(folder, "cpu", **options)
    drawn = (lambda e: e.model.unet.state_dict()[f"{LAYERS[0]}.weight"]) if backend == "float16" else draw
    original, before = drawn(engine).clone(), addresses(engine)
    a, b, _ = loras
    states = [a, [(a, 0.5)], [(b, 0.8), (a, -0.25)], [(b, 0.8)], None, [(a, 0.5), (b, 1.0)]]
    written = []
    for lora in states:
        done = engine.set_lora(lora)
        written.append(done.written)
        fresh = load(folder, "cpu", lora=lora, **options)
        assert torch.equal(drawn(engine), drawn(fresh))
        assert engine.source == fresh.source and engine.loras == fresh.loras == done.loras
        assert same(weights(engine), weights(fresh))
        assert not torch.equal(drawn(engine), original) or lora is None
    if backend == "plan":
        assert str(done).startswith(f"{engine.source.name}: packed anew in {done.seconds:.3f} s; a.saf")
    else:
        assert written == [5, 5, 5, 5, 2, 5] and addresses(engine) == before
        assert done.total == len(before)
        text = f"{engine.source.name}: 5 of {len(before)} weights written in {done.seconds:.3f} s; "
        assert str(done) == text + "a.safetensors x 0.5: 10 of 10 keys applied; b.safetensors x 1: 4 of 4 keys applied"
        assert engine.set_lora([(a, 0.5), (b, 1.0)]).written == 0
    engine.set_lora()
    assert torch.equal(drawn(engine), original)


@NATIVE
def test_another_size_under_a_lora_keeps_no_second_copy_of_the_weights(folder, loras):
    engine = load(folder, "cpu", backend="plan", lora=loras[0])
    side = engine.executor.resolution + engine.executor.vae_scale
    drawn = engine.generate(PROMPTS[0], seed=3, height=side, output_type="pt")
    assert "modules" not in engine.executor.__dict__
    plain = load(folder, "cpu", backend="ref", lora=loras[0])
    assert (drawn - plain.generate(PROMPTS[0], seed=3, height=side, output_type="pt")).abs().max() < 1e-5
    assert engine.model is not None and "modules" in engine.executor.__dict__  # asked for, they stay
    engine.generate(PROMPTS[0], width=side)
    assert "modules" in engine.executor.__dict__


@pytest.mark.parametrize("backend", backends("ref", "plan"))
def test_what_was_loaded_in_inference_mode(folder, other, loras, backend):
    with torch.inference_mode():
        engine = load(folder, "cpu", backend=backend)
    engine.set_lora(loras[0])
    assert torch.equal(draw(engine), draw(load(folder, "cpu", backend=backend, lora=loras[0])))
    with torch.inference_mode():
        engine.switch(other)
    engine.set_lora(loras[0])
    assert torch.equal(draw(engine), draw(load(other, "cpu", backend=backend, lora=loras[0])))


def test_what_was_loaded_with_a_lora_gets_rid_of_it(folder, loras):
    engine = load(folder, "cpu", backend="ref", lora=loras[0])
    assert engine.set_lora().written == 5
    assert torch.equal(draw(engine), draw(load(folder, "cpu", backend="ref")))


@pytest.mark.parametrize("backend", backends("ref", "plan"))
def test_another_model_and_back(folder, other, loras, backend):
    engine = load(folder, "cpu", backend=backend)
    original, digest, before = draw(engine), engine.unet_digest, addresses(engine)
    done = engine.switch(other, lora=loras[1])
    fresh = load(other, "cpu", backend=backend, lora=loras[1])
    assert torch.equal(draw(engine), draw(fresh)) and not torch.equal(draw(engine), original)
    assert engine.unet_digest == fresh.unet_digest != digest
    assert engine.settings(PROMPTS[0]) == fresh.settings(PROMPTS[0])
    engine.set_lora()
    assert torch.equal(draw(engine), draw(load(other, "cpu", backend=backend)))
    if backend == "ref":
        assert done.written == len(engine.model.unet.state_dict())  # the other parts are the same files
        assert engine.switch(folder).written == done.written and addresses(engine) == before
    else:
        engine.switch(folder)
    assert torch.equal(draw(engine), original)


def test_graphs_go_on_with_what_is_in_their_memory(folder, other, loras, monkeypatch):
    monkeypatch.setattr(Recorded, "captured", [])
    plain = load(folder, "cpu", backend="ref")
    engine = Engine(plain.source, Graphs(plain.source.read("cpu", torch.float32), Recorded), "ref")
    close = {"rtol": 1e-4, "atol": 1e-4}  # graphs' modules are channels last
    original = draw(engine)
    draw(engine)
    captured = len(Recorded.captured)
    for change in (lambda e: e.set_lora(loras[0]), lambda e: e.switch(other)):
        for e in (engine, plain):
            change(e)
        torch.testing.assert_close(draw(engine), draw(plain), **close)
        assert (draw(engine) - original).abs().max() > 0.01
    engine.switch(folder)
    assert torch.equal(draw(engine), original)
    assert len(Recorded.captured) == captured == 2


@pytest.mark.parametrize("backend", backends("ref", "plan"))
def test_what_is_refused_changes_nothing(folder, other, loras, tmp_path, backend):
    engine = load(folder, "cpu", backend=backend)
    engine.set_lora(loras[1])
    before, source, held = draw(engine), engine.source, weights(engine)
    wrong = tmp_path / "wrong.safetensors"
    sides = {"A": torch.ones(4, 9), "B": torch.ones(64, 4)}
    save_file({f"unet.{LAYERS[0]}.lora_{side}.weight": t for side, t in sides.items()}, wrong)
    smaller = tmp_path / "smaller"
    shutil.copytree(other, smaller)
    config = json.loads((smaller / "unet/config.json").read_text())
    (smaller / "unet/config.json").write_text(json.dumps(config | {"norm_eps": 1e-3}))
    tiny = load_file(smaller / UNET)
    damaged = tmp_path / "damaged"
    shutil.copytree(other, damaged)
    save_file({k: v[:1] if k == "conv_out.bias" else v for k, v in tiny.items()}, damaged / UNET)
    calls = [
        (lambda: engine.set_lora(wrong), r"must fit this model, got \[64, 4\] x \[4, 9\]"),
        (lambda: engine.set_lora([(loras[0], 1.0), (loras[2], 1.0)]), "must hold finite weights, got NaN or infinity"),
        (lambda: engine.set_lora(tmp_path / "none.safetensors"), "lora must be a .safetensors file, got nothing"),
        (lambda: engine.switch(damaged), r"1 of another shape|has the shape \[1\], not \[4\]"),
        (lambda: engine.switch("no-such-model"), "must be a preset name"),
    ]
    if backend == "ref":
        calls.append((lambda: engine.switch(smaller), "the loaded unet's norm_eps, 1e-05, got 0.001"))
    for call, words in calls:
        with pytest.raises(InputError, match=words):
            call()
        assert torch.equal(draw(engine), before) and engine.source == source
        assert same(weights(engine), held)
    engine.set_lora()
    assert torch.equal(draw(engine), draw(load(folder, "cpu", backend=backend)))


def test_a_file_that_changed_since_it_was_loaded_is_no_base(folder, loras, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    engine = load(copy, "cpu", torch.float16, backend="ref")
    save_file(nudged(load_file(copy / UNET), 3), copy / UNET)
    with pytest.raises(InputError, match="must be what was loaded, got a file that changed since"):
        engine.set_lora(loras[0])


@pytest.mark.parametrize("backend", backends("ref", "plan"))
def test_a_stream_ends_with_its_weights(folder, other, loras, backend):
    engine = load(folder, "cpu", backend=backend)
    for change in (lambda: engine.set_lora(loras[1]), lambda: engine.switch(other)):
        stream = engine.stream(PROMPTS[0])
        next(stream)
        change()
        with pytest.raises(InputError, match="stream: model must be the one it began with, got .*, switched to since"):
            next(stream)
        assert len(list(engine.stream(PROMPTS[0]))) == 4


def replace_unet(copy):
    save_file(nudged(load_file(copy / UNET), 3), copy / "new.safetensors")
    os.replace(copy / "new.safetensors", copy / UNET)


@pytest.mark.parametrize("backend", backends("ref", "plan"))
def test_files_that_were_replaced_are_not_read_as_the_loaded_model(folder, loras, tmp_path, backend):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    engine, asked = load(copy, "cpu", backend=backend), load(copy, "cpu", backend=backend)
    before, digest = draw(engine), asked.unet_digest
    replace_unet(copy)
    words = "must be what was loaded, got a file that changed since"
    assert torch.equal(draw(engine), before)
    for call in (lambda: engine.unet_digest, lambda: engine.settings(PROMPTS[0]), lambda: engine.set_lora(loras[0])):
        with pytest.raises(InputError, match=words):
            call()
    assert asked.unet_digest == digest  # it was read in time
    if backend == "plan":
        with pytest.raises(InputError, match=words):
            engine.generate(PROMPTS[0], height=40)
        with pytest.raises(InputError, match=words):
            _ = engine.model
    assert torch.equal(draw(engine), before)
    shutil.rmtree(copy)
    with pytest.raises(InputError, match="must be what was loaded, got nothing"):
        engine.settings(PROMPTS[0])


def test_a_lora_leaves_the_model_the_files_it_was_loaded_from(folder, loras, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    engine = load(copy, "cpu", backend="ref")
    engine.set_lora(loras[0])  # from here on its files stay mapped
    replace_unet(copy)
    engine.set_lora()
    with pytest.raises(InputError, match="got a file that changed since"):
        _ = engine.unet_digest

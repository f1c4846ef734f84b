"""Graphs draw what the modules draw. Without a GPU a stand-in records the function and runs it again."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nitrokernels
from nitrofusion.engine import Engine, load, pipeline
from nitrofusion.engine import graphs as graphs_module
from nitrofusion.engine.graphs import Graphs, Replays
from nitrofusion.engine.modules import Modules
from nitrofusion.errors import InputError
from nitrofusion.models import sdxl

from .tiny import PROMPTS, student_folder, tiny_folder


class Recorded:
    """What a CUDA graph does to its caller's eyes: fixed buffers in, the same fixed buffers out at every replay."""

    captured: list = []

    def __init__(self, function, inputs, pool):
        self.function, self.inputs = function, tuple(x.clone() for x in inputs)
        self.outputs = tuple(x.clone() for x in function(*self.inputs))
        for x in (*self.inputs, *self.outputs):  # captured, not computed
            x.fill_(float("nan") if x.is_floating_point() else 0)
        self.captured.append(self)
        self.replays = 0

    def replay(self):
        self.replays += 1
        with torch.inference_mode():
            for out, new in zip(self.outputs, self.function(*self.inputs), strict=True):
                out.copy_(new)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return student_folder(tiny_folder(root / "teacher", loud=True), root / "student")


@pytest.fixture(scope="module")
def plain(folder):
    engine = load(folder, "cpu", backend="ref")
    for module in (engine.model.unet, engine.model.vae):  # as graphs have them, so that pictures are equal to the bit
        module.to(memory_format=torch.channels_last)
    return engine


@pytest.fixture
def graphs(folder, plain):
    """An engine whose graphs are recorded; ``graphs.captured`` are all so far."""
    Recorded.captured = []
    engine = Engine(plain.source, Graphs(plain.source.read("cpu", torch.float32), Recorded), "ref")
    engine.captured = Recorded.captured
    return engine


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_pipeline_as_one_function_draws_what_the_engine_draws(plain, steps):
    wanted = plain.generate(PROMPTS, steps, seed=5, output_type="pt")
    executor, generators = plain.executor, [torch.Generator().manual_seed(s) for s in (5, 6, 7)]
    noises = torch.stack([
        torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in generators]) for _ in range(steps)
    ])  # fmt: skip
    ids = sdxl.tokenize(executor.model, PROMPTS)
    timesteps = {1: (999,), 2: (999, 499), 3: (999, 749, 499), 4: (999, 749, 499, 249)}[steps]
    with torch.inference_mode(), nitrokernels.use("ref"):
        drawn = pipeline.draw(executor, timesteps, 500, noises, executor.model.time_ids(3), ids)
        again = pipeline.draw(
            executor, timesteps, 500, noises, executor.model.time_ids(3), drawn.prompt_embeds,
            drawn.pooled_prompt_embeds,
        )  # fmt: skip
    assert torch.equal(drawn.pixels, wanted) and torch.equal(again.pixels, wanted) and drawn.finite
    pictures = plain.generate(PROMPTS, steps, seed=5)
    assert drawn.rgb.dtype == torch.uint8
    assert np.array_equal(drawn.rgb.numpy(), np.stack([np.asarray(p) for p in pictures]))
    assert wanted.std() > 0.01 and (wanted[0] - wanted[1]).abs().max() > 0.01


class OnDevice(TorchDispatchMode):
    """Counts operators, and notes those that read or make a tensor on the host."""

    def __init__(self):
        super().__init__()
        self.count, self.touched = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        if any(isinstance(t, torch.Tensor) and t.device.type == "cpu" for t in tree_leaves((args, kwargs, out))):
            self.touched.append(str(func))
        return out


def test_the_pipeline_waits_for_no_device(folder, monkeypatch):
    """On meta tensors, which have no values to read: a capture allows neither a read nor a copy from the host."""
    model = load(folder, "cpu", torch.bfloat16, backend="ref").model
    for part in model.parts.values():
        torch.nn.Module.to(part, "meta")
    model.alphas_cumprod = model.alphas_cumprod.to("meta")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers looks
    ids, time_ids = sdxl.tokenize(model, PROMPTS).to("meta"), torch.empty(3, 6, device="meta")
    with nitrokernels.use("ref"), OnDevice() as seen:
        noises = torch.empty(3, 3, 4, 16, 16, device="meta")
        drawn = pipeline.draw(Modules(model), (999, 749, 499), 500, noises, time_ids, ids)
    assert drawn.rgb.shape == (3, 32, 32, 3) and seen.count > 1000 and seen.touched == []


def test_one_graph_for_prompts_and_one_for_embeddings(graphs, plain):
    first = graphs.generate(PROMPTS[0], 2, seed=1)[0]
    assert len(graphs.captured) == 1, "everything is in one graph"
    bytes_of_first = first.tobytes()
    second = graphs.generate(PROMPTS[0], 2, seed=2)[0]  # the same prompt: its embeddings are known
    assert len(graphs.captured) == 2 and len(graphs.captured[1].inputs) == 4
    other = graphs.generate(PROMPTS[1], 2, seed=2, output_type="pt")  # a new one: the first graph again
    third = graphs.generate(PROMPTS[1], 2, seed=3)[0]
    assert [g.replays for g in graphs.captured] == [2, 2]
    kept = other.clone()
    graphs.generate(PROMPTS[2], 2, seed=9)
    assert first.tobytes() == bytes_of_first and torch.equal(other, kept), "nothing is written over"
    for picture, prompt, seed in ((first, 0, 1), (second, 0, 2), (third, 1, 3)):
        assert picture.tobytes() == plain.generate(PROMPTS[prompt], 2, seed=seed)[0].tobytes()
    assert torch.equal(other, plain.generate(PROMPTS[1], 2, seed=2, output_type="pt"))


def test_another_size_batch_or_number_of_steps_is_captured_apart(graphs, plain):
    calls = [
        (PROMPTS[:2], {}), (PROMPTS[:2], {"height": 48, "width": 24}), (PROMPTS, {}),
        (PROMPTS[:2], {"num_inference_steps": 3}), (PROMPTS[:2], {"num_images_per_prompt": 2, "batch_size": 3}),
    ]  # fmt: skip
    for i, (prompts, options) in enumerate(calls):
        graphs._prompts.clear()
        ours, wanted = (e.generate(prompts, seed=i, output_type="np", **options) for e in (graphs, plain))
        assert np.array_equal(ours, wanted)
    # the last call draws three pictures with new prompts, for which there is a graph, then one of a known prompt
    assert len(graphs.captured) == 5 and all(g.replays == 1 for g in graphs.captured[:2])


def test_what_has_no_graph_of_its_own_still_draws(graphs, plain):
    image = plain.generate(PROMPTS[0], seed=8)[0]
    negatives = [{"negative_prompt": "a ring"}, {"negative_prompt": [None, "a ring"]}]
    for options in (*negatives, {"image": image}, {"output_type": "latent"}):
        options = {"output_type": "pt"} | options
        ours, wanted = (e.generate(PROMPTS[:2], 2, seed=4, **options) for e in (graphs, plain))
        assert torch.equal(ours, wanted)
    ours, wanted = (list(e.stream(PROMPTS[0], 3, seed=4, output_type="pt")) for e in (graphs, plain))
    assert all(torch.equal(a.image, b.image) for a, b in zip(ours, wanted, strict=True))
    assert not any(len(g.outputs) > 1 for g in graphs.captured), "none of them was the whole picture"


def test_a_capture_that_fails_leaves_nothing(graphs, plain, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(graphs_module.pipeline, "draw", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            graphs.generate(PROMPTS[0], seed=1)
    assert not len(graphs.executor._replays) and not graphs._prompts
    assert graphs.generate(PROMPTS[0], seed=1)[0].tobytes() == plain.generate(PROMPTS[0], seed=1)[0].tobytes()


@pytest.mark.parametrize("error, pools", [(RuntimeError("CUDA error: capture invalidated"), [0, 1]),
                                          (torch.OutOfMemoryError("CUDA out of memory"), [0, 0])])  # fmt: skip
def test_the_pool_of_an_invalid_capture_is_not_used_again(error, pools):
    seen, numbers, errors = [], iter(range(9)), [error]

    def capture(function, inputs, pool):
        seen.append(pool)
        if errors:
            raise errors.pop()
        return Recorded(function, inputs, pool)

    replays = Replays(capture, lambda: next(numbers))
    with pytest.raises(type(error)):
        replays("a", lambda x: (x + 1,), torch.ones(2))
    for _ in range(2):
        assert torch.equal(replays("a", lambda x: (x + 1,), torch.ones(2))[0], torch.full((2,), 2.0))
    assert seen == pools


def test_nan_is_an_error_here_too(graphs):
    with torch.no_grad():
        graphs.model.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="pixels must be finite"):
        graphs.generate(PROMPTS[0])


def test_the_graph_used_longest_ago_goes_first(monkeypatch):
    monkeypatch.setattr(graphs_module, "_GRAPHS", 2)
    monkeypatch.setattr(Recorded, "captured", [])
    replays = Replays(Recorded)
    for key in ("a", "b", "a", "c", "a", "b"):
        (out,) = replays(key, lambda x: (x + 1,), torch.ones(2))
        assert torch.equal(out, torch.full((2,), 2.0))
    assert len(Recorded.captured) == 4 and len(replays) == 2  # b was dropped for c, c for b


def test_only_on_cuda(folder):
    with pytest.raises(InputError, match="backend graph must be on CUDA, got cpu"):
        load(folder, "cpu", backend="graph")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures(folder, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # kernels of two memory layouts would differ by it
    graphs, modules = (load(folder, "cuda", dtype, backend=name) for name in ("graph", "auto"))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for options in ({}, {"num_inference_steps": 3}, {"height": 48, "width": 24}, {"negative_prompt": "a ring"}, {}):
        ours, wanted = (e.generate(PROMPTS[:2], seed=3, output_type="pt", **options) for e in (graphs, modules))
        torch.testing.assert_close(ours, wanted, **close)
    first = graphs.generate(PROMPTS[0], seed=1)[0].tobytes()
    graphs.generate(PROMPTS[2], seed=2)
    assert graphs.generate(PROMPTS[0], seed=1)[0].tobytes() == first

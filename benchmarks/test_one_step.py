"""One picture of a new prompt, and one step of a 33 M UNet; ``benchmarks.one_step`` times the same in turns."""

import itertools

import pytest
import torch

from .one_step import prompts
from .peers import SHAPES, Skip, build


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    from nitrofusion.engine.export import export

    root = tmp_path_factory.mktemp("one_step")
    export("world", root / "model")
    return root


@pytest.mark.benchmark(group="one step")
@pytest.mark.parametrize(  # SDXL's compilations take minutes each: `make gpu` times them by benchmarks.one_step
    "shape, variant", [(shape, name) for shape in ("world", "sdxl30m") for name in SHAPES[shape]]
)
def test_one_step(benchmark, folder, shape, variant):
    benchmark.group = f"one step {shape}"
    try:
        model = build(shape, variant, folder, torch.get_num_threads())
    except Skip as reason:
        pytest.skip(str(reason))
    texts, seeds = prompts(16), itertools.count()
    if shape == "sdxl30m":
        for text in texts:
            model.text(text)

    def run():
        seed = next(seeds)
        model.draw(texts[seed % len(texts)], seed)

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)

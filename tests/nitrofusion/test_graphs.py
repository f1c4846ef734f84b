"""CUDA graphs draw what the modules draw."""

import pytest
import torch

from nitrofusion.engine import load

from .tiny import PROMPTS, student_folder, tiny_folder


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures(tmp_path, dtype):
    folder = student_folder(tiny_folder(tmp_path / "teacher"), tmp_path / "student")
    graphs, modules = (load(folder, "cuda", dtype, backend=name) for name in ("graph", "auto"))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for options in ({}, {"num_inference_steps": 3}, {"height": 48, "width": 24}, {"negative_prompt": "a ring"}, {}):
        ours, wanted = (e.generate(PROMPTS[:2], seed=3, output_type="pt", **options) for e in (graphs, modules))
        torch.testing.assert_close(ours, wanted, **close)
    first = graphs.generate(PROMPTS[0], seed=1, output_type="pt")
    assert torch.equal(graphs.generate(PROMPTS[0], seed=1, output_type="pt"), first)

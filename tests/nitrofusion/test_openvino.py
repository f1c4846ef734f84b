"""The OpenVINO backend draws what eager PyTorch draws."""

import pytest
import torch

from nitrofusion.engine import load
from nitrofusion.engine.openvino import OpenVINO
from nitrofusion.errors import InputError

from .tiny import PROMPTS, student_folder, tiny_folder

pytest.importorskip("openvino", reason="needs the extra [openvino]")


def test_pictures(tmp_path):
    folder = student_folder(tiny_folder(tmp_path / "teacher"), tmp_path / "student")
    engine, reference = (load(folder, "cpu", backend=name) for name in ("openvino", "ref"))
    for options in ({}, {"num_inference_steps": 2}, {"height": 24, "width": 40}, {"negative_prompt": "a ring"}):
        ours, wanted = (e.generate(PROMPTS[:2], seed=3, output_type="pt", **options) for e in (engine, reference))
        assert wanted.std() > 0.01
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="openvino must be on the CPU in float32"):
        load(folder, "cpu", torch.bfloat16, "openvino")


def test_graphs_of_many_sizes_do_not_pile_up(tmp_path, monkeypatch):
    class Graph:
        def __init__(self, function, module, example):
            self.function = function
            converted.append(example[0].shape)

        def infer(self, inputs, share_inputs):
            return [self.function(*map(torch.from_numpy, inputs)).numpy()]

    converted = []
    engine = load(student_folder(tiny_folder(tmp_path / "teacher"), tmp_path / "student"), "cpu", backend="openvino")
    monkeypatch.setattr(OpenVINO, "_convert", Graph)
    for other in range(6):
        for side in (16, 20 + 4 * other):
            engine.generate(PROMPTS[0], height=side, width=16)
    assert len(engine.executor._graphs) == 8 and len(converted) == 2 * 7

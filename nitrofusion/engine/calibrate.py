"""Measures the activations that fp8's scales are made of: a few pictures, drawn with every number of steps."""

from __future__ import annotations

from pathlib import Path

import torch

from ..device import pick_device
from ..errors import InputError
from ..models import fp8
from ..options import check_output
from .source import find

# What the embedded world draws, and what people ask SDXL for: a largest value is not spoilt by the other's prompts.
PROMPTS = (
    "a striped red circle left of a blue ring on an olive background",
    "a white cross on a navy background",
    "a green square above a yellow star on a pink background",
    "a blue ring on a gray background",
    "a photograph of a tabby cat asleep on a red velvet sofa, afternoon light",
    "portrait of an old fisherman, detailed skin, 85mm lens",
    "a wide mountain valley at sunrise, oil painting",
    "a neon sign that reads OPEN in a rainy street at night",
)


def calibrate(
    model: str | Path = "world",
    output: str | Path | None = None,
    prompts: list[str] | tuple[str, ...] = PROMPTS,
    seeds: int = 2,
    skip: tuple[str, ...] = (),
    device: str | torch.device | None = None,
) -> fp8.Calibration:
    """The largest inputs of a student's linear layers at each timestep it is told, for ``load(..., fp8=...)``.

    Args:
        model: as for ``load``, a student.
        output: JSON file to write.
        prompts: to draw, with ``seeds`` seeds each, in every number of steps the model takes.
        skip: pieces of names; layers whose name has one stay in the model's precision (``ff.net.2`` is the layer
            behind each gate).

    Raises:
        InputError: the model is no student, ``skip`` leaves no layer that fp8 is for, or ``output`` is a folder.
        StorageError: ``output`` cannot be written.
    """
    from . import load

    device = pick_device(device)
    prompts, skip = ([given] if isinstance(given, str) else list(given) for given in (prompts, skip))
    if not (source := find(model)).is_student:
        raise InputError(f"calibrate: model must be a student, whose timesteps are few, got {source.name}")
    if output is not None:
        check_output("calibrate", Path(output))
    engine = load(model, device, torch.bfloat16 if device.type == "cuda" else torch.float32, backend="ref")
    options = {"num_images_per_prompt": seeds, "output_type": "latent", "batch_size": 8}
    with fp8.Observer(engine.model.unet, tuple(skip)) as observer:
        for steps in source.steps:
            engine.generate(prompts, steps, **options)
    made = observer.calibration(len(source.steps) * len(prompts) * seeds)
    if output is not None:
        made.save(output)
    return made

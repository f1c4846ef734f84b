"""Drawing pictures: ``load`` a model, ``generate`` from prompts and seeds.

    >>> engine = load("world")
    >>> picture = engine.generate("a red circle on a navy background", seed=7)[0]
    >>> for drawn in engine.stream("a red circle on a navy background", seed=7):
    ...     print(drawn.num_inference_steps, drawn.latency)

A seed gives the same picture in plain diffusers, whatever else is in the batch.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..device import pick_device
from ..models import sdxl
from .arguments import check_call, check_sampling
from .engine import Engine, Refinement
from .source import find

__all__ = ["Engine", "Refinement", "check_call", "check_sampling", "load"]


def load(
    model: str | Path = "world", device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Engine:
    """Loads a model for drawing.

    Args:
        model: a preset's name (``presets.MODELS``), a StableDiffusionXLPipeline folder, or a training run's folder.
            A folder is a student if its scheduler's configuration has ``shifted_timestep``, else a multi-step teacher
            with the folder's own scheduler. A run draws with the averaged student of its newest checkpoint.
        device: None picks CUDA when there is one.
        dtype: None means float16 on CUDA, else float32.

    Raises:
        InputError: there is no such model, or it is not a complete SDXL pipeline in safetensors.
    """
    device = pick_device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    source = find(model)
    loaded = sdxl.load(source.folder, device, dtype, source.unet, fused=True)
    if dtype == torch.float16 and loaded.vae.config.force_upcast:
        loaded.vae.float()  # SDXL's own decoder overflows in float16
    return Engine(source, loaded)

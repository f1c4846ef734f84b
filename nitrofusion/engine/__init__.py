"""Drawing pictures: ``load`` a model, ``generate`` from prompts and seeds.

    >>> engine = load("world")
    >>> picture = engine.generate("a red circle on a navy background", seed=7)[0]
    >>> for drawn in engine.stream("a red circle on a navy background", seed=7):
    ...     print(drawn.num_inference_steps, drawn.latency)

A seed gives the same picture in plain diffusers, whatever else is in the batch.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

import nitrokernels

from ..device import pick_device
from ..errors import InputError
from ..schedule import origin_timesteps
from .arguments import check_call, check_sampling
from .engine import EXECUTORS, Engine, Refinement, ops
from .files import LoadedFiles
from .plans.executor import Plans, build
from .plans.weights import Unsupported
from .source import Loras, find

__all__ = ["BACKENDS", "Engine", "Refinement", "check_call", "check_sampling", "load"]

BACKENDS = ("auto", "plan", "graph", "openvino", "ref", "cpu", "triton", "cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
log = logging.getLogger(__name__)


@torch.inference_mode(False)  # of whoever calls: ``set_lora`` and ``switch`` could not write to weights made in it
def load(
    model: str | Path = "world",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    lora: Loras = None,
    vae: str | Path | None = None,
    allow_pickle: bool = False,
    lossless: bool = False,
    compile: bool = False,
    fp8: str | Path | None = None,
) -> Engine:
    """Loads a model for drawing.

    Args:
        model: a preset's name (``presets.MODELS``); a StableDiffusionXLPipeline folder, or its hub id; a training run's
            folder; a safetensors file, of a UNet alone or a checkpoint with text encoders and VAE, in diffusers' or
            LDM's (ComfyUI's) layout. A folder is a student if its scheduler's configuration has ``shifted_timestep``,
            else a multi-step teacher with the folder's own scheduler; a file is what its header or a published name
            says. A run draws with the averaged student of its newest checkpoint.
        device: None picks CUDA when there is one.
        dtype: None means float16 on CUDA (bfloat16 with fp8), else float32.
        backend: ``plan`` runs each network as one native call (CPU, float32); ``graph`` replays CUDA graphs;
            ``openvino`` (an extra) runs OpenVINO's; ``ref`` is eager PyTorch; the others are diffusers' modules with
            nitrokernels' ops, which never fall back. ``auto`` is plan where it may be, else modules with the fastest
            ops.
        lora: a file, or a list of (file, scale), merged into the weights.
        vae: another decoder: a name in ``published.VAES``, a folder, a file or a hub id.
        allow_pickle: reads a ``.bin`` file that you trust, tensors only.
        compile: torch.compile of UNet and decoder, at the first picture; modules without our ops then run.
        fp8: a student's calibration (``calibrate``). The linear layers of its UNet's transformer blocks then multiply
            8-bit numbers, on CUDA from compute capability 8.9 on, where it has not been run yet. ``ref`` emulates them
            on any device, slowly. LoRAs are added before weights are quantised; scales are those of the model alone.
        lossless: nothing that is not bit-equal to eager PyTorch in float32: the same as ``ref`` in float32.

    Raises:
        InputError: there is no such model, it is not a complete SDXL pipeline in safetensors, or the backend cannot
            draw with it.
    """
    device = pick_device(device)
    if lossless:
        if backend not in ("auto", "ref") or dtype not in (None, torch.float32):
            raise InputError(f"load: lossless must be alone or with ref and float32, got {backend} and {dtype}")
        backend, dtype = "ref", torch.float32
    check_backend(backend, device)
    if dtype is None:
        half = torch.float16 if fp8 is None else torch.bfloat16
        dtype = half if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise InputError(f"load: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if compile and backend not in ("auto", "ref"):
        raise InputError(f"load: compile must be alone or with ref, got backend {backend}")
    source = find(model, lora, vae, allow_pickle)
    if fp8 is not None:
        if not isinstance(fp8, (str, Path)):
            raise InputError(f"load: fp8 must be a file of calibrate, got {fp8!r}")
        return _load_fp8(source, device, dtype, backend, compile, Path(fp8))
    if backend == "plan" or (backend == "auto" and not compile):
        try:
            if device.type != "cpu" or dtype != torch.float32:
                raise Unsupported(f"plans are for the CPU in float32, not {device} in {dtype}")
            plans = build(Plans, source)
            return Engine(source, plans, backend, plans.files)
        except Unsupported as reason:
            if backend == "plan":
                raise InputError(f"load: backend must be one that covers {source.name}, got plan: {reason}") from reason
            log.info("load: %s without plans: %s", source.name, reason)
    files = LoadedFiles(source)
    with ops(backend):
        model = source.read(device, dtype, fused=not compile and backend not in ("ref", "openvino"))
    return Engine(source, _executor(model, backend, compile), backend, files)


def _executor(model, backend: str, compile: bool):
    # diffusers and transformers take seconds to import, and plans need neither
    if backend == "graph":
        from .graphs import Graphs as Executor
    elif backend == "openvino":
        from .openvino import OpenVINO as Executor
    else:
        from .modules import Modules as Executor

    if model.device.type == "cuda" and backend != "ref":  # as its convolutions compute; ref is to the bit what eager is
        for module in (model.unet, model.vae):
            module.to(memory_format=torch.channels_last)
    with ops(backend):
        executor = Executor(model)
    if compile:
        model.unet.compile()
        model.vae.decoder.compile()
    return executor


def _load_fp8(source, device, dtype, backend: str, compile: bool, file: Path) -> Engine:
    from ..models import fp8

    emulated = backend == "ref"
    if backend in ("plan", "openvino", "cpu"):
        raise InputError(f"load: fp8 must be with auto, graph, ref or an op backend of CUDA, got {backend}")
    if not emulated and (reason := fp8.missing(device)) is not None:
        raise InputError(f"load: fp8 must be where PyTorch multiplies it, or emulated by backend ref: {reason}")
    if dtype not in (torch.bfloat16, *[torch.float32] * emulated):
        raise InputError(f"load: fp8 must be beside bfloat16{' or float32' * emulated}, got {dtype}")
    if not source.is_student:
        raise InputError(f"load: fp8 must be of a student, whose timesteps are few, got {source.name}")
    calibration, plain = fp8.Calibration.load(file), source.with_lora(None)
    told = {t * source.shifted_timestep // 1000 for steps in source.steps for t in origin_timesteps(steps)}
    if not told <= set(calibration.timesteps):
        wanted, got = sorted(told, reverse=True), list(calibration.timesteps)
        raise InputError(f"load: fp8 must be calibrated at the timesteps {source.name} is told, {wanted}, got {got}")
    files = LoadedFiles(plain)
    with ops(backend):
        model = plain.read(device, dtype, fused=not compile and not emulated)
    scales = fp8.quantize_(model.unet, calibration, emulated, file)
    engine = Engine(plain, _executor(model, backend, compile), backend, files)
    engine.executor.fp8 = scales
    engine.set_lora(source.loras[source.preset_loras :])
    return engine


def check_backend(backend: str, device: torch.device) -> None:
    """Raises InputError unless ``backend`` works on ``device``."""
    if backend not in BACKENDS:
        raise InputError(f"load: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in (*EXECUTORS, "ref"):
        try:
            with nitrokernels.use(backend):
                nitrokernels.fusible(device)
        except RuntimeError as error:
            raise InputError(f"load: backend must be one that works on {device}, got {backend}: {error}") from error

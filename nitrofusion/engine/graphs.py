"""CUDA graphs: no launch overhead, static buffers, one capture for each shape.

A student's pictures without an image or a negative prompt are one graph from token ids (or, for a prompt seen before,
from its embeddings) to uint8: ``pipeline.draw``. Everything else, image-to-image, negative prompts, ``stream``,
teachers and latents, replays the UNet and the decoder as graphs of their own; negative prompts that act in attention
run their UNet call without one.

Weights are read where they lie, so ``Engine.set_lora`` and ``Engine.switch`` need no new capture. None of this has run
on a GPU yet, and it is therefore used only when named.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import InputError, out_of_memory
from ..models import sdxl
from ..models.conditioning import Conditioning
from . import pipeline
from .modules import Modules

_WARM_UPS = 3  # before a capture: workspaces are allocated, kernels compiled and chosen
_GRAPHS = 16  # kept; the one used longest ago goes first


class Pool(NamedTuple):
    """What graphs that share memory are captured with: the allocator shares it between captures on one stream only.

    A stream of the engine's own, as torch's default one stays on the device of the first capture in the process.
    """

    handle: tuple[int, int]
    stream: torch.cuda.Stream


class CudaGraph:
    """One captured call of ``function`` on buffers of its own.

    Attributes:
        inputs: written before ``replay``.
        outputs: a tuple of what the function returned; valid until any graph of the same ``pool`` is replayed.
    """

    def __init__(self, function: Callable, inputs: tuple[torch.Tensor, ...], pool: Pool):
        handle, side = pool
        # What capturing makes must not become inference tensors, which others may not write to later.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(side.device):
            # The outermost puts the current stream back: after an invalid capture torch leaves it at ``side``.
            with torch.cuda.stream(torch.cuda.current_stream()):
                self.inputs = tuple(x.clone() for x in inputs)
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UPS):
                        function(*self.inputs)
                torch.cuda.current_stream().wait_stream(side)
                self._graph = torch.cuda.CUDAGraph()
                # relaxed: other threads may do what they like, and kernels that no warm-up met may be loaded. There are
                # such: transformers hands attention a mask in a capture, and before it none (5.17; 5.23 no more).
                with torch.cuda.graph(self._graph, handle, side, capture_error_mode="relaxed"):
                    self.outputs = tuple(function(*self.inputs))

    def replay(self) -> None:
        self._graph.replay()


class Replays:
    """Functions of tensors, captured at the first call of each key and shapes and replayed from then on.

    A capture that raises leaves nothing behind. All share one memory pool: one runs at a time, and what it returned is
    copied before the next.

    Args:
        new_pool: makes what is handed to every ``capture``.
    """

    def __init__(self, capture: Callable, new_pool: Callable = lambda: None):
        self._capture, self._new_pool, self._pool = capture, new_pool, new_pool()
        self._made: OrderedDict[tuple, CudaGraph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._made)

    def __call__(self, key, function: Callable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What ``function(*inputs)`` returns, a tuple of tensors, in memory of its own.

        Args:
            key: of whatever the function depends on besides its inputs.
        """
        key = (key, *((x.shape, x.dtype) for x in inputs))
        if key not in self._made:
            made = self._captured(function, inputs)
            if len(self._made) == _GRAPHS:
                self._made.popitem(last=False)
            self._made[key] = made
        self._made.move_to_end(key)
        graph = self._made[key]
        for buffer, x in zip(graph.inputs, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        graph.replay()
        return tuple(out.clone() for out in graph.outputs)

    def _captured(self, function: Callable, inputs: tuple[torch.Tensor, ...]):
        try:
            return self._capture(function, inputs, self._pool)
        except BaseException as error:
            if not out_of_memory(error):  # the allocator takes an invalid capture for one that still goes on
                self._pool = self._new_pool()
            raise


class Graphs(Modules):
    """``Modules`` whose calls are replayed.

    Args:
        capture: what stands in for ``CudaGraph``, in tests.
    """

    def __init__(self, model, capture: Callable | None = None):
        super().__init__(model)
        if capture is None and self.device.type != "cuda":
            raise InputError(f"load: backend graph must be on CUDA, got {self.device}")
        for module in (model.unet, model.vae):
            module.to(memory_format=torch.channels_last)
        if capture is None:
            self._replays = Replays(CudaGraph, self._new_pool)
        else:
            self._replays = Replays(capture)

    def _new_pool(self) -> Pool:
        return Pool(torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device))

    def tokenize(self, prompts: list[str]) -> torch.Tensor:
        """[2, B, tokens] int64 on the model's device."""
        return sdxl.tokenize(self.model, prompts).to(self.device)

    def picture(self, timesteps: tuple[int, ...], shifted_timestep: int, *inputs: torch.Tensor) -> pipeline.Drawn:
        """``pipeline.draw`` as one graph; ``inputs`` are its noises, time_ids and text."""

        def drawn(*inputs):
            return pipeline.draw(self, timesteps, shifted_timestep, *inputs)

        return pipeline.Drawn(*self._replays((timesteps, shifted_timestep), drawn, *inputs))

    def denoise(self, x_t, t, cond: Conditioning, negative) -> torch.Tensor:
        if negative is not None:
            return super().denoise(x_t, t, cond, negative)

        def eps(x_t, t, embeds, pooled, time_ids):
            return (Modules.denoise(self, x_t, t, Conditioning(embeds, pooled, time_ids), None),)

        parts = (x_t, t, cond.prompt_embeds, cond.pooled_prompt_embeds, cond.time_ids)
        return self._replays("denoise", eps, *parts)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._replays("decode", lambda x0: (Modules.decode(self, x0),), latents)[0]

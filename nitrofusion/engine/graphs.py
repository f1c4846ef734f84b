"""UNet and decoder as CUDA graphs: no launch overhead, static buffers, one capture for each shape.

Weights are read where they lie, so a LoRA or another model copied into the same tensors needs no new capture. It has
not run on a GPU yet, and is therefore used only when named.
"""

from __future__ import annotations

import torch

from ..errors import InputError
from ..models.conditioning import Conditioning
from .modules import Modules

_WARM_UPS = 3  # before a capture: workspaces are allocated, kernels compiled and chosen


class Graphs(Modules):
    """``Modules`` whose UNet and decoder are replayed. Negative prompts in attention run without a graph."""

    def __init__(self, model):
        super().__init__(model)
        if self.device.type != "cuda":
            raise InputError(f"load: backend graph must be on CUDA, got {self.device}")
        for module in (model.unet, model.vae):
            module.to(memory_format=torch.channels_last)
        self._captured: dict[tuple, tuple] = {}

    def denoise(self, x_t, t, cond: Conditioning, negative) -> torch.Tensor:
        if negative is not None:
            return super().denoise(x_t, t, cond, negative)

        def eps(x_t, t, embeds, pooled, time_ids):
            return Modules.denoise(self, x_t, t, Conditioning(embeds, pooled, time_ids), None)

        return self._replay(eps, x_t, t, cond.prompt_embeds, cond.pooled_prompt_embeds, cond.time_ids)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._replay(super().decode, latents)

    def _replay(self, function, *inputs: torch.Tensor) -> torch.Tensor:
        key = (function.__name__, *((x.shape, x.dtype) for x in inputs))
        if key not in self._captured:
            self._captured[key] = self._capture(function, inputs)
        graph, buffers, out = self._captured[key]
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x)
        graph.replay()
        return out.clone()  # the next replay writes over it

    def _capture(self, function, inputs) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]:
        with torch.cuda.device(self.device):
            buffers, side = [x.clone() for x in inputs], torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    function(*buffers)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = function(*buffers)
        return graph, buffers, out

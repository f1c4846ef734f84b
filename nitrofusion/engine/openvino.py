"""UNet and decoder as static OpenVINO graphs (extra ``[openvino]``): the CPU in float32, one image at a time.

Graphs are made from the modules at the first picture of each size, which takes seconds; plans (``engine.plans``) need
neither that nor the package, and are faster wherever both were measured (``benchmarks.one_step``).
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from ..errors import InputError
from ..models.conditioning import Conditioning
from .modules import Modules

_GRAPHS = 8  # kept, of UNet and decoder at four sizes; each holds its weights, the one used longest ago goes first


class OpenVINO(Modules):
    """``Modules`` whose UNet and decoder run in OpenVINO. Negative prompts in attention run on the modules."""

    def __init__(self, model):
        super().__init__(model)
        try:
            import openvino
        except ImportError as error:
            text = "load: openvino must be installed (pip install nitrofusion[openvino])"
            raise InputError(f"{text}, got {error}") from error
        if self.device.type != "cpu" or self.dtype != torch.float32:
            raise InputError(f"load: openvino must be on the CPU in float32, got {self.device} in {self.dtype}")
        self._openvino, self._graphs = openvino, OrderedDict()

    def become(self, source, now) -> tuple[int, int]:
        self._graphs.clear()  # they hold the weights; the next picture converts them anew
        return super().become(source, now)

    def denoise(self, x_t, t, cond: Conditioning, negative) -> torch.Tensor:
        if negative is not None:
            return super().denoise(x_t, t, cond, negative)

        def eps(x_t, t, embeds, pooled, time_ids):
            added = {"text_embeds": pooled, "time_ids": time_ids}
            return self.model.unet(x_t, t, embeds, added_cond_kwargs=added, return_dict=False)[0]

        parts = (x_t, t.float(), cond.prompt_embeds, cond.pooled_prompt_embeds, cond.time_ids)
        return self._each(eps, self.model.unet, *parts)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        def picture(latents):
            return self.model.vae.decode(latents / self.scaling_factor, return_dict=False)[0]

        return self._each(picture, self.model.vae, latents).clamp(-1, 1)

    def _each(self, function, module: torch.nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        """``function`` of one row of ``batch`` after another, by the graph for rows of their shapes."""
        key = (module, *(x.shape[1:] for x in batch))
        if key not in self._graphs:
            made = self._convert(function, module, [x[:1] for x in batch])
            if len(self._graphs) == _GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = made
        self._graphs.move_to_end(key)
        graph, out = self._graphs[key], []
        for i in range(len(batch[0])):
            result = graph.infer([x[i : i + 1].contiguous().numpy() for x in batch], share_inputs=True)
            out.append(torch.from_numpy(result[0].copy()))
        return torch.cat(out)

    def _convert(self, function, module: torch.nn.Module, example: list[torch.Tensor]):
        class Called(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = module

            def forward(self, *args):
                return function(*args)

        with torch.inference_mode(False), torch.no_grad():
            example = tuple(x.clone() for x in example)
            shapes = [list(x.shape) for x in example]
            graph = self._openvino.convert_model(Called().eval(), example_input=example, input=shapes)
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        return self._openvino.Core().compile_model(graph, "CPU", options).create_infer_request()

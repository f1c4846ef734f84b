"""Other weights in the tensors of a loaded model: a LoRA, or another model of the same form.

Graphs and compiled code know a weight by its address, which stays what it was, so nothing is captured anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import InputError
from ..models import lora, sdxl
from ..models.folder import PARTS
from ..models.fp8 import Fp8Linear
from ..models.stored import Stored
from ..models.weights import is_finite, origin_of
from .source import Source

_FREE = ("sample_size", "dtype", "torch_dtype", "transformers_version", "architectures")  # no part of a model's form
_PLANNED = 16  # LoRAs whose files stay open


class Bank:
    """The weights of a loaded model, exchanged in place.

    Its files stay mapped: they are what a LoRA is added to, and what is there again without it. On CUDA what a LoRA
    changed once stays in pinned memory.

    Args:
        source: of what the modules hold now.
    """

    def __init__(self, model: sdxl.SDXL, source: Source):
        self._model, self._source, self._held = model, source, source.open()
        self._merges: OrderedDict[tuple, lora.Merge] = OrderedDict()
        for part in PARTS:
            if self._held.files[part].origin != model.origins[part]:
                raise InputError(
                    f"switch: {self._held.where[part]} must be what was loaded, got a file that changed since"
                )

    def become(self, source: Source) -> tuple[int, int]:
        """Writes the weights of ``source`` over those that differ: (how many did, of how many).

        Raises:
            InputError: it is not as a loaded model must be, or of another form; nothing is changed then.
        """
        wanted, model = self._open(source), self._model
        places, begun = list(self._differing(wanted)), []
        try:
            for place in places:
                begun.append(place)
                self._write(wanted, *place)
        except BaseException:
            for place in begun:
                self._write(self._held, *place)
            raise
        model.alphas_cumprod.copy_(wanted.alphas_cumprod)
        model.unet.register_to_config(sample_size=wanted.modules["unet"].config.sample_size)
        model.folder, model.tokenizers, model.loras = wanted.folder, wanted.tokenizers, wanted.loras
        for file in wanted.files.values():
            file.release()
        self._held, self._source = wanted, source
        return len(places), sum(len(tensors) for tensors in wanted.tensors.values())

    def _open(self, source: Source) -> Stored:
        """What is wanted: other LoRAs on the files that are open, or other files; no weight is read."""
        if replace(source, loras=()) == replace(self._source, loras=()):
            return replace(self._held, merges=[self._merge(*pair) for pair in source.loras])
        wanted = source.open()
        for part, module in self._model.parts.items():
            _check_form(source.name, part, module, wanted.modules[part])
        return wanted

    def _merge(self, file: Path, scale: float) -> lora.Merge:
        key = origin_of(file), scale
        if key not in self._merges:
            self._merges[key] = lora.plan(file, scale, self._held.modules)
            if len(self._merges) > _PLANNED:
                self._merges.popitem(last=False)
        return self._merges[key]

    def _differing(self, wanted: Stored) -> Iterator[tuple[str, str]]:
        for part in PARTS:
            for name in wanted.tensors[part]:
                if wanted.origin(part, name) != self._held.origin(part, name):
                    yield part, name

    @torch.no_grad()
    def _write(self, stored: Stored, part: str, name: str) -> None:
        owner, _, leaf = name.rpartition(".")
        owner = self._model.parts[part].get_submodule(owner)
        target, quantised = getattr(owner, leaf), leaf == "weight" and isinstance(owner, Fp8Linear)
        if target.is_cuda and stored.files is self._held.files and not stored.tensors[part][name].is_pinned():
            stored.tensors[part][name] = stored.tensors[part][name].pin_memory()
        tensor = stored.tensor(part, name, target.device).to(owner.precision if quantised else target.dtype)
        if not is_finite(tensor):
            raise InputError(f"switch: {stored.where[part]} must hold finite weights, got NaN or infinity in {name}")
        owner.write_weight_(tensor) if quantised else target.copy_(tensor)


def _check_form(name: str, part: str, ours: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, other = _form(ours), _form(other)
    wrong = sorted(key for key in ours.keys() | other.keys() if ours.get(key) != other.get(key))
    if wrong:
        key = wrong[0]
        raise InputError(
            f"switch: {name} must have the loaded {part}'s {key}, {ours.get(key)!r}, got {other.get(key)!r} (load it)"
        )


def _form(module: torch.nn.Module) -> dict:
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _FREE}
    return {"class": type(module).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}

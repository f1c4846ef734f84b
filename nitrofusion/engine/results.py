"""What an engine returns besides pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Refinement:
    """One picture of ``Engine.stream``.

    Attributes:
        image: as ``output_type`` says, without a batch axis.
        num_inference_steps: it is what ``generate`` draws in so many steps.
        latency: seconds of work from the call to this picture; what its consumer did in between does not count.
    """

    image: Image.Image | np.ndarray | torch.Tensor
    num_inference_steps: int
    latency: float


@dataclass(frozen=True)
class Switched:
    """What ``Engine.set_lora`` or ``Engine.switch`` did; as text, one line.

    Attributes:
        name: of the model that draws now.
        written, total: weights that were exchanged, and that the model has; None where copies were made anew.
        seconds: of the whole call.
        loras: reports of what was applied of each file, those that ``load`` gives.
    """

    name: str
    written: int | None
    total: int | None
    seconds: float
    loras: tuple

    def __str__(self) -> str:
        what = "packed anew" if self.written is None else f"{self.written} of {self.total} weights written"
        return "; ".join([f"{self.name}: {what} in {self.seconds:.3f} s", *map(str, self.loras)])

"""What the server asks of its worker, and what comes back. Light: neither torch nor FastAPI is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

PNG, FAST = "png", "fast"  # a file with its settings, or whatever is quickest to show


@dataclass(frozen=True)
class Order:
    """One picture to draw; None is the model's own.

    Attributes:
        prompt, negative_prompt, num_inference_steps, seed, height, width, strength: as for ``Engine.generate``.
        image: bytes of a PNG, JPEG or WebP file to start from.
        format: PNG or FAST.
        stream: names a picture that is refined step by step, so that stages share their model calls; "" for others.
    """

    prompt: str
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    image: bytes | None = None
    strength: float | None = None
    format: str = FAST
    stream: str = ""

    @property
    def shape(self) -> tuple:
        """What orders must have in common to be drawn in one batch."""
        return (
            self.num_inference_steps, self.height, self.width, self.image is None, self.strength,
            self.negative_prompt is None, self.stream,
        )  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A picture as the bytes of a file.

    Attributes:
        seconds: the model's, for the batch this picture was in; encoding the file is not in it.
    """

    data: bytes
    media_type: str
    width: int
    height: int
    num_inference_steps: int
    seconds: float


class Refused(Exception):
    """The order itself is wrong; the message says what it must be."""


class Failed(Exception):
    """The order was fine and could not be drawn."""


Result = Drawn | Refused | Failed


@dataclass(frozen=True)
class Info:
    """What the worker draws with, and how the page is to show it.

    Attributes:
        model: name; ``notice`` is its licence and whether the file is the published one.
        steps: numbers of steps it may be drawn with, ascending; ``default_steps`` is one of them.
        height, width: in pixels, of a picture that names none; others are multiples of ``multiple``.
        batch: most orders in one call.
        examples: prompts to begin with.
    """

    model: str
    notice: str
    device: str
    version: str
    steps: tuple[int, ...]
    default_steps: int
    height: int
    width: int
    multiple: int
    batch: int
    examples: tuple[str, ...] = ()


class Drawer(Protocol):
    """What lives in the worker's process: the engine, or what stands in for it in a test."""

    info: Info

    def draw(self, orders: list[Order]) -> list[Result]:
        """One result for each order; they have one ``shape``."""

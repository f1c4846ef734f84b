"""Captioned scenes with exact ground truth: sampling, the caption grammar, and attributes.

Grammar (every sentence it makes, and nothing else, is a world caption)::

    caption    = object [relation object] "on a" background "background"     # "an" before a vowel
    object     = "a" [pattern] color shape            # a missing pattern means "plain"
    relation   = "left of" | "right of" | "above" | "below"

Scene ``i`` of seed ``s`` never depends on how many scenes are asked for or where a batch starts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
PATTERNS = ("plain", "striped")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("gray", "brown", "navy", "olive", "pink")
LAYOUTS = ("single", "horizontal", "vertical")

# Columns of the attribute table: what a judge can see, objects ordered left to right or top to bottom.
ATTRIBUTES = {
    "layout": len(LAYOUTS),
    "background": len(BACKGROUNDS),
    "shape_1": len(SHAPES),
    "color_1": len(COLORS),
    "pattern_1": len(PATTERNS),
    "shape_2": len(SHAPES),
    "color_2": len(COLORS),
    "pattern_2": len(PATTERNS),
}

WORDS = tuple(
    dict.fromkeys(
        " ".join(("a", "an", "on", "background", *SHAPES, *COLORS, *PATTERNS, *RELATIONS, *BACKGROUNDS)).split()
    )
)

_UNIFORMS = 24  # random numbers per scene; a multiple of 4, the words Philox makes per counter step


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; every field has the batch first.

    Attributes:
        relation: [n] int, -1 for one object, else an index into ``RELATIONS`` (object 0 relative to object 1).
        background: [n] int.
        shape, color, pattern: [n, 2] int; column 1 is ignored for one object.
        center: [n, 2, 2] float, (x, y) in units of the image side, y down.
        radius: [n, 2] float, in units of the image side.
        light: [n] float, direction the light comes from, radians.
        terse: [n] bool, whether the caption leaves out the word "plain".
    """

    relation: np.ndarray
    background: np.ndarray
    shape: np.ndarray
    color: np.ndarray
    pattern: np.ndarray
    center: np.ndarray
    radius: np.ndarray
    light: np.ndarray
    terse: np.ndarray

    def __len__(self) -> int:
        return len(self.relation)

    def __getitem__(self, index) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def cat(parts: Sequence[Scenes]) -> Scenes:
        return Scenes(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Scenes)})

    def captions(self) -> list[str]:
        """The caption of each scene, in the grammar above."""
        return [self._caption(i) for i in range(len(self))]

    def _caption(self, i: int) -> str:
        def thing(k: int) -> str:
            pattern = PATTERNS[self.pattern[i, k]]
            pattern = "" if pattern == "plain" and self.terse[i] else pattern + " "
            return f"a {pattern}{COLORS[self.color[i, k]]} {SHAPES[self.shape[i, k]]}"

        text = thing(0)
        if self.relation[i] >= 0:
            text += f" {RELATIONS[self.relation[i]]} {thing(1)}"
        background = BACKGROUNDS[self.background[i]]
        return f"{text} on {'an' if background[0] in 'aeiou' else 'a'} {background} background"

    def attributes(self) -> np.ndarray:
        """[n, 8] int, the columns of ``ATTRIBUTES``; -1 where the scene has no second object."""
        single = self.relation < 0
        layout = np.where(single, 0, np.where(self.relation < 2, 1, 2))
        # "right of" and "below" name the second object first.
        swap = ((self.relation == 1) | (self.relation == 3))[:, None]
        look = np.stack([self.shape, self.color, self.pattern], -1)  # [n, 2, 3]
        look = np.where(swap[..., None], look[:, ::-1], look)
        look[single, 1] = -1
        return np.concatenate([layout[:, None], self.background[:, None], look.reshape(-1, 6)], 1)


def sample_scenes(num: int, seed: int, start: int = 0) -> Scenes:
    """Scenes ``start .. start + num - 1`` of the endless list that ``seed`` names."""
    if num < 0 or start < 0:
        raise ValueError(f"sample_scenes: num and start must be >= 0, got {num} and {start}")
    bits = np.random.Philox(key=seed)
    bits.advance(start * _UNIFORMS // 4)
    u = np.random.Generator(bits).random((num, _UNIFORMS))

    def choice(column, n: int) -> np.ndarray:
        return np.minimum((u[:, column] * n).astype(np.int64), n - 1)

    def between(column, low: float, high: float) -> np.ndarray:
        return low + (high - low) * u[:, column]

    single = u[:, 0] < 0.3
    relation = np.where(single, -1, choice(1, 4))
    light = between(2, 0, 2 * np.pi)
    shape, color, pattern = (np.stack([choice(c, n), choice(c + 1, n)], 1) for c, n in ((3, 5), (5, 6), (7, 2)))
    jitter = np.stack([between(c, -1, 1) for c in (9, 10, 11, 12)], 1).reshape(num, 2, 2)
    size = np.stack([between(13, 0, 1), between(14, 0, 1)], 1)

    # One object roams the middle; two keep to their own sides and drift along the shared edge.
    side = np.where(np.isin(relation, (1, 3)), 1.0, -1.0)[:, None] * np.array([0.235, -0.235])
    axis = np.where(relation < 2, 0, 1)
    center = np.full((num, 2, 2), 0.5)
    center[np.arange(num), :, axis] += side
    spread = np.full((num, 1, 2), 0.10)
    spread[np.arange(num), 0, axis] = 0.02
    center = center + jitter * spread
    center[single] = 0.5 + 0.12 * jitter[single]
    radius = np.where(single[:, None], 0.22 + 0.08 * size, 0.165 + 0.035 * size)
    return Scenes(
        relation, choice(15, len(BACKGROUNDS)), shape, color, pattern, center, radius, light, terse=u[:, 16] < 0.3
    )


_OBJECT = rf"an? (?:({'|'.join(PATTERNS)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})? on an? ({'|'.join(BACKGROUNDS)}) background"
)


def parse_caption(caption: str) -> np.ndarray:
    """[8] int attributes of one world caption.

    Raises:
        ValueError: the sentence is not one the grammar makes.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().replace(",", " ").split()).rstrip("."))
    if match is None:
        raise ValueError(
            "parse_caption: caption must be 'a [pattern] color shape [relation a [pattern] color shape] "
            f"on a color background', got {caption!r}"
        )
    p1, c1, s1, relation, p2, c2, s2, background = match.groups()
    looks = [(SHAPES.index(s1), COLORS.index(c1), PATTERNS.index(p1 or "plain"))]
    if relation is None:
        return np.array([0, BACKGROUNDS.index(background), *looks[0], -1, -1, -1])
    looks.append((SHAPES.index(s2), COLORS.index(c2), PATTERNS.index(p2 or "plain")))
    if relation in ("right of", "below"):
        looks.reverse()
    layout = 1 if relation in ("left of", "right of") else 2
    return np.array([layout, BACKGROUNDS.index(background), *looks[0], *looks[1]])

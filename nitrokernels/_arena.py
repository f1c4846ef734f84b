"""Where the maps of a plan lie in its memory."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

_PAGE = 16  # floats; buffers begin at multiples of 64 bytes


@dataclass(eq=False)
class Buffer:
    size: int
    keep: bool = False
    uses: list[int] = field(default_factory=list)
    offset: int = -1


def lay_out(buffers: list[Buffer], segments: list[int]) -> None:
    """Offsets for all buffers; those that never live at the same time may share memory."""

    def part(use: int) -> int:
        return bisect.bisect_right(segments, use)

    end, starts, stops = 0, {}, {}
    for b in buffers:
        if b.keep or (b.uses and part(b.uses[0]) != part(b.uses[-1])):
            b.offset, end = end, end + -(-b.size // _PAGE) * _PAGE
        elif b.uses:
            starts.setdefault(b.uses[0], []).append(b)
            stops.setdefault(b.uses[-1], []).append(b)
    free: list[tuple[int, int]] = []  # (offset, size), sorted
    for use in sorted(starts.keys() | stops.keys()):
        for b in starts.get(use, ()):
            size = -(-b.size // _PAGE) * _PAGE
            fits = [hole for hole in free if hole[1] >= size]
            if fits:
                hole = min(fits, key=lambda h: h[1])
                free.remove(hole)
                b.offset = hole[0]
                if hole[1] > size:
                    bisect.insort(free, (hole[0] + size, hole[1] - size))
            else:
                if free and sum(free[-1]) == end:  # the last hole grows
                    b.offset, _ = free.pop()
                else:
                    b.offset = end
                end = b.offset + size
        for b in stops.get(use, ()):
            size = -(-b.size // _PAGE) * _PAGE
            bisect.insort(free, (b.offset, size))
            merged = []
            for hole in free:
                if merged and sum(merged[-1]) == hole[0]:
                    merged[-1] = (merged[-1][0], merged[-1][1] + hole[1])
                else:
                    merged.append(hole)
            free = merged

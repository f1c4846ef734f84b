"""Charts as inline SVG strings. Colours and fonts come from the page's style sheet, so they follow light and dark.

Every chart has a title and a description for screen readers, and says in text what it says in colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 520, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 54, 44
MAX_POINTS = 400  # of a line; more than the pixels it is drawn on
_LARGEST = 1e300  # beyond it ticks would be infinite
_LONGEST = 60  # characters of a name, that fit a legend as wide as the chart


def line_chart(
    series: dict[str, tuple[Sequence[float], Sequence[float | None]]],
    title: str,
    x_label: str,
    y_label: str,
    smoothing: float = 0.0,
    bands: dict[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    bars: dict[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> str:
    """Lines over a shared x axis; None, nan and infinities are gaps, of bands and bars too.

    Args:
        series: label to (x, y).
        smoothing: width of the smoothed line as a share of the points; the raw line stays as a faint one. 0 is raw.
        bands: label to (low, high), the interval around that line.
        bars: the same, drawn at each point.
    """
    bands, bars = _spans(series, bands or {}), _spans(series, bars or {})
    lines = {}
    for label, (x, y) in series.items():
        raw = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if _drawn(a, b)]
        lines[label] = _thin(raw), _thin(_smooth(raw, smoothing) if smoothing else raw)
    points = [p for _, line in lines.values() for p in line]
    if not points:
        return _empty(title)
    # Axes fit the smoothed lines and all but the wildest raw points, which leave the picture.
    wild = sorted(y for raw, _ in lines.values() for _, y in raw)
    kept = wild[len(wild) // 50 : len(wild) - len(wild) // 50]
    heights = (
        [y for _, y in points]
        + kept
        + [v for spans in (*bands.values(), *bars.values()) for _, low, high in spans for v in (low, high)]
    )
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    apart = 0.04 * (last - first) if bars else 0.0  # a bar at the edge would be half outside
    axes = _Axes((first - apart, last + apart), (min(heights), max(heights)))
    body = axes.frame(x_label, y_label)
    for k, (label, (raw, line)) in enumerate(lines.items()):
        k = _style(k)
        if bands.get(label):
            edge = [*((x, high) for x, _, high in bands[label]), *((x, low) for x, low, _ in reversed(bands[label]))]
            body += f'<path class="band s{k}" d="{axes.path(edge)}Z"/>'
        for x, low, high in bars.get(label, ()):
            body += f'<path class="bar-of s{k}" d="{axes.path([(x, low), (x, high)])}"/>'
        if smoothing:
            body += f'<path class="raw s{k}" d="{axes.path(raw)}"/>'
        mark = "".join(f'<circle class="dot s{k}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3"/>' for x, y in line)
        body += f'<path class="line s{k}" d="{axes.path(line)}"/>' + (mark if len(line) <= 24 else "")
    ends = "; ".join(f"{label} from {number(p[0][1])} to {number(p[-1][1])}" for label, (_, p) in lines.items() if p)
    legend, below = _legend(list(lines))
    return _svg(title, f"{y_label} over {x_label}: {ends}.", legend + body, height=_HEIGHT + below)


def histogram(counts: Sequence[float], edges: Sequence[float], title: str, x_label: str, y_label: str) -> str:
    """Bars of counts [n] between edges [n + 1]."""
    if not len(counts) or not sum(counts):
        return _empty(title)
    axes = _Axes((edges[0], edges[-1]), (0.0, float(max(counts))))
    body = axes.frame(x_label, y_label)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        left, right, top = axes.x(low) + 1, axes.x(high) - 1, axes.y(count)
        label = f"{number(low)} to {number(high)}: {number(count)}"
        body += (
            f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0.5):.1f}" '
            f'height="{axes.y(0) - top:.1f}" rx="1.5"><title>{escape(label)}</title></rect>'
        )
    return _svg(title, f"{y_label} by {x_label}; {number(sum(counts))} in all, at most {number(max(counts))}.", body)


def heat_map(
    values: Sequence[Sequence[float | None]], row_labels: Sequence[str], col_labels: Sequence[str], title: str,
    legend: str = "", signed: bool = True,
) -> str:  # fmt: skip
    """A table of signed numbers, shaded by size: one colour above zero, another below; None is an empty cell.

    Args:
        values: [rows][columns].
        legend: one line under the title that says what the two signs mean.
        signed: whether numbers above zero carry a plus.
    """
    known = [abs(v) for row in values for v in row if v is not None and math.isfinite(v)]
    if not known:
        return _empty(title)
    most = max(known) or 1.0
    left = 24 + 7.4 * max(len(label) for label in row_labels)
    cell, height, top = 56, 30, 84
    width = max(left + cell * len(col_labels) + 8, 7.3 * len(legend), 9.2 * len(title))  # few columns, long headings
    total = top + height * len(row_labels) + 10
    parts = [f'<text class="note" x="0" y="44">{escape(legend)}</text>']
    for c, label in enumerate(col_labels):
        x = left + cell * (c + 0.5)
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.0f}" y="{top - 9}">{escape(str(label))}</text>')
    for r, (label, row) in enumerate(zip(row_labels, values, strict=True)):
        y = top + height * r
        parts.append(
            f'<text class="tick" text-anchor="end" x="{left - 10:.0f}" y="{y + 19}">{escape(str(label))}</text>'
        )
        for c, value in enumerate(row):
            x = left + cell * c
            box = f'x="{x + 1:.0f}" y="{y + 1}" width="{cell - 2}" height="{height - 2}" rx="3"'
            if value is None or not math.isfinite(value):
                parts.append(f'<rect class="blank" {box}/>')
                continue
            sign = "pos" if value >= 0 else "neg"
            text = "0.00" if abs(value) < 0.005 else f"{value:{'+' if signed else ''}.2f}".replace("-", "−")
            parts.append(
                f"<g><title>{escape(f'{label}, {col_labels[c]}: {text}')}</title>"
                f'<rect class="{sign}" fill-opacity="{0.06 + 0.64 * abs(value) / most:.2f}" {box}/>'
                f'<text class="value" text-anchor="middle" x="{x + cell / 2:.0f}" y="{y + 19.5}">{text}</text></g>'
            )
    description = f"{len(row_labels)} rows by {len(col_labels)} columns, up to {number(most)} in size. {legend}"
    return _svg(title, description, "".join(parts), round(width), total, "wide")


def interval_mark(value: float, low: float, high: float, target: float | None, most: float) -> str:
    """A small axis from 0 to ``most``: interval a bar, value a dot, target a tick. The text beside it says the same."""
    x = lambda v: 4 + 112 * min(max(v / most, 0), 1) if most > 0 else 4  # noqa: E731
    tick = "" if target is None else f'<line class="target" x1="{x(target):.1f}" x2="{x(target):.1f}" y1="0" y2="10"/>'
    return (
        f'<svg class="mark" viewBox="0 0 120 10" aria-hidden="true"><line class="rail" x1="4" x2="116" y1="5" y2="5"/>'
        f'<line class="span" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="5" y2="5"/>{tick}'
        f'<circle cx="{x(value):.1f}" cy="5" r="3.4"/></svg>'
    )


def number(value: float | None) -> str:
    """A number for people: three or four significant digits, thousands apart."""
    if value is None or not math.isfinite(value):
        return "–"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        text = f"{value:.2e}"
    elif abs(value) >= 1000 or value == int(value):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")


def shortened(label: str) -> str:
    """One line that fits a chart or a strip; of a longer name its end."""
    label = " ".join(label.split())
    return label if len(label) <= _LONGEST else f"…{label[1 - _LONGEST :]}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that cover [low, high], at most about ``most``."""
    span = high - low
    if span <= 1e-12 * max(abs(low), abs(high)):  # nothing but rounding
        span = abs(high) or 1.0
    rough = max(span / (most - 1), 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


class _Axes:
    """Maps data to the drawing's units."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]):
        self.y_ticks = ticks(*y_range, most=5)
        self.low, self.high = self.y_ticks[0], self.y_ticks[-1]
        self.first, self.last = x_range
        self.x_ticks = [t for t in ticks(*x_range) if self.first <= t <= self.last]

    def x(self, value: float) -> float:
        return _LEFT + (value - self.first) / (self.last - self.first or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        # A point off the axes ends the line just outside the frame rather than across the page.
        return _TOP + (1 - min(max(share, -0.02), 1.02)) * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points) -> str:
        return "".join(f"{'L' if i else 'M'}{self.x(x):.1f} {self.y(y):.1f}" for i, (x, y) in enumerate(points))

    def frame(self, x_label: str, y_label: str) -> str:
        parts = [f'<text class="label" text-anchor="end" x="{_WIDTH - _RIGHT}" y="15">{escape(y_label)}</text>']
        for value in self.y_ticks:
            y = self.y(value)
            kind = "axis" if value == self.low else "grid"
            parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{number(value)}</text>')
        for value in self.x_ticks:
            x = self.x(value)
            parts.append(
                f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{_HEIGHT - 26}">{number(value)}</text>'
            )
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - 6
        parts.append(f'<text class="label" text-anchor="end" x="{right}" y="{bottom}">{escape(x_label)}</text>')
        return "".join(parts)


def _svg(title: str, description: str, body: str, width: int = _WIDTH, height: int = _HEIGHT, kind: str = "") -> str:
    title, description = escape(title), escape(description)
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{title}. {description}">'
        f'<title>{title}</title><desc>{description}</desc><text class="title" x="0" y="15">{title}</text>{body}</svg>'
    )


def _drawn(*values: float | None) -> bool:
    return all(value is not None and abs(value) <= _LARGEST for value in values)


def _spans(series: dict, sides: dict) -> dict[str, list[tuple[float, float, float]]]:
    """Label to (x, low, high) of each interval that can be drawn."""
    each = {label: zip(series[label][0], *low_high, strict=True) for label, low_high in sides.items()}
    return {label: [span for span in spans if _drawn(*span)] for label, spans in each.items()}


def _empty(title: str) -> str:
    return _svg(title, "No data.", '<text class="note" x="0" y="44">No data in this run.</text>', height=60)


def _legend(labels: list[str]) -> tuple[str, int]:
    """A stroke of each line and its name, and how much room it takes below: none while one row under the title does.

    A single line needs none.
    """
    if len(labels) < 2:
        return "", 0
    parts, rows, x = [], 0, 0.0
    # The end of a long path is what tells it from its neighbours.
    labels = [shortened(label) for label in labels]
    widths = [35 + 7.3 * len(label) for label in labels]  # of the larger letters on phones
    one_row = sum(widths) <= _WIDTH
    for k, (label, width) in enumerate(zip(labels, widths, strict=True)):
        if x and x + width > _WIDTH:
            rows, x = rows + 1, 0.0
        y = _TOP - 20 if one_row else _HEIGHT + 12 + 18 * rows
        parts.append(f'<line class="line s{_style(k)}" x1="{x:.0f}" x2="{x + 18:.0f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{x + 23:.0f}" y="{y + 4}">{escape(label)}</text>')
        x += width
    return "".join(parts), 0 if one_row else 18 * (rows + 1) + 6


def _style(k: int) -> str:
    """Class names of the k-th line: six colours, then the same with other strokes."""
    return f"{k % 6} again" if k % 12 >= 6 else f"{k % 6}"


def _smooth(points: list[tuple[float, float]], share: float) -> list[tuple[float, float]]:
    """Exponential moving average over about ``share`` of the points, without the pull of its start."""
    decay = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    out = []
    for x, y in points:
        total, weight = decay * total + y, decay * weight + 1
        out.append((x, total / weight))
    return out


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = -(-len(points) // MAX_POINTS)
    return points if stride <= 1 else [*points[::stride], points[-1]]

"""Records of ``benchmarks.one_step`` as a picture of horizontal bars, an SVG that stands alone and follows dark mode.

python -m benchmarks.plot one_step-1.json one_step-2.json --output one_step.svg
"""

from __future__ import annotations

import argparse
import math
from html import escape

from . import records

NAMES = {
    "diffusers_eager": "diffusers",
    "diffusers_compile": "diffusers, torch.compile",
    "xformers_eager": "diffusers, xformers",
    "openvino": "OpenVINO",
    "nitrofusion_ref": "NitroFusion, eager",
    "nitrofusion_cpu": "NitroFusion, fused ops",
    "nitrofusion_plan": "NitroFusion",
    "nitrofusion_accelerate": "diffusers, accelerated",
}
_STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #1d2024; }
  .title { font-weight: 600; font-size: 15px; } .note { fill: #5b626c; font-size: 12px; }
  .peer { fill: #b9bec6; } .ours { fill: #0b7a73; } .bold { font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e9e8e4; } .note { fill: #a0a7b0; } .peer { fill: #565d66; } .ours { fill: #4fc7bb; }
  }
"""
_UNITS = {"ms": "ms", "s": "s", "mb": "MB"}
_WIDTH, _LABEL, _VALUE, _ROW = 760, 190, 70, 26


def bar_chart(groups: dict[str, dict[str, float]], title: str, note: str, unit: str = "ms") -> str:
    """An SVG of bars, shortest first, one group below another on one scale.

    Args:
        groups: heading to variant to value; lower is better, ours are the variants that begin with ``nitrofusion``.
        note: one line below the title: machine, versions.
    """
    most = max((value for rows in groups.values() for value in rows.values()), default=1.0)
    scale, y, parts = (_WIDTH - _LABEL - _VALUE) / (most or 1.0), 62, []
    for heading, rows in groups.items():
        parts.append(f'<text class="note" x="0" y="{y + 14}">{escape(heading)}</text>')
        y += _ROW
        for variant, value in sorted(rows.items(), key=lambda row: row[1]):
            ours, name = variant.startswith("nitrofusion"), NAMES.get(variant, variant)
            kind, weight = ("ours", "bold") if ours else ("peer", "")
            width = max(1.0, value * scale)
            parts.append(
                f'<text class="{weight}" x="{_LABEL - 10}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
                f'<rect class="{kind}" x="{_LABEL}" y="{y + 3}" width="{width:.1f}" height="{_ROW - 9}" rx="2"/>'
                f'<text class="{weight}" x="{_LABEL + width + 7:.1f}" y="{y + 15}">{value:.3g} {escape(unit)}</text>'
            )
            y += _ROW
        y += 8
    said = "; ".join(
        f"{heading}: " + ", ".join(f"{NAMES.get(v, v)} {x:.3g} {unit}" for v, x in rows.items())
        for heading, rows in groups.items()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(said)}</desc><style>{_STYLE}</style>"
        f'<text class="title" x="0" y="18">{escape(title)}</text><text class="note" x="0" y="40">{escape(note)}</text>'
        + "".join(parts)
        + "</svg>\n"
    )


def drawn(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def plot(found: list[dict], column: str = "p50_ms") -> str:
    """The chart of records from one machine."""
    groups = {}
    for record in found:
        threads = record["machine"]["threads"]
        shape = record["rows"][0]["shape"]
        heading = f"{shape}, {threads} thread{'s' * (threads > 1)}"
        again = sum(known == heading or known.startswith(f"{heading}, record ") for known in groups)
        heading += f", record {again + 1}" if again else ""
        groups[heading] = {row["variant"]: row[column] for row in record["rows"] if drawn(row.get(column))}
    machine = found[0]["machine"]
    versions = machine["versions"]
    note = f"{machine['cpu']}, fp32, PyTorch {versions['torch']}, OpenVINO {versions['openvino']}; lower is better"
    titles = {"p50_ms": "One picture of a new prompt", "cold_s": "Process start to the first PNG", "peak_mb": "Memory"}
    return bar_chart(groups, titles.get(column, column), note, _UNITS.get(column.rpartition("_")[2], ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", nargs="+", help="JSON of benchmarks.one_step")
    parser.add_argument("--column", default="p50_ms", help="p50_ms, same_prompt_p50_ms, unet_ms, cold_s, peak_mb, ...")
    parser.add_argument("--output", type=records.output, required=True, help="SVG file")
    args = parser.parse_args()
    found = [records.read(path) for path in args.record]
    for path, record in zip(args.record, found, strict=True):
        if "machine" not in record or not record.get("rows"):
            parser.error(f"{path} must be a record of benchmarks.one_step with rows, got none")
    known = sorted({name for record in found for row in record["rows"] for name, value in row.items() if drawn(value)})
    if args.column not in known:
        parser.error(f"--column must be one of {', '.join(known)}, got {args.column}")
    args.output.write_text(plot(found, args.column), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A run as one self-contained page, its numbers as JSON, and its pictures as one PNG."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path

from .. import __version__
from .charts import MAX_POINTS, heat_map, histogram, interval_mark, line_chart, number
from .pictures import data_uri, fitting_scale, labelled_strips, png_bytes, shown, to_images, write_atomic
from .style import CSS

_TITLE = "NitroFusion"
SMOOTHING = 0.05  # of the logged steps
_SHOWN = 200  # characters of a prompt in a table
_RECENT = 0.2  # share of the logged steps that the pool's heat map averages

# Column: key, heading, hint, decimals, key of the same number for real pictures.
_METRICS = (
    ("accuracy", "Accuracy", "share of prompts followed", 1, "accuracy_real"),
    ("frechet", "Frechet distance", "to real pictures; less is better", 2, "frechet_floor"),
    ("sharpness", "Sharpness", "mean |Laplacian|; nearer to real is better", 3, "sharpness_real"),
    ("diversity", "Diversity", "of one prompt's pictures; real is 1", 2, None),
)


def write_report(folder: str | Path, data: dict) -> Path:
    """Writes ``report.html``, ``report.json`` and ``report.png``; each appears complete or not at all.

    Args:
        folder: created if missing.
        data: plain data; any key may be missing, and its part of the page with it:

            - title, summary: str.
            - rows: list of {label, steps, and an ``evaluate`` result}, in the order shown. Labels that start with
              "student" stand out.
            - prompts: list of str; grids: list of {label "who, how", images [len(prompts), 3, h, w] in [-1, 1]}.
            - log: lines of ``log.jsonl`` as dicts: step, nimg, seconds, loss, grad_norm, images_per_second,
              peak_memory_mb, and of the pool: cells {"task/t*": {real, fake: [levels]}}, head_age {mean, max,
              histogram}.
            - evaluations: list of {step, accuracy, accuracy_interval, frechet, frechet_interval} while training.
            - config: dict.

    Returns:
        The path of ``report.html``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows, log, evaluations = data.get("rows") or [], data.get("log") or [], data.get("evaluations") or []
    title, summary = data.get("title") or _TITLE, data.get("summary") or ""
    prompts, grids = data.get("prompts") or [], data.get("grids") or []
    curves, margin, age = training_curves(log), pool_margin(log), head_age(log)

    points = {name: {k: list(zip(*xy, strict=True)) for k, xy in lines.items()} for name, lines in curves.items()}
    numbers = {
        "title": title,
        "summary": summary,
        "version": __version__,
        "rows": rows,
        "prompts": prompts,
        "grids": [grid["label"] for grid in grids],
        "curves": points,
        "evaluations": evaluations,
        "pool_margin": margin,
        "head_age": age,
        "config": data.get("config"),
    }
    text = json.dumps(finite(numbers), indent=1, allow_nan=False, default=str) + "\n"
    write_atomic(folder / "report.json", text.encode())
    picture = labelled_strips([(grid["label"], grid["images"]) for grid in grids], title, summary)
    write_atomic(folder / "report.png", png_bytes(picture))
    body = [
        f"<header><h1>{escape(title)}</h1><p class=lede>{escape(summary)}</p>{_facts(rows, log)}</header>",
        _results(rows),
        picture_table(prompts, grids),
        _training(curves, evaluations),
        pool_section(margin, age, curves.get("head_age")),
        settings(data.get("config")),
        f"<footer>NitroFusion Engine {__version__}. The numbers of this page are in report.json.</footer>",
    ]
    write_atomic(folder / "report.html", html_page(title, body).encode())
    return folder / "report.html"


def html_page(title: str, parts: list[str]) -> str:
    """A page of its own from HTML parts; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


# ---------------------------------------------------------------- numbers


def training_curves(log: list[dict]) -> dict[str, dict[str, tuple[list, list]]]:
    """Chart name to line label to (steps, values), thinned evenly to what a chart can show."""
    stride = max(1, len(log) // MAX_POINTS)
    curves: dict[str, dict[str, tuple[list, list]]] = {
        "loss": {}, "logits": {}, "grad_norm": {}, "images_per_second": {}, "head_age": {}, "peak_memory_mb": {}
    }  # fmt: skip

    def add(chart: str, label: str, step: int, value) -> None:
        if isinstance(value, (int, float)) and math.isfinite(value):
            steps, values = curves[chart].setdefault(label, ([], []))
            steps.append(step)
            values.append(value)

    for line in log[::stride]:
        step = line["step"]
        for chart in ("loss", "grad_norm"):
            for label, value in (line.get(chart) or {}).items():
                add(chart, label, step, value)
        for side in ("real", "fake"):
            logits = [v for cell in (line.get("cells") or {}).values() for v in cell[side] if v is not None]
            if logits:
                add("logits", side, step, sum(logits) / len(logits))
        add("images_per_second", "images per second", step, line.get("images_per_second"))
        add("peak_memory_mb", "peak memory", step, line.get("peak_memory_mb"))
        add("head_age", "mean", step, (line.get("head_age") or {}).get("mean"))
    return {name: lines for name, lines in curves.items() if lines}


def pool_margin(log: list[dict]) -> dict | None:
    """Mean real - fake logit of each cell over the last fifth of the log: {rows, columns, values, steps}, or None."""
    recent = [line for line in log[int(len(log) * (1 - _RECENT)) :] if line.get("cells")]
    sums: dict[str, list[list[float]]] = {}
    for line in recent:
        for name, cell in line["cells"].items():
            levels = sums.setdefault(name, [[] for _ in cell["real"]])
            for level, real, fake in zip(levels, cell["real"], cell["fake"], strict=True):
                if real is not None and fake is not None and math.isfinite(real - fake):
                    level.append(real - fake)
    if not sums:
        return None
    names = sorted(sums, key=lambda name: (name.rpartition("/")[0], float(name.rpartition("/")[2])))
    return {
        "rows": names,
        "columns": list(range(max(len(levels) for levels in sums.values()))),
        "values": [[sum(v) / len(v) if v else None for v in sums[name]] for name in names],
        "steps": [recent[0]["step"], recent[-1]["step"]],
    }


def head_age(log: list[dict]) -> dict | None:
    """The last line's head ages in optimizer steps: {mean, max, histogram, edges}, or None."""
    ages = [line["head_age"] for line in log if line.get("head_age")]
    if not ages:
        return None
    bins, most = len(ages[-1]["histogram"]), max(16, ages[-1]["max"])
    return {**ages[-1], "edges": [most * i / bins for i in range(bins + 1)]}


def finite(value):
    """The value with nan and infinities as None: JSON has neither."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- parts of the page


def _facts(rows: list[dict], log: list[dict]) -> str:
    facts = []
    students = [row for row in rows if row["label"].startswith("student")]
    if students:
        row = min(students, key=lambda r: r["steps"])
        facts += [
            (f"Prompts followed at {_steps(row['steps'])}", f"{100 * row['accuracy']:.1f}", "%"),
            (f"Frechet distance at {_steps(row['steps'])}", number(row["frechet"]), ""),
            (f"Time per picture at {_steps(row['steps'])}", *_seconds(row["seconds_per_image"])),
        ]
    if log:
        last = log[-1]
        facts.append((f"Training, {last['step']:,} optimizer steps", f"{last['seconds'] / 60:.1f}", "min"))
        facts.append(("Pictures seen in training", f"{last['nimg']:,}", ""))
        if last.get("peak_memory_mb"):
            facts.append(("Peak memory in training", f"{last['peak_memory_mb'] / 1024:.1f}", "GiB"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value} <small>{unit}</small></dd></div>" for name, value, unit in facts
    )
    return f"<dl class=facts>{cells}</dl>" if cells else ""


def _results(rows: list[dict]) -> str:
    if not rows:
        return ""
    most = {m[0]: max(max(row[f"{m[0]}_interval"][1], _target(row, m) or 0) for row in rows) for m in _METRICS}
    most["accuracy"] = 1.0
    students = [row for row in rows if row["label"].startswith("student")]
    head = "".join(f'<th scope="col" title="{escape(hint)}">{name}</th>' for _, name, hint, *_ in _METRICS)
    body, before = [], rows[0]["label"]
    for row in rows:
        kind = " ".join(["ours"] * (row in students) + ["first"] * (row["label"] != before))
        before = row["label"]
        cells = "".join(_cell(row, metric, most[metric[0]]) for metric in _METRICS)
        body.append(
            f'<tr class="{kind}"><th scope="row">{escape(row["label"])} <small>{_steps(row["steps"])}</small></th>'
            f"{cells}"
            f'<td data-label="Time per picture"><b>{" ".join(_seconds(row["seconds_per_image"]))}</b></td></tr>'
        )
    sample = rows[0]
    if "frechet_floor" in sample:
        cells = "".join(f'<td data-label="{m[1]}">{_metric_text(_target(sample, m), m)}</td>' for m in _METRICS)
        body.append(
            f'<tr class="real first"><th scope="row">real pictures <small>the best to hope for</small></th>{cells}'
            '<td data-label="Time per picture">–</td></tr>'
        )
    facts = f"{sample['num_images']:,} fresh scenes" if "num_images" in sample else "Fresh scenes"
    return (
        "<section><h2>Results</h2>"
        f"<p class=help>{facts}, the same prompts and noises for every row. Bars and small numbers are 95 % intervals; "
        "the upright tick is what real pictures of the same prompts score. Accuracy is better high, Frechet distance "
        "low; sharpness and diversity are best where real pictures are.</p>"
        f'<div class="card"><table class=results><thead><tr><th scope="col">Model</th>{head}'
        f'<th scope="col">Time per picture</th></tr></thead><tbody>{"".join(body)}</tbody></table></div></section>'
    )


def _cell(row: dict, metric: tuple, most: float) -> str:
    key, name = metric[:2]
    value, (low, high) = row[key], row[f"{key}_interval"]
    mark = interval_mark(value, low, high, _target(row, metric), most)
    span = f"{_metric_text(low, metric)} to {_metric_text(high, metric)}"
    return f'<td data-label="{name}"><b>{_metric_text(value, metric)}</b>{mark}<small>{span}</small></td>'


def _target(row: dict, metric: tuple) -> float | None:
    """What real pictures score; None if the row does not say."""
    return 1.0 if metric[0] == "diversity" else row.get(metric[4])


def _metric_text(value: float | None, metric: tuple) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if metric[0] == "accuracy" else f"{value:.{metric[3]}f}"


def picture_table(prompts: list[str], grids: list[dict], heading: str = "Pictures") -> str:
    """A section with one row per prompt and one column per grid; see ``write_report`` for both."""
    if not grids:
        return ""
    columns = [[_thumbnail(image) for image in to_images(grid["images"])] for grid in grids]
    labels = [_who_how(grid["label"]) for grid in grids]
    apart = [i > 0 and labels[i][0] != labels[i - 1][0] for i in range(len(labels))]
    spaced = lambda i: ' class="apart"' if apart[i] else ""  # noqa: E731
    head = "".join(
        f'<th scope="col"{spaced(i)}>{escape(who)}<small>{escape(how)}</small></th>'
        for i, (who, how) in enumerate(labels)
    )
    kind = ' class="pixels"' if grids[0]["images"].shape[-1] < 96 else ""
    body = []
    for r, prompt in enumerate(prompts):
        cells = []
        for i, column in enumerate(columns):
            text = escape(f"{grids[i]['label']}: {prompt}")
            cells.append(f'<td{spaced(i)}><img{kind} src="{column[r]}" alt="{text}" title="{text}"></td>')
        body.append(f'<tr><th scope="row">{escape(beginning(prompt))}</th>{"".join(cells)}</tr>')
    return (
        f"<section><h2>{escape(heading)}</h2><p class=help>One prompt per row; every picture of a row starts from the "
        "same noise. None is chosen by hand.</p>"
        '<div class="card scroll" tabindex="0" role="region" aria-label="Pictures by prompt and model">'
        f'<table class=pictures><thead><tr><th scope="col">Prompt</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def beginning(prompt: str) -> str:
    """A prompt, or of a long one what a table has room for; its pictures have all of it."""
    return prompt if len(prompt) <= _SHOWN else f"{prompt[: _SHOWN - 1]}…"


def _who_how(label: str) -> tuple[str, str]:
    """The parts around the last comma, "student, 1 step" being of the student."""
    who, _, how = label.rpartition(", ")
    return (who, how) if who else (how, "")


def _thumbnail(image) -> str:
    return data_uri(shown(image, min(1, fitting_scale(image.width))))  # the browser enlarges


def _training(curves: dict, evaluations: list[dict]) -> str:
    names = {
        "loss": ("Loss", "loss"),
        "logits": ("Logits of real and fake pictures", "mean logit"),
        "grad_norm": ("Gradient norm before clipping", "norm"),
        "images_per_second": ("Speed", "images per second"),
    }
    charts = [
        line_chart(curves[name], title, "optimizer step", unit, SMOOTHING)
        for name, (title, unit) in names.items()
        if name in curves
    ]
    if evaluations:
        steps = [e["step"] for e in evaluations]
        for key, title, unit in (("accuracy", "Accuracy in training", "share of prompts"),
                                 ("frechet", "Frechet distance in training", "distance")):  # fmt: skip
            bands = {}
            if all(f"{key}_interval" in e for e in evaluations):
                low, high = zip(*(e[f"{key}_interval"] for e in evaluations), strict=True)
                bands = {key: (low, high)}
            values = [e[key] for e in evaluations]
            charts.append(line_chart({key: (steps, values)}, title, "optimizer step", unit, bands=bands))
    if not charts:
        return ""
    return (
        "<section><h2>Training</h2><p class=help>Strong lines are moving averages over a twentieth of the run; faint "
        "lines are single optimizer steps. Shaded bands are 95 % intervals.</p>"
        f'<div class="charts">{cards(charts)}</div></section>'
    )


def pool_section(
    margin: dict | None, age: dict | None, mean_age: dict | None, heading: str = "Discriminator pool"
) -> str:
    """A section from ``pool_margin`` and ``head_age``."""
    if margin is None and age is None:
        return ""
    parts = []
    if margin:
        first, last = margin["steps"]
        chart = heat_map(
            margin["values"],
            [name.replace("/", ", t* ") for name in margin["rows"]],
            [f"level {c}" for c in margin["columns"]],
            f"Real minus fake logit, steps {first:,} to {last:,}",
            "Above 0 the heads tell real from fake; near or below 0 the student fools them.",
        )
        parts.append(
            f'<div class="card map scroll" tabindex="0" role="region" aria-label="Logit margins">{chart}</div>'
        )
    if age:
        title = f"Age of the {sum(age['histogram']):,} heads at the end"
        charts = [histogram(age["histogram"], age["edges"], title, "optimizer steps since initialisation", "heads")]
        charts.append(line_chart(mean_age or {}, "Mean age of heads", "optimizer step", "optimizer steps"))
        parts.append(f'<div class="charts">{cards(charts)}</div>')
    return (
        f"<section><h2>{escape(heading)}</h2><p class=help>Each row is a task and a re-noising timestep t*, each "
        "column a level of the frozen encoder, from fine to coarse. Heads are re-initialised at random, so a healthy "
        f"pool holds young and old ones.</p>{''.join(parts)}</section>"
    )


def settings(config: dict | None, heading: str = "Configuration") -> str:
    """A folded table of names and values."""
    if not config:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(json.dumps(value, default=str))}</td></tr>'
        for key, value in config.items()
    )
    return (
        "<section><details class=card><summary>" + escape(heading) + "</summary>"
        f"<table class=settings>{rows}</table></details></section>"
    )


def cards(charts: list[str]) -> str:
    return "".join(f'<div class="card">{chart}</div>' for chart in charts)


def _steps(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"


def _seconds(seconds: float) -> tuple[str, str]:
    return (number(seconds * 1000), "ms") if seconds < 1 else (number(seconds), "s")

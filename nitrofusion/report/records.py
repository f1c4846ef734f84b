"""Pages of evaluation records: one, or several of one protocol beside each other; as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from .. import __version__
from ..engine.png import read_settings
from ..errors import InputError
from ..evaluate.record import check_comparable
from ..pil import UNREADABLE
from . import paper
from .charts import interval_mark, line_chart, number
from .page import beginning, cards, html_page, settings
from .pictures import data_uri, fitting_scale, shown, write_atomic

_SHOWN = 8  # pictures of each record on the page
_WAYS = {"higher": "more is better", "lower": "less is better", "real": "nearer to real is better"}


def write_records(path: str | Path, records: Sequence[dict], folders: Sequence[Path | None]) -> Path:
    """Writes the HTML page ``path`` and the same as ``.md`` beside it; each appears complete or not at all.

    Args:
        records: as ``evaluate.record`` makes them.
        folders: of each record its output folder, for the pictures, or None.

    Returns:
        ``path``.

    Raises:
        InputError: a metric was not measured by one protocol in all of them.
    """
    check_comparable(records)
    path = Path(path)
    title, lede = _title(records), _lede(records)
    body = [
        f"<header><h1>{escape(title)}</h1><p class=lede>{escape(lede)}</p></header>",
        _errors(records),
        _table(records),
        _charts(records),
        _paper(records),
        _noise(records),
        _pictures(records, folders),
        *(
            settings(_protocol(record), f"Protocol of {label}")
            for record, label in zip(records, labels(records), strict=True)
        ),
        f"<footer>NitroFusion Engine {__version__}. The numbers of this page are in the records.</footer>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of files need not be Unicode.
    write_atomic(path, html_page(title, body).encode(errors="backslashreplace"))
    write_atomic(path.with_suffix(".md"), markdown(records).encode(errors="backslashreplace"))
    return path


def labels(records: Sequence[dict]) -> list[str]:
    """A name for each record: its model, steps where it has any, and which one where several would have the same."""
    found = []
    for record in records:
        subject = record["subject"]
        steps = subject.get("num_inference_steps")
        found.append(str(subject.get("model", "?")).rstrip("/") + (f", {_steps(steps)}" if steps else ""))
    again = {name: 0 for name in found if found.count(name) > 1}
    for i, name in enumerate(found):
        if name in again:
            again[name] += 1
            found[i] = f"{name} ({again[name]})"
    return found


# ---------------------------------------------------------------- what the numbers say


def columns(records: Sequence[dict]) -> dict[str, dict]:
    """Metric to a result that has its title, in the order of the first record that has it."""
    return {result["metric"]: result for record in reversed(records) for result in record["results"]} | {
        result["metric"]: result for result in records[0]["results"]
    }


def result_of(record: dict, metric: str) -> dict | None:
    return next((result for result in record["results"] if result["metric"] == metric), None)


def value_text(value: float, metric: str) -> str:
    """With the paper's decimals where it has the metric."""
    return f"{value:.{paper.DECIMALS[metric]}f}".replace("-", "−") if metric in paper.DECIMALS else number(value)


def _milliseconds(record: dict) -> float | None:
    seconds = record["run"].get("seconds_per_image")
    return 1000 * seconds if seconds else None


def _how(run: dict) -> str:
    """Where a picture took that long."""
    batch = run.get("batch_size")
    return str(run.get("device", "")) + (f", {batch} at a time" if batch else "")


def _title(records) -> str:
    suite = records[0]["protocol"]["suite"]
    return f"{labels(records)[0]} on {suite}" if len(records) == 1 else f"{len(records)} evaluations on {suite}"


def _lede(records) -> str:
    protocol = records[0]["protocol"]
    width, height = protocol["resolution"]
    said = f"{protocol['n']:,} pictures of {width}x{height} pixels"
    if protocol["prompts_digest"]:
        said += f", one for each prompt of set {protocol['prompts_digest'][:12]}"
    if protocol["seed_rule"]:
        said += f", {protocol['seed_rule']}"
    return said + ". Small numbers are 95 % intervals over the pictures: another draw of prompts and noises."


def _errors(records) -> str:
    lines = [
        f"<p class=help><b>{escape(error['metric'])}</b> of {escape(label)} failed: {escape(error['error'])}</p>"
        for record, label in zip(records, labels(records), strict=True)
        for error in record["errors"]
    ]
    return f"<section><h2>What failed</h2>{''.join(lines)}</section>" if lines else ""


def _table(records) -> str:
    found = columns(records)
    if not found:
        return ""
    every = {m: [r for record in records if (r := result_of(record, m))] for m in found}
    ends = {m: [x for r in rs for x in (*r["interval"], r.get("target")) if x is not None] for m, rs in every.items()}
    head = "".join(
        f'<th scope="col">{escape(r["title"])}<br><small>{_WAYS[r["better"]]}</small></th>' for r in found.values()
    )
    body = []
    for record, label in zip(records, labels(records), strict=True):
        cells = []
        for metric in found:
            result = result_of(record, metric)
            title = escape(found[metric]["title"])
            if result is None:
                cells.append(f'<td data-label="{title}">–</td>')
                continue
            low, high = result["interval"]
            least, most, target = min(ends[metric]), max(ends[metric]), result.get("target")
            span = f"{value_text(low, metric)} to {value_text(high, metric)}"
            mark = ""
            if len(every[metric]) > 1 or target is not None:  # alone on its own axis it would say nothing
                at = [None if x is None else x - least for x in (result["value"], low, high, target)]
                mark = interval_mark(*at, most - least)
            cells.append(
                f'<td data-label="{title}"><b>{value_text(result["value"], metric)}</b>{mark}<small>{span}</small></td>'
            )
        took = _milliseconds(record)
        device = f"<small>{escape(_how(record['run']))}</small>"
        cells.append(
            f'<td data-label="Time per picture"><b>{number(took)} ms</b>{device}</td>' if took else "<td>–</td>"
        )
        body.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>')
    told = (
        "<p class=help>Bars are 95 % intervals, each column on an axis of its own from the lowest end to the highest; "
        "the upright tick is what real pictures score.</p>"
    )
    marked = any('class="mark"' in row for row in body)
    targets = {m: rs[0]["target"] for m, rs in every.items() if rs[0].get("target") is not None}
    if targets:
        cells = "".join(
            f'<td data-label="{escape(found[m]["title"])}">{value_text(targets[m], m) if m in targets else "–"}</td>'
            for m in found
        )
        body.append(f'<tr class="real first"><th scope="row">real pictures</th>{cells}<td></td></tr>')
    return (
        f"<section><h2>Results</h2>{told if marked else ''}"
        '<div class="card scroll" tabindex="0" role="region" aria-label="Results">'
        f'<table class=results><thead><tr><th scope="col">Evaluation</th>{head}'
        f'<th scope="col">Time per picture</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _charts(records) -> str:
    """Quality against latency and against steps, one line for each model; nothing where all lie at one place."""
    sections = []
    for heading, axis, key in (
        ("Quality against latency", "milliseconds per picture", _milliseconds),
        ("Steps against quality", "inference steps", lambda record: record["subject"].get("num_inference_steps")),
    ):
        charts = []
        for metric, about in columns(records).items():
            points: dict[str, list[tuple[float, dict]]] = {}
            for record in records:
                result = result_of(record, metric)
                if result and key(record):
                    points.setdefault(str(record["subject"].get("model", "?")), []).append((key(record), result))
            if len({x for line in points.values() for x, _ in line}) > 1:
                charts.append(_chart(points, f"{about['title']}: {_WAYS[about['better']]}", axis, about["title"]))
        if charts:
            sections.append(f'<h2>{heading}</h2><div class="charts">{cards(charts)}</div>')
    return "".join(f"<section>{section}</section>" for section in sections)


def _chart(points: dict[str, list[tuple[float, dict]]], title: str, x_label: str, y_label: str) -> str:
    series, bars = {}, {}
    for model, line in points.items():
        line = sorted(line, key=lambda point: point[0])
        series[model] = [x for x, _ in line], [r["value"] for _, r in line]
        bars[model] = [r["interval"][0] for _, r in line], [r["interval"][1] for _, r in line]
    return line_chart(series, title, x_label, y_label, bars=bars)


def _paper_rows(records) -> list[tuple[str, int | None, list[float | None], bool]]:
    """(model, steps, values, whether it is ours); none unless a record is of the paper's suite."""
    if all(record["protocol"]["suite"] != "coco5k" for record in records):
        return []
    rows = [(model, steps, list(values), False) for model, steps, values in paper.ROWS]
    for record in records:
        values = [result_of(record, metric) for metric in paper.COLUMNS]
        subject = record["subject"]
        rows.append(
            (f"{subject.get('model', '?')} (ours)", subject.get("num_inference_steps"),
             [None if v is None else v["value"] for v in values], True)
        )  # fmt: skip
    return rows


def _paper_note(records) -> str:
    n = records[0]["protocol"]["n"]
    fewer = f" Ours has {n:,} pictures, not 5,000: its FID is larger for that alone." if n != 5000 else ""
    return f"{paper.SOURCE}. {paper.UNKNOWN}{fewer}"


def _paper(records) -> str:
    rows = _paper_rows(records)
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{paper.TITLES[metric]}</th>' for metric in paper.COLUMNS)
    body = []
    for model, steps, values, ours in rows:
        cells = "".join(
            f'<td data-label="{paper.TITLES[m]}"><b>{"–" if v is None else value_text(v, m)}</b></td>'
            for m, v in zip(paper.COLUMNS, values, strict=True)
        )
        told = f" <small>{_steps(steps)}</small>" if steps else ""
        body.append(f'<tr class="{"ours" * ours}"><th scope="row">{escape(model)}{told}</th>{cells}</tr>')
    return (
        f"<section><h2>The paper's table beside ours</h2><p class=help>{escape(_paper_note(records))}</p>"
        f'<div class="card"><table class=results><thead><tr><th scope="col">Model</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _floors(records) -> dict[str, float]:
    """Title to noise floor, of the metrics that have one."""
    return {r["title"]: r["noise_floor"] for r in columns(records).values() if r["noise_floor"] is not None}


def _noise(records) -> str:
    floors = _floors(records)
    if not floors:
        return ""
    told = "; ".join(f"{title} {number(floor)}" for title, floor in floors.items())
    return (
        "<section><h2>Noise floor</h2>"
        f"<p class=help>{escape(paper.NOISE)} On this page: {escape(told)}. Beyond it, look at the intervals.</p>"
        "</section>"
    )


def _pictures(records, folders) -> str:
    """The first pictures of each record whose folder is known: a row each, a prompt a column."""
    prompts, rows = [], []
    for label, folder in zip(labels(records), folders, strict=True):
        paths = [] if folder is None else sorted((folder / "images").glob("*.png"))[:_SHOWN]
        if not paths or (prompts and len(paths) != len(prompts)):
            continue
        prompts = prompts or [_prompt(path) for path in paths]
        cells = "".join(_cell(path, f"{label}: {text}") for path, text in zip(paths, prompts, strict=True))
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(beginning(text))}</th>' for text in prompts)
    return (
        f"<section><h2>The first {len(prompts)} pictures</h2><p class=help>None is chosen by hand.</p>"
        '<div class="card scroll" tabindex="0" role="region" aria-label="Pictures by evaluation and prompt">'
        f'<table class=pictures><thead><tr><th scope="col">Prompt</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cell(path: Path, text: str) -> str:
    try:
        with Image.open(path) as image:
            small = shown(image.convert("RGB"), min(1, fitting_scale(image.width)))  # the browser enlarges
    except UNREADABLE:
        return f'<td title="{escape(text)}">{escape(path.name)} cannot be read</td>'
    kind = ' class="pixels"' if small.width < 96 else ""
    return f'<td><img{kind} src="{data_uri(small)}" alt="{escape(text)}" title="{escape(text)}"></td>'


def _prompt(path: Path) -> str:
    try:
        return str(read_settings(path).get("prompt", path.name))
    except InputError:
        return path.name


def _protocol(record: dict) -> dict:
    fields = ("implementation", "version", "extractor_digest", "resize", "reference_digest", "reference_n",
              "protocol_digest")  # fmt: skip
    told = {result["metric"]: {name: result[name] for name in fields} for result in record["results"]}
    return {**record["protocol"], **record["subject"], **told, **record["run"]}


# ---------------------------------------------------------------- Markdown


def markdown(records: Sequence[dict]) -> str:
    """The page without its pictures and plots."""
    found = columns(records)
    lines = [f"# {_plain(_title(records))}", "", _plain(_lede(records)), ""]
    if found:
        rows = []
        for record, label in zip(records, labels(records), strict=True):
            cells = []
            for metric in found:
                result = result_of(record, metric)
                cells.append("–" if result is None else "{} ({} to {})".format(
                    *(value_text(v, metric) for v in (result["value"], *result["interval"]))))  # fmt: skip
            took = _milliseconds(record)
            rows.append([label, *cells, f"{number(took)} ms" if took else "–"])
        titles = [f"{r['title']} ({_WAYS[r['better']]})" for r in found.values()]
        lines += _grid(["evaluation", *titles, "time per picture"], rows)
    for record, label in zip(records, labels(records), strict=True):
        lines += [f"- {_plain(e['metric'])} of {_plain(label)} failed: {_plain(e['error'])}" for e in record["errors"]]
    if rows := _paper_rows(records):
        lines += ["", "## The paper's table beside ours", "", _paper_note(records), ""]
        body = [
            [f"**{_plain(model)}**" if ours else model, str(steps or "–"),
             *("–" if v is None else value_text(v, m) for m, v in zip(paper.COLUMNS, values, strict=True))]
            for model, steps, values, ours in rows
        ]  # fmt: skip
        lines += _grid(["model", "steps", *paper.TITLES.values()], body)
    if floors := _floors(records):
        told = "; ".join(f"{title} {number(floor)}" for title, floor in floors.items())
        lines += ["", "## Noise floor", "", f"{paper.NOISE} Here: {told}."]
    lines += ["", "## Protocol", ""]
    for record, label in zip(records, labels(records), strict=True):
        lines += [f"- {_plain(label)}: {record['protocol_digest']}"]
    return "\n".join(lines) + "\n"


def _grid(head: list[str], rows: list[list[str]]) -> list[str]:
    line = lambda cells: "| " + " | ".join(_plain(cell) for cell in cells) + " |"  # noqa: E731
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def _plain(text: str) -> str:
    """One line that neither ends a cell nor starts HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _steps(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"

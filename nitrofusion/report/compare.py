"""The page of a comparison: what differs by more than its seeds do, in words, tables, pictures and curves."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import torch

from .. import __version__
from ..compare.runs import ABLATIONS, BASE, CONTROL, REFERENCES, base_of
from ..compare.statistics import by_seed, exceeds, paired, summarize
from .charts import heat_map, line_chart, number
from .page import (
    SMOOTHING,
    cards,
    head_age,
    html_page,
    picture_table,
    pool_margin,
    pool_section,
    settings,
    training_curves,
)
from .pictures import labelled_strips, png_bytes, write_atomic

# Key, heading, what it is, decimals, as a percentage, which way is better (0: nearer to real), key of the real value.
METRICS = (
    ("accuracy", "Accuracy", "share of prompts followed; more is better", 1, True, 1, "accuracy_real"),
    ("frechet", "Frechet distance", "to real pictures; less is better", 2, False, -1, "frechet_floor"),
    ("structure_rate", "Odd structure", "pictures whose structure, such as doubled outlines, is odder than that of 99 "
     "% of real ones; less is better", 1, True, -1, "structure_rate_real"),
    ("grain_rate", "Grain", "pictures grainier than 99 % of decoded real ones; less is better", 1, True, -1, None),
    ("sharpness", "Sharpness", "mean |Laplacian|; nearer to real is better", 4, False, 0, "sharpness_real"),
    ("diversity", "Diversity", "of one prompt's pictures; real is 1", 3, False, 0, None),
)  # fmt: skip
_JUDGED = tuple(metric for metric in METRICS if metric[5])
_RECENT = 0.2  # share of the log that the gradient map averages


def write_comparison(
    folder: Path, result: dict, pictures: dict[str, dict[str, torch.Tensor]], logs: dict[str, list[dict]]
) -> Path:
    """Writes ``report.html`` and ``report.png``; parts whose data is missing are left out.

    Args:
        result: rows, protocol and errors, as ``compare.record.collect`` makes them.
        pictures: run to number of steps to pictures [16, 3, h, w] in [-1, 1].
        logs: run to the lines of its log, of one seed.

    Returns:
        The path of ``report.html``.
    """
    title, protocol = "Recipes and ablations on the embedded world", result["protocol"]
    said = verdict(result)
    every = sorted({steps for each in pictures.values() for steps in each}, key=int)
    students = [steps for steps in every if any(steps in pictures[run] for run in pictures if run != "teacher")]
    grids = {steps: _grids(pictures, steps) for steps in dict.fromkeys(students[:1] + students[-1:])}
    strips = [(grid["label"], grid["images"]) for each in grids.values() for grid in each]
    write_atomic(folder / "report.png", png_bytes(labelled_strips(strips, title, " ".join(said[:2]))))
    lede = "".join(f"<p class=lede>{escape(sentence)}</p>" for sentence in said)
    body = [
        f"<header><h1>{escape(title)}</h1>{lede}{_facts(protocol)}</header>",
        _errors(result["errors"]),
        *(_metric_table(result, metric) for metric in METRICS),
        _training_table(result),
        *(picture_table(_prompts(), grid, f"Pictures at {_steps(int(steps))}") for steps, grid in grids.items()),
        _curves(logs),
        *(_dashboard(name, log) for name, log in logs.items()),
        settings(protocol, "Protocol"),
        f"<footer>NitroFusion Engine {__version__}. The numbers of this page are in compare-world.json.</footer>",
    ]
    write_atomic(folder / "report.html", html_page(title, body).encode())
    return folder / "report.html"


# ---------------------------------------------------------------- what the numbers say


def runs_of(result: dict) -> list[str]:
    """Trained runs with at least one row of numbers, in order."""
    found = (row["run"] for row in result["rows"] if row["seed"] is not None and "error" not in row)
    return [run for run in dict.fromkeys(found) if run not in REFERENCES]


def verdict(result: dict) -> list[str]:
    """Sentences computed from the rows: who is ahead, and what exceeds the spread over seeds."""
    protocol, rows = result["protocol"], result["rows"]
    trained, seeds = runs_of(result), protocol["seeds"]
    if not trained:
        return ["No run has results yet."]
    said = [
        f"{len(trained)} runs from the same start, {len(seeds)} seed{'s' * (len(seeds) != 1)} each, "
        f"{number(protocol['seconds_budget'] / 60)} min of training on one thread planned for every one, "
        f"measured on {protocol['num_images']:,} fresh prompts a seed, the same for every run."
    ]
    lacking = [
        f"{run} with seed {', '.join(map(str, missing))}"
        for run in trained
        if (missing := [s for s in seeds if s not in {row["seed"] for row in _measured(rows, run)}])
    ]
    if lacking:
        said.append(f"No results yet of {'; '.join(lacking)}.")
    if len(seeds) < 2:
        said.append("One seed shows no spread, so no difference on this page can be told from chance.")
    compared = chance = 0
    for steps in protocol["steps"]:
        clauses = []
        for metric in _JUDGED:
            means = {
                run: summarize(list(v.values()))["mean"]
                for run in trained
                if (v := by_seed(rows, run, steps, metric[0]))
            }
            if not means:
                continue
            best = max(means, key=lambda run: metric[5] * means[run])
            start = list(by_seed(rows, "start", steps, metric[0]).values())
            untrained = f", untrained start {_text(summarize(start)['mean'], metric)}" if start else ""
            clause = f"{metric[1].lower()} is best in {best} ({_text(means[best], metric)}{untrained})"
            for reference in ("start", CONTROL) if len(seeds) > 1 else ():
                if by_seed(rows, reference, steps, metric[0]):
                    others = [run for run in trained if run != reference]
                    differing = _differing(rows, others, reference, steps, metric)
                    told = _told(rows, others, reference, steps, metric)
                    compared, chance = compared + told, chance + len(differing)
                    clause += _spread(differing, reference) if told else ""
            clauses.append(clause)
        if clauses:
            said.append(f"At {_steps(steps)}: {'; '.join(clauses)}.")
    for base in dict.fromkeys(map(base_of, ABLATIONS)):
        ablations = [run for run in trained if run in ABLATIONS and base_of(run) == base]
        if len(seeds) == 1 or base not in trained or not ablations:
            continue
        steps, found, told = protocol["steps"][0], [], 0
        for metric in _JUDGED:
            told += _told(rows, ablations, base, steps, metric)
            found += [f"{metric[1].lower()} of {text}" for text in _differing(rows, ablations, base, steps, metric)]
        compared, chance = compared + told, chance + len(found)
        if not told:
            continue
        said.append(
            f"Ablations beside {base} at {_steps(steps)}: "
            + (f"beyond the seeds' spread are {', '.join(found)}." if found else "no difference at this scale.")
        )
    if compared:
        said.append(
            f"{chance} of {compared} differences exceed the seeds' spread; where nothing differs at all, about "
            f"{max(1, round(0.05 * compared))} would by chance."
        )
    return said


def _measured(rows: list[dict], run: str) -> list[dict]:
    return [row for row in rows if row["run"] == run and "error" not in row]


def _told(rows: list[dict], names: list[str], reference: str, steps: int, metric: tuple) -> int:
    """How many runs share two seeds or more with the reference: of fewer nothing can be told from chance."""
    beside = by_seed(rows, reference, steps, metric[0])
    return sum(len(by_seed(rows, run, steps, metric[0]).keys() & beside.keys()) > 1 for run in names)


def _spread(differing: list[str], reference: str) -> str:
    if not differing:
        return f", no difference to {reference} at this scale"
    return f", beyond the seeds' spread of {reference}: {', '.join(differing)}"


def _differing(rows: list[dict], names: list[str], reference: str, steps: int, metric: tuple) -> list[str]:
    """Runs whose paired difference to the reference leaves out zero, with whether that is better."""
    found = []
    for run in names:
        difference = paired(by_seed(rows, run, steps, metric[0]), by_seed(rows, reference, steps, metric[0]))
        if exceeds(difference):
            better = "better" if difference["mean"] * metric[5] > 0 else "worse"
            found.append(f"{run} ({better}, {_text(difference['mean'], metric, signed=True)})")
    return found


def gradient_map(log: list[dict]) -> dict | None:
    """Share of the heads' gradient of each cell and level over the last fifth of the log, in percent, or None.

    A step in which a cell's t* was not drawn counts as none of it, so that the map sums to 100.
    """
    recent = [line["gradient_share"] for line in log[int(len(log) * (1 - _RECENT)) :] if line.get("gradient_share")]
    if not recent:
        return None
    sums: dict[str, list[float]] = {}
    for line in recent:
        for cell, levels in line.items():
            sums[cell] = [a + b for a, b in zip(sums.get(cell, [0.0] * len(levels)), levels, strict=True)]
    names = sorted(sums, key=lambda name: (name.rpartition("/")[0], float(name.rpartition("/")[2])))
    return {"rows": names, "values": [[100 * v / len(recent) for v in sums[name]] for name in names]}


# ---------------------------------------------------------------- parts of the page


def _facts(protocol: dict) -> str:
    facts = [
        ("Training of each run and seed", number(protocol["seconds_budget"] / 60), "min"),
        ("Seeds", str(len(protocol["seeds"])), ""),
        ("Fresh prompts", f"{protocol['num_images']:,}", ""),
        ("Teacher samples, not counted", number(protocol["teacher_sample_seconds"] / 60), "min in all"),
        ("Machine", str(protocol["cores"]), f"cores, {protocol['cpu']}"),
    ]
    shown = (f"<div><dt>{escape(n)}</dt><dd>{escape(v)} <small>{escape(u)}</small></dd></div>" for n, v, u in facts)
    return f"<dl class=facts>{''.join(shown)}</dl>"


def _errors(errors: list[dict]) -> str:
    if not errors:
        return ""
    seed = lambda e: "" if e["seed"] is None else f"seed {e['seed']}"  # noqa: E731
    rows = "".join(
        f'<tr><th scope="row">{escape(e["run"])} <small>{seed(e)}</small></th>'
        f'<td class="words">{escape(e["error"])}</td></tr>'
        for e in errors
    )
    return (
        "<section><h2>Failed runs</h2><p class=help>They are missing below; the same command tries them again.</p>"
        f'<div class="card"><table class=results><tbody>{rows}</tbody></table></div></section>'
    )


def _metric_table(result: dict, metric: tuple) -> str:
    rows, steps = result["rows"], result["protocol"]["steps"]
    key, name, hint, *_, real = metric
    names = [run for run in REFERENCES if any(row["run"] == run for row in rows)] + runs_of(result)
    if not names:
        return ""
    head = "".join(f'<th scope="col">{_steps(n)}</th>' for n in steps)
    body = []
    for run in names:
        kind = "ours" if run == BASE else "first" if run in (CONTROL, next(iter(ABLATIONS))) else ""
        if run == "teacher":
            own = next(row["steps"] for row in rows if row["run"] == run)
            summary = summarize(list(by_seed(rows, run, own, key).values()))
            cells = f'<td colspan="{len(steps)}">{_value(summary["mean"], summary["interval"], metric)}</td>'
            label = f"teacher <small>{_steps(own)}</small>"
        else:
            cells = "".join(f'<td data-label="{_steps(n)}">{_cell(rows, run, n, metric)}</td>' for n in steps)
            label = escape(run)
        body.append(f'<tr class="{kind}"><th scope="row">{label}</th>{cells}</tr>')
    best = f" Real pictures of the same prompts score {_text(result['protocol'].get(real), metric)}." if real else ""
    return (
        f"<section><h2>{name}</h2><p class=help>{escape(hint[0].upper() + hint[1:])}.{best} Small numbers are 95 % "
        f"intervals over seeds, and differences to the start and to {CONTROL} (of ablations, to what they change too) "
        "of the same seeds; bold ones exceed the spread. Every seed has its own prompts and noises.</p>"
        '<div class="card scroll" tabindex="0" role="region" aria-label="'
        f'{name}"><table class=results><thead><tr><th scope="col">Run</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _cell(rows: list[dict], run: str, steps: int, metric: tuple) -> str:
    key = metric[0]
    values = by_seed(rows, run, steps, key)
    if not values:
        return "–"
    summary = summarize(list(values.values()))
    parts = [_value(summary["mean"], summary["interval"], metric)]
    beside = () if run in REFERENCES else ("start", CONTROL, base_of(run)) if run in ABLATIONS else ("start", CONTROL)
    for reference in dict.fromkeys(beside):
        difference = paired(values, by_seed(rows, reference, steps, key))
        if difference is None or run == reference:
            continue
        text = f"{_text(difference['mean'], metric, signed=True)} vs {reference}"
        if difference["interval"]:
            low, high = (_text(v, metric, signed=True) for v in difference["interval"])
            text += f" ({low} to {high})"
        parts.append(f"<small>{f'<b>{text}</b>' if exceeds(difference) else text}</small>")
    return "".join(parts)


def _value(value: float, interval: list[float] | None, metric: tuple) -> str:
    span = f"<small>{_text(interval[0], metric)} to {_text(interval[1], metric)}</small>" if interval else ""
    return f"<b>{_text(value, metric)}</b>{span}"


def _text(value: float | None, metric: tuple, signed: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    decimals, percent = metric[3], metric[4]
    text = f"{100 * value if percent else value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")
    return f"{text} %" if percent else text


def _training_table(result: dict) -> str:
    rows, protocol = result["rows"], result["protocol"]
    body, off = [], 0
    for run in runs_of(result):
        mine = list({row["seed"]: row for row in rows if row["run"] == run and "error" not in row}.values())
        values = lambda key: [row[key] for row in mine]  # noqa: E731, B023
        flagged = [row for row in mine if abs(row["seconds_off"]) > protocol["tolerance"]]
        off += len(flagged)
        minutes = ", ".join(
            f"<b>{row['seconds'] / 60:.2f} ({100 * row['seconds_off']:+.0f} %)</b>" if row in flagged
            else f"{row['seconds'] / 60:.2f}" for row in mine
        )  # fmt: skip
        body.append(
            f'<tr class="{"ours" if run == BASE else ""}"><th scope="row">{escape(run)}</th>'
            f'<td data-label="Optimizer steps">{max(values("optimizer_steps")):,}</td>'
            f'<td data-label="Pictures seen">{max(values("images")):,}</td>'
            f'<td data-label="Minutes">{minutes}</td>'
            f'<td data-label="Peak memory">{max(values("peak_mb")) / 1024:.2f} GiB</td></tr>'
        )
    if not body:
        return ""
    heads = "".join(
        f'<th scope="col">{h}</th>' for h in ("Run", "Optimizer steps", "Pictures seen", "Minutes", "Peak memory")
    )
    note = f"{off} of them are further off, in bold" if off else "none is further off"
    return (
        "<section><h2>Training</h2><p class=help>Steps were planned from seconds per step of a run alone on one "
        "thread. Minutes are those its steps took, one number per seed; a run within "
        f"{100 * protocol['tolerance']:.0f} % of the median of all counts as equal, and {note}. Peak memory is that of "
        "the whole process.</p>"
        f'<div class="card"><table class=results><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>'
        "</div></section>"
    )


def _grids(pictures: dict[str, dict[str, torch.Tensor]], steps: str) -> list[dict]:
    grids = []
    for run, each in pictures.items():
        own = next(iter(each)) if run == "teacher" else steps
        if own in each:
            grids.append({"label": f"{run}, {_steps(int(own))}", "images": each[own]})
    return grids


def _prompts() -> list[str]:
    from ..demo import grid_prompts

    return grid_prompts()


def _curves(logs: dict[str, list[dict]]) -> str:
    charts = [
        line_chart(losses, f"Losses of {name}", "optimizer step", "loss", SMOOTHING)
        for name, log in logs.items()
        if (losses := training_curves(log).get("loss"))
    ]
    if not charts:
        return ""
    return (
        "<section><h2>Losses</h2><p class=help>Of the first seed. Strong lines are moving averages over a twentieth of "
        f'the run. Losses of different recipes do not compare.</p><div class="charts">{cards(charts)}</div></section>'
    )


def _dashboard(name: str, log: list[dict]) -> str:
    """The pool of one run: margins, ages, shares of gradient; folded away for all but the recipe itself."""
    shares, curves = gradient_map(log), training_curves(log)
    pool = pool_section(pool_margin(log), head_age(log), curves.get("head_age"), f"Discriminator pool of {name}")
    if not pool:
        return ""
    extra = ""
    if shares:
        chart = heat_map(
            shares["values"], [cell.replace("/", ", t* ") for cell in shares["rows"]],
            [f"level {k}" for k in range(len(shares["values"][0]))], "Share of the heads' gradient, percent",
            "Squared gradient of the student's loss in each level's features; all cells sum to 100.",
            signed=False,
        )  # fmt: skip
        extra = (
            '<section><div class="card map scroll" tabindex="0" role="region" aria-label="Shares of gradient">'
            f"{chart}</div></section>"
        )
    if name == BASE:
        return pool + extra
    return f"<details class=card><summary>Discriminator pool of {escape(name)}</summary>{pool}{extra}</details>"


def _steps(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"

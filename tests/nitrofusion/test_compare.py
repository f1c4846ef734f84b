"""Comparisons: statistics against scipy, the plan against a loop, resumption, failures, and the page."""

import dataclasses
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file

from nitrofusion.cli import main
from nitrofusion.compare import compare, plan, record, runs, worker
from nitrofusion.compare.jobs import Job, run_jobs
from nitrofusion.compare.statistics import exceeds, paired, summarize, t95
from nitrofusion.config import TrainConfig
from nitrofusion.errors import InputError
from nitrofusion.presets import RUNS
from nitrofusion.recipes import RECIPES
from nitrofusion.report.compare import gradient_map, verdict, write_comparison

from . import compare_tiny
from .test_report import Balanced

EVIL = "<b>it & broke</b>"


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 29, 200])
def test_quantile_of_student_t_matches_scipy(df):
    assert t95(df) == pytest.approx(scipy.stats.t.ppf(0.975, df), rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_intervals_match_scipy(n):
    a, b = np.random.default_rng().normal(3, 2, (2, n))
    low, high = scipy.stats.t.interval(0.95, n - 1, loc=a.mean(), scale=scipy.stats.sem(a))
    assert summarize(list(a)) == {"mean": pytest.approx(a.mean()), "interval": pytest.approx([low, high]), "n": n}
    test = scipy.stats.ttest_rel(a, b)
    ours = paired({10: 99.0, **dict(enumerate(a))}, {11: 99.0, **dict(enumerate(b))})  # seeds of one side drop out
    assert ours["interval"] == pytest.approx(list(test.confidence_interval(0.95))) and ours["n"] == n
    assert exceeds(ours) == (test.pvalue < 0.05)


def test_one_seed_has_no_interval_and_exceeds_nothing():
    assert summarize([2.0])["interval"] is None and not exceeds(paired({1: 5.0}, {1: 0.0}))
    assert paired({1: 5.0}, {2: 0.0}) is None


# ---------------------------------------------------------------- equal wall-clock

STAGED = TrainConfig(stages=(300, 0, 0, 60), discriminator_warmup=40, warmup_steps=30, regression_fade=100)


@pytest.mark.parametrize("config", [TrainConfig(stages=(150,)), STAGED, RUNS["world"]])
def test_steps_fill_the_seconds(config):
    rng = np.random.default_rng()
    probe = plan.probe_config(config)
    rates = {plan.kind(probe, step): float(rng.uniform(0.5, 3)) for step in range(probe.total_steps)}

    def total(steps):
        scaled = plan.scaled(config, steps)
        return sum(rates[f"{'warm-up' if s < scaled.discriminator_warmup else 'stage'} {scaled.stage(s)}"]
                   for s in range(steps))  # fmt: skip

    for budget in (20.0, 300.0, 2000.0):
        steps = plan.steps_within(config, rates, budget)
        assert total(steps) <= budget < total(steps + 1) + max(rates.values())  # stages round by a step
        assert plan.seconds(plan.scaled(config, steps), rates) == pytest.approx(total(steps))
    assert plan.steps_within(config, rates, 1e-9) == 1


def test_probe_times_every_kind_without_its_first_step():
    probe = plan.probe_config(STAGED)
    kinds = [plan.kind(probe, step) for step in range(probe.total_steps)]
    whole = {plan.kind(STAGED, step) for step in range(STAGED.total_steps)}
    assert set(kinds) == whole == {"warm-up 1", "stage 1", "stage 4"}
    times, log = iter(np.random.default_rng().uniform(1, 2, 100)), []
    wanted = {name: [] for name in whole}
    for step, name in enumerate(kinds):
        first = kinds.index(name) == step
        took = 50.0 if first else next(times)
        wanted[name] += [] if first else [took]
        log.append({"seconds": took + (log[-1]["seconds"] if log else 0.0)})
    assert plan.measured(probe, log) == pytest.approx({name: np.mean(v) for name, v in wanted.items()})
    assert len(wanted["stage 1"]) == len(wanted["stage 4"]) == 10 and len(wanted["warm-up 1"]) == 3


def test_a_scaled_run_keeps_its_shares():
    short, long = plan.scaled(STAGED, 36), plan.scaled(STAGED, 3600)
    assert short.stages == (30, 0, 0, 6) and long.stages == (3000, 0, 0, 600)
    assert (short.discriminator_warmup, short.warmup_steps, short.regression_fade) == (4, 3, 10)
    assert (long.discriminator_warmup, long.warmup_steps, long.regression_fade) == (40, 30, 100)
    for steps in range(1, 40):
        plan.scaled(STAGED, steps).validate()
        slow = plan.scaled(dataclasses.replace(STAGED, discriminator_warmup=300, generator_interval=5), steps)
        assert any(s >= slow.discriminator_warmup and s % 5 == 0 for s in range(steps))  # the student is trained
        assert plan.scaled(STAGED, steps).total_steps == steps and plan.scaled(STAGED, steps).regression_fade >= 1


# ---------------------------------------------------------------- what is compared

NOTHING = object()


def test_all_is_what_is_registered_and_ablations_change_what_they_say():
    chosen = runs.select(("all",))
    assert set(chosen) == {"nitrofusion", *runs.ABLATIONS} | {r for r in RECIPES if f"{r}-world" in RUNS}

    def flat(config):
        values = config.validate().to_json()
        for group in ("pool", "options"):
            values.update({f"{group}.{key}": value for key, value in values.pop(group).items()})
        return values

    for name, changes in runs.ABLATIONS.items():
        base = flat(chosen[runs.base_of(name)])
        differing = {key for key, value in flat(chosen[name]).items() if value != base.get(key, NOTHING)}
        assert differing == set(changes), name
    for name, config in chosen.items():
        assert config.init == "world-start" and (config.recipe == name or name in runs.ABLATIONS)
    assert list(runs.select(("ns", "regression"))) == ["regression", "ns"]


def test_digest_names_the_configuration_and_not_its_folders():
    config = RUNS["world"]
    moved = dataclasses.replace(config, output="/elsewhere", cache="/there")
    assert runs.digest(moved) == runs.digest(config) != runs.digest(dataclasses.replace(config, seed=9))


def test_digest_of_another_start_is_of_its_weights(tmp_path):
    file, copy, other = (tmp_path / f"{name}.safetensors" for name in "abc")
    for path, value in ((file, 1.0), (copy, 1.0), (other, 2.0)):
        save_file({"a": torch.tensor([value])}, path)
    a, b, c = (runs.digest(dataclasses.replace(RUNS["world"], init=str(path))) for path in (file, copy, other))
    assert a == b != c and a != runs.digest(RUNS["world"])


def test_a_run_from_another_start_is_refused(monkeypatch):
    monkeypatch.setitem(RUNS, "regression-world", dataclasses.replace(RUNS["regression-world"], init=None))
    with pytest.raises(InputError, match="init of regression must be 'world-start', as the others', got None"):
        runs.select(("regression",))


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--recipes", "nitrofusoin"], 2, "did you mean nitrofusion"),
        (["--recipes", "no-refesh"], 2, "did you mean no-refresh"),
        (["--seeds", "0"], 2, "compare: seeds must be in 1..1000, got 0"),
        (["--minutes", "0"], 2, "compare: minutes must be above 0"),
        (["--minutes", "1e9"], 2, "compare: minutes must be above 0"),
        (["--steps", "1", "5"], 2, "compare: steps must be different numbers in 1..4, got [1, 5]"),
        (["--jobs", "0"], 2, "compare: jobs must be >= 1, got 0"),
        (["--num_images", "1"], 2, "num_images must be >= 2, got 1"),
        (["--suite", "wrld"], 2, "compare: suite must be one of world"),
        (["--output", "/proc/nowhere"], 3, "compare: /proc/nowhere must be a folder that can be written"),
        (["--json", "/proc/x.json"], 3, "/proc must be a folder that can be written"),
        (["--start", "nowhere"], 2, "start"),
        (["--start", "world-teacher"], 2, "start must be a student of shifted_timestep 500, got world-teacher of none"),
        (["--sedes", "1"], 2, "did you mean --seeds"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, args, code, words):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *args]) == code
    err = capsys.readouterr().err.strip()
    assert words in err and "Traceback" not in err and "\n" not in err
    assert not list(tmp_path.iterdir())


def test_another_comparison_or_other_files_are_refused(capsys, tmp_path):
    settings = {"suite": "world", "minutes": 4.0, "num_images": 500, "steps": [1, 2, 4], "evaluation_seed": 777}
    (tmp_path / "plan.json").write_text(json.dumps({"settings": settings}))
    assert main(["compare", "--output", str(tmp_path)]) == 2
    assert "minutes 4.0 instead of 5.0" in capsys.readouterr().err
    (tmp_path / "plan.json").rename(tmp_path / "mine.json")
    assert main(["compare", "--output", str(tmp_path)]) == 2
    assert "with other files" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", '{"settings": {', "[]", "{}", '{"settings": 3}', '{"settings": {}, "runs": []}'])
def test_a_damaged_plan_is_named(capsys, tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    assert main(["compare", "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "plan.json must be" in err and "Traceback" not in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    [
        {"recipes": "nitrofusion"}, {"recipes": (1,)}, {"seeds": "3"}, {"seeds": 2.5}, {"minutes": "5"}, {"steps": 1},
        {"steps": (1.0,)}, {"jobs": 0.5}, {"start": 3},
    ],
)  # fmt: skip
def test_arguments_of_another_type_are_refused(tmp_path, option):
    with pytest.raises(InputError, match=next(iter(option))):
        compare(tmp_path / "new", **option)
    assert not (tmp_path / "new").exists()


def test_a_start_whose_file_was_replaced_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "start.safetensors"
    monkeypatch.setattr("nitrofusion.compare._started", lambda config, start: config)
    monkeypatch.setattr("nitrofusion.compare.resolve_unet", lambda name: name)
    monkeypatch.setattr("nitrofusion.compare.run_jobs", lambda *_: 1 / 0)
    for value, error, words in ((1.0, ZeroDivisionError, ""), (2.0, InputError, "with start_sha256 '")):
        save_file({"a": torch.tensor([value])}, file)
        with pytest.raises(error, match=words or None):
            compare(tmp_path / "new", start=str(file))


@pytest.mark.parametrize("text", [None, "", '{"rows": [', "[]", "{}"])
def test_a_result_cut_short_is_made_again(tmp_path, text):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    assert worker.read_result(path) is None and not Job("a", {"result": str(path)}).done()
    path.write_text('{"rows": []}')
    assert worker.read_result(path) == {"rows": []} and Job("a", {"result": str(path)}).done()


def test_damaged_pictures_are_named_with_what_to_do(tmp_path):
    path = tmp_path / "results" / "add-3.safetensors"
    path.parent.mkdir()
    save_file({"1": torch.ones(2)}, path)
    assert record.pictures(tmp_path, ["add"], 3)["add"]["1"].sum() == 2
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"add-3.safetensors must be .* remove add-3.json"):
        record.pictures(tmp_path, ["add"], 3)


def test_evaluations_of_a_run_that_was_removed_are_not_those_of_the_next(tmp_path, monkeypatch):
    import nitrofusion.demo  # first, or it would keep the names below as they are meanwhile
    import nitrofusion.engine
    import nitrofusion.evaluate
    import nitrofusion.train

    config = RUNS["world-smoke"]
    log = {"step": 1, "nimg": 1, "seconds": 1.0, "peak_memory_mb": 1}
    (tmp_path / "log.jsonl").write_text(json.dumps(log))
    said = iter(range(9))
    monkeypatch.setattr(nitrofusion.train, "train", lambda _: tmp_path)
    monkeypatch.setattr(nitrofusion.evaluate, "evaluate", lambda *_, **__: {"accuracy": next(said)})
    drawn = type("Engine", (), {"generate": lambda *_, **__: torch.zeros(1)})
    monkeypatch.setattr(nitrofusion.engine, "load", lambda _: drawn())
    spec = {"result": str(tmp_path / "results/a.json"), "steps": [1], "num_images": 2, "evaluation_seed": 0}
    values = [
        worker.measure(spec | {"config": dataclasses.replace(config, seed=seed).to_json()})["rows"][0]["accuracy"]
        for seed in (1, 1, 2, 2)
    ]
    assert values == [0, 0, 1, 1]


def test_nobody_is_told_of_progress_where_nobody_looks(tmp_path, capsys, monkeypatch):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("no")
    monkeypatch.setattr("nitrofusion.compare.jobs._start", lambda *_: subprocess.Popen(["false"]))
    job = Job("a", {"kind": "nothing", "result": str(tmp_path / "a.json")})
    assert run_jobs([job], tmp_path, 1, "jobs") == {"a": "exit code 1: no"}
    assert "left" not in capsys.readouterr().err


# ---------------------------------------------------------------- whole comparisons


def timeless(record):
    """Rows without what depends on the clock or the process."""
    clock = ("seconds", "seconds_off", "seconds_per_image", "peak_mb")
    return [{k: v for k, v in row.items() if k not in clock} for row in record["rows"]]


def wait_for(path, process):
    deadline = time.monotonic() + 600
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), process.communicate()


def workers(folder):
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if "nitrofusion.compare" in line and str(folder) in line]


MOMENTS = ("logs/probe-broken.log", "runs/nitrofusion-100/config.json", "results/nitrofusion-100-1.json")


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_rows_and_reports_what_failed(tmp_path, monkeypatch, capsys):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "tests.nitrofusion.compare_tiny", str(killed), "nitrofusion", "broken"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(killed / random.choice(MOMENTS), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while workers(killed) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers(killed), "no process outlives the suite"

    monkeypatch.setattr(runs, "configs", runs.configs)  # as it is now, for the other tests
    assert compare_tiny.main(killed, "nitrofusion", "broken") == 5
    err = capsys.readouterr().err
    assert "1 that failed, first probe-broken" in err and "crop_size must be" in err
    record = json.loads((killed / "compare-world.json").read_text())
    assert [(row["run"], row["seed"]) for row in record["rows"]] == [
        ("teacher", 100), ("start", 100), ("nitrofusion", 100), ("broken", 100)
    ]  # fmt: skip
    assert record["errors"][0]["run"] == "broken" and "crop_size" in record["rows"][-1]["error"]
    run, row = killed / "runs/nitrofusion-100", record["rows"][2]
    config = TrainConfig.from_json(json.loads((run / "config.json").read_text()))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert row["config_digest"] == runs.digest(config) and config.seed == 100
    assert row["seconds"] == log[-1]["seconds"] and row["peak_mb"] == max(line["peak_memory_mb"] for line in log)
    assert row["optimizer_steps"] == len(log) == record["protocol"]["plan"]["nitrofusion"]["steps"]
    assert "broken" in Balanced((killed / "report.html").read_text()).text

    for done in ("plan.json", "probes", "samples", "results/teacher-100*", "results/start-100*"):  # no kill of these
        for path in killed.glob(done):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            (whole / path.relative_to(killed)).parent.mkdir(parents=True, exist_ok=True)
            copy(path, whole / path.relative_to(killed))
    assert compare_tiny.main(whole, "nitrofusion") == 0
    other = json.loads((whole / "compare-world.json").read_text())
    assert timeless(other) == timeless(record)[:-1] and not other["errors"]

    before = (whole / "compare-world.json").read_bytes()
    assert compare_tiny.main(whole, "nitrofusion") == 0, "nothing is left to do"
    assert (whole / "compare-world.json").read_bytes() == before


# ---------------------------------------------------------------- the page


def row(run, seed, steps, accuracy, frechet=30.0, seconds=60.0):
    values = {"accuracy": accuracy, "frechet": frechet, "sharpness": 0.18, "diversity": 1.0, "grain_rate": 0.03}
    values["structure_rate"] = 0.05
    spans = {f"{name}_interval": [v - 0.01, v + 0.01] for name, v in values.items()}
    about = {"seconds": seconds, "seconds_off": seconds / 60 - 1, "optimizer_steps": 40, "images": 2560, "peak_mb": 900}
    return {"run": run, "seed": seed, "steps": steps, **values, **spans, **({} if run in runs.REFERENCES else about)}


@pytest.fixture
def result():
    seeds = ((100, -0.001), (101, 0.0), (102, 0.001))
    rows = [row("teacher", seed, 8, 0.99 + noise) for seed, noise in seeds]
    for n in (1, 4):
        for seed, noise in seeds:
            rows += [
                row("start", seed, n, 0.97 - 3 * noise),
                row("regression", seed, n, 0.95 + noise, seconds=90 if seed == 100 else 60),
                row("nitrofusion", seed, n, 0.97 + 2 * noise, 28.0),
                row("ns", seed, n, 0.97 + noise, 28.0 + 1000 * noise),
            ]
    protocol = {
        "seeds": [100, 101, 102], "steps": [1, 4], "num_images": 500, "seconds_budget": 60.0, "tolerance": 0.15,
        "teacher_sample_seconds": 120.0, "cores": 2, "cpu": "a <CPU>", "accuracy_real": 1.0, "frechet_floor": 20.0,
        "sharpness_real": 0.19, "structure_rate_real": 0.017,
    }  # fmt: skip
    errors = [{"run": "pgsb", "seed": 100, "error": EVIL}]
    return {"rows": rows + errors, "protocol": protocol, "errors": errors}


def line(step):
    share = {"global-cond/10": [0.25, 0.25], "local-cond/10": [0.5, 0.0]}
    cells = {name: {"real": [1.0, 0.5], "fake": [-1.0, 0.0]} for name in share}
    age = {"mean": 2.0, "max": 9, "histogram": [3, 1]}
    return {"step": step, "seconds": step, "loss": {"student.a": 1 / step}, "cells": cells, "head_age": age,
            "gradient_share": share}  # fmt: skip


def test_verdict_says_what_exceeds_the_spread_and_what_does_not(result):
    said = " ".join(verdict(result))
    assert "At 1 step: accuracy is best in nitrofusion (97.0 %, untrained start 97.0 %), beyond the seeds'" in said
    assert "spread of start: regression (worse, −2.0 %), beyond the seeds' spread of regression: nitrofusion" in said
    assert "nitrofusion (better, +2.0 %), ns (better, +2.0 %)" in said
    assert "frechet distance is best in nitrofusion (28.00, untrained start 30.00), beyond the seeds' spread" in said
    assert "grain is best in" in said and "no difference to start at this scale, no difference to regression" in said
    assert "Ablations beside nitrofusion at 1 step: no difference at this scale." in said
    # 3 runs beside the start, 2 beside regression, x 4 metrics x 2 steps, and 1 ablation x 4
    assert "of 44 differences exceed the seeds' spread" in said


def test_verdict_counts_only_what_two_seeds_tell(result):
    gone = ("ns", "regression")
    result["rows"] = [r for r in result["rows"] if r["run"] not in gone or r["seed"] == 100 or "error" in r]
    said = " ".join(verdict(result))
    assert "No results yet of regression with seed 101, 102; ns with seed 101, 102." in said
    assert "regression: " not in said.replace("with", "") and "of regression at" not in said
    assert "no difference to regression" not in said and "Ablations" not in said
    assert "of 8 differences exceed" in said  # nitrofusion beside the start, x 4 metrics x 2 steps


def test_verdict_of_one_seed_claims_nothing(result):
    result["protocol"]["seeds"] = [100]
    result["rows"] = [r for r in result["rows"] if r["seed"] == 100]
    said = " ".join(verdict(result))
    assert "no difference on this page can be told from chance" in said and "spread of" not in said
    assert verdict({**result, "rows": []}) == ["No run has results yet."]


def test_page_shows_intervals_differences_flags_and_errors(tmp_path, result):
    pictures = {"teacher": {"8": torch.zeros(16, 3, 32, 32)}}
    pictures |= {run: {n: torch.rand(16, 3, 32, 32) for n in ("1", "2", "4")} for run in ("start", "nitrofusion")}
    logs = {"nitrofusion": [line(s) for s in range(1, 11)], "ns": [line(s) for s in range(1, 3)], "pgsb": []}
    path = write_comparison(tmp_path, result, pictures, logs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.png"]
    html = path.read_text(encoding="utf-8")
    page = Balanced(html)
    assert not re.search(r"https?:|@import|url\(|<script", html)
    low, high = scipy.stats.t.interval(0.95, 2, loc=95, scale=0.1 / math.sqrt(3))
    for words in (
        f"{low:.1f} % to {high:.1f} %", "+2.0 % vs regression", "vs start", "vs nitrofusion", "1.50 (+50 %)",
        "0.88 GiB", EVIL, "1 of them are further off", "a <CPU>", "Losses of nitrofusion",
        "Pictures at 1 step", "Pictures at 4 steps", "Share of the heads' gradient", "Discriminator pool of ns",
    ):  # fmt: skip
        assert words in page.text, words
    assert "Pictures at 2 steps" not in page.text and "Losses of pgsb" not in page.text
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2 * 3 * 16


@pytest.mark.parametrize("gone", ["nitrofusion", "regression", "teacher", "start", "all"])
def test_page_with_missing_runs(tmp_path, result, gone):
    result["rows"] = [r for r in result["rows"] if r["run"] != gone and gone != "all"]
    Balanced(write_comparison(tmp_path, result, {}, {}).read_text(encoding="utf-8"))
    incomplete = [r for r in result["rows"] if not (r["run"] == "ns" and (r["seed"], r.get("steps")) != (101, 4))]
    Balanced(write_comparison(tmp_path, {**result, "rows": incomplete}, {}, {}).read_text(encoding="utf-8"))


def test_gradient_map_sums_to_a_hundred():
    log = [{"gradient_share": {"a/10": [0.5, 0.5]}}] * 8 + [{"gradient_share": {"a/500": [1.0, 0.0]}}]
    log.append({"gradient_share": {"a/10": [0.25, 0.75]}})
    assert gradient_map(log) == {"rows": ["a/10", "a/500"], "values": [[12.5, 37.5], [50.0, 0.0]]}
    assert gradient_map([{"step": 1}]) is None

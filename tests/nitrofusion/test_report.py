"""The report from made-up data: complete, self-contained, escaped, well formed."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from nitrofusion.report import image_grid, save_preview, write_report
from nitrofusion.report.charts import MAX_POINTS, heat_map, histogram, line_chart, number, ticks
from nitrofusion.report.page import head_age, pool_margin, training_curves
from nitrofusion.report.pictures import labelled_strips

EVIL = "<script>alert(\"x\")</script> & 'more'"
VOID = {"meta", "img", "br", "link", "input"}


def fake_row(label, steps, accuracy):
    return {
        "label": label,
        "steps": steps,
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.05, accuracy + 0.05],
        "frechet": 10.0,
        "frechet_interval": [9.0, 11.0],
        "sharpness": 0.2,
        "sharpness_interval": [0.19, 0.21],
        "diversity": 0.9,
        "diversity_interval": [0.8, 1.0],
        "seconds_per_image": 0.0123,
        "accuracy_real": 0.987,
        "frechet_floor": 1.32,
        "sharpness_real": 0.228,
        "num_images": 400,
    }


def fake_line(step):
    return {
        "step": step,
        "nimg": step * 8,
        "seconds": step * 0.5,
        "loss": {"pool.adversarial": 1.0 / step, "student.adversarial": float("nan") if step == 3 else 2.0},
        "grad_norm": {"pool": 1.0, "student": None if step == 3 else 0.5},
        "images_per_second": 16.0,
        "peak_memory_mb": 2048,
        "cells": {
            "local-cond/750": {"real": [1.0, 0.5], "fake": [-1.0, 1.0]},
            "global-cond/250": {"real": [0.5, float("nan")], "fake": [0.25, 0.0]},
            "global-cond/10": {"real": [0.0, 0.0], "fake": [0.0, 0.0]},
        },
        "head_age": {"mean": 2.5, "max": 40, "histogram": [3, 2, 1, 2]},
    }


@pytest.fixture
def data():
    prompts = ["a red circle", EVIL, "a ring"]
    return {
        "title": f"Title {EVIL}",
        "summary": f"Summary {EVIL}",
        "rows": [fake_row("teacher", 8, 0.9), fake_row(f"regression {EVIL}", 1, 0.4), fake_row("student", 1, 0.817)],
        "prompts": prompts,
        "grids": [
            {"label": "teacher, 8 steps", "images": torch.rand(3, 3, 32, 32) * 2 - 1},
            {"label": f"student {EVIL}, 1 step", "images": torch.rand(3, 3, 32, 32) * 2 - 1},
        ],
        "log": [fake_line(step) for step in range(1, 11)],
        "evaluations": [
            {"step": s, "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "frechet": 3.0} for s in (0, 5, 10)
        ],
        "config": {"preset": EVIL, "lr": 1e-4},
    }


class Balanced(HTMLParser):
    """Fails on a tag that closes another one; collects tags and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# ---------------------------------------------------------------- the three files


def test_page_is_self_contained_well_formed_and_escaped(tmp_path, data):
    path = write_report(tmp_path / "new", data)
    assert path == tmp_path / "new" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json", "report.png"]
    text = path.read_text(encoding="utf-8")
    page = Balanced(text)
    assert not re.search(r"https?:|@import|url\(", text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,"), tag
        assert not [name for name in attrs if name.startswith("on")]
    assert page.text.count('alert("x")') >= 5  # title, summary, a row, a prompt, a setting: shown, not run


def test_page_says_what_it_shows(tmp_path, data):
    page = Balanced(write_report(tmp_path, data).read_text(encoding="utf-8"))
    for words in ("81.7 %", "76.7 % to 86.7 %", "12.3 ms", "98.7 %", "1.32", "0.228", "400 fresh scenes", "2.0 GiB"):
        assert words in page.text, words
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 6 and all(i["alt"] == i["title"] for i in images)
    assert images[0]["alt"] == "teacher, 8 steps: a red circle"
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(charts) == 4 + 2 + 1 + 2 and all(c["aria-label"] for c in charts)


def test_json_holds_the_numbers_and_no_nan(tmp_path, data):
    write_report(tmp_path, data)
    refuse = lambda name: pytest.fail(f"{name} in JSON")  # noqa: E731
    numbers = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert numbers["rows"] == data["rows"] and numbers["prompts"] == data["prompts"]
    assert numbers["curves"]["grad_norm"]["student"][:3] == [[1, 0.5], [2, 0.5], [4, 0.5]]
    assert numbers["pool_margin"]["rows"] == ["global-cond/10", "global-cond/250", "local-cond/750"]
    assert numbers["pool_margin"]["values"] == [[0.0, 0.0], [0.25, None], [2.0, -0.5]]
    assert numbers["head_age"]["edges"] == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("missing", ["rows", "prompts", "grids", "log", "evaluations", "config", "summary", "title"])
def test_any_part_may_be_missing(tmp_path, data, missing):
    if missing == "prompts":
        del data["grids"]
    del data[missing]
    Balanced(write_report(tmp_path, data).read_text(encoding="utf-8"))


def test_empty_report_and_a_log_of_a_recipe_without_a_pool(tmp_path, data):
    Balanced(write_report(tmp_path, {}).read_text(encoding="utf-8"))
    log = [{k: v for k, v in line.items() if k not in ("cells", "head_age")} for line in data["log"]]
    page = write_report(tmp_path, {"title": "regression", "log": log}).read_text(encoding="utf-8")
    assert "Discriminator pool" not in page and "Gradient norm" in page


def test_report_overwrites_and_leaves_nothing_else(tmp_path, data):
    write_report(tmp_path, data)
    write_report(tmp_path, {**data, "title": "second"})
    assert "second" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(list(tmp_path.iterdir())) == 3


# ---------------------------------------------------------------- numbers


def test_long_logs_are_thinned():
    log = [fake_line(step) for step in range(1, 4 * MAX_POINTS + 1)]
    steps, values = training_curves(log)["images_per_second"]["images per second"]
    assert len(steps) == MAX_POINTS and steps[:2] == [1, 5] and set(values) == {16.0}


def test_margin_averages_the_last_fifth():
    log = [{"step": s, "cells": {"t/10": {"real": [float(s)], "fake": [0.0]}}} for s in range(1, 11)]
    assert pool_margin(log) == {"rows": ["t/10"], "columns": [0], "values": [[9.5]], "steps": [9, 10]}
    assert pool_margin([{"step": 1}]) is None and head_age([]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3, "3"), (-0.5, "−0.5"), (0.12345, "0.123"), (12.34, "12.3"), (123.4, "123"), (450.4, "450"),
     (999.7, "1000"), (19200, "19,200"), (1.5e-5, "1.50e−05"), (None, "–"), (float("nan"), "–")],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (1e-6, 2e-6), (5, 5), (0, 0), (-1e9, 1e9)])
def test_ticks_are_few_even_and_cover(low, high):
    t = ticks(low, high)
    assert t[0] <= low and t[-1] >= high and 2 <= len(t) <= 8
    assert np.allclose(np.diff(t), t[1] - t[0])


# ---------------------------------------------------------------- charts


def test_charts_are_well_formed_svg_with_titles_and_units():
    charts = [
        line_chart({EVIL: ([1, 2, 3], [1, None, float("inf")]), "b": ([1, 2], [2.0, 3.0])}, EVIL, "step", "loss", 0.5),
        line_chart({"a": ([0, 1], [1.0, 2.0])}, "bands", "x", "y", bands={"a": ([0.5, 1.5], [1.5, 2.5])}),
        line_chart({"flat": ([4], [1.0])}, "one point", "x", "y"),
        heat_map([[1.0, None], [-0.5, 0.0]], [EVIL, "r"], ["c", "d"], "heat", "legend"),
        histogram([1, 0, 5], [0, 2, 4, 6], "ages", "steps", "heads"),
        line_chart({}, "none", "x", "y"),
        heat_map([[None]], ["r"], ["c"], "none"),
        histogram([], [], "none", "x", "y"),
    ]
    for svg in charts:
        root = ET.fromstring(svg)
        assert root.get("role") == "img" and root.find("title").text and root.find("desc").text
    assert "loss" in ET.fromstring(charts[0]).find("desc").text
    assert "".join(ET.fromstring(charts[3]).itertext()).count("−0.50") == 2  # in the cell and its tooltip
    assert len(ET.fromstring(charts[4]).findall("rect")) == 3
    assert "No data" in charts[-1]


def test_twelve_lines_look_different():
    lines = ET.fromstring(line_chart({f"run {k}": ([0, 1], [k, k]) for k in range(12)}, "t", "step", "loss"))
    looks = [path.get("class") for path in lines.iter("path") if "line" in path.get("class")]
    in_legend = [line.get("class") for line in lines.iter("line") if "line" in line.get("class").split()]
    assert len(set(looks)) == 12 and looks == in_legend


def test_line_stays_in_the_drawing_and_ends_where_the_data_does():
    svg = ET.fromstring(line_chart({"a": (range(1000), [0.0] * 500 + [1e6] + [1.0] * 499)}, "t", "x", "y", 0.1))
    width, height = map(float, svg.get("viewBox").split()[2:])
    for path in svg.iter("path"):
        points = [tuple(map(float, p.split())) for p in re.split("[ML]", path.get("d"))[1:]]
        assert len(points) <= MAX_POINTS + 1
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
        assert points[-1][0] == pytest.approx(width - 14, abs=0.1)


# ---------------------------------------------------------------- pictures


def test_image_grid_places_every_picture_in_whole_pixels():
    pictures = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    sheet = np.array(image_grid(pictures, cols=3, scale=2))
    assert sheet.shape == (2 * 8 + 4, 3 * 8 + 2 * 4, 3)
    for i, value in enumerate((0, 64, 128, 191, 255)):
        y, x = i // 3 * 12, i % 3 * 12
        assert (sheet[y : y + 8, x : x + 8] == value).all()


def test_save_preview_shows_every_row(tmp_path):
    path = tmp_path / "preview.png"
    rows = [("teacher, 8 steps", torch.ones(2, 3, 32, 32)), ("student, 1 step", -torch.ones(2, 3, 32, 32))]
    save_preview(path, rows)
    pixels = np.array(Image.open(path).convert("RGB"))
    assert (pixels == 255).all(-1).sum() >= 2 * 96 * 96 and (pixels == 0).all(-1).sum() >= 2 * 96 * 96
    assert [p.name for p in tmp_path.iterdir()] == ["preview.png"]


def test_large_pictures_are_reduced(tmp_path, data):
    save_preview(tmp_path / "preview.png", [("student", torch.zeros(2, 3, 1024, 1024))])
    assert Image.open(tmp_path / "preview.png").height < 400
    data["grids"] = [{"label": "student, 1 step", "images": torch.rand(3, 3, 1024, 1024)}]
    assert write_report(tmp_path, data).stat().st_size < 1_500_000


def test_a_minus_sign_is_drawn_as_one():
    """The font that is drawn with has U+002D alone, and a box for all it lacks."""
    pictures = torch.rand(2, 3, 8, 8) * 2 - 1
    signs = [labelled_strips([(f"{sign}1 step", pictures)], f"{sign}2", f"{sign}3 %") for sign in "−-+"]
    assert signs[0].tobytes() == signs[1].tobytes() != signs[2].tobytes()


@pytest.mark.parametrize("values", [(1e-14, 2e-14), (0.0, 5e-324), (-1e308, 1e308), (1e16, 1e16 + 2), (0.1, 0.1)])
def test_numbers_of_any_size_have_a_chart(values):
    chart = ET.fromstring(line_chart({"a": ([1, 2], values)}, "t", "x", "y"))
    assert "nan" not in ET.tostring(chart, "unicode") and len(set(ticks(1e-14, 2e-14))) > 2


def test_what_cannot_be_drawn_is_a_gap_in_bands_and_bars_too():
    spans = ([0.5, None, 1.0], [1.5, 2.0, float("nan")])
    for name in ("bands", "bars"):
        chart = line_chart({"a": ([1, 2, float("inf")], [1.0, 2.0, 3.0])}, "t", "x", "y", **{name: {"a": spans}})
        ET.fromstring(chart)
        assert "nan" not in chart and "inf" not in chart
        assert chart.count('class="band' if name == "bands" else 'class="bar-of') == 1


def test_a_long_name_keeps_its_end_and_stays_on_the_chart():
    names = [f"{'a folder of many words/' * 9}{i}" for i in range(2)]
    chart = ET.fromstring(line_chart({name: ([1, 2], [1.0, 2.0]) for name in names}, "t", "x", "y"))
    ends = [t for t in chart.iter("text") if t.text and t.text.startswith("…")]
    assert [t.text[-1] for t in ends] == ["0", "1"] and all(float(t.get("x")) + 7.3 * len(t.text) < 520 for t in ends)


def test_headings_and_names_of_any_length_stay_on_the_picture():
    few = torch.zeros(2, 3, 32, 32)
    for rows in ([], [("a", few)], [("line\nline" * 99, few)], [("none", few[:0])]):
        for title in ("A page without any picture", "many words " * 30, "w" * 300):
            sheet = np.asarray(labelled_strips(rows, title))
            assert sheet.shape[1] <= 2000 and (sheet[:, -12:] == sheet[0, 0]).all(), (rows, title)
            assert (sheet[:60, 24:] != sheet[0, 0]).any()


def test_a_map_of_few_columns_has_room_for_its_headings():
    chart = ET.fromstring(heat_map([[1.0]], ["a"], ["b"], "t" * 40, "l" * 80))
    assert float(chart.get("viewBox").split()[2]) >= max(9 * 40, 7 * 80)


def test_a_long_prompt_leaves_room_for_its_pictures(tmp_path, data):
    data["prompts"][0] = "x" * 10_000
    page = Balanced(write_report(tmp_path, data).read_text())
    assert "x" * 199 + "…" in page.text and "x" * 200 not in page.text
    assert any("x" * 10_000 in attrs["title"] for tag, attrs in page.tags if tag == "img")

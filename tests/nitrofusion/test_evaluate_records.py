"""Records: they round-trip, say what differs, refuse unlike protocols; and the pages made of them."""

import copy
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from nitrofusion.cli import main
from nitrofusion.errors import InputError, StorageError
from nitrofusion.evaluate import compare_records, evaluate, read_record, world, write_record
from nitrofusion.evaluate.metrics import Z95
from nitrofusion.evaluate.record import PROTOCOL, check_comparable, make_record, make_result, timeless
from nitrofusion.evaluate.suites import digest_of
from nitrofusion.evaluate.world_record import world_record
from nitrofusion.report import paper
from nitrofusion.report.charts import line_chart
from nitrofusion.report.records import labels, markdown, value_text, write_records

from .test_report import EVIL, Balanced

SAMPLE = {"n": 5000, "prompts_digest": "ab" * 32, "seed_rule": "seed = index", "resolution": [64, 48], "format": "png"}
METRICS = {"clip_score": ("CLIP score", "higher", 0.003), "fid": ("FID", "lower", 0.6), "odd": ("Odd", "real", None)}


def record(values, half=0.01, model="student", steps=1, seconds=0.05, suite="coco5k", sample=None, **fields):
    """A made-up record of {metric: value}."""
    sample, results = sample or SAMPLE, []
    for name, value in values.items():
        title, better, floor = METRICS[name]
        metric = {
            "metric": name, "reference_digest": "cd" * 32 if name == "fid" else None,
            "reference_n": 5000 if name == "fid" else None, "implementation": "made up 1", "extractor": f"see {name}",
            "extractor_digest": "ef" * 32, "resize": "bicubic 224",
        } | fields  # fmt: skip
        measured = {"title": title, "better": better, "value": value, "interval": [value - half, value + half],
                    "noise_floor": floor, "version": "1"}  # fmt: skip
        results.append(make_result(sample, metric, measured))
    subject = {"model": model, "num_inference_steps": steps, "unet": "123"}
    run = {"seconds_per_image": seconds, "device": "a machine", "date": "today"}
    return make_record(suite, sample, results, subject, run, [])


# ---------------------------------------------------------------- records


def test_records_round_trip(tmp_path):
    rng = np.random.default_rng()
    made = record({name: float(rng.normal()) * 10.0 ** float(rng.integers(-9, 9)) for name in METRICS}, model=EVIL)
    write_record(tmp_path / "new" / "record.json", made)
    assert read_record(tmp_path / "new" / "record.json") == made
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["record.json"]
    assert set(PROTOCOL) < set(made["results"][0])


def test_what_may_differ_between_two_runs_is_in_run_alone():
    a, b = record({"fid": 25.0}, seconds=1.0), record({"fid": 25.0}, seconds=2.0)
    assert a != b and timeless(a) == timeless(b)


def alter(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(record="other"), "must be a record of nitrofusion-evaluation-1, got 'other'"),
        (lambda r: r.pop("results"), "must have results"),
        (lambda r: r["results"][0].pop("resize"), "every result of .* must have resize"),
        (lambda r: r["results"][0].update(resize="lanczos"), "protocol of fid in .* must have its digest"),
        (lambda r: r["results"][0].update(n=4999), "protocol of fid in .* must have its digest"),
        (lambda r: r["results"][0].update(value=math.nan), "NaN, which JSON does not have"),
        (lambda r: r["results"][0].update(interval=[2, 1]), "fid of .* must have a value and an interval"),
        (lambda r: r["results"][0].update(interval=None), "fid of .* must have a value and an interval"),
    ],
)
def test_altered_records_are_refused(tmp_path, change, words):
    write_record(tmp_path / "record.json", record({"fid": 25.0}))
    alter(tmp_path / "record.json", change)
    with pytest.raises(InputError, match=words):
        read_record(tmp_path / "record.json")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"record": 1}'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(InputError, match="record: .*record.json must be"):
        read_record(tmp_path / "record.json")
    with pytest.raises(InputError, match="must be a file that can be read"):
        read_record(tmp_path)


# ---------------------------------------------------------------- comparisons


@pytest.mark.parametrize("field", [name for name in PROTOCOL if name != "metric"])
def test_a_difference_in_any_field_is_named_and_refused(field):
    changed = {"n": 4000, "resolution": [32, 32], "reference_n": 7}.get(field, "another")
    mine = record({"fid": 25.0})
    if field in SAMPLE:
        other = record({"fid": 25.0}, sample={**SAMPLE, field: changed})
    else:
        other = record({"fid": 25.0}, **{field: changed})
    with pytest.raises(InputError) as error:
        compare_records(mine, other)
    before, after = (str(r["results"][0][field]) for r in (mine, other))
    told = str(error.value).split("got ")[1]
    assert told == f"{field} {before[:12] if len(before) == 64 else before} and {after}"
    with pytest.raises(InputError, match=field):
        check_comparable([record({"odd": 1.0}), mine, other])
    check_comparable([record({"odd": 1.0}), mine, mine])


def test_model_latency_date_and_suite_are_no_protocol():
    a = record({"fid": 25.0})
    b = record({"fid": 25.5}, model="other", steps=4, seconds=9.0, suite="prompts")
    assert compare_records(a, b)[0]["difference"] == 0.5


def test_intervals_of_differences_are_those_of_independent_normals():
    rng = np.random.default_rng()
    (x, y), (s, t) = rng.normal(size=2), rng.uniform(0.1, 2, 2)
    (found,) = compare_records(record({"odd": x}, Z95 * s), record({"odd": y}, Z95 * t))
    half = Z95 * math.sqrt(s**2 + t**2)  # of the difference of two normals
    assert found["difference"] == pytest.approx(y - x)
    assert found["interval"] == pytest.approx([y - x - half, y - x + half])


@pytest.mark.parametrize(
    ("metric", "change", "half", "says"),
    [
        ("fid", 0.59, 0.01, "within the noise floor"),
        ("fid", -0.6, 0.01, "within the noise floor"),
        ("fid", 0.7, 0.6, "within the intervals"),  # half is 0.6 sqrt 2
        ("fid", 0.7, 0.4, "worse"),
        ("fid", -0.7, 0.4, "better"),
        ("clip_score", 0.002, 1e-6, "within the noise floor"),
        ("clip_score", 0.01, 0.001, "better"),
        ("clip_score", -0.01, 0.001, "worse"),
        ("odd", 1e-9, 0.0, "different"),
        ("odd", 0.0, 0.0, "within the intervals"),
    ],
)
def test_what_a_gap_says(metric, change, half, says):
    (found,) = compare_records(record({metric: 0.0}, half), record({metric: change}, half))
    assert found["says"] == says


def test_metrics_of_one_alone_are_left_out_and_none_in_common_is_refused():
    both, one = record({"fid": 25.0, "odd": 1.0}), record({"odd": 2.0})
    assert [d["metric"] for d in compare_records(both, one)] == ["odd"]
    with pytest.raises(InputError, match="records must share a metric, got fid and odd"):
        compare_records(record({"fid": 25.0}), one)


def test_command_compares_and_writes_a_page(tmp_path, capsys):
    for name, made in {
        "a": record({"fid": 25.0, "odd": 1.0}),
        "b": record({"fid": 27.0}, steps=4, seconds=0.2),
        "c": record({"fid": 25.1, "odd": 1.0}, model="other"),
        "d": record({"odd": 1.0}, resize="none"),
    }.items():
        write_record(tmp_path / f"{name}.json", made)
    paths = {name: str(tmp_path / f"{name}.json") for name in "abcd"}
    page = tmp_path / "page" / "all.html"
    assert main(["compare-records", paths["a"], paths["b"], paths["c"], "--output", str(page)]) == 0
    out = capsys.readouterr().out
    assert "+2.0000" in out and "worse" in out and "+0.1000" in out and "within the noise floor" in out
    assert page.is_file() and page.with_suffix(".md").is_file()
    # c and d share a metric of two protocols, though a and b would let either pass.
    for options, words in (
        ([paths["b"], paths["c"], paths["d"]], "records must share a metric"),
        ([paths["a"], paths["d"]], "odd must be measured by one protocol, got resize bicubic 224 and none"),
        ([paths["a"]], "records must be at least two, got 1"),
        ([paths["a"], str(tmp_path / "no.json")], "no.json must be a file that can be read"),
    ):
        assert main(["compare-records", *options]) == 2
        err = capsys.readouterr().err.strip()
        assert words in err and "\n" not in err


# ---------------------------------------------------------------- suite world


def test_results_of_suite_world_are_records(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "REFERENCE_SCENES", 200)
    monkeypatch.setattr(world, "_references", {})
    from .test_evaluate import paint

    records = []
    for seed in (0, 0, 1):
        result = world.evaluate_world(paint, 20, seed)
        records.append(world_record({"suite": "world", "model": "paint", **result}))
        found = {r["metric"]: (r["value"], r["interval"]) for r in records[-1]["results"]}
        assert len(found) == 6
        for name, (value, interval) in found.items():
            assert (value, interval) == (result[name], result[f"{name}_interval"])
    write_record(tmp_path / "record.json", records[0])
    assert read_record(tmp_path / "record.json") == records[0]
    assert timeless(records[0]) == timeless(records[1])
    assert {d["difference"] for d in compare_records(records[0], records[1])} == {0.0}
    with pytest.raises(InputError, match="got prompts_digest .* seed_rule"):
        compare_records(records[0], records[2])
    write_records(tmp_path / "page.html", records[:1], [None])
    assert "real pictures" in (tmp_path / "page.html").read_text()


# ---------------------------------------------------------------- pages


def parse(path):
    Balanced(path.read_text())
    return path.read_text()


def test_page_shows_every_number_and_needs_nothing_else(tmp_path):
    made = [
        record({"fid": 24.87, "clip_score": 0.3187}),
        record({"fid": 27.31, "clip_score": 0.3141}, steps=4, seconds=0.2),
    ]
    text = parse(write_records(tmp_path / "page.html", made, [None, None]))
    for r in made:
        for result in r["results"]:
            for value in (result["value"], *result["interval"]):
                assert value_text(value, result["metric"]) in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text.replace("http-equiv", "")
    assert text.count("<svg") > 4 and "Quality against latency" in text and "Steps against quality" in text
    for floor in ("0.6 FID", "0.003 CLIP", "0.01 ImageReward"):
        assert floor in text


def test_page_of_one_record_has_no_curves_and_names_what_failed(tmp_path):
    made = record({"fid": 24.87}, model=EVIL)
    made["errors"] = [{"metric": "kid", "extractor": "x", "error": EVIL}]
    text = parse(write_records(tmp_path / "page.html", [made], [None]))
    assert "Quality against" not in text and "What failed" in text and "<script" not in text
    assert "<script" not in (tmp_path / "page.md").read_text()


def test_papers_table_stands_beside_ours_for_its_suite_only(tmp_path):
    text = parse(write_records(tmp_path / "page.html", [record({"fid": 24.87, "clip_score": 0.3187})], [None]))
    for model, _, values in paper.ROWS:
        assert model in text
        for metric, value in zip(paper.COLUMNS, values, strict=True):
            assert value_text(value, metric) in text
    assert "student (ours)" in text and "not one protocol" in text and "is larger for that alone" not in text
    fewer = record({"fid": 24.87}, sample={**SAMPLE, "n": 1000})
    assert "Ours has 1,000 pictures, not 5,000" in markdown([fewer])
    other = record({"fid": 24.87}, suite="prompts")
    assert "The paper's table" in text
    assert "The paper's table" not in parse(write_records(tmp_path / "other.html", [other], [None]))


def test_markdown_tables_are_whole():
    made = [record({"fid": 24.87, "clip_score": 0.3187}, model="a|b\nc"), record({"fid": 27.31}, steps=2)]
    lines = markdown(made).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 2 + 2 + 2 + len(paper.ROWS) + 2
    counts = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert set(counts[:4]) == {5} and set(counts[4:]) == {7}


def test_pages_refuse_what_compare_refuses(tmp_path):
    made = [record({"fid": 24.87}), record({"fid": 24.87}, resize="none")]
    with pytest.raises(InputError, match="fid must be measured by one protocol, got resize"):
        write_records(tmp_path / "page.html", made, [None, None])
    assert not (tmp_path / "page.html").exists()


def test_bars_are_drawn_and_names_of_many_lines_stay_on_the_chart():
    series = {f"a model with a long name {k}": ([1, 2], [k, k + 1]) for k in range(5)}
    bars = {name: ([y - 0.5 for y in ys], [y + 0.5 for y in ys]) for name, (_, ys) in series.items()}
    chart = line_chart(series, "t", "x", "y", bars=bars)
    assert chart.count('class="bar-of') == 10
    left, top, width, height = map(float, re.search(r'viewBox="([^"]+)"', chart)[1].split())
    ends = re.findall(r'<text class="tick" x="(\d+)" y="(\d+)">([^<]+)</text>', chart)
    assert len(ends) == 5
    for x, y, text in ends:
        assert float(x) + 7.3 * len(text) <= width and float(y) < height
    assert "bar-of" not in line_chart(series, "t", "x", "y")


def test_records_are_not_changed_by_looking(tmp_path):
    made = [record({"fid": 24.87, "odd": 1.0}), record({"fid": 27.31}, steps=2)]
    before = copy.deepcopy(made)
    write_records(tmp_path / "page.html", made, [None, None])
    compare_records(*made)
    assert made == before


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        (("results", 0, "title"), 3), (("results", 0, "metric"), []), (("results", 0, "noise_floor"), "x"),
        (("results", 0, "value"), 10**400), (("protocol",), {}), (("protocol", "resolution"), [1, 2, 3]),
        (("protocol", "n"), None), (("protocol", "prompts_digest"), 1), (("protocol_digest",), None),
        (("subject", "num_inference_steps"), "x"), (("run", "seconds_per_image"), "x"), (("errors",), ["x"]),
        (("run", "seconds_per_image"), 1e307), (("results", 0, "target"), "x"),
        (("results",), record({"fid": 25.0})["results"] * 2),
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused_before_a_page_is_made_of_it(tmp_path, path, bad):
    spoiled = record({"fid": 25.0})
    at = spoiled
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = bad
    result = spoiled["results"][0]
    result["protocol_digest"] = digest_of({name: result[name] for name in PROTOCOL})
    (tmp_path / "record.json").write_text(json.dumps(spoiled))
    with pytest.raises(InputError, match="^record: "):
        read_record(tmp_path / "record.json")


@pytest.mark.parametrize(
    "option",
    [
        {"guidance_scale": 3.0}, {"height": 64}, {"width": 64}, {"weights": "here"}, {"jobs": 2}, {"cache": "here"},
        {"allow_unknown_digest": True},
    ],
)  # fmt: skip
def test_suite_world_refuses_what_it_would_ignore(option):
    with pytest.raises(InputError, match=f"{next(iter(option))} must be None for suite world"):
        evaluate("world", num_images=4, **option)


def test_suite_world_loads_for_the_device_and_backend_that_are_named(monkeypatch):
    told = {}

    def load(model, **loading):
        told.update(loading)
        raise InputError("load: far enough")

    monkeypatch.setattr("nitrofusion.engine.load", load)
    with pytest.raises(InputError, match="far enough"):
        evaluate("world", num_images=4, device="cpu", backend="eager")
    assert told == {"device": "cpu", "backend": "eager"}


def test_a_picture_that_cannot_be_read_is_named_on_the_page(tmp_path):
    (tmp_path / "run" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "run" / "images" / "00000.png")
    (tmp_path / "run" / "images" / "00001.png").write_bytes(b"\x89PNG")
    page = write_records(tmp_path / "page.html", [record({"fid": 24.87})], [tmp_path / "run"])
    assert "00001.png cannot be read" in page.read_text() and "data:image/png" in page.read_text()


def test_evaluations_of_one_name_are_told_apart():
    made = [record({"fid": 25.0}), record({"fid": 26.0}), record({"fid": 27.0}, steps=2)]
    assert labels(made) == ["student, 1 step (1)", "student, 1 step (2)", "student, 2 steps"]


def test_text_of_a_stranger_is_no_html_in_markdown_and_no_unicode_is_asked_of_it(tmp_path):
    sample = SAMPLE | {"seed_rule": "<script>x</script>\n# y"}
    page = write_records(tmp_path / "page.html", [record({"fid": 25.0}, sample=sample, model="caf\udce9")], [None])
    assert "caf\\udce9" in page.read_text() and "<script>" not in page.read_text()
    told = page.with_suffix(".md").read_text()
    assert "caf\\udce9" in told and "<script>" not in told and "\n# y" not in told


@pytest.mark.parametrize("name", ["page.md", "a/record.json", "page.v2"])
def test_a_page_of_another_kind_is_refused_before_it_overwrites_anything(tmp_path, capsys, name):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a/record.json", tmp_path / "b.json"):
        write_record(path, record({"fid": 25.0}))
    before = (tmp_path / "a/record.json").read_bytes()
    arguments = [str(tmp_path / "a/record.json"), str(tmp_path / "b.json"), "--output", str(tmp_path / name)]
    assert main(["compare-records", *arguments]) == 2
    assert "output must be the name of an .html page, got" in capsys.readouterr().err
    assert (tmp_path / "a/record.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_suite_world_leaves_another_suites_folder_alone(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "record.json").write_text("dear")
    with pytest.raises(InputError, match="output must be no other suite's folder for suite world"):
        evaluate("world", num_images=2, output=tmp_path)
    assert (tmp_path / "record.json").read_text() == "dear"
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="must be a folder that can be written"):
        evaluate("world", num_images=2, output=tmp_path / "file")

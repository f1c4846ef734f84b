"""Whole evaluations of the embedded world with small extractors: resumed, killed, shared, partly failing."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from nitrofusion.engine.png import read_settings
from nitrofusion.errors import InputError
from nitrofusion.evaluate import drawing, run, weights, worker
from nitrofusion.evaluate import evaluate as evaluate_suite
from nitrofusion.evaluate.drawing import Pictures, batches
from nitrofusion.evaluate.metrics import Frechet
from nitrofusion.evaluate.record import timeless
from nitrofusion.evaluate.suites import Plan
from nitrofusion.storage import hold_alone

from ..native import LEVELS_BY_BATCH, NATIVE
from . import evaluate_fakes
from .evaluate_fakes import WIDTH, load_colors, notes
from .test_evaluate_suites import write_pictures

PROMPTS = ("a red circle on a navy background", "a blue ring on a white background", "a green square")


def plan_of(n):
    return Plan("prompts", "m", n, ["a"] * n, list(range(n)), "seed = index", None, None, (), {}, {})


def command(folder, *options, **environment):
    """(command line, environment) of an evaluation of prompts in ``folder``."""
    args = ["evaluate", "--suite", "prompts", "--prompts", str(folder.parent / "prompts.txt"), "--output", str(folder),
            "--cache", str(folder.parent / "cache"), "--weights", str(folder.parent), "--batch_size", "3",
            "--jobs", "1", "--metrics", "clip_score", "colour"]  # fmt: skip
    known = {"FAKES": "1", "SHARD": "6", "NOTES": str(folder.with_suffix(".notes"))} | environment
    return ["-m", "tests.nitrofusion.evaluate_fakes", *args, *options], os.environ | known


def evaluate(folder, *options, code=0, **environment):
    args, environment = command(folder, *options, **environment)
    done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One evaluation of 20 prompts that nothing disturbed; the last is drawn when others have been looked at."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    prepare(folder.parent)
    evaluate(folder, LAST_WAITS="19")
    return folder


def prepare(folder):
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("".join(f"{PROMPTS[i % 3]}\n" for i in range(20)))
    (folder / "words.txt").write_text("0.25")


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("n", [1, 5, 64, 100])
def test_batches_cover_every_picture_once_and_are_the_same_whoever_draws_them(n):
    for size in (1, 2, 3, 5):
        shards = list(range(-(-n // 8)))
        shares = [batches(plan_of(n), shards[rank::size], 8, 3) for rank in range(size)]
        assert sorted(i for share in shares for at in share for i in at) == list(range(n))
        assert {at for share in shares for at in share} == set(batches(plan_of(n), shards, 8, 3))
        assert all(len({i // 8 for i in at}) == 1 and len(at) <= 3 for share in shares for at in share)


def test_a_picture_is_finished_when_its_file_is_whole(tmp_path):
    pictures = Pictures(tmp_path)
    pictures.recover()
    assert not pictures.finished(3)
    Image.new("RGB", (8, 8)).save(pictures.path(3))
    assert pictures.finished(3)
    whole = pictures.path(3).read_bytes()
    for cut in (whole[:-1], whole[:20], b""):
        pictures.path(3).write_bytes(cut)
        assert not pictures.finished(3)


def test_what_was_ready_is_published_and_what_was_not_is_dropped(tmp_path):
    for folder, names in ((".ready/000000", (0, 1)), (".ready/000004", ()), (".staging/000002", (2,))):
        (tmp_path / folder).mkdir(parents=True)
        for i in names:
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{i:06d}.png")
    Pictures(tmp_path).recover()
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["000000.png", "000001.png"]
    assert not (tmp_path / ".staging").exists() and not list((tmp_path / ".ready").iterdir())


def test_latency_is_of_batches_drawn_alone(tmp_path):
    pictures = Pictures(tmp_path)
    assert pictures.seconds_per_image() is None
    line = {"start": 0, "images": 2, "seconds": 8.0, "first": True, "alone": True}
    (tmp_path / "drawing-0.jsonl").write_text(json.dumps(line) + '\n{"cut')
    assert pictures.seconds_per_image() == 4.0
    lines = [line, *({**line, "first": False, "seconds": s} for s in (1.0, 2.0, 6.0))]
    lines += [{**line, "first": False, "alone": False, "seconds": 99.0}] * 9
    (tmp_path / "drawing-1.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert pictures.seconds_per_image() == 1.0


@pytest.fixture
def fakes(monkeypatch):
    for name, value in evaluate_fakes.FAKE_EXTRACTORS.items():
        monkeypatch.setitem(worker.instruments.EXTRACTORS, name, value)
    for name, value in evaluate_fakes.FAKE_METRICS.items():
        monkeypatch.setitem(worker.instruments.METRICS, name, value)


def extraction(folder, count, shards, extractor="colors"):
    paths = [str(folder / "p" / f"{i:03d}.png") for i in range(count)]
    each = {"pictures": paths, "prompts": None, "shards": shards, "folder": str(folder / "features")}
    return {"kind": "extract", "modules": [], "extractor": extractor, "weights": {}, "device": "cpu", "polite": False,
            "shard_size": 20, "sets": [each]}  # fmt: skip


def test_features_are_those_of_each_picture_in_order(tmp_path, fakes, monkeypatch):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    pixels = write_pictures(tmp_path / "p", 50)
    worker.work(extraction(tmp_path, 50, [0, 2]))
    look = load_colors({}, "cpu")
    for shard, at in ((0, range(20)), (2, range(40, 50))):
        found = load_file(tmp_path / "features" / f"shard-{shard:05d}.safetensors")["features"]
        wanted = np.concatenate([look([Image.fromarray(pixels[i])], None) for i in at])
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert not (tmp_path / "features" / "shard-00001.safetensors").exists()
    (tmp_path / "notes").unlink()
    worker.work(extraction(tmp_path, 50, [0, 1, 2]))
    assert sum(notes(tmp_path / "notes", "looked")) == 20  # the middle shard alone


def test_features_that_are_no_numbers_and_pictures_that_are_none_are_named(tmp_path, fakes, monkeypatch):
    write_pictures(tmp_path / "p", 3)
    odd = lambda kind: lambda paths, device: lambda images, prompts: kind  # noqa: E731
    nan, short, flat = np.full((3, 2), np.nan), np.zeros((2, 2)), np.zeros(3)
    for value, words in ((nan, "NaN"), (short, r"\[2, 2\]"), (flat, r"\[3\]")):
        monkeypatch.setitem(
            worker.instruments.EXTRACTORS, "odd",
            evaluate_fakes.Extractor("odd", "odd 1", (), False, "none", odd(value)),
        )  # fmt: skip
        with pytest.raises(InputError, match=r"odd must give finite features \[3, width\], got " + words):
            worker.work(extraction(tmp_path, 3, [0], "odd"))
    (tmp_path / "p" / "001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="001.png must be a picture that can be read"):
        worker.work(extraction(tmp_path, 3, [0]))
    assert not list((tmp_path / "features").glob("*.safetensors"))


# ---------------------------------------------------------------- whole evaluations


@pytest.mark.slow
def test_record_says_what_the_pictures_measure(whole):
    record, pixels = record_of(whole), []
    for i in range(20):
        settings = read_settings(whole / "images" / f"{i:06d}.png")
        assert (settings["prompt"], settings["seed"]) == (PROMPTS[i % 3], i)
        pixels.append(np.asarray(Image.open(whole / "images" / f"{i:06d}.png")))
    from nitrofusion.engine import load

    (first,) = load("world").generate(PROMPTS[1], seed=1)
    assert np.abs(np.asarray(first).astype(int) - pixels[1]).max() <= LEVELS_BY_BATCH
    bright = [p.mean() / 255 * 0.25 * len(PROMPTS[i % 3]) for i, p in enumerate(pixels)]
    values = {result["metric"]: result for result in record["results"]}
    assert values["clip_score"]["value"] == pytest.approx(np.mean(bright), rel=1e-5)
    low, high = values["clip_score"]["interval"]
    assert low < np.mean(bright) < high
    features = load_colors({}, "cpu")([Image.fromarray(p) for p in pixels], None)
    assert features.shape == (20, WIDTH) and values["colour"]["value"] == pytest.approx(features.mean(), rel=1e-5)
    assert record["subject"]["num_inference_steps"] == 1 and record["protocol"]["seed_rule"] == "seed = index"
    assert record["run"]["seconds_per_image"] > 0 and record["errors"] == []
    assert sorted(i for seeds in notes(whole.with_suffix(".notes"), "drawn") for i in seeds) == list(range(20))
    page = (whole / "report.html").read_text()
    assert "CLIP score" in page and page.count("data:image/png") == 8 and (whole / "report.md").is_file()


@pytest.mark.slow
def test_the_same_command_does_nothing_twice_and_another_metric_uses_the_same_pictures(whole, tmp_path):
    shutil.copytree(whole.parent, tmp_path / "copy")
    folder = tmp_path / "copy" / "run"
    (tmp_path / "copy" / "run.notes").unlink()
    write_pictures(tmp_path / "real", 30)
    before = record_of(folder)
    evaluate(folder)
    assert record_of(folder) == {**before, "run": record_of(folder)["run"]}
    assert not (tmp_path / "copy" / "run.notes").exists()  # nothing was drawn, nothing was looked at
    options = ("--metrics", "fid", "colour", "--reference", str(tmp_path / "real"))
    evaluate(folder, *options)
    record, seen = record_of(folder), tmp_path / "copy" / "run.notes"
    assert notes(seen, "drawn") == [] and sum(notes(seen, "looked")) == 30
    assert record["results"][1] == before["results"][1]
    images = [Image.open(p).convert("RGB") for p in sorted((folder / "images").iterdir())]
    real = [Image.open(p) for p in sorted((tmp_path / "real").iterdir())]
    look = load_colors({}, "cpu")
    wanted = Frechet(look(real, None))(look(images, None))
    assert record["results"][0]["value"] == pytest.approx(wanted, rel=1e-4)
    # The reference's features are the cache's: another evaluation, of the pictures as a folder, looks at its own only.
    other = tmp_path / "copy" / "folder"
    seen.unlink()
    evaluate(other, "--suite", "folder", "--model", str(folder / "images"), "--metrics", "fid", "--prompts",
             str(tmp_path / "copy" / "prompts.txt"), *options[-2:], "--seed_rule", "seed = index")  # fmt: skip
    assert sum(notes(tmp_path / "copy" / "folder.notes", "looked")) == 20
    a, b = record["results"][0], record_of(other)["results"][0]
    assert a == b, "pictures that were drawn and the same pictures given are one protocol and one value"


def evaluate_here(folder, monkeypatch, **options):
    """The same call in this process, which must end before anything is loaded or started."""
    monkeypatch.setattr("nitrofusion.engine.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(run, "SHARD", 6)
    monkeypatch.setattr(weights, "locate", evaluate_fakes.locate)
    monkeypatch.setattr(weights, "digest", lambda path: path.read_text())
    parent = folder.parent
    usual = {"suite": "prompts", "prompts": parent / "prompts.txt", "output": folder, "cache": parent / "cache",
             "weights": parent, "batch_size": 3, "metrics": ("clip_score", "colour")}  # fmt: skip
    return evaluate_suite("world", **usual | options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "seed_rule 'seed = index' instead of 'seed = 1 \\+ index'"),
        ({"num_images": 10}, "with n 20 instead of 10"),
        ({"num_inference_steps": 2}, "num_inference_steps 1 instead of 2"),
        ({"batch_size": 4}, "batch_size 3 instead of 4"),
    ],
)
def test_another_evaluation_in_the_folder_is_refused_by_name(whole, fakes, monkeypatch, options, words):
    before = (whole / "settings.json").read_bytes()
    with pytest.raises(InputError, match=words):
        evaluate_here(whole, monkeypatch, **options)
    assert (whole / "settings.json").read_bytes() == before


def test_other_files_in_the_folder_are_refused(tmp_path, fakes, monkeypatch):
    prepare(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="with other files"):
        evaluate_here(tmp_path / "run", monkeypatch)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("text", ["", '{"value": 0.', "[1]", "null", "{}"])
def test_a_measurement_that_was_cut_short_is_none(tmp_path, text):
    path = tmp_path / "fid.json"
    assert run._said(path) == {} and run._measured(path) is None
    path.write_text(text)
    assert run._said(path) == {} and run._measured(path) is None
    path.write_text('{"error": "no such file"}')
    assert run._said(path) == {"error": "no such file"} and run._measured(path) is None
    path.write_text('{"value": 0.5, "interval": [0, 1]}')
    assert run._measured(path)["value"] == 0.5


@pytest.mark.slow
def test_one_metric_that_fails_loses_nothing_and_is_tried_again(tmp_path):
    prepare(tmp_path)
    folder = tmp_path / "run"
    options = ("--metrics", "crash", "failure", "clip_score", "--num_images", "6")
    err = evaluate(folder, *options, code=6).stderr
    assert "got 2 that failed, first crash (exit code 7: about to fail)" in err.splitlines()[-1]
    record = record_of(folder)
    assert [result["metric"] for result in record["results"]] == ["clip_score"]
    assert {e["metric"]: e["error"] for e in record["errors"]} == {
        "crash": "exit code 7: about to fail", "failure": "ValueError: no interval today"
    }  # fmt: skip
    assert "about to fail" in (folder / "report.html").read_text()
    seen = folder.with_suffix(".notes")
    drawn = len(notes(seen, "drawn"))
    assert "got 1 that failed, first failure" in evaluate(folder, *options, code=6, MENDED="1").stderr
    assert [result["metric"] for result in record_of(folder)["results"]] == ["crash", "clip_score"]
    assert len(notes(seen, "drawn")) == drawn == 2


# ---------------------------------------------------------------- kills and several processes


def workers(folder):
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if "nitrofusion.evaluate " in line and str(folder) in line]


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_record_and_draws_no_finished_picture_again(whole, tmp_path, seed):
    prepare(tmp_path)
    folder, rng = tmp_path / "run", random.Random(seed)
    args, environment = command(folder, "--jobs", "2", SLOW_DRAWING="0.4", SLOW_FEATURES="0.8")
    seen, kills, shards = folder.with_suffix(".notes"), [], set()
    for wanted in (rng.randint(3, 15), 20):  # the last while features are made
        process = subprocess.Popen([sys.executable, *args], env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 300
        while len(list((folder / "images").glob("*.png"))) < wanted and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.wait()
        process.stderr.close()
        deadline = time.monotonic() + 60
        while workers(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert workers(folder) == []
        finished = {int(path.stem) for path in (folder / "images").glob("*.png")}
        kills.append((finished, len(notes(seen, "drawn"))))
        shards |= {path: path.stat().st_mtime_ns for path in (folder / "features").rglob("*.safetensors")}.items()
    evaluate(folder)
    drawn = notes(seen, "drawn")
    assert len(kills[0][0]) >= 3 and len(kills[0][0]) < 20
    for finished, before in kills:
        assert not finished & {i for seeds in drawn[before:] for i in seeds}
    assert timeless(record_of(folder)) == timeless(record_of(whole))
    assert {path: path.stat().st_mtime_ns for path, _ in shards}.items() == shards  # no shard was written again
    for path in sorted((whole / "images").iterdir()):
        assert (folder / "images" / path.name).read_bytes() == path.read_bytes()


@NATIVE  # two processes draw in other batches
@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs PyTorch with gloo")
def test_two_processes_make_the_record_of_one(whole, tmp_path):
    prepare(tmp_path)
    folder = tmp_path / "run"
    args, environment = command(folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *args]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "record.json").read_text() != ""
    text = [json.dumps(timeless(record_of(each)), indent=1) for each in (folder, whole)]
    assert text[0] == text[1]
    assert {line for line in notes(folder.with_suffix(".notes"), "rank")} == {"0", "1"}
    drawn = sorted(i for seeds in notes(folder.with_suffix(".notes"), "drawn") for i in seeds)
    assert drawn == list(range(20)) and record_of(folder)["run"]["processes"] == 2
    for kind in ("images/*.png", "features/*/*.safetensors"):
        paths = sorted(whole.glob(kind))
        names = [[p.relative_to(each) for p in sorted(each.glob(kind))] for each in (whole, folder)]
        assert paths and names[0] == names[1]
        for path in paths:
            assert (folder / path.relative_to(whole)).read_bytes() == path.read_bytes()
    # A refusal in one is a refusal in all, and said by rank 0 at least.
    refused = subprocess.run([*launch, "--seed", "1"], env=environment, capture_output=True, text=True)
    assert refused.returncode != 0 and "instead of 'seed = 1 + index'" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs PyTorch with gloo")
def test_the_first_of_two_processes_measures_world(tmp_path):
    args = ["-m", "tests.nitrofusion.evaluate_fakes", "evaluate", "--num_images", "6"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    known = os.environ | {"NOTES": str(tmp_path / "notes"), "OMP_NUM_THREADS": "1"}
    found = []
    for where, each in (("one.json", args), ("two.json", [*launch, *args])):
        each = [sys.executable, *each, "--json", str(tmp_path / where)]
        done = subprocess.run(each, env=known, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / where).read_text()))
        assert found[-1].pop("seconds_per_image") > 0
    assert found[0] == found[1]
    ranks = notes(tmp_path / "notes", "rank")  # a line for each call that draws
    assert ranks == [None] * (len(ranks) // 2) + ["0"] * (len(ranks) // 2) and ranks
    wrong = [sys.executable, *launch, *args, "--seed", "-1"]
    refused = subprocess.run(wrong, env=known, capture_output=True, text=True)
    assert refused.returncode != 0 and "seed must be >= 0, got -1" in refused.stderr


def test_drawing_waits_for_no_worker_that_does_not_come(tmp_path, monkeypatch):
    """Pictures of an engine that fails half way: those before are kept, the error is the engine's."""

    class Engine:
        unet_digest = "x"

        def generate(self, prompts, seed, output_type, **options):
            if seed[0] >= 4:
                raise InputError("generate: model drew NaN")
            return [Image.new("RGB", (8, 8), (s, 0, 0)) for s in seed]

        def settings(self, prompt, **options):
            return {"prompt": prompt, **options}

    pictures, plan = Pictures(tmp_path), plan_of(8)
    pictures.recover()
    todo = batches(plan, [0], 8, 2)
    with pytest.raises(InputError, match="drew NaN"):
        drawing.draw(plan, pictures, Engine(), todo, {"batch_size": 2}, 0, lambda count: None)
    pictures.recover()
    assert len(list((tmp_path / "images").iterdir())) in (0, 2, 4)
    assert read_settings(pictures.path(0))["seed"] == 0 if pictures.finished(0) else True


# ---------------------------------------------------------------- what is left of a folder


@pytest.mark.parametrize("cut", [0, 10, -1, None])
def test_features_cut_short_are_made_again(tmp_path, fakes, monkeypatch, cut):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    (tmp_path / "p").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "p" / f"{i:03d}.png")
    shard = worker.shard_path(tmp_path / "features", 0)
    worker.extract(extraction(tmp_path, 3, [0]))
    made = shard.read_bytes()
    assert worker.whole(shard, 3) and not worker.whole(shard, 4)
    if cut is None:
        worker.extract(extraction(tmp_path, 2, [0]))  # of fewer pictures
    else:
        shard.write_bytes(made[:cut])
    assert not worker.whole(shard, 3)
    worker.extract(extraction(tmp_path, 3, [0]))
    assert shard.read_bytes() == made


@pytest.mark.parametrize("text", ["", "[1]", '{"model": '])
def test_damaged_settings_are_named(tmp_path, fakes, monkeypatch, text):
    prepare(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text(text)
    with pytest.raises(InputError, match="evaluate: .*settings.json must be"):
        evaluate_here(tmp_path / "run", monkeypatch)


def test_a_folder_is_of_one_process_at_a_time(tmp_path):
    code = "import sys; from pathlib import Path; from nitrofusion.storage import hold_alone\n"
    code += "held = hold_alone(Path(sys.argv[1]), 'evaluate'); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="evaluate: .* must be of one process at a time"):
            hold_alone(tmp_path, "evaluate")
        other.kill()
    hold_alone(tmp_path, "evaluate").close()

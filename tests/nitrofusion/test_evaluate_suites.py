"""What suites read and refuse before any work: captions, pictures, weights, options."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from nitrofusion.errors import InputError
from nitrofusion.evaluate import evaluate, gallery, instruments, suites, weights
from nitrofusion.evaluate.coco import first_captions
from nitrofusion.evaluate.gallery import open_gallery, open_picture
from nitrofusion.evaluate.suites import make_plan

from .evaluate_fakes import FAKE_EXTRACTORS, FAKE_METRICS, locate


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    for name, value in FAKE_EXTRACTORS.items():
        monkeypatch.setitem(instruments.EXTRACTORS, name, value)
    for name, value in FAKE_METRICS.items():
        monkeypatch.setitem(instruments.METRICS, name, value)
    monkeypatch.setattr(weights, "locate", locate)
    monkeypatch.setattr(weights, "digest", lambda path: path.read_text())


def write_pictures(folder, count, size=(24, 16), suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng().integers(0, 256, (count, size[1], size[0], 3), np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:03d}{suffix}")
    return pixels


def write_coco(path, images, seed=0):
    """Two to four captions an image, everything shuffled; returns image id to its first caption."""
    rng = random.Random(seed)
    numbers = rng.sample(range(10**6), 5 * images)
    names = [{"id": rng.randrange(10**6), "file_name": f"{i:03d}.png", "height": 3} for i in range(images)]
    rows, first = [], {}
    for image in names:
        own = sorted(numbers.pop() for _ in range(rng.randrange(2, 5)))
        rows += [{"id": n, "image_id": image["id"], "caption": f" caption {n}\n"} for n in own]
        first[image["id"]] = (image["file_name"], f"caption {own[0]}")
    rng.shuffle(names)
    rng.shuffle(rows)
    path.write_text(json.dumps({"info": {}, "licenses": [], "images": names, "annotations": rows}))
    return first


# ---------------------------------------------------------------- captions


def test_first_captions_are_those_of_lowest_id_by_image_id(tmp_path, seed):
    first = write_coco(tmp_path / "captions.json", 40, seed)
    names, captions = first_captions(tmp_path / "captions.json")
    assert list(zip(names, captions, strict=True)) == [first[number] for number in sorted(first)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "images have id, file_name; .* has a list"),
        ({"annotations": []}, "images have id, file_name; .* has none"),
        (
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 1, "bbox": []}]},
            "annotations have id, image_id, caption; .* has id, image_id, bbox",  # instances_val2017.json
        ),
        (
            {"images": [{"id": 1, "file_name": "a"}, {"id": 2}],
             "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]},
            "every row of .* must have the columns of the first, got KeyError",
        ),
        (
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 2, "caption": "x"}]},
            "every image of .* must have a caption, got none for image 1",
        ),
        (
            {"images": [{"id": 1, "file_name": "../a"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]},
            "file_name in .* must be a plain name, got '../a'",
        ),
    ],
)  # fmt: skip
def test_captions_with_other_columns_are_refused(tmp_path, data, words):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=words):
        first_captions(path)
    path.write_text("prompt\na ring\n")
    with pytest.raises(InputError, match="prompts must be COCO's captions JSON"):
        first_captions(path)


# ---------------------------------------------------------------- pictures


def test_digest_is_of_content_and_order_not_of_names(tmp_path):
    write_pictures(tmp_path / "a", 5)
    (tmp_path / "b").mkdir()
    for i, path in enumerate(sorted((tmp_path / "a").iterdir())):
        (tmp_path / "b" / f"picture-{i}.png").write_bytes(path.read_bytes())
    a, b = (open_gallery(tmp_path / name, tmp_path / "cache", "model") for name in "ab")
    assert a.digest == b.digest and len(a) == 5 and a.sizes == [(24, 16)] and a.format == "png"
    (tmp_path / "b" / "picture-0.png").rename(tmp_path / "b" / "picture-9.png")
    assert open_gallery(tmp_path / "b", tmp_path / "cache", "model").digest != a.digest


def test_a_folder_that_has_not_changed_is_not_decoded_again(tmp_path, monkeypatch):
    pixels = write_pictures(tmp_path / "a", 4)
    first = open_gallery(tmp_path / "a", tmp_path / "cache", "model")
    monkeypatch.setattr(gallery, "_look", lambda *_: pytest.fail("decoded again"))
    assert open_gallery(tmp_path / "a", tmp_path / "cache", "model") == first
    assert (np.asarray(open_picture(first.paths[2])) == pixels[2]).all()
    monkeypatch.undo()
    write_pictures(tmp_path / "a", 1)
    assert open_gallery(tmp_path / "a", tmp_path / "cache", "model").digest != first.digest


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "flipped"])
def test_pictures_that_cannot_be_read_are_refused(tmp_path, damage):
    write_pictures(tmp_path / "a", 3)
    path = tmp_path / "a" / "001.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes({"cut": content[:-40], "text": b"hello", "empty": b"", "flipped": content}[damage])
    with pytest.raises(InputError, match="reference must hold pictures that can be read, got .*001.png"):
        open_gallery(tmp_path / "a", tmp_path / "cache", "reference")


def test_unequal_sizes_missing_files_and_no_pictures_are_refused(tmp_path):
    write_pictures(tmp_path / "a", 3)
    Image.new("RGB", (30, 16)).save(tmp_path / "a" / "odd.png")
    words = "model must hold pictures of one size, got 2 sizes in .*, such as 24x16 and 30x16"
    with pytest.raises(InputError, match=words):
        open_gallery(tmp_path / "a", tmp_path / "cache", "model", one_size=True)
    assert len(open_gallery(tmp_path / "a", tmp_path / "cache", "reference").sizes) == 2  # as COCO's are
    with pytest.raises(InputError, match="without 2 of them, first x.png"):
        open_gallery(tmp_path / "a", tmp_path / "cache", "reference", ["x.png", "000.png", "y.png"])
    for folder, got in ((tmp_path, "none in"), (tmp_path / "no", "nothing at"), (tmp_path / "a" / "odd.png", "a file")):
        with pytest.raises(InputError, match=got):
            open_gallery(folder, tmp_path / "cache", "model")


# ---------------------------------------------------------------- plans


@pytest.fixture
def files(tmp_path):
    """Everything an evaluation may need."""
    write_pictures(tmp_path / "real", 9, (20, 30), ".jpg")
    for name, count in (("drawn", 6), ("few", 3)):
        write_pictures(tmp_path / name, count)
    (tmp_path / "prompts.txt").write_text("".join(f"picture {i}\n" for i in range(6)))
    (tmp_path / "three.csv").write_text("prompt\na\nb\nc\n")
    (tmp_path / "wrong.csv").write_text("picture,words\na,b\n")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "words.txt").write_text("0.5")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "words.txt").write_text("altered")
    return tmp_path


def plan(files, suite, model="world", **options):
    names = ("prompts", "reference", "weights_folder")
    places = {name: files / value for name, value in options.items() if name in names}
    model = files / model if (files / model).is_dir() else model
    return make_plan(suite, model, files / "cache", **options | places)


def test_plan_of_prompts(files):
    made = plan(files, "prompts", prompts="prompts.txt", metrics=("clip_score", "colour"), weights_folder="weights",
                num_images=5, seed=7)  # fmt: skip
    assert made.prompts == [f"picture {i}" for i in range(5)] and made.seeds == [7, 8, 9, 10, 11]
    assert made.seed_rule == "seed = 7 + index" and made.given is made.reference is None
    assert made.extractors == ("words", "colors") and made.reference_for("colors") is None
    (files / "weights" / "words.txt").write_text("0.25")
    again = plan(files, "prompts", prompts="prompts.txt", metrics=("clip_score", "colour"), weights_folder="weights")
    assert again.digests["words"] != made.digests["words"] and again.digests["colors"] == made.digests["colors"]
    assert again.seed_rule == "seed = index" and again.prompts_digest != made.prompts_digest


def test_plan_of_coco_has_all_its_reference_pictures(tmp_path):
    first = write_coco(tmp_path / "captions.json", 8)
    write_pictures(tmp_path / "real", 9)
    options = {"prompts": "captions.json", "reference": "real", "metrics": ("fid",)}
    made = plan(tmp_path, "coco5k", num_images=5, **options)
    ordered = [first[number] for number in sorted(first)]
    assert made.prompts == [caption for _, caption in ordered[:5]]
    assert [p.name for p in made.reference.paths] == [name for name, _ in ordered]  # all eight, and not the ninth
    with pytest.raises(InputError, match="prompts must be at least 5000, got 8 in"):
        plan(tmp_path, "coco5k", **options)
    (tmp_path / "real" / ordered[2][0]).unlink()
    with pytest.raises(InputError, match=f"reference must hold the 8 pictures .* first {ordered[2][0]}"):
        plan(tmp_path, "coco5k", num_images=5, **options)


def test_plan_of_folders(files):
    made = plan(files, "folder", "drawn", reference="real", metrics=("fid", "colour"), seed_rule="seed = index")
    assert made.n == 6 and made.seeds is None and made.prompts is None and made.seed_rule == "seed = index"
    assert len(made.reference) == 9 and made.reference_for("colors") is made.reference
    # A folder of pictures may stand for a model in any suite.
    made = plan(files, "prompts", "drawn", prompts="prompts.txt", metrics=("clip_score",), weights_folder="weights")
    assert made.given is not None and len(made.prompts) == 6 and made.seed_rule is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ("fidd",)}, "metrics must be among .*, got 'fidd'"),
        ({"metrics": ()}, "metrics must be different names, at least one"),
        ({"metrics": ("fid", "fid")}, "metrics must be different names"),
        ({"suite": "prompts", "model": "world", "prompts": None}, "prompts must be a .txt, .csv, .jsonl or .parquet"),
        ({"suite": "coco5k", "model": "world", "prompts": None}, "prompts must be COCO's captions_val2017.json"),
        ({"suite": "coco5k", "model": "world", "prompts": "prompts.txt"}, "prompts must be COCO's captions JSON"),
        ({"suite": "prompts", "model": "world", "prompts": "wrong.csv"}, "must have a column prompt or caption"),
        ({"suite": "prompts", "model": "world", "num_images": 7}, "prompts must be at least 7, got 6"),
        ({"suite": "prompts", "model": "world", "prompts": "three.csv", "metrics": ("fid",)},
         "num_images must be at least 4 pictures for fid, got 3"),
        ({"suite": "prompts", "model": "world", "seed_rule": "seed = index"}, "seed_rule must be given with a folder"),
        ({"model": "few"}, "num_images must be at least 4 pictures for fid, got 3"),
        ({"reference": "few"}, "reference must be at least 4 pictures for fid, got 3"),
        ({"reference": None}, "reference must be a folder of pictures for fid, got None"),
        ({"model": "nowhere"}, "model must be a folder of pictures, got nothing"),
        ({"metrics": ("clip_score",), "prompts": None}, "must be a file of one for each picture for clip_score"),
        ({"metrics": ("clip_score",), "prompts": "three.csv"}, "prompts must be as many as the 6 pictures .*, got 3"),
        ({"metrics": ("clip_score",), "weights_folder": None}, "weights must be a folder with the files .*, got None"),
        ({"metrics": ("clip_score",), "weights_folder": "real"}, "weights: .*words.txt must be a file, got nothing"),
        ({"metrics": ("clip_score",), "weights_folder": "bad"}, "weights: .*words.txt must have digest 123"),
        ({"num_images": 5}, "num_images must be as many as the 6 pictures in .*, got 5"),
        ({"num_images": 0}, "num_images must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": True}, "seed must be an integer >= 0, got True"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(files, options, words):
    usual = {"suite": "folder", "model": "drawn", "metrics": ("fid",), "prompts": "prompts.txt", "reference": "real",
             "weights_folder": "weights"}  # fmt: skip
    options = usual | options
    options = {name: value for name, value in options.items() if value is not None}
    with pytest.raises(InputError, match=words):
        plan(files, options.pop("suite"), options.pop("model"), **options)


def test_weights_of_unknown_digest_are_taken_when_the_user_says_so(files):
    options = {"prompts": "prompts.txt", "metrics": ("clip_score",), "weights_folder": "bad"}
    assert plan(files, "prompts", allow_unknown_digest=True, **options).weights["words"]["words.txt"].is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"suite": "coco"}, "suite must be one of world, coco5k, prompts, folder, got 'coco'"),
        ({"output": None}, "output must be a folder for suite prompts, got None"),
        ({"jobs": 0}, "jobs must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"num_inference_steps": 9}, "num_inference_steps must be"),
        ({"suite": "world", "metrics": ("fid",)}, "metrics must be None for suite world, which has its own"),
        ({"device": "tpu"}, "device: must be one this machine has"),
    ],
)
def test_nothing_is_loaded_or_written_before_a_refusal(files, monkeypatch, options, words):
    monkeypatch.setattr("nitrofusion.engine.load", lambda *_, **__: pytest.fail("loaded"))
    usual = {"suite": "prompts", "prompts": files / "prompts.txt", "metrics": ("colour",), "output": files / "new"}
    with pytest.raises(InputError, match=words):
        evaluate("world", **usual | {"cache": files / "cache"} | options)
    assert not (files / "new").exists()


def test_every_suite_names_metrics_in_one_vocabulary():
    assert set(suites.METRICS) == {"coco5k", "prompts", "folder"}
    known = {"fid", "kid", "precision", "recall", "patch_fid", "clip_score", "aesthetic", "image_reward", "hpsv2"}
    assert {name for names in suites.METRICS.values() for name in names} == known


def test_reference_pictures_too_small_for_a_crop_are_left_out_for_it_alone(files, monkeypatch):
    monkeypatch.setattr(suites, "_LEAST_SIDE", {"colors": 20})
    small = sorted((files / "real").iterdir())[::3]
    for path in small:
        Image.new("RGB", (19, 90)).save(path)
    made = plan(files, "prompts", prompts="prompts.txt", reference="real", metrics=("fid",))
    kept = made.reference_for("colors")
    assert len(made.reference) == 9 and set(made.reference.paths) - set(kept.paths) == set(small) and len(kept) == 6
    for path in small:
        path.unlink()
    alone = plan(files, "prompts", prompts="prompts.txt", reference="real", metrics=("fid",))
    assert alone.reference.digest == kept.digest != made.reference.digest
    with pytest.raises(InputError, match="pictures must be of 20 pixels a side or more for fid, got 24x16"):
        plan(files, "folder", "drawn", reference="real", metrics=("fid",))
    for path in sorted((files / "real").iterdir())[3:]:
        Image.new("RGB", (90, 19)).save(path)
    with pytest.raises(InputError, match="reference must be at least 4 pictures for fid, got 3"):
        plan(files, "prompts", prompts="prompts.txt", reference="real", metrics=("fid",))


@pytest.mark.parametrize("text", ["", '{"digests": [', "[]", "null", '{"digests": [], "sizes": [], "format": "PNG"}'])
def test_what_is_remembered_of_a_folder_is_looked_at_again_where_it_is_damaged(tmp_path, text):
    write_pictures(tmp_path / "a", 3)
    first = open_gallery(tmp_path / "a", tmp_path / "cache", "model")
    (known,) = (tmp_path / "cache" / "checked").iterdir()
    whole = known.read_bytes()
    known.write_text(text)
    assert open_gallery(tmp_path / "a", tmp_path / "cache", "model") == first
    assert known.read_bytes() == whole

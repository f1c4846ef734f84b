"""Suite coco5k from one end to the other with the published instruments' code and random weights in their layouts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from scipy.linalg import sqrtm

from nitrofusion.errors import InputError
from nitrofusion.evaluate import compare_records, evaluate, read_record
from nitrofusion.evaluate.instruments import EXTRACTORS

from . import straight
from .test_evaluate_suites import write_pictures
from .test_instruments import clip_folder  # noqa: F401

N, REAL = 50, 56  # the fewest pictures a Frechet distance is given for, and a few more


@pytest.fixture(scope="module")
def files(tmp_path_factory, clip_folder):  # noqa: F811
    """Weights, captions and a reference."""
    folder = tmp_path_factory.mktemp("files")
    state = straight.State()
    with torch.inference_mode():
        straight.inception(state, torch.zeros(1, 3, 299, 299, dtype=torch.float64))
    (folder / "weights").mkdir()
    save_file(dict(state), folder / "weights" / "pt_inception-2015-12-05-6726825d.safetensors")
    (folder / "weights" / "clip-vit-base-patch32").symlink_to(clip_folder)
    write_pictures(folder / "val2017", REAL, (40, 30), ".jpg")
    Image.open(folder / "val2017" / "007.jpg").resize((33, 50)).save(folder / "val2017" / "007.jpg")
    scenes = [f"a {color} {shape} on a navy background" for color in ("red", "green") for shape in ("circle", "ring")]
    images = [{"id": i, "file_name": f"{i:03d}.jpg"} for i in range(REAL)]
    rows = [{"id": i, "image_id": i, "caption": scenes[i % 4]} for i in range(REAL)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": rows}))
    return folder


@pytest.mark.slow
def test_suite_coco_with_the_published_instruments(files, tmp_path):
    usual = {"suite": "coco5k", "prompts": files / "captions.json", "reference": files / "val2017", "num_images": N,
             "weights": files / "weights", "cache": tmp_path / "cache", "batch_size": 10, "jobs": 1}  # fmt: skip
    metrics = ("fid", "kid", "precision", "recall", "clip_score")
    record = evaluate("world", metrics=metrics, output=tmp_path / "one", **usual)
    assert read_record(tmp_path / "one" / "record.json") == record
    found = {result["metric"]: result for result in record["results"]}
    assert tuple(found) == metrics
    (drawn,) = (tmp_path / "one" / "features").glob("inception-*")
    assert drawn.name == f"inception-{found['fid']['extractor_digest'][:12]}"
    (real,) = (tmp_path / "cache" / "features").glob("*/inception-*")
    x, y = (load_file(path)["features"].astype(np.float64) for folder in (drawn, real) for path in folder.iterdir())
    assert x.shape == (N, 2048) and y.shape == (REAL, 2048)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # tr (A B)^(1/2) from the small Gram form: with A = P'P and B = Q'Q it is the nuclear norm of P Q'.
    p, q = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (x, y))
    root = np.linalg.norm(p @ q.T, "nuc")
    assert root == pytest.approx(np.trace(sqrtm(p @ q.T @ q @ p.T)).real, rel=1e-4)
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert found["fid"]["value"] == pytest.approx(wanted, rel=1e-3)
    for name, result in found.items():
        low, high = result["interval"]
        assert low <= result["value"] <= high and result["n"] == N
        assert result["implementation"] == EXTRACTORS[result["extractor"]].implementation, name
    assert found["fid"]["reference_n"] == REAL and found["clip_score"]["reference_digest"] is None
    assert "The paper's table" in (tmp_path / "one" / "report.html").read_text()
    with pytest.raises(InputError, match="reference must be at least 50 pictures for patch_fid, got 0"):
        evaluate("world", metrics=("patch_fid",), output=tmp_path / "two", **usual)  # val2017 here is too small
    assert compare_records(record, record)[0]["says"] == "within the noise floor"

"""What a newcomer runs first, in small."""

import json
import shlex

import pytest
from PIL import Image

from nitrofusion.cli import main
from nitrofusion.evaluate import world


@pytest.mark.slow
def test_the_demo_trains_compares_and_shows_and_a_second_call_makes_nothing_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(world, "DIVERSITY_PROMPTS", 2)  # most of what is drawn, otherwise
    folder = tmp_path / "demo"
    command = ["demo", "--preset", "world-smoke", "--num_images", "2", "--output", str(folder)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"Look at {folder / 'report.html'}" in said
    advice = shlex.split(said.rpartition("Draw with it: ")[2])
    assert advice[1:3] == ["-m", "nitrofusion"] and main([*advice[3:], "--output", str(tmp_path / "one.png")]) == 0
    rows = json.loads((folder / "report.json").read_text())["rows"]
    runs = ("start", "regression, equal compute", "student")
    assert [(row["label"], row["steps"]) for row in rows] == [
        ("teacher", 8), *((label, steps) for label in runs for steps in (1, 2, 4))
    ]  # fmt: skip
    assert all(row["num_images"] == 2 and 0 <= row["accuracy"] <= 1 and row["frechet"] > 0 for row in rows)
    for name, steps in (("student", 6), ("regression", json.loads((folder / "control.json").read_text())["steps"])):
        log = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log] == list(range(1, steps + 1))
    page = (folder / "report.html").read_text()
    assert all(label in page for label in ("teacher", *runs)) and "data:image/png;base64," in page
    with Image.open(folder / "report.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100, "a picture with something on it"

    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".safetensors", ".tar")}
    judged = {path: path.stat().st_mtime_ns for path in (folder / "evaluations").iterdir()}
    assert main(command) == 0
    assert made and judged and all(path.stat().st_mtime_ns == then for path, then in (made | judged).items())

    # Another student under the same name is measured again, and nothing else is.
    result = folder / "evaluations" / "student-2.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"unet_digest": "of another", "accuracy": 2.0}))
    judged[result] = 0
    assert main(command) == 0
    again = {path: path.stat().st_mtime_ns for path in judged}
    assert [path for path in judged if again[path] != judged[path]] == [result]
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert all(row["accuracy"] <= 1 for row in rows)

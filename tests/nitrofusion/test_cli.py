"""Commands as a user types them: results, one-line errors, exit codes."""

import json
import subprocess
import sys

import pytest

from nitrofusion.cli import main


def fails(capsys, args, code, *words):
    assert main(args) == code
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and "Traceback" not in err
    for word in words:
        assert word in err, err


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert main([]) == 2


def test_module_and_script_are_the_same_command():
    out = [
        subprocess.run([sys.executable, "-m", *module], capture_output=True, text=True)
        for module in (["nitrofusion", "--help"], ["nitrofusion", "train", "--help"], ["nitrofusion.train", "--help"])
    ]
    assert all(run.returncode == 0 for run in out), [run.stderr for run in out]
    assert out[1].stdout == out[2].stdout and "--pool.width" in out[1].stdout


def test_generate_writes_a_png_that_knows_its_settings(tmp_path, capsys):
    from nitrofusion.engine.png import read_settings

    path = tmp_path / "a" / "ring.png"
    prompt = "a green ring on a navy background"
    assert main(["generate", prompt, "--seed", "5", "--num_inference_steps", "2", "--output", str(path)]) == 0
    settings = read_settings(path)
    assert settings["prompt"] == prompt and settings["seed"] == 5 and settings["num_inference_steps"] == 2


@pytest.mark.parametrize(
    "args, words",
    [
        (["paint"], ("command must be one of", "paint")),
        (["genrate"], ("did you mean generate",)),
        (["generate", "a ring", "--model", "wrld"], ("wrld", "world")),
        (["generate", "a ring", "--num_inference_steps", "9"], ("num_inference_steps", "9")),
        (["train", "--preset", "wrold"], ("wrold", "did you mean world")),
        (["train", "--lear_rate", "1"], ("lear_rate",)),
        (["train", "--batch_size", "0", "--dry_run"], ("batch_size must be >= 1, got 0",)),
        (["train", "--teacher", "/nowhere", "--dry_run"], ("/nowhere", "got nothing")),
        (["train", "--prompts", "/nowhere.txt", "--dry_run"], ("/nowhere.txt",)),
        (["evaluate", "--suite", "wrld"], ("wrld",)),
        (["evaluate", "--num_images", "0"], ("num_images", "0")),
        (["prepare", "--part", "3/2"], ("part must be k/n",)),
        (["export", "--output", "/proc/nowhere"], ("/proc/nowhere",)),
    ],
)
def test_bad_input_is_one_line(capsys, args, words):
    assert main(args) in (2, 3)
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


def test_unknown_yaml_key_suggests_the_right_one(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("batch_sise: 4\n")
    fails(capsys, ["train", "--config", str(path), "--dry_run"], 2, "batch_sise", "did you mean batch_size")
    path.write_text("pool:\n  widht: 4\n")
    fails(capsys, ["train", "--config", str(path), "--dry_run"], 2, "widht", "did you mean", "width")


def test_yaml_then_options(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: 4\naccumulation: 2\npool:\n  width: 24\n")
    args = ["train", "--config", str(path), "--accumulation", "5", "--print_config"]
    with pytest.raises(SystemExit) as done:
        main(args)
    assert done.value.code in (0, None)
    out = capsys.readouterr().out
    assert "batch_size: 4" in out and "accumulation: 5" in out and "width: 24" in out


def test_dry_run_trains_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--preset", "world", "--output", str(out), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "memory" in text and "disk" in text and "time" in text
    assert not out.exists()


def test_evaluate_writes_json(tmp_path):
    path = tmp_path / "result.json"
    args = ["evaluate", "--model", "world", "--num_images", "8", "--json", str(path)]
    assert main(args) == 0
    result = json.loads(path.read_text())
    for name in ("accuracy", "frechet", "sharpness", "diversity"):
        low, high = result[f"{name}_interval"]
        assert low <= high and isinstance(result[name], float)

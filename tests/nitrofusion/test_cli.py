"""Commands as a user types them: results, one-line errors, exit codes."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from nitrofusion.cli import main
from nitrofusion.presets import MODELS, RUNS
from nitrofusion.processes import settle


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_named(unbuffered):
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        command = [sys.executable, "-m", "nitrofusion", "--version"]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert run.returncode == 3
    assert run.stderr.startswith("nitrofusion: standard output, or a file") and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "policy", "spins"),
    [
        ({}, "PASSIVE", "3000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", None),
        ({"GOMP_SPINCOUNT": "0"}, None, "0"),
    ],
)
def test_how_threads_wait_is_the_users_choice(monkeypatch, given, policy, spins):
    """It is decided before torch is imported, which reads it once."""
    monkeypatch.setattr(os, "environ", dict(given))
    settle()
    assert (os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")) == (policy, spins)
    early = "import sys; from nitrofusion import processes; processes.settle(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", early]).returncode == 0


def test_module_and_script_are_the_same_command():
    out = [
        subprocess.run([sys.executable, "-m", *module], capture_output=True, text=True)
        for module in (["nitrofusion", "train", "--help"], ["nitrofusion.train", "--help"])
    ]
    assert all(run.returncode == 0 for run in out), [run.stderr for run in out]
    assert out[0].stdout == out[1].stdout and "--pool.width" in out[0].stdout


def test_generate_writes_a_png_that_knows_its_settings(tmp_path, capsys):
    from nitrofusion.engine.png import read_settings

    path = tmp_path / "a" / "ring.png"
    prompt = "a green ring on a navy background"
    assert main(["generate", prompt, "--seed", "5", "--num_inference_steps", "2", "--output", str(path)]) == 0
    settings = read_settings(path)
    assert settings["prompt"] == prompt and settings["seed"] == 5 and settings["num_inference_steps"] == 2


def test_a_name_that_the_terminal_cannot_show(tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["generate", "a ring", "a cross", "--output", str(tmp_path / "ünï.png")]) == 0
    assert len(list(tmp_path.glob("ünï-00[01].png"))) == 2
    assert written.getvalue().count(b"\\xfcn\\xef-00") == 2


def test_generate_takes_what_the_engine_takes(tmp_path, capsys):

    from nitrofusion.engine import load
    from nitrofusion.engine.png import read_settings

    source = tmp_path / "source.png"
    Image.effect_noise((40, 24), 90).save(source)
    options = {"strength": 0.8, "negative_prompt": "a ring", "nag_scale": 1.5, "nag_steps": 1, "num_inference_steps": 4}
    args = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    path = tmp_path / "a.png"
    assert main(["generate", "a red cross", *args, "--seed", "3", "--image", str(source), "--output", str(path)]) == 0
    with Image.open(source) as image, Image.open(path) as drawn:
        (wanted,) = load("world").generate("a red cross", seed=3, image=image, **options)
        assert drawn.size == (40, 24) and drawn.tobytes() == wanted.tobytes()
    settings = read_settings(path)
    assert {name: settings[name] for name in options} == options and settings["negative"] == "nag"
    again = tmp_path / "again.png"
    capsys.readouterr()
    assert main(["reproduce", str(path), "--image", str(source), "--output", str(again)]) == 0
    assert capsys.readouterr().out.strip() == "every pixel is the same" and again.is_file()
    fails(capsys, ["reproduce", str(path)], 2, "must be the one this picture was drawn from", "got none")
    fails(capsys, ["reproduce", str(path), "--image", "/no.png"], 2, "reproduce: image must be", "/no.png")
    fails(capsys, ["reproduce", str(path), "--output", "/proc/a.png"], 3, "/proc")


def test_what_is_drawn_when_memory_ends_is_kept(tmp_path, capsys, monkeypatch):
    from nitrofusion.engine import load
    from nitrofusion.engine.engine import Engine

    drawn, generate = [], Engine.generate

    def scarce(self, prompts, *args, **options):
        if len(drawn) + len(prompts) > 5:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 7 bytes\n1"
            )
        drawn.extend(generate(self, prompts, *args, **options))
        return drawn[-len(prompts) :]

    monkeypatch.setattr(Engine, "generate", scarce)
    args = ["a red ring", "a blue cross", "--num_images_per_prompt", "3", "--seed", "9"]
    assert main(["generate", *args, "--output", str(tmp_path / "a.png")]) == 1
    said = capsys.readouterr()
    assert re.search(r"^nitrofusion: there must be enough free memory, got RuntimeError: .*7 bytes$", said.err, re.M)
    paths = [tmp_path / f"a-00{i}.png" for i in range(4)]
    assert sorted(tmp_path.iterdir()) == paths and said.out.split() == [str(path) for path in paths]
    whole = generate(load("world"), ["a red ring", "a blue cross"], seed=9, num_images_per_prompt=3)
    for path, picture in zip(paths, whole[:4], strict=True):
        assert Image.open(path).tobytes() == picture.tobytes()


def test_generate_streams_files(tmp_path, capsys):
    from nitrofusion.engine.png import read_settings

    args = ["generate", "a red cross", "--stream", "--height", "24", "--output", str(tmp_path / "a.png")]
    assert main(args) == 0
    names = [f"a-{steps}.png" for steps in (1, 2, 3, 4)]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert [read_settings(tmp_path / name)["num_inference_steps"] for name in names] == [1, 2, 3, 4]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(tmp_path / name) for name in names]
    assert main([*args, "--num_inference_steps", "2", "--num_images_per_prompt", "2"]) == 0
    assert {"a-000-1.png", "a-000-2.png", "a-001-1.png", "a-001-2.png"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "args, words",
    [
        (["generate", "a ring", "--strength", "0"], ("generate: strength must be above 0 and at most 1, got 0.0",)),
        (["generate", "a ring", "--image", "/nowhere.png"], ("generate: image must be", "/nowhere.png")),
        (["generate", "a ring", "--height", "33"], ("generate: height must be a multiple of 2, got 33",)),
        (["generate", "a ring", "--width", "0"], ("generate: width must be an integer in 1..8192, got 0",)),
        (["generate", "a ring", "--negative", "cgf"], ("generate: negative must be one of nag, nasa, cfg, got 'cgf'",)),
        (["generate", "a ring", "--nag_scle", "3"], ("nag_scle", "did you mean --nag_scale")),
        (["generate", "x" * 10**6], ("prompt must be at most 5000 characters", "got 1000000")),
        (["generate", "a ring", "--model", "world-teacher", "--stream"], ("stream: model must be a student",)),
        (["reproduce", "/nowhere.png"], ("/nowhere.png",)),
        (["reproduc", "a.png"], ("did you mean reproduce",)),
        (["paint"], ("command must be one of", "paint")),
        (["genrate"], ("did you mean generate",)),
        (["generate", "a ring", "--model", "wrld"], ("wrld", "world")),
        (["generate", "a ring", "--num_inference_steps", "9"], ("num_inference_steps", "9")),
        (["generate", "a ring", "--lora", ""], ("lora must be FILE or FILE:SCALE, got ''",)),
        (["generate", "a ring", "--lora", "a\nb:0.5"], (r"lora must be a .safetensors file, got nothing: 'a\nb'",)),
        (["train", "--preset", "wrold"], ("wrold", "did you mean world")),
        (["train", "--lear_rate", "1"], ("lear_rate",)),
        (["train", "--batch_size", "0", "--dry_run"], ("batch_size must be >= 1, got 0",)),
        (["train", "--teacher", "/nowhere", "--dry_run"], ("/nowhere", "got nothing")),
        (["train", "--prompts", "/nowhere.txt", "--dry_run"], ("/nowhere.txt",)),
        (["train", "--backbone", "/nowhere", "--dry_run"], ("/nowhere", "got nothing")),
        (["train", "--seed", "-1", "--dry_run"], ("seed must be in 0..2^32 - 1, got -1",)),
        (["train", "--betas", "[0.9, 1.0]", "--dry_run"], ("betas must be two in [0, 1), got (0.9, 1.0)",)),
        (["train", "--crop_size", "7", "--dry_run"], ("crop_size must be a multiple of 4 in 8..16 latents, got 7",)),
        (["train", "--pool.sampled_per_cell", "9", "--dry_run"], ("pool: sampled_per_cell must be in 1..4, got 9",)),
        (["train", "--pool.t_star", "[10, 1000]", "--dry_run"], ("pool: t_star must be timesteps in 0..999",)),
        (["train", "--device", "tpu", "--dry_run"], ("device: must be one this machine has", "'tpu'")),
        (["train", "--output", "", "--dry_run"], ("output must be a folder, got ''",)),
        (["generate", " "], ("prompt must have at least one word",)),
        (["generate", "\udcff ring"], ("generate: prompt must be valid Unicode",)),
        (["generate", "a ring", "--output", "/proc/ring.png"], ("/proc must be a folder that can be written",)),
        (["generate", "a ring", "--device", "meta"], ("device: must be one this machine has",)),
        (["prepare", "--teacher_unet", "/nowhere.safetensors"], ("teacher_unet: /nowhere.safetensors", "got nothing")),
        (["prepare", "--output", "/proc/nowhere"], ("prepare: /proc must have", "bytes free, got 0")),
        (["evaluate", "--json", "/proc/x.json"], ("/proc must be a folder that can be written",)),
        (
            ["evaluate", "--num_inference_steps", "5"],
            ("evaluate: num_inference_steps must be an integer in 1..4, got 5",),
        ),
        (["evaluate", "--suite", "wrld"], ("wrld",)),
        (["evaluate", "--num_images", "0"], ("num_images", "0")),
        (["prepare", "--part", "3/2"], ("part must be k/n",)),
        (["export", "--output", "/proc/nowhere"], ("/proc/nowhere",)),
        (["export", "--output", "x", "--format", "onnx"], ("format must be one of diffusers, comfyui, lora",)),
        (["export", "--output", "x", "--dtype", "int8"], ("dtype must be one of float16, bfloat16, float32",)),
        (["export", "--output", "x", "--rank", "4.5"], ("rank",)),
        (["export", "--output", "x", "--format", "lora", "--model", "world-teacher"], ("base must be given",)),
        (["graft", "--custom", "/nowhere", "--output", "x", "--student", "world"], ("/nowhere",)),
        (["graft", "--custom", "world-teacher", "--output", "x", "--student", "wrld"], ("did you mean world",)),
        (
            ["graft", "--custom", "world-teacher", "--output", "x", "--student", "world", "--strength", "much"],
            ("strength", "much"),
        ),
        (["graft", "--custom", "world-teacher", "--output", "/proc/x", "--student", "world"], ("/proc/x",)),
        (["doctor", "--device", "tpu"], ("device: must be one this machine has",)),
    ],
)
def test_bad_input_is_one_line(capsys, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) in (2, 3)
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    for word in words:
        assert word in err, err
    assert not list(tmp_path.iterdir()), "nothing half written"


def test_a_home_that_the_shell_left_is_expanded(capsys, tmp_path, monkeypatch):
    (tmp_path / "home" / "taken").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fails(capsys, ["generate", "a ring", "--output=~/taken"], 2, f"got {tmp_path / 'home' / 'taken'}")
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("command", [["train"], ["train", "--dry_run"], ["prepare"]])
def test_a_cache_that_is_a_file_is_refused_before_any_work(capsys, tmp_path, command):
    (tmp_path / "taken").write_bytes(b"")
    options = ["--preset", "world-smoke", "--output", str(tmp_path / "run")]
    for cache in (tmp_path / "taken", tmp_path / "taken" / "below"):
        fails(capsys, [*command, *options, "--cache", str(cache)], 3, "taken must be a folder, got a file")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--model", "--vae", "--lora"])
@pytest.mark.parametrize("given", ["x" * 5000, "~nouser/x"])
def test_a_path_that_cannot_be_looked_up_is_bad_input(capsys, option, given):
    assert main(["generate", "a ring", option, given]) == 2
    assert "must be a path this system has, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scheduler/scheduler_config.json": {"prediction_type": "v_prediction"}}, "must predict epsilon"),
        ({"scheduler/scheduler_config.json": {"beta_end": None}}, "with beta_end between 0 and 1, got None"),
        ({"unet/config.json": {"in_channels": 9}}, "4 input channels, got 9"),
        ({"unet/config.json": {"sample_size": 15}}, "sample_size is a multiple of 4, got 15"),
        ({"unet/config.json": None}, "must be a JSON object, got list"),
        ({"unet/diffusion_pytorch_model.safetensors": None}, "must be a readable safetensors file"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_any_work(tmp_path, capsys, change, words):
    folder, out = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(MODELS["world-teacher"].folder, folder)
    for name, values in change.items():
        path = folder / name
        path.write_text("[]" if values is None else json.dumps(json.loads(path.read_text()) | values))
    for command in ("train", "prepare"):
        fails(capsys, [command, "--teacher", str(folder), "--output", str(out)], 2, words)
    fails(capsys, ["generate", "a ring", "--model", str(folder)], 2, words)
    fails(capsys, ["export", "--model", str(folder), "--output", str(out)], 2, words)
    assert not out.exists()


def test_the_folder_of_another_run_is_refused(tmp_path, capsys):
    dataclasses.replace(RUNS["world-smoke"], output=str(tmp_path)).save(tmp_path)
    args = ["train", "--preset", "world-smoke", "--output", str(tmp_path), "--seed", "77"]
    fails(capsys, args, 2, "must be a new folder or this run's own", "seed 2 instead of 77")


def test_unknown_yaml_key_suggests_the_right_one(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("batch_sise: 4\n")
    fails(capsys, ["train", "--config", str(path), "--dry_run"], 2, "batch_sise", "did you mean batch_size")
    path.write_text("pool:\n  widht: 4\n")
    fails(capsys, ["train", "--config", str(path), "--dry_run"], 2, "widht", "did you mean", "width")
    path.write_text("preset: [world]\n")
    fails(capsys, ["train", "--config", str(path), "--dry_run"], 2, "preset must be a name, got ['world']")


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

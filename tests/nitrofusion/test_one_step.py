"""The one-step benchmark's parts: that it times what it says, on pictures that are the same."""

import argparse
import importlib
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from benchmarks import one_step, peers, pipelines, records
from benchmarks import plot as plotting
from benchmarks.plot import bar_chart, plot
from benchmarks.shapes import SDXL30M, TOKENS, sdxl30m
from nitrofusion import schedule

from ..native import NATIVE, backends


def test_turns_call_everyone_equally_often():
    seen = {"a": [], "b": []}
    times = one_step.in_turns({name: calls.append for name, calls in seen.items()}, 7)
    assert seen == dict.fromkeys("ab", [-1, -1, -1, *range(7)])
    assert all(t.shape == (7, 2) and t.min() >= 0 for t in times.values())


def test_prompts_do_not_repeat():
    assert len(set(one_step.prompts(300))) == 300


@NATIVE
def test_a_record_of_ours(tmp_path):
    names = ["nitrofusion_ref", "nitrofusion_cpu", "nitrofusion_accelerate"]
    record = one_step.measure("world", 1, calls=5, cold_starts=0, only=names, folder=tmp_path)
    rows = {row["variant"]: row for row in record["rows"]}
    assert set(rows) == {"diffusers_eager", *names}
    for row in rows.values():
        assert row["max_diff_to_eager"] <= 1 and len(row["picture_digest"]) == 12
        assert 0 < row["p50_ms"] <= row["p99_ms"] and row["text_ms"] > 0 and row["decoder_ms"] > 0
        assert 0 < row["unet_ms"] < 2 * row["p50_ms"]  # five calls on a busy machine
        assert row["image_p50_ms"] > 0 and row["cpu_ms"] > 0 and len(one_step.line(row)) < 130
    assert record["machine"]["threads"] == 1 and record["machine"]["versions"]["torch"] == torch.__version__
    root = ElementTree.fromstring(plot([json.loads(json.dumps(record))]))
    assert len([e for e in root.iter() if e.tag.endswith("rect")]) == 4


def test_pipelines_run_on_a_tiny_model(tmp_path):
    """What a GPU times at SDXL's size: everything that a CPU can run of it, the rest skipped with its reason."""
    record = one_step.measure("sdxl_tiny", 1, calls=5, cold_starts=0, only=None, folder=tmp_path)
    rows = {row["variant"]: row for row in record["rows"]}
    assert set(rows) == {"diffusers_eager", "diffusers_taesd", "nitrofusion_accelerate", "nitrofusion_modules"}
    assert set(rows) | set(record["skipped"]) == set(peers.PIPELINES) and not set(rows) & set(record["skipped"])
    assert all("NVIDIA GPU" in reason or "CUDA" in reason for reason in record["skipped"].values())
    for name, row in rows.items():
        assert row["p50_ms"] > 0 and row["text_ms"] > 0 and row["unet_ms"] > 0 and row["decoder_ms"] > 0
        assert row["max_diff_to_eager"] <= 1 or "taesd" in name
    assert rows["nitrofusion_modules"]["switch_ms"] > 0
    assert record["machine"]["gpu"] is None
    assert set(pipelines.variants("sdxl")) == set(peers.PIPELINES)
    nothing = one_step.measure("sdxl", 1, calls=2, cold_starts=0, only=None, folder=tmp_path)
    assert nothing["rows"] == [] and set(nothing["skipped"]) == set(peers.PIPELINES)


def test_a_variant_nobody_knows_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["one_step", "--variant", "nitrofusion_cpu", "plan"])
    with pytest.raises(SystemExit):
        one_step.main()
    told = capsys.readouterr().err
    assert "--variant must be of diffusers_eager, " in told and told.endswith("for world, got plan\n")


class Drawing:
    """A variant that fails at one of its calls."""

    def __init__(self, fails=None, after=0):
        self.fails, self.after = fails, after

    def __getattr__(self, name):
        if name not in ("draw", "redraw", "text", "unet", "decode"):
            raise AttributeError(name)
        return lambda *args: self.call(name)

    def call(self, name):
        if name == self.fails:
            self.after -= 1
            if self.after < 0:
                raise RuntimeError(f"no\n{name}")
        return np.zeros((2, 2, 3), np.uint8)


def test_a_variant_that_fails_takes_no_other_along(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no build")

    def start(shape, name, folder, threads):
        if name == "cold":
            raise RuntimeError("no start")
        return 1.5, 10.0

    makes = {"building": broken, "diffusers_eager": lambda *_: Drawing(), "cold": lambda *_: Drawing()}
    makes |= {"unet": lambda *_: Drawing("unet"), "late": lambda *_: Drawing("draw", 6)}
    monkeypatch.setitem(peers.SHAPES, "sdxl_tiny", {n: lambda f, t, make=m: make() for n, m in makes.items()})
    monkeypatch.setattr(one_step, "start", start)
    file = tmp_path / "record.json"
    record = one_step.measure("sdxl_tiny", 1, 5, 1, None, tmp_path, file)
    assert json.loads(file.read_text()) == record
    rows = {row["variant"]: row for row in record["rows"]}
    assert set(rows) == {"diffusers_eager", "cold", "unet"} and rows["diffusers_eager"]["cold_s"] == 1.5
    assert rows["cold"]["decoder_ms"] is not None and rows["cold"]["cold_s"] is None
    assert rows["unet"]["p50_ms"] is not None and "unet_ms" not in rows["unet"]
    why = {name: f"failed: RuntimeError: no {name}" for name in ("unet", "draw")}
    assert record["skipped"] == {
        "building": "failed: RuntimeError: no build",
        "cold": "failed: RuntimeError: no start",
        "unet": why["unet"] + " (unet_ms)",
        "late": why["draw"] + " (p50_ms)",
    }
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in record["skipped"].values())


def test_sdxl30m_is_sdxls_form():
    unet = sdxl30m()
    assert 30e6 < sum(p.numel() for p in unet.parameters()) < 35e6
    assert torch.equal(unet.conv_in.weight, sdxl30m().conv_in.weight)
    depths = [len(a.transformer_blocks) for b in unet.down_blocks for a in getattr(b, "attentions", [])]
    assert depths == [1, 1, 2, 2] and not hasattr(unet.down_blocks[0], "attentions")


@pytest.mark.parametrize("backend", backends(*peers.BACKENDS))
def test_a_step_of_sdxl30m(backend, tmp_path):
    """Against the UNet and the formula, in fp64."""
    torch.manual_seed(0)
    step = peers.build("sdxl30m", f"nitrofusion_{backend}", tmp_path, 1)
    embeds, pooled = (torch.from_numpy(x).double() for x in step.text("a ring"))
    assert embeds.shape == (1, TOKENS, SDXL30M["cross_attention_dim"])
    noise = np.random.default_rng(3).standard_normal((1, 4, 32, 32), np.float32)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[256.0, 256, 0, 0, 256, 256]], dtype=torch.float64)}
    x_t = torch.from_numpy(noise).double()
    t = torch.tensor([499])
    with torch.no_grad():
        eps = sdxl30m().double()(x_t, t, embeds, added_cond_kwargs=added).sample
    alpha = schedule.make_alphas_cumprod().double()[499]
    x0 = (x_t - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    assert np.abs(step.draw("a ring", 3) - x0.numpy()).max() < 1e-4 * x0.abs().max()


def test_bars_are_as_long_as_their_values():
    root = ElementTree.fromstring(bar_chart({"g <1>": {"nitrofusion_x": 5.0, "openvino": 10.0}}, "t", "n & m"))
    bars = [e for e in root.iter() if e.tag.endswith("rect")]
    assert [b.get("class") for b in bars] == ["ours", "peer"]
    assert float(bars[1].get("width")) == pytest.approx(2 * float(bars[0].get("width")))


# ---------------------------------------------------------------- what benchmarks are asked for, read and write


def made(path, **row):
    machine = {"threads": 1, "cpu": "a <CPU>", "versions": {"torch": "2", "openvino": None}}
    rows = [{"shape": "world", "variant": "nitrofusion_plan", **row}]
    path.write_text(json.dumps({"machine": machine, "rows": rows}))
    return str(path)


def plot_command(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["plot", *map(str, args)])
    plotting.main()


def test_two_records_of_one_shape_are_both_drawn_and_zeros_too(tmp_path, monkeypatch):
    files = [made(tmp_path / f"{i}.json", p50_ms=value, max_diff_to_eager=0.0) for i, value in enumerate((2.0, 4.0))]
    for column, texts in (("p50_ms", ["2 ms", "4 ms"]), ("max_diff_to_eager", ["0 ", "0 "])):
        plot_command(monkeypatch, *files, "--column", column, "--output", tmp_path / "x.svg")
        found = [e.text for e in ElementTree.parse(tmp_path / "x.svg").iter() if e.tag.endswith("text")]
        assert [t for t in found if t in texts] == texts and "world, 1 thread, record 2" in found


@pytest.mark.parametrize(
    ("column", "text", "words"),
    [
        ("nonsense", None, "--column must be one of p50_ms, got nonsense"),
        ("p50_ms", '{"rows": [', "must be a benchmark's record"),
        ("p50_ms", "[]", "must be a benchmark's record, got list"),
        ("p50_ms", '{"rows": []}', "must be a record of benchmarks.one_step"),
    ],
)
def test_what_cannot_be_plotted_is_one_line(tmp_path, monkeypatch, capsys, column, text, words):
    file = made(tmp_path / "a.json", p50_ms=1.0)
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        plot_command(monkeypatch, file, "--column", column, "--output", tmp_path / "x.svg")
    assert words in capsys.readouterr().err + str(ended.value) and not (tmp_path / "x.svg").exists()


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    for good in (tmp_path / "a.json", tmp_path / "none" / "so" / "far.json"):
        assert records.output(str(good)) == good and good.parent.is_dir() and not good.exists()
    for bad in (tmp_path, "/proc/version/a.json"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a file in a folder that can be written"):
            records.output(str(bad))
    for bad in ("0", "-1", "x", "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="must be an integer >= 1"):
            records.count(bad)
    assert records.count("12") == 12


@pytest.mark.parametrize("name", ["serve", "parallel"])
def test_a_record_is_written_after_every_part_and_keeps_the_others(tmp_path, monkeypatch, name):
    module = importlib.import_module(f"benchmarks.{name}")

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "PARTS", {"one": lambda *_: {"a": 1}, "two": fails})
    monkeypatch.setattr("tests.nitrofusion.tiny.tiny_folder", lambda *_: None)
    (tmp_path / "a.json").write_text('{"three": {"b": 2}}')
    with pytest.raises(KeyboardInterrupt):
        module.main(["--json", str(tmp_path / "a.json"), "--only", "one", "two"])
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["one"] == {"a": 1} and found["three"] == {"b": 2} and "two" not in found

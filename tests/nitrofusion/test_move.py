"""Exports and grafts of models whose parts lie elsewhere than usual, and of what cannot be written or held."""

import json
import re
import resource
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nitrofusion import presets
from nitrofusion.engine import export as exporting
from nitrofusion.engine import load
from nitrofusion.engine.export import LORA_FILE, LORA_REPORT, export
from nitrofusion.engine.graft import graft
from nitrofusion.errors import InputError, StorageError

from .tiny import PROMPTS, nudged, published, sdxl_folder

UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
LAYER = "mid_block.resnets.0.conv1.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return sdxl_folder(tmp_path_factory.mktemp("move") / "base")


@pytest.fixture
def preset(base, monkeypatch, tmp_path):
    """Makes a preset of a UNet beside ``base``."""

    def make(state=None, folder=base, name="tiny", **options):
        file = None
        if state is not None:
            save_file(state, tmp_path / f"{name}.safetensors")
            file = str(tmp_path / f"{name}.safetensors")
        monkeypatch.setitem(presets.MODELS, name, presets.ModelPreset(name, str(folder), file, 500, **options))
        return name

    return make


def state_of(folder):
    return load_file(folder / UNET)


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def changed(base, **changes):
    return state_of(base) | {name.replace("__", "."): value for name, value in changes.items()}


@pytest.fixture
def other_vae(base, tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    config = json.loads((base / "vae" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    save_file(nudged(load_file(base / VAE), 3), folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_a_full_file_has_the_presets_own_decoder(base, preset, other_vae, tmp_path):
    preset(nudged(state_of(base), 1), vae=str(other_vae))
    made = load_file(next(export("tiny", tmp_path / "out", "comfyui", full=True).glob("*.safetensors")))
    wanted = load_file(other_vae / "diffusion_pytorch_model.safetensors")
    assert torch.equal(made["first_stage_model.encoder.conv_in.weight"], wanted["encoder.conv_in.weight"])


def test_a_full_file_of_a_full_file_is_the_same(tmp_path):
    """Text encoders and decoder of a checkpoint are its own, not those of the folder that gives their form."""
    first = next(export("world", tmp_path / "first", "comfyui", full=True).glob("*.safetensors"))
    moved = nudged({k: v for k, v in load_file(first).items() if v.is_floating_point()}, 4, 0.01)
    save_file(moved, tmp_path / "moved.safetensors", metadata=header(first))
    folder = export(tmp_path / "moved.safetensors", tmp_path / "out", "comfyui", full=True)
    again = load_file(folder / "moved_comfyui.safetensors")
    assert again.keys() == moved.keys() and all(torch.equal(again[k], moved[k]) for k in moved)


def test_a_base_keeps_its_loras(base, preset, tmp_path):
    state = state_of(base)
    preset(nudged(state, 1))
    lora = export("tiny", tmp_path / "first", "lora", rank=8) / LORA_FILE
    preset(name="adapted", lora=str(lora))
    report = json.loads((export("tiny", tmp_path / "out", "lora", rank=8, base="adapted") / LORA_REPORT).read_text())
    factors, wanted = load_file(lora), 0.0
    for name, weight in nudged(state, 1).items():
        delta, layer = weight.double() - state[name].double(), f"unet.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in factors:
            down, up = (factors[f"{layer}.lora_{side}.weight"].double().flatten(1) for side in "AB")
            delta -= (up @ down).reshape(delta.shape)
        wanted += delta.square().sum().item()
    assert sum(layer["energy"] for layer in report["layers"]) == pytest.approx(wanted, rel=1e-4)


def test_what_a_lora_cannot_hold_is_refused(base, preset, tmp_path):
    weight = state_of(base)[LAYER]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    preset(changed(base, **{LAYER: weight + 1e12 * noise}))
    with pytest.raises(InputError, match="lora_A of unet.mid_block.resnets.0.conv1 must fit float16"):
        export("tiny", tmp_path / "out", "lora", dtype="float16")
    with pytest.raises(InputError, match=f"unet.{LAYER} must fit float16"):
        export("tiny", tmp_path / "out", "diffusers", dtype="float16")
    for name in (LAYER, LAYER.replace("weight", "bias")):
        preset(changed(base, **{name: torch.full_like(state_of(base)[name], float("nan"))}))
        with pytest.raises(InputError, match=f"finite weights, got NaN or infinity in {name}"):
            export("tiny", tmp_path / "out", "lora")
        with pytest.raises(InputError, match="tiny must hold finite weights, got NaN or infinity in model.diffusion"):
            export("tiny", tmp_path / "out", "comfyui")
    assert not (tmp_path / "out").exists()


def test_a_lora_of_eight_bit_weights_is_of_sixteen_or_more(base, preset, tmp_path):
    preset({k: v.to(torch.float8_e4m3fn) for k, v in nudged(state_of(base), 1).items()})
    made = load_file(export("tiny", tmp_path / "out", "lora", rank=2) / LORA_FILE)
    assert {v.dtype for v in made.values()} == {torch.float32}


def test_a_stated_licence_is_passed_on_and_another_folders_is_not(base, preset, tmp_path):
    state = load_file(presets.MODELS["world"].unet)
    for said, card in ({"modelspec.license": "cc-by-nc-4.0"}, "Licence: cc-by-nc-4.0."), ({}, "Licence: that of the"):
        save_file(state, tmp_path / "x.safetensors", metadata={"nitrofusion.shifted_timestep": "500"} | said)
        folder = export(tmp_path / "x.safetensors", tmp_path / "out", "comfyui")
        assert header(folder / "x_comfyui.safetensors").get("modelspec.license") == said.get("modelspec.license")
        assert card in (folder / "README.md").read_text()
        shutil.rmtree(folder)
    preset(nudged(state_of(base), 1))
    graft(base, tmp_path / "world", student="tiny")  # called like a preset, and none
    assert "Licence: that of the weights it was made from." in (tmp_path / "world" / "README.md").read_text()


def test_a_folder_of_half_precision_files_is_adapted_whole(base, preset, tmp_path):
    """As the hub's cache holds SDXL: its own names with .fp16, and in several files."""
    custom, halves = sdxl_folder(tmp_path / "custom", seed=5), tmp_path / "halves"
    preset(nudged(state_of(base), 1))
    shutil.copytree(custom, halves)
    for file in halves.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    text = halves / "text_encoder_2"
    state = load_file(text / "model.fp16.safetensors")
    (text / "model.fp16.safetensors").unlink()
    names = sorted(state)
    shards = {"model.fp16-00001-of-00002.safetensors": names[::2], "model.fp16-00002-of-00002.safetensors": names[1::2]}
    for name, keys in shards.items():
        save_file({key: state[key] for key in keys}, text / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (text / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    graft(halves, tmp_path / "out", student="tiny")
    for part, name in ((VAE, VAE), ("text_encoder/model.safetensors",) * 2, ("text_encoder_2/model.safetensors",) * 2):
        made, wanted = load_file(tmp_path / "out" / part), load_file(custom / name)
        if name.startswith("text_encoder/"):
            wanted = published(wanted)
        assert made.keys() == wanted.keys() and all(torch.equal(made[k], wanted[k]) for k in wanted)
    load(tmp_path / "out").generate(PROMPTS[0])


def test_a_custom_preset_keeps_its_decoder(base, preset, other_vae, tmp_path):
    """It lies elsewhere, and where the hub's folder has none of its own."""
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    (bare / VAE).unlink()
    preset(nudged(state_of(base), 1))
    graft(preset(folder=bare, name="custom", vae=str(other_vae)), tmp_path / "out", student="tiny")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "out" / "vae" / name).read_bytes() == (other_vae / name).read_bytes()


def test_a_unet_that_drawing_did_not_need_is_fetched(base, preset, tmp_path, monkeypatch):
    """A hub preset's folder comes without the UNet that the student's replaces, which is what it was distilled from."""
    state = nudged(state_of(base), 1)
    preset(state)
    wanted = export("tiny", tmp_path / "a", "lora", rank=2)
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    (bare / UNET).unlink()
    asked = []

    def fetch(name, repo, parts):
        asked.append((repo, parts))
        return base if "unet" in parts else bare

    monkeypatch.setattr("nitrofusion.engine.source.fetch_folder", fetch)
    monkeypatch.setattr(exporting, "fetch_folder", fetch)
    preset(state, folder="someone/sdxl")
    made = export("tiny", tmp_path / "b", "lora", rank=2)
    assert (made / LORA_FILE).read_bytes() == (wanted / LORA_FILE).read_bytes()
    report = graft(sdxl_folder(tmp_path / "custom", seed=5), tmp_path / "g.safetensors", student="tiny")
    assert report.change > 0 and asked.count(("someone/sdxl", ("unet",))) == 2


@pytest.mark.parametrize("shape", [(), (0,), (5,), (4, 4), (48, 4, 3, 3, 1)])
def test_first_layers_of_another_form_are_refused(base, preset, tmp_path, shape):
    preset(nudged(state_of(base), 1))
    save_file(changed(base, conv_in__weight=torch.zeros(shape)), tmp_path / "x.safetensors")
    for name in ("custom", "student", "base"):
        given = {"custom": base, "student": "tiny", "base": base, name: tmp_path / "x.safetensors"}
        words = f"{name} must have 4 sides in conv_in.weight, got {list(shape)}"
        with pytest.raises(InputError, match=re.escape(words)):
            graft(output=tmp_path / "out.safetensors", shifted_timestep=500, **given)


def test_bad_grafts_are_one_line(base, preset, tmp_path):
    preset(nudged(state_of(base), 1))
    save_file(nudged(state_of(base), 1), tmp_path / "x.safetensors", metadata={"nitrofusion.shifted_timestep": "abc"})
    save_file(changed(base, extra=torch.tensor([float("nan")])), tmp_path / "nan.safetensors")
    for options, words in (
        ({"student": tmp_path / "x.safetensors", "base": base}, "shifted_timestep must be given in 1..1000"),
        ({"strength": 10**400}, "strength must be a finite number"),
        ({"student": None}, "student must be a preset, a folder or a safetensors file, got None"),
        ({"custom": "~nobodyhere/x"}, "must be a path this system has"),
        ({"custom": tmp_path / "nan.safetensors"}, "custom must hold finite weights, got NaN or infinity in extra"),
        ({"output": tmp_path / ("x" * 300)}, "output must be a path this system has"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            graft(**{"custom": base, "student": "tiny", "output": tmp_path / "o.safetensors"} | options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan.safetensors", "tiny.safetensors", "x.safetensors"]


def test_where_an_export_goes(base, preset, tmp_path, monkeypatch):
    preset(nudged(state_of(base), 1))
    (tmp_path / "empty").mkdir()
    for name, target in (("link", "empty"), ("dangling", "later")):
        (tmp_path / name).symlink_to(tmp_path / target)
        assert export("tiny", tmp_path / name, "lora", rank=1) == tmp_path / name
        assert (tmp_path / target / LORA_FILE).is_file() and (tmp_path / name).is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (".", "", tmp_path / "here"):
        with pytest.raises(InputError, match="output must be another folder than the current one"):
            export("tiny", output, "lora", rank=1)
    for output in ("x" * 300, "~nobodyhere/x", "a\0b"):
        with pytest.raises(InputError, match="output must be a path this system has"):
            export("tiny", output, "lora", rank=1)
    assert export("tiny", "n" * 250, "lora", rank=1).is_dir()


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "lora"])
def test_a_full_disk_leaves_nothing(base, preset, tmp_path, format):
    preset(nudged(state_of(base), 1))
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="must"):
            export("tiny", tmp_path / "out", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before

"""Files that try to run code, crash, or take the machine; and every way in which a model is given to us.

Everything made here is offered by ``test_hostile.py`` in small numbers and by ``benchmarks/survival.py`` in large ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nitrofusion import checkpoint
from nitrofusion.config import TrainConfig
from nitrofusion.engine import load
from nitrofusion.engine.export import export
from nitrofusion.engine.graft import graft
from nitrofusion.errors import NitroError
from nitrofusion.evaluate.weights import convert
from nitrofusion.models.weights import Weights, read_pickle
from nitrofusion.train.plan import preflight

UNET = "unet/diffusion_pytorch_model.safetensors"

# ------------------------------------------------------------------------------------------------ safetensors


def mutations(data: bytes, rng: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    """``each`` of eight kinds, all different from ``data``."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for name, mutate in {
        "truncated": lambda: data[: rng.randrange(len(data))],
        "appended": lambda: data + rng.randbytes(rng.randint(1, 64)),
        "length": lambda: (
            struct.pack("<Q", rng.choice((rng.randrange(2**64), max(0, size + rng.randint(-9, 9))))) + data[8:]
        ),
        "random": lambda: rng.randbytes(rng.randint(1, 4096)),
        "header edit": lambda: _edited(header, data[8 + size :], rng),
        "odd tensor": lambda: _with_tensor(header, data[8 + size :], rng),
        "header bit": lambda: _flipped(data, rng.randrange(8 * 8, 8 * (8 + size))),
        "payload bit": lambda: _flipped(data, rng.randrange(8 * (8 + size), 8 * len(data))),
    }.items():
        made = 0
        while made < each:
            if (changed := mutate()) != data:
                made += 1
                yield name, changed


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _edited(header: dict, payload: bytes, rng: random.Random) -> bytes:
    header = json.loads(json.dumps(header))
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, other = header[name], rng.choice([-1, 0, 1, 2**31, 2**63, 2**64, 1.5, None, "x", [], {}, True])
    rng.choice((
        lambda: entry.update(dtype=rng.choice(("F64", "I4", "F4", "", 7, "F8_E8M0", "BF16"))),
        lambda: entry.update(shape=[other, *entry["shape"][1:]]),
        lambda: entry.update(shape=other),
        lambda: entry["data_offsets"].__setitem__(rng.randrange(2), other),
        lambda: entry.update(data_offsets=other),
        lambda: entry.pop(rng.choice(("dtype", "shape", "data_offsets"))),
        lambda: header.update({name + "x": header.pop(name)}),
        lambda: header.update({"__metadata__": rng.choice(({"a": 1}, [], {"a": {"b": "c"}}))}),
        lambda: header.update({f"again.{name}": dict(entry)}),
    ))()  # fmt: skip
    return file_of(header, payload)


def _with_tensor(header: dict, payload: bytes, rng: random.Random) -> bytes:
    """One more, at the end, of no bytes or of very many sides."""
    end, side = len(payload), rng.choice([1, 7, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
    empty = [side] * rng.randint(1, 9)
    empty.insert(rng.randrange(len(empty)), 0)
    shape, more = rng.choice(((empty, b""), ([1] * rng.choice((8, 9, 64, 65, 10_000)), bytes(4))))
    odd = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + len(more)]}
    return file_of(header | {"odd": odd}, payload + more)


def file_of(header: dict, payload: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + payload


# ------------------------------------------------------------------------------------------------ pickles


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path, how: str = "open"):
        self.canary, self.how = str(canary), how

    def __reduce__(self):
        code = f"open({self.canary!r}, 'w').close()"
        return {
            "open": (open, (self.canary, "w")),
            "exec": (exec, (code,)),
            "system": (os.system, (f"touch {self.canary}",)),
        }[self.how]


def pickles(folder: Path, canary: Path) -> Iterator[Path]:
    """Sixty payloads: ten forms under six extensions."""
    folder.mkdir(parents=True, exist_ok=True)
    forms = {
        "protocol0": pickle.dumps(Touch(canary), 0),
        "protocol2": pickle.dumps({"a": Touch(canary, "exec")}, 2),
        "protocol5": pickle.dumps([Touch(canary, "system")], 5),
        "zip": _saved({"state_dict": {"conv_in.weight": Touch(canary)}}),
        "legacy": _saved({"a": Touch(canary, "exec")}, _use_new_zipfile_serialization=False),
        "beside-tensors": _saved({"conv_in.weight": torch.zeros(2), "b": Touch(canary, "system")}),
        "torchscript": _zipped({"m/code/__torch__.py": b"class M(Module): pass", "m/constants.pkl": b"\x80\x02).",
                                "m/data.pkl": pickle.dumps(Touch(canary), 2), "m/version": b"3\n"}),
        "nested": _zipped({"a/inner.pt": _saved(Touch(canary)), "a/data.pkl": pickle.dumps(Touch(canary, "exec"), 2)}),
        "tar": _tarred({"tensors": b"", "pickle": pickle.dumps(Touch(canary), 2), "storages": b""}),
        "dcp-metadata": pickle.dumps(Touch(canary, "exec"), 4) + pickle.dumps({"state_dict_metadata": {}}, 4),
    }  # fmt: skip
    for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors"):
        for name, data in forms.items():
            path = folder / f"{name}{suffix}"
            path.write_bytes(data)
            yield path


def _saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def file_entries(path: Path, base: Path, scratch: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a weights file a user names; ``base`` is a good pipeline folder."""
    config = TrainConfig(output=str(scratch / "run"), teacher=str(base), init=None, crop_size=8, device="cpu")
    return {
        "load": lambda: load(path),
        "load, pickles allowed": lambda: load(path, allow_pickle=True),
        "load, as a part": lambda: load(_replaced(base, scratch / "part", UNET, path)),
        "lora": lambda: load(base, lora=path),
        "vae": lambda: load(base, vae=path, allow_pickle=True),
        "fp8": lambda: load(base, fp8=path),
        "teacher_unet": lambda: preflight(_with(config, teacher_unet=str(path))),
        "init": lambda: preflight(_with(config, init=str(path))),
        "checkpoint": lambda: _resumed(path, scratch / "checkpoint"),
        "export": lambda: export(path, scratch / "exported"),
        "graft": lambda: graft(path, scratch / "grafted", student=base),
        "evaluate": lambda: read_pickle(path, "evaluate"),
        "convert": lambda: convert(path, scratch / "converted.safetensors"),
    }


def _with(config: TrainConfig, **changes) -> TrainConfig:
    import dataclasses

    return dataclasses.replace(config, **changes)


def _replaced(base: Path, copy: Path, name: str, path: Path) -> Path:
    """A pipeline folder in which the payload lies in place of the UNet's weights, under its own extension."""
    shutil.rmtree(copy, ignore_errors=True)
    linked(base, copy)
    (copy / name).unlink()
    shutil.copyfile(path, (copy / name).with_suffix(path.suffix))
    return copy


def _resumed(path: Path, run: Path):
    """A sealed checkpoint to which the payload was added."""
    shutil.rmtree(run, ignore_errors=True)
    folder = checkpoint.save(run, 1, {"student": {"a": torch.zeros(2)}}, {})
    shutil.copyfile(path, folder / (".metadata" if "dcp" in path.name else path.name))
    return checkpoint.load(folder)


# ------------------------------------------------------------------------------------------------ folders


def linked(base: Path, copy: Path) -> Path:
    """A copy of a folder that shares its files; to change one, ``put`` it."""
    shutil.copytree(base, copy, copy_function=os.link)
    return copy


def put(path: Path, content: bytes | str | dict) -> None:
    """Writes a new file in the place of a shared one."""
    path.unlink(missing_ok=True)
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def edit(path: Path, **changes) -> None:
    put(path, json.loads(path.read_text()) | changes)


def folders(base: Path, root: Path, canary: Path) -> Iterator[tuple[str, Path]]:
    """Pipeline folders that name code, or files that are not theirs."""
    code = f"open({str(canary)!r}, 'w').close()\n"
    index, auto = (
        "model_index.json",
        {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.E"},
    )
    weight_map = lambda name: {"weight_map": {"conv_in.weight": name}}  # noqa: E731

    def sharded(folder: Path, name: str) -> None:
        (folder / UNET).rename(folder / "unet" / "stray.safetensors")
        put(folder / f"{UNET}.index.json", weight_map(name))

    def pickled(folder: Path, keep: bool) -> None:
        put(folder / "unet" / "diffusion_pytorch_model.bin", _saved({"a": Touch(canary)}))
        if not keep:
            (folder / UNET).unlink()

    def link(folder: Path, name: str, target: str) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        (folder / name).symlink_to(target)

    def pipe(folder: Path, name: str) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    scheduler, tokenizer = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
    for name, change in {
        "custom_pipeline": lambda f: edit(f / index, custom_pipeline="pipeline.py"),
        "pipeline class of its own": lambda f: edit(f / index, _class_name=["evil", "StableDiffusionXLEvil"]),
        "pipeline name of its own": lambda f: edit(f / index, _class_name="EvilPipeline"),
        "component of its own": lambda f: edit(f / index, unet=["evil", "Evil"], scheduler=["evil", "Evil"]),
        "module path of a component": lambda f: edit(
            f / index, unet=["os", "system"], text_encoder=["builtins", "exec"]
        ),
        "auto_map of the unet": lambda f: edit(f / "unet/config.json", auto_map=auto, _class_name="Evil"),
        "auto_map of a text encoder": lambda f: edit(f / "text_encoder/config.json", auto_map=auto, model_type="evil"),
        "auto_map of a tokenizer": lambda f: edit(f / tokenizer, auto_map=auto, tokenizer_class="evil.Evil"),
        "template of a tokenizer": lambda f: edit(f / tokenizer, chat_template="{{ ''.__class__.__mro__ }}"),
        "vocabulary elsewhere": lambda f: edit(f / tokenizer, vocab_file="/etc/passwd", tokenizer_file="/etc/passwd"),
        "scheduler of its own": lambda f: edit(f / scheduler, _class_name="Evil"),
        "scheduler that is a module": lambda f: edit(f / scheduler, _class_name="scheduling_utils"),
        "scheduler that is a builtin": lambda f: edit(f / scheduler, _class_name="__import__"),
        "scheduler that is a list": lambda f: edit(f / scheduler, _class_name=["evil", "Evil"]),
        "quantizer": lambda f: edit(f / "text_encoder/config.json", quantization_config={"quant_method": "evil"}),
        "dtype": lambda f: edit(f / "unet/config.json", torch_dtype="__import__('os')", dtype="evil"),
        "index up": lambda f: sharded(f, "../../stray.safetensors"),
        "index absolute": lambda f: sharded(f, "/etc/passwd"),
        "index to a pickle": lambda f: sharded(f, "diffusion_pytorch_model.bin"),
        "index through a folder": lambda f: sharded(f, "x/../../unet/stray.safetensors"),
        "pickle alone": lambda f: pickled(f, False),
        "pickle beside": lambda f: pickled(f, True),
        "weights that are a link": lambda f: link(f, UNET, "/etc/passwd"),
        "configuration that is a link": lambda f: link(f, "unet/config.json", "/etc/passwd"),
        "link to itself": lambda f: link(f, "vae", "vae"),
        "folder that is a link": lambda f: link(f, "unet", "/dev"),
        "weights that are a pipe": lambda f: pipe(f, UNET),
        "configuration that is a pipe": lambda f: pipe(f, "vae/config.json"),
    }.items():
        folder = linked(base, root / name.replace(" ", "-"))
        for inner in (folder, *(p for p in folder.iterdir() if p.is_dir())):
            for module in ("evil.py", "pipeline.py", "__init__.py", "conftest.py"):
                (inner / module).write_text(code)
        change(folder)
        yield name, folder


def folder_entries(folder: Path, base: Path, scratch: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a pipeline folder a user names; the server's worker calls ``load`` too."""
    config = TrainConfig(output=str(scratch / "run"), teacher=str(folder), init=None, crop_size=8, device="cpu")
    return {
        "load": lambda: load(folder),
        "load on modules": lambda: load(folder, backend="ref"),
        "teacher": lambda: preflight(config),
        "backbone": lambda: preflight(_with(config, teacher=str(base), backbone=str(folder))),
        "init": lambda: preflight(_with(config, teacher=str(base), init=str(folder))),
        "vae": lambda: load(base, vae=folder),
        "export": lambda: _exported(folder, scratch / "exported"),
    }


def _exported(folder: Path, output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    export(folder, output)
    strange = [p for p in output.rglob("*") if p.suffix in (".py", ".bin") or p.is_symlink()]
    assert not strange, f"export passed on {strange}"


# ------------------------------------------------------------------------------------------------ outcomes


def outcome(call: Callable[[], object]) -> str:
    """``refused: ...`` in one line, ``accepted``, or ``crashed: ...``."""
    try:
        call()
    except NitroError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"crashed: {type(error).__name__}: {error}"
    return "accepted"


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# ------------------------------------------------------------------------------------------------ offers


def reseal(folder: Path) -> Path:
    """The manifest of a stranger, who can hash what he altered."""
    names = [path.name for path in folder.iterdir() if path.name != checkpoint.MANIFEST]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    put(folder / checkpoint.MANIFEST, {"files": digests})
    return folder


def mutated(root: Path, rng: random.Random, each: int) -> dict:
    """Mutations of a checkpoint's file, offered with its manifest, with one of their own, and without."""
    parts = {"student": {f"layer.{i}.weight": torch.randn(8, i + 1) for i in range(6)} | {"half": torch.ones(5).half()}}
    folder = checkpoint.save(root, 1, parts, {})
    file, alone = folder / "student.safetensors", root / "alone.safetensors"
    said = {"made": 0, "accepted under a manifest": 0, "read without one": 0, "crashed": [], "slowest_ms": 0.0}
    before = peak()
    for kind, data in mutations(file.read_bytes(), rng, each):
        sealed = file.read_bytes()
        file.write_bytes(data)
        alone.write_bytes(data)
        started = time.perf_counter()
        under = outcome(lambda: checkpoint.load(folder))
        bare = outcome(lambda: Weights(alone))
        said["slowest_ms"] = max(said["slowest_ms"], round(1000 * (time.perf_counter() - started), 1))
        resealed = outcome(lambda: checkpoint.load(reseal(folder)))
        file.write_bytes(sealed)
        reseal(folder)
        said["made"] += 1
        said["accepted under a manifest"] += under == "accepted"
        said["read without one"] += bare == "accepted"
        said["crashed"] += [f"{kind}: {what}" for what in (under, resealed, bare) if what.startswith("crashed")]
    return said | {"memory_mb": (peak() - before) >> 20}


def unpickled(base: Path, root: Path, rng: random.Random, count: int = 60) -> dict:
    """Payloads offered to everything that reads a weights file."""
    canary = root / "canary"
    paths = list(pickles(root / "payloads", canary))
    said = {"payloads": min(count, len(paths)), "offers": 0, "ran": [], "not refused": [], "without how to convert": []}
    for path in rng.sample(paths, min(count, len(paths))):
        for entry, call in file_entries(path, base, root / "scratch").items():
            what = outcome(call)
            said["offers"] += 1
            said["not refused"] += [] if what.startswith("refused") else [f"{path.name}, {entry}: {what}"]
            tells = entry not in ("load", "load, as a part", "lora", "teacher_unet") or "convert" in what
            tells = tells or path.name in ("protocol0.safetensors", "tar.safetensors")  # which begin as anything may
            said["without how to convert"] += [] if tells else [f"{path.name}, {entry}: {what}"]
            if canary.exists():
                said["ran"].append(f"{path.name}, {entry}")
                canary.unlink()
    return said


def opened(base: Path, root: Path, rng: random.Random, count: int | None = None) -> dict:
    """Folders offered to everything that reads one."""
    canary = root / "canary"
    made = list(folders(base, root / "folders", canary))
    said = {"folders": min(count or len(made), len(made)), "offers": 0, "refused": 0, "ran": [], "crashed": []}
    for name, folder in rng.sample(made, said["folders"]):
        for entry, call in folder_entries(folder, base, root).items():
            what = outcome(call)
            said["offers"] += 1
            said["refused"] += what.startswith("refused")
            said["crashed"] += [f"{name}, {entry}: {what}"] if what.startswith("crashed") else []
            if canary.exists():
                said["ran"].append(f"{name}, {entry}")
                canary.unlink()
    return said

"""What this machine has and whether the ops are right on it: versions, device, backends, errors, speeds, models."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import platform
import statistics
import textwrap
import time
from pathlib import Path

import torch

import nitrokernels.ops
from nitrokernels import _native, explain, use
from nitrokernels.testing import Case, map_tensors, tensors, widen

from . import __version__
from .device import pick_device
from .presets import MODELS

PACKAGES = ("diffusers", "transformers", "safetensors", "numpy")
OPTIONAL = ("triton", "openvino", "xformers", "peft")
SECONDS = 0.25  # of timing an op
LARGEST = 12_000_000  # elements of an op's input here
DRAWS = 4  # fresh inputs of each op; one draw's error may be small by luck


def diagnose(device: str | None = None) -> dict:
    """Everything ``nitrofusion doctor`` shows, as JSON holds it.

    Returns:
        ``versions``, ``device``, ``ops`` (a row each: backend, why, errors, speed), ``models`` (preset to where it is),
        ``notes`` (what could be better), ``faults`` (what is wrong; empty means all is fine).

    Raises:
        InputError: there is no such device.
    """
    chosen = pick_device(device)
    names = [module.name for module in pkgutil.iter_modules(nitrokernels.ops.__path__)]
    ops = [check_op(importlib.import_module(f"nitrokernels.ops.{name}"), chosen.type) for name in names]
    report = {
        "versions": {
            "nitrofusion": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # names its CUDA, which its metadata may not
            **_versions(PACKAGES + OPTIONAL),
        },
        "device": _device(chosen),
        "ops": ops,
        "models": {name: _where(name) for name in MODELS},
        "notes": [],
        "faults": [f"{op['op']}: {op['fault']}" for op in ops if op["fault"]],
    }
    if _native.MISSING:
        report["notes"].append(_native.MISSING)
    if report["device"]["load"] > report["device"]["cores"]:
        report["notes"].append(f"the machine is busy (load {report['device']['load']}): speeds are not to be trusted")
    if named := os.environ.get("NITROKERNELS_BACKEND"):
        report["notes"].append(f"NITROKERNELS_BACKEND={named} overrides the choice of backend")
    return report


def check_op(module, device: str) -> dict:
    """One op on the backend it chooses for a large input: error against fp64 on its first case, speed against eager."""
    op, case = module.OP.name, next(iter(module.CASES.values()))
    row = {"op": op, "backend": None, "why": [], "error": None, "eager_error": None, "fault": None}
    row |= {"shape": None, "ms": None, "eager_ms": None}
    try:
        row["shape"], large = _large(module)
        row["why"] = explain(op, *large.make(torch.float32, device))
        row["backend"] = next(line.split(":")[0] for line in row["why"] if line.endswith(": chosen"))
        with use(row["backend"]):  # of a small input, too, which it would leave to eager PyTorch
            row["error"], row["eager_error"], row["fault"] = _error(module, case, device)
        row["ms"], row["eager_ms"] = _speed(module, large, device)
    except (RuntimeError, StopIteration) as error:  # a named backend that cannot run, a kernel that fails
        row["fault"] = " ".join(str(error).split()) or f"no backend runs it ({'; '.join(row['why'])})"
    return row


def _call(module, case: Case, args: list) -> list[torch.Tensor]:
    out = getattr(module, module.OP.name)(*args)
    written = tensors(out) + [t for i in case.mutated for t in tensors(args[i])]
    return [t for t in written if t.is_floating_point()] or [t.double() for t in written]  # codes of 8-bit numbers


def _error(module, case: Case, device: str) -> tuple[float, float, str | None]:
    """(largest error relative to the largest exact value, that of eager PyTorch, None or what exceeds its budget).

    The budget is the contract suite's: twice eager's error, and one unit in the last place, each over all draws.
    """
    draws = [_errors(module, case, device) for _ in range(DRAWS)]
    outputs = [tuple(map(max, *output)) for output in zip(*draws, strict=True)]
    unit = torch.finfo(torch.float32).eps
    wrong = [(error, eager) for error, eager in outputs if error > 2 * eager + unit]
    fault = (
        f"error must be <= {2 * wrong[0][1] + unit:.2g} of the largest value, got {wrong[0][0]:.2g}" if wrong else None
    )
    return *map(max, *outputs, (0.0, 0.0)), fault


def _errors(module, case: Case, device: str) -> list[tuple[float, float]]:
    """(error, eager's error) of each output of a call with fresh input."""
    args = case.make(torch.float32, device)
    with use("ref"):
        exact = _call(module, case, list(widen(args)))
        eager = _call(module, case, map_tensors(torch.clone, list(args)))
    got = _call(module, case, map_tensors(torch.clone, list(args)))

    def error(value: torch.Tensor, true: torch.Tensor) -> float:
        off = (value.double() - true).abs().max() / true.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        return off.nan_to_num(nan=float("inf"), posinf=float("inf")).item()

    return [(error(g, x), error(e, x)) for g, e, x in zip(got, eager, exact, strict=True)]


def _large(module) -> tuple[str, Case]:
    """The largest case, full-size ones included, whose input is not too large."""
    sizes = {}
    for name, case in (module.CASES | getattr(module, "AOT", {})).items():
        size = sum(t.numel() for t in tensors(list(case.make(torch.float32, "meta"))))  # where nothing is allocated
        if size <= LARGEST:
            sizes[name] = size, case
    name = max(sizes, key=lambda name: sizes[name][0])
    return name, sizes[name][1]


def _speed(module, case: Case, device: str) -> tuple[float, float]:
    """Median milliseconds of the backend that is chosen, and of eager PyTorch, in turns."""
    args = case.make(torch.float32, device)
    function = getattr(module, module.OP.name)

    def once() -> float:
        start = time.perf_counter()
        function(*args)
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def eager() -> float:
        with use("ref"):
            return once()

    times: tuple[list[float], list[float]] = ([], [])
    once(), eager()
    end = time.perf_counter() + SECONDS
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 100):
        times[0].append(once())
        times[1].append(eager())
    return statistics.median(times[0]), statistics.median(times[1])


def _versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _device(device: torch.device) -> dict:
    cuda = device.type == "cuda"
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1) if cuda else _memory_gb(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
        "native_ops": _native.MISSING is None,
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _where(name: str) -> str:
    """Where a preset's weights are: ``shipped``, ``in the hub's cache`` or ``not here``; downloads nothing."""
    from huggingface_hub import try_to_load_from_cache

    preset = MODELS[name]
    wanted = [(preset.folder, "model_index.json"), (preset.folder, "unet/config.json")]
    if preset.unet:
        wanted.append(tuple(preset.unet.rsplit("/", 1)))
    if all(Path(folder).is_absolute() for folder, _ in wanted):
        return "shipped" if all((Path(folder) / file).exists() for folder, file in wanted) else "not here"
    found = [isinstance(try_to_load_from_cache(repo, file), str) for repo, file in wanted]
    return "in the hub's cache" if all(found) else "in part in the hub's cache" if any(found) else "not here"


def format_report(report: dict) -> str:
    """The report for a terminal of 100 columns."""
    device, versions = report["device"], report["versions"]
    memory = f", {device['memory_gb']} GB" if device["memory_gb"] else ""
    packages = [f"{name} {version}" for name, version in versions.items() if version]
    missing = [name for name, version in versions.items() if not version]
    lines = _wrapped("versions", ", ".join(packages) + (f"; without {', '.join(missing)}" if missing else ""))
    lines += _wrapped("device", f"{device['type']}: {device['name']}{memory}")
    native = "native ops loaded" if device["native_ops"] else "no native ops"
    cores = f"{device['cores']} cores, {device['threads']} threads, {device['vectors']}, load {device['load']}"
    lines += [*_wrapped("cpu", f"{cores}, {native}"), ""]
    lines.append(
        f"  {'op':16} {'backend':8} {'error':>8} {'eager':>8}   {'shape':20} {'ms':>8} {'eager':>8} {'speed':>7}"
    )
    for op in report["ops"]:
        lines += _op_lines(op)
    lines.append("")
    for where in sorted(set(report["models"].values()), reverse=True):
        lines += _wrapped(where, ", ".join(name for name, place in report["models"].items() if place == where), 28)
    lines.append("")
    for note in report["notes"]:
        lines += _wrapped("note", note)
    for fault in report["faults"]:
        lines += _wrapped("FAULT", fault)
    return "\n".join([*lines, f"{len(report['faults'])} faults" if report["faults"] else "all fine"])


def _op_lines(op: dict) -> list[str]:
    mark = "x" if op["fault"] else " "
    head = f"{mark} {op['op']:16} {op['backend'] or '-':8}"
    if op["ms"] is None:
        lines = [head]
    else:
        speed = op["eager_ms"] / op["ms"]
        head += f" {op['error']:8.1e} {op['eager_error']:8.1e}   {op['shape']:20.20}"
        ratio = "eager" if op["backend"] == "ref" else f"{speed:.1f}x"
        lines = [f"{head} {op['ms']:8.3f} {op['eager_ms']:8.3f} {ratio:>7}"]
    if op["backend"] == "ref":
        reasons = [line for line in op["why"] if not line.startswith(("ref", "triton: tensors", "cuda: tensors"))]
        lines += textwrap.wrap("; ".join(reasons), 96, initial_indent="    ", subsequent_indent="    ")
    return lines


def _wrapped(label: str, text: str, indent: int = 10) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=f"{label:{indent}}", subsequent_indent=" " * indent) or [label]

"""Every op at full size, every backend beside eager PyTorch and torch.compile.

    python -m benchmarks.ops --threads 1 --json ops.json

Shapes are the ``AOT`` cases of each op's file, so a new op is timed without touching this one; the heads have a
benchmark of their own (``benchmarks.heads``). Variants take turns inside one run; medians are of wall-clock time.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator

import torch

import nitrokernels.ops
from nitrokernels import use
from nitrokernels.testing import Case, map_tensors, tensors

from . import records

DTYPES = ("float32", "float16", "bfloat16")
NAMES = [m.name for m in pkgutil.iter_modules(nitrokernels.ops.__path__)]
MODULES = [importlib.import_module(f"nitrokernels.ops.{name}") for name in NAMES]


def workloads() -> Iterator[tuple[object, str, Case]]:
    """(module, shape, case) of every op but the heads."""
    for module in MODULES:
        if module.OP.name != "head_pool":
            for shape, case in getattr(module, "AOT", {}).items():
                yield module, shape, case


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def variants(module, case: Case, dtype: torch.dtype, device: str, backward: bool, compiled: bool = True):
    """({variant: a function that runs it once}, {variant: why it cannot}); all share their input."""
    args = list(case.make(dtype, device))
    public = getattr(module, module.OP.name)
    asked: list[torch.Tensor] = []
    if backward:
        ask = lambda t: t.requires_grad_() if t.is_floating_point() else t  # noqa: E731
        args = [map_tensors(ask, a) if i in case.grads else a for i, a in enumerate(args)]
        asked = [t for i in case.grads for t in tensors(args[i]) if t.is_floating_point()]
        with use("ref"):
            outputs = [o for o in tensors(public(*args)) if o.requires_grad]
        upstream = [torch.randn_like(o) for o in outputs]

    def runner(function: Callable, backend: str) -> Callable[[], None]:
        def run():
            with use(backend), torch.set_grad_enabled(backward):
                out = function(*args)
            if backward:
                torch.autograd.grad([o for o in tensors(out) if o.requires_grad], asked, upstream)

        return run

    runs = {"eager": runner(public, "ref")}
    if compiled and not case.mutated:
        torch.compiler.reset()  # after eight shapes dynamo would leave the rest in eager mode
        runs["compile"] = runner(torch.compile(public, dynamic=False), "ref")
    for backend in module.OP.impls:
        if backend == "ref" or (backend == "triton" and device == "cpu"):
            continue  # the interpreter is for numbers, not for times
        runs[f"nitrokernels_{backend}"] = runner(public, backend)
    return that_run(runs, device)


def that_run(runs: dict[str, Callable], device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """(those that run, {those that do not: why}), by a first call of each."""
    fine, skipped = {}, {}
    for name, run in runs.items():
        try:
            run()
            synchronize(device)
            fine[name] = run
        except Exception as error:  # a backend that cannot, a kernel that does not compile or fit: the others go on
            skipped[name] = records.failure(error)
    return fine, skipped


def interleaved(runs: dict[str, Callable], device: str, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, in turns for about ``seconds`` each; every variant has run twice before."""
    slowest = 0.0
    for run in runs.values():
        run()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        slowest = max(slowest, time.perf_counter() - start)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(5, min(200, int(seconds / slowest)))):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def measure(module, shape: str, case: Case, dtype, device: str, threads: int, seconds: float, compiled: bool):
    """Yields (rows, what was skipped and why) of each direction."""
    for direction in ("forward", "forward + backward") if case.grads else ("forward",):
        what = {
            "op": module.OP.name,
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "direction": direction,
        }
        median, skipped = {}, {}
        try:
            runs, skipped = variants(module, case, dtype, device, direction != "forward", compiled)
            median = interleaved(runs, device, seconds) if "eager" in runs else {}
        except Exception as error:  # of the reference, or of memory: the other cases go on
            skipped["all"] = records.failure(error)
        rows = []
        for variant, value in median.items():
            about = {"device": device, "threads": threads, "load_average": round(os.getloadavg()[0], 2)}
            times = {"median_ms": round(value, 4), "ratio_to_eager": round(median["eager"] / value, 3)}
            rows.append(what | about | {"variant": variant} | times)
            print("{op:16} {shape:18} {dtype:8} {direction:18} {variant:18} {median_ms:10.3f} ms "
                  "{ratio_to_eager:6.2f}x eager".format(**rows[-1]), flush=True)  # fmt: skip
        absent = [what | {"variant": variant, "reason": reason} for variant, reason in skipped.items()]
        for row in absent:
            print("{op:16} {shape:18} {dtype:8} {direction:18} {variant:18} {reason}".format(**row), flush=True)
        yield rows, absent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=records.count, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    names = [module.OP.name for module in MODULES if module.OP.name != "head_pool"]
    parser.add_argument("--op", nargs="*", choices=names, help="only these")
    parser.add_argument("--dtype", nargs="*", default=["float32"], choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each variant")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=records.output, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = {"machine": records.machine(args.threads), "rows": [], "skipped": []}
    for module, shape, case in workloads():
        if args.op and module.OP.name not in args.op:
            continue
        for name in args.dtype:
            dtype = getattr(torch, name)
            if dtype in case.dtypes:
                compiled = not args.no_compile
                rest = args.device, args.threads, args.seconds, compiled
                for rows, skipped in measure(module, shape, case, dtype, *rest):
                    record["rows"] += rows
                    record["skipped"] += skipped
                    records.write(args.json, record)


if __name__ == "__main__":
    main()

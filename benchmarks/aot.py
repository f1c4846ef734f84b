"""Compiles every Triton kernel at every listed shape for sm_80, sm_90 and sm_100, with no GPU at hand.

    python -m benchmarks.aot --json FILE

A row per kernel, arch and shape: registers, spills (bytes), shared_bytes, and the bytes the launch must move. Ends
with exit code 1 where a kernel spills or wants more shared memory than the part has.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

import nitrokernels.ops
from nitrokernels import _triton, use
from nitrokernels.testing import Case, map_tensors, tensors

from . import records

DTYPES = ("float32", "bfloat16", "float16")
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may have (CUDA programming guide)


def launches(module, case: Case, dtype: torch.dtype) -> list[_triton.Launch]:
    """What one call and its gradients would launch, from meta tensors."""
    args = [map_tensors(lambda t: t.to("meta"), a) for a in case.make(dtype, "meta")]
    inputs = [t.requires_grad_() for i in case.grads for t in tensors(args[i]) if t.is_floating_point()]
    with use("triton"), _triton.record() as seen:
        out = getattr(module, module.OP.name)(*args)
        outputs = [o for o in tensors(out) if o.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, inputs, [torch.empty_like(o) for o in outputs], allow_unused=True)
    return seen


def compile_case(op: str, shape: str, dtype: torch.dtype) -> list[dict]:
    """A row per launch and arch."""
    module, rows = importlib.import_module(f"nitrokernels.ops.{op}"), []
    for launch in launches(module, module.AOT[shape], dtype):
        for arch in SHARED_LIMIT:
            built = _triton.compile_ahead(launch, arch)
            rows.append(
                {
                    "op": module.OP.name,
                    "kernel": launch.kernel.__name__,
                    "arch": f"sm_{arch}",
                    "shape": f"{shape} {str(dtype).removeprefix('torch.')}",
                    "registers": built.registers,
                    "spills": built.spills,
                    "shared_bytes": built.shared_bytes,
                    "shared_limit": SHARED_LIMIT[arch],
                    "bytes_moved": launch.bytes_moved(),
                }
            )
    return rows


def compile_all(dtypes: list[str]) -> list[dict]:
    """All cases of these types, on all cores."""
    calls = []
    for info in pkgutil.iter_modules(nitrokernels.ops.__path__):
        module = importlib.import_module(f"nitrokernels.ops.{info.name}")
        if "triton" in module.OP.impls:
            for shape, case in getattr(module, "AOT", {}).items():
                wanted = [dtype for dtype in case.dtypes if str(dtype).removeprefix("torch.") in dtypes]
                calls += [(info.name, shape, dtype) for dtype in wanted]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as workers:
        return [row for rows in workers.map(compile_case, *zip(*calls, strict=True)) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=records.output, help="file to write")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    args = parser.parse_args()
    if _triton.MISSING is not None:
        print(f"aot: {_triton.MISSING}", file=sys.stderr)
        return 1
    rows = compile_all(args.dtypes)
    for row in rows:
        print("{op:16} {kernel:34} {arch:7} {shape:34}".format(**row), end=" ")
        print("{registers:4} regs {spills:4} spilled {shared_bytes:7} shared".format(**row))
    records.write(args.json, {"rows": rows})
    bad = [r for r in rows if r["spills"] or r["shared_bytes"] > r["shared_limit"]]
    for row in bad:
        print(f"aot: {row['kernel']} must fit {row['arch']} without spills, got {row}", file=sys.stderr)
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

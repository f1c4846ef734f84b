"""The only caller of Triton: an import that may be missing, and launches as data.

A launcher describes its launch; ``run`` runs it, in the interpreter on a CPU when TRITON_INTERPRET=1. Inside
``record()`` nothing runs and the launches are collected: with meta tensors the same launchers list what an op would
launch at any shape, for ahead-of-time compilation on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl

    MISSING = None
except ImportError:
    triton = tl = None
    MISSING = "triton is not installed"

jit = triton.jit if triton else lambda fn: fn
INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # fixed when kernels are decorated

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
_recorded: list[Launch] | None = None


def recording() -> bool:
    """Whether launches are collected instead of run."""
    return _recorded is not None


def missing(x: torch.Tensor) -> str | None:
    """Why Triton cannot work on x's device, or None."""
    if MISSING is not None:
        return MISSING
    if x.is_cuda or _recorded is not None or (x.device.type == "cpu" and INTERPRETED):
        return None
    return f"tensors must be on cuda (or TRITON_INTERPRET=1), got {x.device.type}"


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: a ``jit`` function.
        grid: up to three extents.
        args: the kernel's run-time arguments by name: tensors, tuples of tensors, None, ints, floats.
        constants: its constexpr arguments by name.
        num_warps, num_stages: compile options.
    """

    kernel: object
    grid: tuple[int, ...]
    args: dict[str, object]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        if _recorded is not None:
            _recorded.append(self)
            return
        if min(self.grid) == 0:
            return
        options = {} if INTERPRETED else {"num_warps": self.num_warps, "num_stages": self.num_stages}
        tensor = next(v for v in self.args.values() if isinstance(v, torch.Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            self.kernel[self.grid](**self.args, **self.constants, **options)

    def bytes_moved(self) -> int:
        """Lower bound: every tensor argument once."""
        groups = (v if isinstance(v, tuple) else (v,) for v in self.args.values())
        return sum(t.numel() * t.element_size() for group in groups for t in group if isinstance(t, torch.Tensor))


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collects launches instead of running them."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a kernel."""

    registers: int
    spills: int
    shared_bytes: int
    ptx: str = field(repr=False)


def compile_ahead(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch for sm_<capability> on a machine without a GPU, specialised as a real launch would be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attrs = {}, dict(launch.constants), {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.args.get(name)
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            constants.setdefault(name, value)
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            signature[name] = tuple(_POINTERS[t.dtype] for t in value)
            attrs |= {(i, j): [["tt.divisibility", 16]] for j in range(len(value))}
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    keys = {(launch.kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(launch.kernel, signature, keys, attrs)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    registers, spills = _ptxas(ptx, built.metadata.target.arch)
    return Compiled(registers, spills, built.metadata.shared, ptx)


def _ptxas(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads) of one kernel."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.ptx"
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"-arch={arch}", str(path), "-o", str(Path(folder) / "k.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"ptxas: {said}")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    return max(registers), sum(spills)

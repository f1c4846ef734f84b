"""The CUDA sources under nvcc: every architecture, no spills, tensor cores where they are meant to be. Needs no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
ARCHS = ("80", "90a", "100")
KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes", re.DOTALL)
TENSOR_CORES = {"head_pool_conv": {"sm_80": "HMMA", "sm_90a": "HGMMA", "sm_100": "HMMA"}}

pytestmark = [pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"), pytest.mark.slow]


def disassembler() -> str | None:
    """cuobjdump from the path, or the one inside Triton, which brings the nvdisasm it needs."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(inside) if inside.exists() else None


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, tmp_path):
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command = ["nvcc", "-O3", "-std=c++17", *archs, "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-c", str(source)]
    compiled = tmp_path / "compiled.o"
    done = subprocess.run([*command, "-o", str(compiled)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr, "wgmma must run on by itself"
    kernels = KERNEL.findall(done.stderr)
    assert {arch for _, arch, *_ in kernels} == {f"sm_{arch}" for arch in ARCHS}
    spilling = [(name, arch) for name, arch, stores, loads in kernels if int(stores) + int(loads)]
    assert not spilling

    if source.stem not in TENSOR_CORES:
        return
    if disassembler() is None:
        pytest.skip("compiled; to see the instructions needs cuobjdump, from CUDA or Triton")
    for arch, instruction in TENSOR_CORES[source.stem].items():
        command = [disassembler(), "-sass", "-arch", arch, str(compiled)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        functions = text.split("Function : ")[1:]
        assert len(functions) == 3
        for function in functions:
            assert f"{instruction}." in function, (arch, function.splitlines()[0])

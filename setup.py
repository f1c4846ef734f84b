"""Builds csrc into nitrokernels._C with pybind11 and ninja; no torch headers.

With nvcc the CUDA part is built too. Without a C++ compiler the install is pure Python and says so: every op has a
reference. NITROKERNELS_NATIVE=0 and NITROKERNELS_CUDA=0 turn the parts off by hand.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CUDA_ARCHS = ("80", "90a", "100")  # 90a: wgmma is Hopper's alone


def find_cxx() -> str | None:
    """The C++ compiler, or None."""
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def find_nvcc() -> str | None:
    """nvcc on the path or under CUDA_HOME, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    inside = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None
    return inside or shutil.which("nvcc")


def find_ninja() -> str:
    """ninja on the path, else that of the module.

    In an isolated build the path leads to the one just installed, while the module (1.13) names the environment's:
    there a script (before 1.13) would import the module, and call itself without end.
    """
    found = shutil.which("ninja")
    if found is None:
        import ninja

        found = str(Path(ninja.BIN_DIR) / "ninja")
    return found


def cuda_archs(nvcc: str) -> list[str]:
    """Those of CUDA_ARCHS that this nvcc can make; all, if it does not say."""
    try:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return list(CUDA_ARCHS)
    return [arch for arch in CUDA_ARCHS if f"sm_{arch.rstrip('a')}" in known]


def native_parts(environ=os.environ) -> tuple[str | None, str | None, str]:
    """(compiler, nvcc, one line for the user); a part that is None is not built."""
    if environ.get("NITROKERNELS_NATIVE") == "0":
        return None, None, "nitrokernels: pure Python, as NITROKERNELS_NATIVE=0 asks"
    cxx = find_cxx()
    if cxx is None:
        return None, None, "nitrokernels: pure Python, no C++ compiler found (every op falls back to PyTorch)"
    nvcc = None if environ.get("NITROKERNELS_CUDA") == "0" else find_nvcc()
    return cxx, nvcc, f"nitrokernels: native ops for the CPU{' and CUDA' if nvcc else ', no nvcc found'}"


def ninja_file(cxx: str, nvcc: str | None, output: Path) -> str:
    """The build as one ninja file."""
    import pybind11

    includes = f"-I{ROOT / 'csrc'} -I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    define = "-DNITROKERNELS_WITH_CUDA" if nvcc else ""
    lines = [  # a square root that may set errno does not vectorise
        f"cxxflags = -O3 -fno-math-errno -std=c++17 -fPIC -fvisibility=hidden -Wall {define} {includes}",
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d $cxxflags -c $in -o $out\n  depfile = $out.d",
    ]
    objects, link = [], "-shared" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {source.stem}.o: cxx {source}")
    if nvcc:
        known = cuda_archs(nvcc)
        newest = known[-1].rstrip("a")  # newer GPUs translate this one
        archs = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in known)
        archs += f" -gencode arch=compute_{newest},code=compute_{newest}"
        flags = f"-O3 -std=c++17 -Xcompiler -fPIC --threads 0 {archs} -I{ROOT / 'csrc'}"
        lines.append(f"rule nvcc\n  command = {nvcc} -MD -MF $out.d {flags} -c $in -o $out\n  depfile = $out.d")
        for source in sorted((ROOT / "csrc").rglob("*.cu")):
            objects.append(f"{source.stem}.cu.o")
            lines.append(f"build {source.stem}.cu.o: nvcc {source}")
    linker = f"{nvcc} -cudart static -Xcompiler -fPIC {link}" if nvcc else f"{cxx} {link}"
    lines.append(f"rule link\n  command = {linker} $in -o $out")
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Hands the one extension to ninja."""

    def build_extension(self, ext):
        cxx, nvcc, message = native_parts()
        print(message, file=sys.stderr)
        if cxx is None:
            return
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).absolute() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(cxx, nvcc, output))
        subprocess.run([find_ninja(), "-C", str(folder)], check=True)

    def copy_extensions_to_source(self):
        built = Path(self.get_ext_fullpath("nitrokernels._C"))
        if built.exists() or Path(self.build_lib, self.get_ext_filename("nitrokernels._C")).exists():
            super().copy_extensions_to_source()


setup(ext_modules=[Extension("nitrokernels._C", [], optional=False)], cmdclass={"build_ext": NinjaBuild})

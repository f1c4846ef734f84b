"""The import rules, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [p for name in ("nitrokernels", "nitrofusion") for p in sorted((ROOT / name).rglob("*.py"))]
EVERYTHING = PACKAGES + [p for name in ("benchmarks", "tests") for p in sorted((ROOT / name).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Absolute names of the modules a file imports, names from packages included."""
    tree = ast.parse(path.read_text())
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def touches(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in names)


@pytest.mark.parametrize("path", PACKAGES, ids=module_name)
def test_layers(path):
    name, used = module_name(path), imports(path)
    for outsider in ("tests", "benchmarks"):
        assert not touches(used, outsider)
    if not name.endswith("__main__"):
        assert not touches(used, "nitrofusion.cli"), "only __main__ starts the command line"
    if not name.startswith("nitrofusion.serve") and name != "nitrofusion.cli":
        assert not touches(used, "nitrofusion.serve"), "only the command line starts the server"
    if name.startswith("nitrofusion.serve.") and name != "nitrofusion.serve.drawing":
        for heavy in ("torch", "PIL", "nitrofusion.engine"):
            assert not touches(imports(path, top_level=True), heavy), "the engine lives in the worker's process"
    if name.startswith("nitrokernels"):
        assert not touches(used, "nitrofusion")
        first = imports(path, top_level=True)
        assert not touches(first, "nitrokernels._diffusers"), "it is imported when first needed"
        assert name == "nitrokernels._diffusers" or not touches(first, "diffusers")
    if name.startswith("nitrokernels.ops."):
        others = {n for n in used if n.startswith("nitrokernels.ops.") and n.split(".")[2] != name.split(".")[2]}
        assert not others, "ops never import each other"
    if name.startswith("nitrofusion.recipes."):
        for other in ("nitrofusion.train", "nitrofusion.engine"):
            assert not touches(used, other)
        own = name.split(".")[2]
        siblings = {p.stem for p in (ROOT / "nitrofusion" / "recipes").glob("*.py")} - {"__init__", own}
        assert not any(touches(used, f"nitrofusion.recipes.{s}") for s in siblings), "recipes never import each other"
    if name in ("nitrofusion.schedule", "nitrofusion.losses", "nitrofusion.pool", "nitrofusion.models.sdxl"):
        for upper in ("recipes", "train", "engine", "evaluate", "world"):
            assert not touches(used, f"nitrofusion.{upper}")


def test_edges_that_one_file_holds():
    for path in PACKAGES:
        text, name = path.read_text(), module_name(path)
        assert "data_ptr(" not in text or name == "nitrokernels._native"
        assert "torch.library" not in text or name in ("nitrokernels._library",)
        assert "weights_only=False" not in text and "pickle" not in imports(path)
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "#include <torch" not in text and "#include <ATen" not in text
            assert "pybind11" not in text or path.name == "bindings.cpp"


def test_no_file_is_a_folder_in_disguise():
    for path in EVERYTHING:
        assert len(path.read_text().splitlines()) <= 500, path


def test_no_bare_except():
    for path in EVERYTHING:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), path

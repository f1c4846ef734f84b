"""What an older Triton than the installed one would refuse, seen in the source."""

import ast
from pathlib import Path

import pytest

import nitrokernels

ROOT = Path(nitrokernels.__file__).parent


def kernels(source: str):
    """Functions decorated with ``jit``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d).endswith("jit") for d in node.decorator_list):
            yield node


def nested(function: ast.FunctionDef) -> list[str]:
    """Assignments like ``(a, b), c = ...``."""
    return [
        f"{function.name}: {ast.unparse(node)}"
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Tuple) and any(isinstance(e, ast.Tuple) for e in target.elts)
    ]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_tuples_are_unpacked_flat(path):
    """Triton 3.6 fails on a nested target: TypeError: unhashable type: 'list'."""
    assert [text for kernel in kernels(path.read_text()) for text in nested(kernel)] == []


def test_a_nested_tuple_is_seen():
    source = "@_triton.jit\ndef f(x):\n    (a, b), c = x\n    a, c = x\n"
    assert [len(nested(kernel)) for kernel in kernels(source)] == [1]

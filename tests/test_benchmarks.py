"""Benchmarks, most of which no other test runs: what each takes from the project's modules is there."""

import ast
import pathlib
import pkgutil
import types

import pytest

BENCHMARKS = sorted((pathlib.Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_uses_of_the_project(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {
        alias.asname or alias.name: pkgutil.resolve_name(f"{node.module}.{alias.name}")
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module.startswith("alice_jax")
        for alias in node.names
    }
    used = [(ast.unparse(node.value), node.attr) for node in nodes if isinstance(node, ast.Attribute)]
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "mock.patch.object":
            used.append((ast.unparse(node.args[0]), node.args[1].value))
    of_modules = [(found[name], what) for name, what in used if isinstance(found.get(name), types.ModuleType)]
    assert [f"{module.__name__}.{what}" for module, what in of_modules if not hasattr(module, what)] == []

"""The shape of the package: imports form a DAG, the mathematics knows no SAELens."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "saelens_asi"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Only these may import SAELens or TransformerLens; the rest is torch and the standard library.
EDGES = {
    "plugin",
    "configs",
    "activations",
    "evaluation",
    "cli",
    "sweep",
}
EXTENDED_PACKAGES = {"sae_lens", "transformer_lens"}


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_form_a_dag() -> None:
    names = {_module_name(path) for path in MODULES}
    graph = {_module_name(path): (_imports(path) & names) - {_module_name(path)} for path in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_free_of_asserts(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]

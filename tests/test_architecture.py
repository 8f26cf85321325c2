"""The shape of the package: rooms that use those below them alone, and no name with two meanings."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import saelens_asi

PACKAGE = Path(saelens_asi.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = [
    "saelens_asi",
    *(f"saelens_asi.{found.name}" for found in pkgutil.iter_modules([str(PACKAGE)]) if found.ispkg),
]

# What somebody sees who opens the package.
ENTRIES = {
    *("sparse", "history.py", "interrupts.py", "resume.py"),
    *("activations", "sparse_adam.py"),
    "spectra",
    *("initialization", "evaluation"),
    *("plugin", "configs.py", "dead_features", "lorsa", "sweep"),
    "planning",
    "plots",
    "cli",
    *("__init__.py", "__main__.py", "py.typed"),
}


def test_the_rooms_are_those_of_the_house() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"} == ENTRIES


def test_rooms_use_those_below_them_alone() -> None:
    """The contracts are in ``.importlinter``."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Contracts: 3 kept, 0 broken." in done.stdout


@pytest.mark.parametrize("name", PACKAGES)
def test_no_name_is_both_a_module_and_something_else(name: str) -> None:
    """``import saelens_asi.evaluation.run as m`` gives a module, whatever the package exports."""
    package = importlib.import_module(name)
    modules = [found.name for found in pkgutil.iter_modules(package.__path__) if found.name != "__main__"]
    for module in modules:
        if module != "triton_kernels" or importlib.util.find_spec("triton"):  # which is there for Linux alone
            importlib.import_module(f"{name}.{module}")
    assert not [module for module in modules if not isinstance(getattr(package, module, package), ModuleType)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_input_is_not_validated_by_asserts(path: Path) -> None:
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_is_longer_than_fifty_lines(path: Path) -> None:
    """Docstrings not counted."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if _length(node) > 50]


def _length(function: ast.FunctionDef) -> int:
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0
    return function.end_lineno - function.lineno + 1 - docstring

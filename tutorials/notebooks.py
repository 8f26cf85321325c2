"""Notebooks from their scripts, in which ``# %%`` starts a cell: ``python tutorials/notebooks.py``."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent


def notebook(script: Path) -> str:
    """The notebook of a script, without outputs, as .ipynb text."""
    made = jupytext.read(script, fmt="py:percent")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for i, cell in enumerate(made.cells):
        cell["id"] = f"cell-{i}"  # otherwise drawn at random: every run would change every file
    return nbformat.writes(made) + "\n"


def scripts() -> list[Path]:
    return [path for path in sorted(FOLDER.glob("*.py")) if path != Path(__file__)]


if __name__ == "__main__":
    for path in scripts():
        path.with_suffix(".ipynb").write_text(notebook(path))
        print(path.with_suffix(".ipynb"))

"""Notebooks from their scripts, in which ``# %%`` starts a cell: ``python tutorials/notebooks.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def cells(script: str) -> list[dict[str, Any]]:
    found = []
    for i, block in enumerate(re.split(r"^# %%", script, flags=re.MULTILINE)[1:]):
        kind, _, body = block.partition("\n")
        lines = body.strip("\n").split("\n")
        is_text = kind.strip() == "[markdown]"
        if is_text:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        source = [line + "\n" for line in lines[:-1]] + lines[-1:]
        cell: dict[str, Any] = {"cell_type": "markdown" if is_text else "code", "id": f"cell-{i}", "metadata": {}}
        found.append(
            cell | {"source": source} if is_text else cell | {"execution_count": None, "outputs": [], "source": source}
        )
    return found


def notebook(script: str) -> str:
    """The notebook of a script, without outputs, as .ipynb text (nbformat 4.5)."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return (
        json.dumps({"cells": cells(script), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"
    )


def scripts() -> list[Path]:
    return [path for path in sorted(FOLDER.glob("*.py")) if path != Path(__file__)]


if __name__ == "__main__":
    for path in scripts():
        path.with_suffix(".ipynb").write_text(notebook(path.read_text()))
        print(path.with_suffix(".ipynb"))

"""Notebooks from their sources, executed: ``python tutorials/notebooks.py [NAME ...]``; all of them unless named.

A source is a script in which ``# %%`` starts a cell. A notebook runs in a kernel of its own; kept of its outputs is
what another run would give again, numbers apart: neither times nor progress bars. A warning stays, and is an error.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
PARAMETERS = "parameters"  # the tag of the cell that names model, text and hook

# A cell trains several SAEs at most; on a busy machine that takes minutes.
_CELL_SECONDS = 3600

# What tqdm draws: "name:  42%|####  | 42/100 [00:01<00:01]", or without a total "name: 42it [00:01]"; and how it moves
# the cursor from one bar to another.
_PROGRESS = re.compile(r"\d+%\||\[\d\d:\d\d[<,\]]")
_CURSOR = re.compile(r"\x1b\[\w")
_WIDGET = "application/vnd.jupyter.widget-view+json"


def scripts() -> list[Path]:
    return [path for path in sorted(FOLDER.glob("*.py")) if path != Path(__file__)]


def notebook(script: Path) -> Any:
    """The notebook of a script, without outputs."""
    made = jupytext.read(script, fmt="py:percent")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for i, cell in enumerate(made.cells):
        cell["id"] = f"cell-{i}"  # otherwise drawn at random: every run would change every file
    return made


def executed(made: Any, **options: Any) -> Any:
    """The same notebook with its outputs, run in an empty folder.

    Args:
        made: of ``notebook``; changed in place.
        options: of nbclient's ``NotebookClient``.
    """
    # Without ipywidgets, which are not needed, tqdm draws its bars as text, and says so.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
    with TemporaryDirectory() as folder:
        settings = {"timeout": _CELL_SECONDS, "record_timing": False, "resources": {"metadata": {"path": folder}}}
        NotebookClient(made, **{**settings, **options}).execute(env=environment)
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs = _kept(cell.outputs)
    return made


def complaints(made: Any) -> str:
    """What an executed notebook says on stderr, apart from progress."""
    outputs = [output for cell in made.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stderr")


def _kept(outputs: list[Any]) -> list[Any]:
    """Outputs without progress, what was printed in one piece."""
    kept: list[Any] = []
    for output in outputs:
        if _WIDGET in output.get("data", {}):
            continue
        if output.get("name") == "stderr":
            lines = re.split(r"[\r\n]", _CURSOR.sub("", output.text))
            output.text = "".join(f"{line}\n" for line in lines if line.strip() and not _PROGRESS.search(line))
            if not output.text:
                continue
        if kept and output.get("name") and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main(names: list[str]) -> None:
    known = {path.stem: path for path in scripts()}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no such notebook: {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names or known:
        start = time.perf_counter()
        made = executed(notebook(known[name]))
        path = known[name].with_suffix(".ipynb")
        path.write_text(nbformat.writes(made) + "\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)
        said = complaints(made)
        if said:
            sys.exit(f"{path} holds what should not be shown:\n{said}")


if __name__ == "__main__":
    main(sys.argv[1:])

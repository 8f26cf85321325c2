"""Results of a sweep: one line of JSON a cell, appended when the cell is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelens_asi.sweep.grid import Cell

Row = dict[str, Any]


class SweepStore:
    """The finished cells in ``folder/cells.jsonl``, and the settings that all of them share.

    Raises:
        ValueError: for a folder whose cells were made with other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        now = json.loads(json.dumps(dict(settings)))
        path = self.folder / "sweep.json"
        saved = json.loads(path.read_text()) if path.exists() else now
        other = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
        if other:
            differences = "; ".join(f"{name} was {saved.get(name)!r} and is {now.get(name)!r}" for name in other)
            raise ValueError(f"{self.folder} holds a sweep with other settings ({differences}): use another folder")
        path.write_text(json.dumps(now, indent=1) + "\n")
        self.path = self.folder / "cells.jsonl"
        self.rows = read_sweep(self.folder)
        self._drop_unfinished_line()

    def find(self, cell: Cell, hook_name: str) -> Row | None:
        """The finished row of a cell on a hook."""
        wanted = {"hook_name": hook_name, **cell.to_dict()}
        return next((row for row in self.rows if all(row.get(name) == wanted[name] for name in wanted)), None)

    def add(self, cell: Cell, results: Mapping[str, Any]) -> Row:
        row = {**cell.to_dict(), "method": cell.method, **results}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row

    def _drop_unfinished_line(self) -> None:
        """A line that a crash cut short would run into the next one."""
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


def read_sweep(folder: str | Path) -> list[Row]:
    """The finished cells of a sweep: settings, ``method``, and what was measured. Empty where there are none yet."""
    path = Path(folder) / "cells.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last line, where writing it was interrupted
            continue
    return rows

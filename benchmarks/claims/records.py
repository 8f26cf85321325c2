"""Finished SAEs, line by line in a file for each part of the plan; several processes may write to one."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.claims.sources import CACHE
from saelens_asi.sweep.cells import LEFT_OUT

RESULTS = Path(__file__).parent.parent / "results" / "claims"


def results_file(part: str) -> Path:
    return RESULTS / f"{part}.jsonl"


def read(part: str) -> list[dict[str, Any]]:
    """The finished lines of a part."""
    path = results_file(part)
    return lines(path) if path.exists() else []


def lines(path: Path) -> list[dict[str, Any]]:
    """What a file of JSON, line by line, holds."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_among(rows: Iterable[Mapping[str, Any]], key: Mapping[str, Any]) -> bool:
    """Whether one of the lines has all of these settings, and of those that a cell may leave out no others."""
    whole = {**dict.fromkeys(LEFT_OUT), **key}
    return any(all(row.get(name) == value for name, value in whole.items()) for row in rows)


@contextmanager
def taken(key: Mapping[str, Any]) -> Iterator[bool]:
    """Whether this process has the item for itself; the system lets go of it however the process ends."""
    folder = CACHE / "taken"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / digest_of(key)).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def keep(part: str, row: Mapping[str, Any]) -> None:
    """Add a line to a part."""
    append(results_file(part), row)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to a file that several processes write to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(dict(row)) + "\n")


def digest_of(key: Mapping[str, Any]) -> str:
    """A short name for settings."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]

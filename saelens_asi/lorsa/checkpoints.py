"""Checkpoints of a run: when they are due, that they are whole, which stay, and which one a resume goes on from."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from saelens_asi.resume import CheckpointClock, check_writable, damage, folder_written_whole, read_manifest

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"

# How many stay: should the newest be damaged, there is the one before.
KEPT = 2


class Checkpoints:
    """The checkpoints below the folder of a run, of which this process is the only writer.

    Args:
        folder: of the run.
        every: steps between two; 0: none by steps.
        minutes: between two, and longer where they would take over 1 % of the time; 0: none by time.
    """

    def __init__(self, folder: Path, every: int, minutes: float) -> None:
        self.folder = folder / CHECKPOINTS
        self._good: list[Path] = []
        self._every, self.clock = every, CheckpointClock(minutes)

    @property
    def last_good(self) -> Path | None:
        """The newest that was written, or that the run went on from."""
        return self._good[-1] if self._good else None

    def went_on_from(self, done: int) -> None:
        """The run begins with the checkpoint after ``done`` steps."""
        self._good = [self.path(done)]

    def is_due(self, done: int) -> bool:
        """Whether there should be one now, after ``done`` steps."""
        return bool(self._every and done % self._every == 0) or self.clock.is_due()

    @property
    def saved_steps(self) -> int:
        """Steps that the last good checkpoint holds."""
        return 0 if self.last_good is None else _step(self.last_good)

    def path(self, done: int) -> Path:
        """Of the checkpoint after ``done`` steps."""
        return self.folder / f"step_{done:08d}"

    @contextmanager
    def writing(self, done: int) -> Iterator[Path]:
        """A temporary folder that becomes the checkpoint after ``done`` steps; then all but the newest two go."""
        path = self.path(done)
        with self.clock.timed(), folder_written_whole(path, {"step": done}) as unfinished:
            yield unfinished
        self._good.append(path)
        self._remove_old()

    def _remove_old(self) -> None:
        """Those that were passed over as damaged go too."""
        self._good = self._good[-KEPT:]
        for path in _by_step(self.folder):
            if path not in self._good:
                shutil.rmtree(path, ignore_errors=True)


def checkpoints_in(folder: str | Path) -> list[Path]:
    """All checkpoints of a run's folder, damaged ones too, the newest first."""
    return _by_step(Path(folder) / CHECKPOINTS)


def _by_step(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit())
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:])


def last_checkpoint(folder: str | Path, files: Collection[str] = ()) -> Path | None:
    """The newest whole checkpoint of a run's folder; None where there is none at all.

    One that is damaged is passed over with a warning.

    Args:
        folder: of the run.
        files: that a checkpoint has.

    Raises:
        ValueError: where there are checkpoints, and all of them are damaged.
    """
    paths = checkpoints_in(folder)
    broken: dict[Path, str] = {}
    for path in paths:
        reason = _damage(path, files)
        if reason is None:
            return path
        broken[path] = reason
        logger.warning("checkpoint %s is passed over: %s", path, reason)
    if paths:
        detail = "; ".join(f"{path.name}: {reason}" for path, reason in broken.items())
        raise ValueError(
            f"out={str(folder)!r}: no checkpoint there is whole ({detail}): set overwrite=True to begin anew, or give "
            "another folder"
        )
    return None


def _damage(path: Path, files: Collection[str]) -> str | None:
    try:
        reason = damage(path)
        listed = (read_manifest(path) or {}).get("files", {})
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be followed ({type(error).__name__}: {error})"
    missing = sorted(set(files) - set(listed))
    return reason or (f"its manifest does not list {missing}" if missing else None)


def check_folder(folder: Path, n_bytes: int, n_bytes_at_the_end: int) -> None:
    """Raise ValueError for a folder that cannot be written to, or whose disk is too small.

    Args:
        folder: of the run; made where it is not there.
        n_bytes: of a checkpoint. One more than stay are there while one is written.
        n_bytes_at_the_end: of what is written beside them.
    """
    check_writable("out", folder)
    to_come = max(1, KEPT + 1 - len(checkpoints_in(folder)))
    needed, free = to_come * n_bytes + n_bytes_at_the_end, shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"out={str(folder)!r} has {free / 2**20:,.0f} MiB free, and checkpoints and the Lorsa take "
            f"{needed / 2**20:,.0f} MiB: free the space, or give a folder on another disk"
        )

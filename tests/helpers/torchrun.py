"""Real torchruns of ``many_run``, to be watched and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Torchrun:
    """A torchrun of n processes that run ``many_run`` in a folder; what they say goes to a file there.

    In a ``with`` block, at whose end none of them is left.
    """

    def __init__(self, n: int, folder: Path, runs: Any, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.n = folder, n
        for path in folder.glob("pid.*"):
            path.unlink()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._log = folder / f"log.{len(list(folder.glob('log.*')))}"
        with self._log.open("w") as log:
            self.agent = subprocess.Popen(
                [*command, "-m", "tests.helpers.many_run", str(folder), json.dumps(runs)],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._seen: set[int] = set()

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *of_error: object) -> None:
        self.pids()
        for pid in (self.agent.pid, *self._seen):
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait()

    @property
    def said(self) -> str:
        return self._log.read_text()

    def pids(self) -> list[int]:
        """Of the processes of the last start, in the order of their ranks; empty before all of them are there."""
        texts = [path.read_text() for path in sorted(self.folder.glob("pid.*"))]
        pids = [int(text) for text in texts if text]
        self._seen |= set(pids)
        return pids if len(pids) == self.n else []

    def until(self, come: Callable[[], Any], seconds: float = 120, pause: float = 0.02) -> Any:
        """What ``come`` gives once it is true; raises TimeoutError with what was said."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if result := come():
                return result
            if self.agent.poll() is not None and not (result := come()):
                break
            time.sleep(pause)
        raise TimeoutError(f"torchrun ({self.agent.poll()}) said: {self.said[-6000:]}")

    def end(self, seconds: float = 120) -> int:
        """Wait for the end; torchrun's exit code."""
        try:
            return self.agent.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"torchrun has not ended: {self.said[-6000:]}") from None

    def seconds_until_gone(self, seconds: float = 120) -> float:
        """Until torchrun and all processes of its last start are gone."""
        began = time.monotonic()
        self.end(seconds)
        seconds_until_gone(self.pids(), seconds)
        return time.monotonic() - began


def seconds_until_gone(pids: list[int], seconds: float = 120) -> float:
    """Until all processes have ended; raises TimeoutError where some do not."""
    began = time.monotonic()
    while left := [pid for pid in pids if not is_gone(pid)]:
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"processes {left} are left after {seconds:g} s")
        time.sleep(0.02)
    return time.monotonic() - began


def is_gone(pid: int) -> bool:
    """Whether a process has ended; its parent may not have looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # before the file was opened, and after
        return True


def checkpoints(folder: Path) -> list[int]:
    """Samples seen, of all whole checkpoints below a folder."""
    found = folder.glob("checkpoints/*/*/manifest.json")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())

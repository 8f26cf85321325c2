"""Files that were damaged, and processes that were killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from saelens_asi.activations import reader
from tests.helpers import resumable

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Damage:
    """What happens to a file; places are shares of its length."""

    kind: str
    place: float
    other: float
    bit: int

    def choose(self, names: Sequence[str]) -> str:
        return names[self.bit * len(names) // 8]

    def apply(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        i, j = (min(int(share * len(content)), len(content) - 1) for share in (self.place, self.other))
        if self.kind == "flip":
            content[i] ^= 1 << self.bit
        elif self.kind == "swap":
            content[i], content[j] = content[j], content[i]
        elif self.kind == "cut":
            del content[i:]
        elif self.kind == "empty":
            content.clear()
        else:
            path.unlink()
            path.mkdir()
            return
        path.write_bytes(content)


@contextmanager
def hit_in_the_third_batch(number: signal.Signals, times: int) -> Iterator[None]:
    """Signals to this process, from within the third forward pass over text."""
    stock, calls = reader.read_activations, []

    def hit(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            for _ in range(times):
                signal.raise_signal(number)
        stock(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "read_activations", hit)
        yield


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def damages() -> st.SearchStrategy[Damage]:
    share = st.floats(0, 1)
    # Headers are short: half of the places lie in the first part.
    place = st.one_of(share, st.floats(0, 0.1))
    kind = st.sampled_from(["flip", "flip", "swap", "cut", "empty", "folder"])
    return st.builds(Damage, kind, place, share, st.integers(0, 7))


def assert_survives_kills(kind: str, folder: Path, n_kills: int = 3, seed: int = 0) -> None:
    """Run what ``resumable`` has, killed ``n_kills`` times, and once without: results are the same."""
    whole = folder / "whole"
    seconds, _ = _run(kind, whole, None)
    moments = random.Random(seed)
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT]
    n_hit = n_ended = 0
    for _ in range(5 * n_kills):
        number = numbers[n_hit % len(numbers)]
        _, code = _run(kind, folder / f"parts_{n_ended}", number, 0.7 * moments.random() * seconds)
        if code == 0:  # it had ended before the signal came
            n_ended += 1
        else:
            n_hit += 1
        if n_hit == n_kills:
            break
    assert n_hit == n_kills
    _run(kind, folder / f"parts_{n_ended}", None)
    for i in range(n_ended + 1):
        assert resumable.digest(kind, folder / f"parts_{i}") == resumable.digest(kind, whole)


def _run(kind: str, folder: Path, number: int | None, after: float = 0) -> tuple[float, int]:
    """Run it to the end, or until it is killed ``after`` seconds of work. Returns its seconds of work and its code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.helpers.resumable", kind, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "started":
            assert process.poll() is None, process.stderr and process.stderr.read()[-3000:]
        start = time.monotonic()
        if number is not None:
            time.sleep(after)
            process.send_signal(number)
        _, errors = process.communicate()
        took = time.monotonic() - start
        # A process that lives ends with the signal's number, one that was done with 0; a failure has another code.
        assert process.returncode in ((0,) if number is None else (0, -number)), errors[-3000:]
    return took, process.returncode

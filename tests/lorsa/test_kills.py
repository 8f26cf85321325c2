"""Real processes, killed at any moment, also while they write a checkpoint: the run ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saelens_asi.resume import one_writer
from tests.conftest import ROOT
from tests.helpers.lorsa_run import digest, outcome

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are killed as POSIX has it")


def started(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.lorsa_run", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finished(folder: Path) -> None:
    process = started(folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]


def n_lines(folder: Path) -> int:
    history = folder / "history.jsonl"
    return history.read_text().count("\n") if history.exists() else 0


def is_writing(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".step_*.tmp"))


def wait_for(process: subprocess.Popen[str], happens: Callable[[], bool]) -> None:
    while not happens():
        assert process.poll() is None, f"it ended before: {process.communicate()[1][-4000:]}"


def killed(folder: Path, number: signal.Signals, while_writing: bool, chance: random.Random) -> None:
    """Start, or go on, and send a signal after a few more lines of the history."""
    before = n_lines(folder)
    leftovers = set((folder / "checkpoints").glob(".step_*"))
    process = started(folder)
    wait_for(process, (folder / ".writer.json").exists)
    more = chance.randint(0, 3)  # with 0, while it reads its checkpoint, or makes its first steps
    wait_for(process, lambda: n_lines(folder) >= before + more)
    with pytest.raises(ValueError, match=f"is being written by process {process.pid} on "), one_writer(folder, "out"):
        pass
    if while_writing:
        wait_for(process, lambda: is_writing(folder))
    else:
        time.sleep(0.03 * chance.random())
    process.send_signal(number)
    if number != signal.SIGKILL:
        process.send_signal(number)
    process.communicate()
    assert process.returncode == {signal.SIGTERM: 143}.get(number, -number)
    if number != signal.SIGKILL:
        assert not set((folder / "checkpoints").glob(".step_*")) - leftovers
    with one_writer(folder, "out"):  # free again, however the process ended
        pass


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, cut, chance = tmp_path / "whole", tmp_path / "cut", random.Random(0)
    finished(whole)
    for number, while_writing in (
        (signal.SIGKILL, False),
        (signal.SIGKILL, True),
        (signal.SIGTERM, False),
        (signal.SIGINT, True),
    ):
        killed(cut, number, while_writing, chance)
    finished(cut)
    (tensors, history), (expected, expected_history) = outcome(cut), outcome(whole)
    assert tensors.keys() == expected.keys()
    assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])]
    assert history == expected_history
    assert digest(cut) == digest(whole)
    seeded = torch.Generator().manual_seed(3).get_state()
    assert not torch.equal(expected["generator/cpu"], seeded)  # the model's dropout has drawn from it
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["step_00000290", "step_00000300"]

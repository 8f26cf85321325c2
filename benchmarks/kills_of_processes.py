"""One process of several killed at random moments, over and over: do the others end, and does the run go on as if not?

``python -m benchmarks.kills --processes 2``. Each run is started by a real torchrun; a process of random rank is killed
by SIGKILL at a random moment, in every other cell while a checkpoint is being written. Torchrun then starts all again
(``--max-restarts``), or ends, and the same command is started with ``resume_from_checkpoint="latest"``. A run that ends
is compared with one that was left alone: weights, moments, counters, history, random state, bit for bit.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from saelens_asi import read_history
from tests.helpers.torchrun import Torchrun, checkpoints, seconds_until_gone

N_STEPS, KILLS_OF_A_RUN = 60, 3
_SETTINGS = {"n_steps": N_STEPS, "n_checkpoints": 19, "seconds": 0.05}
_LONGEST = 3.0  # seconds of training after which a process is killed at the latest


@dataclass
class Kill:
    """One of them.

    Attributes:
        rank: that was killed.
        while_written: whether a checkpoint was being written, its folder not whole yet.
        restarted_by: who started the run again: torchrun, or the same command.
        samples: that the run went on from.
        seconds: from the kill until all processes of that start were gone.
    """

    rank: int
    while_written: bool
    restarted_by: str
    samples: int
    seconds: float


@dataclass
class Outcome:
    """What became of one run.

    Attributes:
        kills: in their order.
        differing: names of what was not equal at the end.
        lost: what was said by a run that did not end; empty for others.
    """

    kills: list[Kill] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    lost: str = ""


def measure(n: int, n_kills: int, chance: random.Random, folder: Path, bar: tqdm) -> Iterator[list[Outcome]]:
    """Outcomes of the runs so far, after each of them, until there were ``n_kills``."""
    untouched, outcomes = folder / "untouched", list[Outcome]()
    with Torchrun(n, untouched, {**_SETTINGS, "seconds": 0.0}) as torchrun:
        if torchrun.end() != 0:
            raise RuntimeError(f"the run that nobody kills failed: {torchrun.said}")
    while (done := sum(len(one.kills) for one in outcomes)) < n_kills:
        run = folder / f"run_{len(outcomes)}"
        kills = [len(outcomes) % 2 == 0] * min(KILLS_OF_A_RUN, n_kills - done)
        outcome = _killed(n, run, kills, chance, bar)
        if not outcome.lost:
            outcome.differing = differences(run, untouched)
            if not outcome.differing:
                shutil.rmtree(run)
        outcomes.append(outcome)
        yield outcomes


def _killed(n: int, run: Path, by_torchrun: list[bool], chance: random.Random, bar: tqdm) -> Outcome:
    """A run from its start to its end, killed as often as there are entries: whether torchrun is to start it again."""
    outcome = Outcome()
    restarts = sum(by_torchrun)
    while True:
        settings = {**_SETTINGS, "resume_from_checkpoint": "latest" if outcome.kills and not restarts else None}
        with Torchrun(n, run, settings, "--max-restarts", str(restarts)) as torchrun:
            try:
                for i in range(len(outcome.kills), len(by_torchrun)):
                    outcome.kills.append(_kill(torchrun, i, by_torchrun[i], chance))
                    bar.update()
                    if not by_torchrun[i]:
                        break
                else:
                    code = torchrun.end()
                    _note_where_it_went_on(outcome, run)
                    outcome.lost = "" if code == 0 else torchrun.said[-4000:]
                    return outcome
                torchrun.end()
            except TimeoutError as error:
                outcome.lost = str(error)
                return outcome


def _kill(torchrun: Torchrun, n_before: int, by_torchrun: bool, chance: random.Random) -> Kill:
    torchrun.until(lambda: len(begun(torchrun.folder)) > n_before)
    pids, rank = torchrun.until(torchrun.pids), chance.randrange(torchrun.n)
    is_written = n_before % 2 == 1
    time.sleep(chance.uniform(0, _LONGEST))
    if is_written:
        torchrun.until(lambda: list(torchrun.folder.glob("checkpoints/*/.*.tmp")), pause=0.001)
        time.sleep(chance.uniform(0, 0.02))
    found = bool(list(torchrun.folder.glob("checkpoints/*/.*.tmp")))
    os.kill(pids[rank], signal.SIGKILL)
    seconds = seconds_until_gone(pids)
    return Kill(rank, found, "torchrun" if by_torchrun else "the same command", 0, round(seconds, 2))


def _note_where_it_went_on(outcome: Outcome, run: Path) -> None:
    for kill, samples in zip(outcome.kills, begun(run)[1:], strict=False):
        kill.samples = samples


def begun(run: Path) -> list[int]:
    """Samples that the processes had seen when they began, of each start."""
    path = run / "begun.0"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def differences(run: Path, other: Path) -> list[str]:
    """Names of what two runs did not end with alike."""
    ends = [torch.load(folder / "final.pt", weights_only=True) for folder in (run, other)]
    differing = sorted(ends[0].keys() ^ ends[1].keys())
    differing += [n for n in ends[0].keys() & ends[1].keys() if not torch.equal(ends[0][n], ends[1][n])]
    found, expected = (read_history(folder / "output" / "training_history.jsonl") for folder in (run, other))
    same = [{**one, "seconds": 0} for one in found] == [{**one, "seconds": 0} for one in expected]
    same_checkpoints = checkpoints(run)[-1] == checkpoints(other)[-1]
    return [*differing, *([] if same else ["history"]), *([] if same_checkpoints else ["checkpoints"])]


def report(n: int, outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts, and all cells."""
    kills = [kill for one in outcomes for kill in one.kills]
    seconds = [kill.seconds for kill in kills]
    return {
        "processes": n,
        "kills": len(kills),
        "while_a_checkpoint_was_written": sum(kill.while_written for kill in kills),
        "of_the_first_process": sum(kill.rank == 0 for kill in kills),
        "started_again_by_torchrun": sum(kill.restarted_by == "torchrun" for kill in kills),
        "seconds_until_all_were_gone": {"median": sorted(seconds)[len(seconds) // 2], "most": max(seconds)},
        "runs": len(outcomes),
        "bit_exact": sum(not one.differing and not one.lost for one in outcomes),
        "lost": sum(bool(one.lost) for one in outcomes),
        "outcomes": [asdict(one) for one in outcomes],
    }

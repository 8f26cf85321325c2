"""Real processes killed at random moments, over and over: how many runs end as the one that nobody killed?

``python -m benchmarks.kills --kills 200``. Each attempt is a process of its own (forked from one that has imported
everything, so that moments within the run are hit and not the imports). It goes on from what its folder holds. Some
are killed by SIGKILL, which nothing can catch, some by SIGTERM or SIGINT, once or twice. A run that ends is compared
with one that was left alone: weights, moments, statistics, history, random state, bit for bit.

With ``--processes N`` runs of several processes, of which one is killed: see ``kills_of_processes``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks import kills_of_processes
from benchmarks.train_step import machine
from saelens_asi.resume import write_json
from tests.helpers import kept_run, lorsa_run, resumable

RESULTS = Path(__file__).parent / "results" / "kills.json"
N_STEPS = 60
SIGNALS = ((signal.SIGKILL,), (signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM))

Start = Callable[[Path], None]
Compare = Callable[[Path, Path], list[str]]


@dataclass
class Tally:
    """What became of the runs of one kind."""

    kills: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    bit_exact: int = 0
    lost: int = 0
    what_differed: list[str] = field(default_factory=list)


def _train(kind: str) -> Start:
    return lambda folder: kept_run.main(kind, str(folder), str(N_STEPS), "0.02")


def _compare_ends(one: Path, other: Path) -> list[str]:
    ends = [torch.load(folder / "final.pt", weights_only=True) for folder in (one, other)]
    return kept_run.differences(*ends)


def _compare_digests(kind: str) -> Compare:
    def compare(one: Path, other: Path) -> list[str]:
        return [] if resumable.digest(kind, one) == resumable.digest(kind, other) else [kind]

    return compare


def _compare_lorsas(one: Path, other: Path) -> list[str]:
    return [] if lorsa_run.digest(one) == lorsa_run.digest(other) else ["lorsa"]


def workloads() -> dict[str, tuple[Start, Compare]]:
    """From a name to what runs in a folder, and what compares two folders."""
    of_training = {kind: (_train(kind), _compare_ends) for kind in kept_run.KINDS}
    others: dict[str, tuple[Start, Compare]] = {
        kind: (start, _compare_digests(kind)) for kind, start in resumable.KINDS.items()
    }
    return {**of_training, **others, "lorsa": (lorsa_run.run, _compare_lorsas)}


def _in_process(start: Start, folder: Path) -> None:
    torch.set_num_threads(1)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this was started in the background
    # tqdm's own is shared with the parent and all forks: one that is killed while it holds it would stop them all.
    tqdm.set_lock(threading.RLock())
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            start(folder)
        except BaseException:
            traceback.print_exc(file=log)
            os._exit(1)
    os._exit(0)


def _spawn(start: Start, folder: Path) -> multiprocessing.Process:
    folder.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_in_process, args=(start, folder))
    process.start()
    return process


def measure(start: Start, compare: Compare, n_kills: int, chance: random.Random, bar: tqdm, folder: Path) -> Tally:
    """Kill runs until there were ``n_kills``, and the last of them has ended."""
    began = time.monotonic()
    untouched = _spawn(start, folder / "untouched")
    untouched.join()
    if untouched.exitcode:
        raise RuntimeError(f"the run that nobody kills failed: {folder / 'untouched' / 'log.txt'}")
    length = time.monotonic() - began
    tally, killed, n_run = Tally(), Counter(), 0
    while sum(killed.values()) < n_kills:
        run = folder / f"run_{n_run}"
        n_run += 1
        while True:
            process = _spawn(start, run)
            signals = chance.choice(SIGNALS)
            enough = sum(killed.values()) >= n_kills
            process.join(None if enough else chance.uniform(0, 0.8 * length))
            if process.exitcode is None:
                for number in signals:
                    os.kill(process.pid, number)
                    time.sleep(0.01)
                process.join()
                if process.exitcode != 0:
                    killed[signals[0].name + (" twice" if len(signals) > 1 else "")] += 1
                    bar.update()
                    continue
            break
        tally.runs += 1
        differing = compare(folder / "untouched", run) if process.exitcode == 0 else None
        if differing is None:
            tally.lost += 1
            tally.what_differed.append((run / "log.txt").read_text()[-2000:])
        elif differing:
            tally.what_differed += differing
        else:
            tally.bit_exact += 1
            shutil.rmtree(run)
    tally.kills = dict(sorted(killed.items()))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=260, help="of all kinds together")
    parser.add_argument("--kinds", nargs="+", help="of runs; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="of a run; with several, 12 kills are many")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.processes > 1:
        kill_processes(args)
    else:
        kill_runs(args)


def kill_processes(args: argparse.Namespace) -> None:
    """Runs of several processes; what is known so far is written after each."""
    out = args.out or RESULTS.with_name("kills_processes.json")
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.kills, desc="Kills") as bar:
        chance = random.Random(args.seed)
        for outcomes in kills_of_processes.measure(args.processes, args.kills, chance, Path(folder), bar):
            report = {"machine": machine(), **kills_of_processes.report(args.processes, outcomes)}
            write_json(out, report, indent=1)
    tqdm.write(f"wrote {out}")


def kill_runs(args: argparse.Namespace) -> None:
    """Runs of one process, of all kinds."""
    out = args.out or RESULTS
    all_kinds = workloads()
    kinds = args.kinds or list(all_kinds)
    each = -(-args.kills // len(kinds))
    chance, tallies = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=each * len(kinds), desc="Kills") as bar:
        for kind in kinds:
            start, compare = all_kinds[kind]
            tallies[kind] = measure(start, compare, each, chance, bar, Path(folder) / kind)
            write_json(out, _report(tallies), indent=1)
            tqdm.write(f"{kind}: {json.dumps(asdict(tallies[kind]))}")
    tqdm.write(f"wrote {out}: {json.dumps(_report(tallies)['all'])}")


def _report(tallies: dict[str, Tally]) -> dict[str, object]:
    total = {
        "kills": sum(sum(one.kills.values()) for one in tallies.values()),
        **{name: sum(getattr(one, name) for one in tallies.values()) for name in ("runs", "bit_exact", "lost")},
    }
    return {"machine": machine(), "all": total, "kinds": {kind: asdict(one) for kind, one in tallies.items()}}


if __name__ == "__main__":
    main()

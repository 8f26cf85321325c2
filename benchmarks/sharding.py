"""What it costs to spread an SAE's features over processes: bytes, time and memory, against what arithmetic says.

    python -m benchmarks.sharding check      # bytes of real steps of 1, 2 and 4 processes against the formula
    python -m benchmarks.sharding speed      # two processes of one thread against one of two; memory of 1, 2 and 4
    python -m benchmarks.sharding table      # what that makes of GPUs, by arithmetic (sharding_costs.py)

The processes are real ones that speak over gloo, each with SAELens's trainer and this package's steps. ``check`` counts
what ``Group.traffic`` counts, and beside it what the operating system has sent over its loopback: nothing else should
speak there meanwhile. ``speed`` lets its sides take turns of a few steps; nothing else should run then.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from tqdm import tqdm

from benchmarks import sharding_costs as costs
from benchmarks.ablation import activations
from benchmarks.sharding_costs import STEPS_A_RECORD, Hardware, Mesh, Sizes
from benchmarks.train_step import LR, RESULTS, machine
from saelens_asi.activations.sae_state import shard_of
from saelens_asi.evaluation.tables import markdown_table
from tests.helpers.processes import in_processes

ROOT = Path(__file__).parent.parent

# Steps that come first: memory is new, and approximations of the encoder are timed.
_WARM_UP = 3

# Features of an SAE that costs next to nothing.
_SMALL = 2048

# Activations of the real model, for training and set aside, and how often a side that waits for its turn looks.
_TOKENS, _PAUSE = (65_536, 1024), 0.005


class Run(NamedTuple):
    """A run of some processes: all that its trainer is made from."""

    sizes: Sizes
    mesh: Mesh
    n_steps: int
    architecture: str = "topk"
    initializer: str = "default"
    real: bool = False
    threads: int = 1

    def trainer(self, data: list[Tensor], watch: Callable[[SAETrainer, int], None]) -> SAETrainer:
        """SAELens's, with our steps; ``watch`` is called with it and their number before each."""
        torch.set_num_threads(self.threads)
        sae_class, config_class = get_sae_training_class(self.architecture)
        d_in, d_sae, k, batch = self.sizes
        flags = {"initializer": self.initializer, "optimizer": "sparse_adam", "batch_shards": self.mesh.tokens}
        torch.manual_seed(0)
        sae = sae_class(config_class(d_in=d_in, d_sae=d_sae, k=k, **flags))
        cfg = SAETrainerConfig(
            total_training_samples=self.n_steps * batch,
            train_batch_size_samples=batch,
            lr=LR,
            lr_end=LR,
            lr_warm_up_steps=10,
            logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=STEPS_A_RECORD),
        )
        trainer = SAETrainer(cfg, sae, itertools.cycle(data))
        return _watched(trainer, watch)

    def batches(self) -> list[Tensor]:
        """Attention output of SmolLM2-135M, or random vectors with a decaying spectrum around a mean."""
        d_in, _, _, batch = self.sizes
        if self.real:
            x = activations(*_TOKENS)[0]
        else:
            scales = torch.linspace(0, -4, d_in).exp()
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(8 * batch, d_in, generator=generator) * scales + scales.flip(0)
        return [part for part in x.split(batch) if len(part) == batch]


def _watched(trainer: SAETrainer, watch: Callable[[SAETrainer, int], None]) -> SAETrainer:
    numbers, step = itertools.count(), trainer.step

    def watched(batch: Tensor) -> TrainStepOutput:
        watch(trainer, next(numbers))
        trainer.output = step(batch)
        return trainer.output

    trainer.step = watched
    return trainer


class Counted(NamedTuple):
    """Of a process: what it had sent before each step, in how many calls, and what had gone over loopback; then how
    many of its features fired in each."""

    sent: list[float]
    calls: list[int]
    loopback: list[int]
    active: list[int]


def count(run: Run) -> Counted:
    """Train in each process of the group that it is called in."""
    found = Counted([], [], [], [])

    def watch(trainer: SAETrainer, step: int) -> None:
        if step:
            found.active.append(trainer.output.feature_acts.coalesce().indices()[1].unique().numel())
        traffic = shard_of(trainer.sae).world.traffic
        found.sent.append(traffic.n_bytes)
        found.calls.append(traffic.calls)
        found.loopback.append(loopback_bytes())

    run.trainer(run.batches(), watch).fit()
    return found


def loopback_bytes() -> int:
    """What the operating system has sent over its loopback so far, headers and acknowledgements of TCP included."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.split()[0] == "lo:")


class Step(NamedTuple):
    """What was sent in a step: by the process that sent most and by all, and what the record of the step was of it."""

    most: float
    by_all: float
    record: float
    calls: int
    active: int

    def fits(self, run: Run) -> bool:
        """Whether the formula says so too."""
        least, most = self.formula(run)
        return least - 1e-3 <= self.most * (1 + 1e-9) and self.most <= most * (1 + 1e-9) + 1e-3

    def formula(self, run: Run) -> tuple[float, float]:
        """The least and the most that the formula says: of a TopK the same."""
        if run.mesh.n == 1:
            return 0.0, 0.0
        if run.architecture == "topk":
            parts = costs.step_bytes(run.sizes, run.mesh, self.active)
            least = most = sum(parts.values())
        else:
            least, most = costs.batch_step_bytes(run.sizes, run.mesh, self.calls - (4 if self.record else 0))
        return least + self.record, most + self.record


def steps_of(run: Run, of_all: list[Counted]) -> list[Step]:
    """The steps of a run, but for the first and for the last, after which nothing more was counted."""
    steps = []
    for step in range(_WARM_UP, run.n_steps - 1):
        sent = [process.sent[step + 1] - process.sent[step] for process in of_all]
        rank = sent.index(max(sent))
        is_recorded = (step + 1) % STEPS_A_RECORD == 0 and run.mesh.n > 1
        # Processes with the same features pad their rows to those of the one with most.
        peers = of_all[rank % run.mesh.features :: run.mesh.features]
        steps.append(
            Step(
                most=max(sent),
                by_all=sum(sent),
                record=costs.record_bytes(run.sizes, run.mesh) if is_recorded else 0.0,
                calls=of_all[rank].calls[step + 1] - of_all[rank].calls[step],
                active=max(peer.active[step] for peer in peers),
            )
        )
    return steps


def compare(run: Run) -> dict[str, Any]:
    """Bytes of a run's steps against those of the formula."""
    of_all = in_processes(run.mesh.n, count, run)
    steps = steps_of(run, of_all)
    total = sum(step.by_all for step in steps)
    over_loopback = of_all[0].loopback[run.n_steps - 1] - of_all[0].loopback[_WARM_UP]
    return {
        "architecture": run.architecture,
        "processes": run.mesh.n,
        "batch_shards": run.mesh.tokens,
        **run.sizes._asdict(),
        "counted_bytes": [step.most for step in steps],
        "formula_bytes": [step.formula(run) for step in steps],
        "active": [step.active for step in steps],
        "calls": [step.calls for step in steps],
        "agrees": all(step.fits(run) for step in steps),
        "loopback_to_counted": over_loopback / total if total else None,
    }


def check(args: argparse.Namespace) -> None:
    """Bytes of all cells; each is kept as it comes."""
    path, cells = args.out or RESULTS / "sharding_bytes.json", []
    meshes = [Mesh(n) for n in (1, 2, 4)]
    runs = [
        *(("topk", mesh, d_sae) for mesh in [*meshes, Mesh(1, 2), Mesh(2, 2)] for d_sae in args.d_sae),
        *(("batchtopk", mesh, d_sae) for mesh in meshes for d_sae in args.d_sae),
    ]
    for architecture, mesh, d_sae in tqdm(runs, unit="run", disable=None):
        sizes = Sizes(args.d_in, d_sae, args.k, args.batch)
        cells.append(compare(Run(sizes, mesh, args.steps, architecture)))
        path.write_text(json.dumps({"machine": machine(), "cells": cells}, indent=1) + "\n")
    print(report_of_bytes(cells))
    print(f"\nwrote {path}")
    if not all(cell["agrees"] for cell in cells):
        raise SystemExit("what was counted is not what the formula says")


def report_of_bytes(cells: list[dict[str, Any]]) -> str:
    """A line for each run: kilobytes that a process sends in a step."""
    lines = []
    for cell in cells:
        formula = [end for step in cell["formula_bytes"] for end in step]
        who = (cell["architecture"], str(cell["processes"]), str(cell["batch_shards"]), f"{cell['d_sae']:,}")
        found = (_kilobytes(cell["counted_bytes"]), _kilobytes(formula), "yes" if cell["agrees"] else "NO")
        lines.append((*who, *found, _share(cell["loopback_to_counted"])))
    columns = ["architecture", "processes", "batch_shards", "d_sae", "kB counted", "kB by formula", "agrees"]
    return markdown_table([*columns, "loopback / counted"], lines, align="lrrrrrlr")


def _kilobytes(values: list[float]) -> str:
    least, most = f"{min(values) / 1e3:,.1f}", f"{max(values) / 1e3:,.1f}"
    return least if least == most else f"{least} to {most}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


class Turns(NamedTuple):
    """Sides that train by turns of some steps: a file says how many turns are over, of all sides together."""

    folder: Path
    side: int
    n_sides: int
    n_processes: int
    n_steps: int

    def before(self, step: int, is_first: bool) -> None:
        """To be called before each step by all processes of a side, of which the first ends turns."""
        if step % self.n_steps:
            return
        number = step // self.n_steps * self.n_sides + self.side
        if step == 0:
            (self.folder / f"ready {os.getpid()}").touch()
        elif is_first:
            self.end(step)
        while len(list(self.folder.glob("ready *"))) < self.n_processes or self._over() < number:
            time.sleep(_PAUSE)

    def _over(self) -> int:
        path = self.folder / "over"
        return int(path.read_text()) if path.exists() else 0

    def end(self, steps_done: int) -> None:
        """End the turn after which so many steps are done."""
        unfinished = self.folder / "over.unfinished"
        unfinished.write_text(str((steps_done // self.n_steps - 1) * self.n_sides + self.side + 1))
        unfinished.replace(self.folder / "over")


def time_steps(run: Run, turns: Turns) -> list[float]:
    """Seconds from each step to the next, in each process of the group that it is called in."""
    seconds, started = [], 0.0

    def watch(trainer: SAETrainer, step: int) -> None:
        nonlocal started
        if step:
            seconds.append(time.perf_counter() - started)
        turns.before(step, is_first)
        started = time.perf_counter()

    trainer = run.trainer(run.batches(), watch)
    is_first = shard_of(trainer.sae).world.is_first
    trainer.fit()
    if is_first:
        turns.end(run.n_steps)
    return seconds


def side_by_side(runs: Mapping[str, Run], steps_a_turn: int) -> dict[str, list[float]]:
    """Seconds of each step of each run, which take turns; as the first process has them, the first turn left out."""
    n_processes = sum(run.mesh.n for run in runs.values())
    with TemporaryDirectory() as folder, ThreadPoolExecutor(len(runs)) as pool:
        turns = [Turns(Path(folder), side, len(runs), n_processes, steps_a_turn) for side in range(len(runs))]
        waiting = [
            pool.submit(in_processes, run.mesh.n, time_steps, run, turn)
            for run, turn in zip(runs.values(), turns, strict=True)
        ]
        return {name: one.result()[0][steps_a_turn:] for name, one in zip(runs, waiting, strict=True)}


def peak_memory(run: Run) -> dict[str, float]:
    """Bytes of each process: its peak above what it held before the SAE was made, and its weights and moments.

    A small SAE comes first: libraries are loaded and compiled for it, which has nothing to do with how large one is.
    """
    data = run.batches()
    run._replace(sizes=run.sizes._replace(d_sae=_SMALL)).trainer(data, lambda trainer, step: None).fit()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    trainer = run.trainer(data, lambda trainer, step: None)
    trainer.fit()
    peak = _status("VmHWM") - before
    params = list(trainer.sae.parameters())
    moments = [trainer.optimizer.state[param][name] for param in params for name in ("exp_avg", "exp_avg_sq")]
    held = [sum(tensor.numel() * tensor.element_size() for tensor in tensors) for tensors in (params, moments)]
    return {"peak": peak, "whole_peak": _status("VmHWM"), "weights": held[0], "moments": held[1]}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def memory_cell(run: Run) -> dict[str, Any]:
    """Memory of the process that needs most, and what arithmetic says of it."""
    most = max(in_processes(run.mesh.n, peak_memory, run), key=lambda one: one["peak"])
    expected = costs.state_bytes(run.sizes, run.mesh)
    screen = costs.screen_bytes(run.sizes, run.mesh)
    return {"processes": run.mesh.n, **run.sizes._asdict(), **most, "formula": {**expected, "screen": screen}}


def speed(args: argparse.Namespace) -> None:
    """Times of all sides, then memory; each cell is kept as it comes."""
    path = args.out or RESULTS / "sharding_speed.json"
    real = args.activations == "smollm2"
    sizes = Sizes(576, args.d_sae[0], args.k, args.batch)
    settings = {"n_steps": args.turns * args.steps_a_turn, "initializer": "active_subspace", "real": real}
    runs = {
        "one process, two threads": Run(sizes, Mesh(1), threads=2, **settings),
        "two processes share features": Run(sizes, Mesh(2), **settings),
        "two processes share tokens": Run(sizes, Mesh(1, 2), **settings),
    }
    if real:
        activations(*_TOKENS)  # computed once, here
    seconds = side_by_side(runs, args.steps_a_turn)
    result: dict[str, Any] = {"machine": machine(), **sizes._asdict(), "activations": args.activations}
    result |= {"steps_a_turn": args.steps_a_turn, "seconds": seconds, "memory": []}
    path.write_text(json.dumps(result, indent=1) + "\n")
    for n in args.processes:
        run = Run(sizes._replace(d_sae=args.memory_d_sae), Mesh(n), _WARM_UP, real=real, threads=1)
        result["memory"].append(memory_cell(run))
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(report_of_speed(result))
    print(f"\nwrote {path}")


def report_of_speed(result: dict[str, Any]) -> str:
    """Two tables: seconds a step, and memory of a process."""
    medians = {name: statistics.median(seconds) for name, seconds in result["seconds"].items()}
    alone = next(iter(medians.values()))
    times = [(name, f"{seconds:.3f}", f"{seconds / alone:.2f}") for name, seconds in medians.items()]
    one, lines = result["memory"][0], []
    for cell in result["memory"]:
        peak, held, part = cell["peak"], cell["weights"] + cell["moments"], one["peak"] / cell["processes"]
        gib = (f"{n_bytes / 2**30:.2f}" for n_bytes in (peak, held, peak - held, part, peak - part))
        lines.append((str(cell["processes"]), *gib))
    columns = ["processes", "peak, GiB", "weights and moments", "beyond these", "1/N of one process", "above it"]
    sizes = ", ".join(f"{name} = {result[name]:,}" for name in Sizes._fields)
    return "\n\n".join(
        [
            f"{result['machine']['cpu']}; {sizes}, {result['activations']} activations",
            markdown_table(["side", "s a step", "x one process"], times, align="lrr"),
            f"d_sae = {one['d_sae']:,}",
            markdown_table(columns, lines, align="rrrrrr"),
        ]
    )


def tables(args: argparse.Namespace) -> list[str]:
    """What GPUs would take, by arithmetic."""
    gpu = {"H100": costs.H100, "H200": costs.H200}[args.gpu]
    return [report_of_gpus(Sizes(4096, d_sae, 64, args.batch), gpu) for d_sae in (2**20, 2**24)]


def table(args: argparse.Namespace) -> None:
    """Print what GPUs would take, by arithmetic."""
    print("\n\n".join(tables(args)))


def report_of_gpus(sizes: Sizes, gpu: Hardware, numbers: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)) -> str:
    """A line for each number of GPUs: features spread over all of them, and the best way to split the batch too."""
    lines = []
    for n in numbers:
        best = costs.best_mesh(sizes, n, gpu)
        other = ["as before" if best == Mesh(n) else "none has room", *[""] * 4]
        if best is not None and best != Mesh(n):
            other = [str(best.tokens), *_on_gpus(sizes, best, gpu)]
        lines.append((str(n), *_on_gpus(sizes, Mesh(n), gpu), *other))
    figures = ["GiB", "GB sent", "ms a step", "efficiency"]
    sizes_said = ", ".join(f"{name} = {value:,}" for name, value in sizes._asdict().items())
    heading = f"{sizes_said}; {gpu.name} with {gpu.memory / 1e9:.0f} GB"
    return f"{heading}\n\n" + markdown_table(["GPUs", *figures, "batch_shards", *figures], lines, align="r" * 10)


def _on_gpus(sizes: Sizes, mesh: Mesh, gpu: Hardware) -> Iterator[str]:
    has_room = costs.fits(sizes, mesh, gpu)
    yield f"{costs.memory(sizes, mesh) / 2**30:.1f}" + ("" if has_room else " (no room)")
    yield f"{sum(costs.all_bytes(sizes, mesh, costs.most_active(sizes, mesh)).values()) / 1e9:.2f}"
    yield f"{costs.step_seconds(sizes, mesh, gpu) * 1e3:.0f}" if has_room else ""
    yield f"{costs.efficiency(sizes, mesh, gpu):.2f}" if has_room else ""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run: Callable[[argparse.Namespace], None], batch: int, d_sae: list[int]) -> argparse.ArgumentParser:
        one = commands.add_parser(run.__name__, help=run.__doc__)
        one.set_defaults(run=run)
        one.add_argument("--batch", type=int, default=batch, help=f"tokens of a step (default: {batch:,})")
        if d_sae:
            one.add_argument("--d-sae", type=int, nargs="+", default=d_sae)
            one.add_argument("--k", type=int, default=32)
            one.add_argument("--out", type=Path, help="where to write the result (default: benchmarks/results)")
        return one

    of_bytes = command(check, 1024, [2048, 8192, 32_768])
    of_bytes.add_argument("--d-in", type=int, default=576)
    of_bytes.add_argument("--steps", type=int, default=16)
    of_speed = command(speed, 4096, [32_768])
    of_speed.add_argument("--activations", choices=["smollm2", "random"], default="smollm2")
    of_speed.add_argument("--turns", type=int, default=11, help="of each side; the first is left out (default: 11)")
    of_speed.add_argument("--steps-a-turn", type=int, default=5)
    of_speed.add_argument("--memory-d-sae", type=int, default=131_072)
    of_speed.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="whose memory is measured")
    command(table, 65_536, []).add_argument("--gpu", choices=["H100", "H200"], default="H100")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    os.environ["TQDM_DISABLE"] = "1"  # of the processes that are started; this one has its bar
    args.run(args)


if __name__ == "__main__":
    main()

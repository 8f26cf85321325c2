"""Time and memory that a plan predicts, against runs that it was not told of.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_costs memory    # peaks of real runs, each in a process of its own
    OMP_NUM_THREADS=1 python -m benchmarks.plan_costs time      # steps at sizes between and beyond those timed
    python -m benchmarks.plan_costs table

Time is compared in CPU seconds, sizes one after the other in several rounds, so that whatever else runs falls on all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.planning.cost import step_cost
from saelens_asi.planning.make import PILOT_D_SAE, PILOT_K, TIMED_D_SAE
from saelens_asi.planning.memory import run_memory
from saelens_asi.planning.pilots import Pilot, run_pilot
from saelens_asi.planning.recipe import recommended
from saelens_asi.sweep.run import SweepTraining, train_cell

RESULTS = Path(__file__).parent / "results" / "plan"

# Width, features, active ones, tokens in a step.
SIZES = (
    (576, 2048, 32, 1024),
    (576, 8192, 32, 1024),
    (576, 32768, 32, 1024),
    (576, 8192, 64, 4096),
    (1024, 16384, 32, 1024),
    (576, 65536, 32, 1024),
)
STEPS = 6

TIMED = ((PILOT_D_SAE[0], PILOT_K[0]), (PILOT_D_SAE[1], PILOT_K[0]), (PILOT_D_SAE[0], PILOT_K[1]), (TIMED_D_SAE, 32))
PREDICTED = ((16384, 32), (8192, 64), (65536, 32))
ROUNDS, TIMED_STEPS = 4, 20


def peak_here(d_in: int, d_sae: int, k: int, batch: int) -> dict[str, int]:
    """Bytes that this process holds at its peak in a few steps, and how many of them are activations."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(3, 0.1, d_in)
    x = torch.randn(max(32 * d_in, STEPS * batch), d_in, generator=generator) * scales + 0.5
    training = SweepTraining(training_tokens=STEPS * batch, batch_size=batch)
    train_cell(recommended(d_sae, k), training, x)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return {"peak": peak, "activations": x.numel() * x.element_size()}


def peak_of_run(d_in: int, d_sae: int, k: int, batch: int) -> dict[str, int]:
    """The same, of a process of its own."""
    sizes = map(str, (d_in, d_sae, k, batch))
    command = [sys.executable, "-m", "benchmarks.plan_costs", "one", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory() -> list[dict[str, Any]]:
    rows = []
    for d_in, d_sae, k, batch in SIZES:
        found = peak_of_run(d_in, d_sae, k, batch)
        predicted = run_memory(d_in, d_sae, k, batch, store=found["activations"]).peak
        rows.append({"d_in": d_in, "d_sae": d_sae, "k": k, "batch": batch, **found, "predicted": predicted})
        print(rows[-1], f"{predicted / found['peak']:.3f}", flush=True)
    return rows


def measure_time(activations: torch.Tensor) -> dict[str, Any]:
    """CPU seconds of a step at every size, the least of the rounds; and what the timed ones predict of the others."""
    torch.set_num_threads(1)
    found: dict[tuple[int, int], list[Pilot]] = {}
    for turn in range(ROUNDS):
        for size in (*TIMED, *PREDICTED):
            found.setdefault(size, []).append(run_pilot(activations, activations[:512], *size, steps=TIMED_STEPS))
            print(turn, size, f"{found[size][-1].cpu_seconds:.4f} CPU s", flush=True)
    of_size = {size: min(one.cpu_seconds for one in pilots) for size, pilots in found.items()}
    cost = step_cost([found[size][0] for size in TIMED], [of_size[size] for size in TIMED])
    rows = [
        {
            "d_sae": d_sae,
            "k": k,
            "timed": (d_sae, k) in TIMED,
            "cpu_seconds": of_size[d_sae, k],
            "rounds": [one.cpu_seconds for one in found[d_sae, k]],
            "predicted": cost.seconds(d_sae, k),
        }
        for d_sae, k in of_size
    ]
    return {"steps": TIMED_STEPS, "batch": 1024, "rows": rows}


def table(memory: list[dict[str, Any]], time: dict[str, Any]) -> str:
    """Markdown of both."""
    of_memory = [
        [f"{r['d_in']:,}", f"{r['d_sae']:,}", str(r["k"]), f"{r['batch']:,}", f"{r['peak'] / 2**30:.2f}",
         f"{r['predicted'] / 2**30:.2f}", f"{r['predicted'] / r['peak']:.2f}"]
        for r in memory
    ]  # fmt: skip
    of_time = [
        [f"{r['d_sae']:,}", str(r["k"]), "timed" if r["timed"] else "predicted", f"{r['cpu_seconds']:.3f}",
         f"{r['predicted']:.3f}", f"{r['predicted'] / r['cpu_seconds']:.2f}"]
        for r in time["rows"]
    ]  # fmt: skip
    return "\n\n".join(
        [
            markdown_table(["d_in", "d_sae", "k", "batch", "GiB", "predicted", "ratio"], of_memory, align="rrrrrrr"),
            markdown_table(["d_sae", "k", "", "CPU s a step", "predicted", "ratio"], of_time, align="rrlrrr"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["memory", "time", "one", "table"])
    parser.add_argument("sizes", type=int, nargs="*")
    args = parser.parse_args()
    memory, time = RESULTS / "memory.json", RESULTS / "time.json"
    if args.part == "one":
        print(json.dumps(peak_here(*args.sizes)))
    elif args.part == "memory":
        memory.write_text(json.dumps(measure_memory(), indent=1) + "\n")
    elif args.part == "time":
        from benchmarks.plan_sweep import OWN, activations

        train, _ = activations(OWN[0], OWN[0].hooks[0])
        time.write_text(json.dumps(measure_time(train), indent=1) + "\n")
    else:
        print(table(json.loads(memory.read_text()), json.loads(time.read_text())))


if __name__ == "__main__":
    main()

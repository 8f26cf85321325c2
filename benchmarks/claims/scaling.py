"""Up to a million features on two CPU cores: the paper's headline on a machine that anybody has.

    python -m benchmarks.claims.scaling                          # go on, also after a kill; hours, 21 GiB
    python -m benchmarks.claims.scaling --moments decay --d-sae 16384 32768

The flag's start, SparseAdam, 2M tokens of the main source; moments that stay in silence, and ones that decay but for
the largest. Checkpoints, and the history of the run, lie beside the
cached activations; each finished SAE is one line of benchmarks/results/claims/scaling.jsonl.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer
from torch import Tensor

from benchmarks.claims.plan import K
from benchmarks.claims.records import is_among, keep, read
from benchmarks.claims.sources import CACHE, MAIN, MAIN_HOOK, activations
from benchmarks.claims.train import processor
from saelens_asi.evaluation.run import evaluate
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.planning.recipe import learning_rate
from saelens_asi.sweep import Cell, SweepTraining
from saelens_asi.sweep.results import fit_power_law, grouped
from saelens_asi.sweep.run import measured, train_cell

PART = "scaling"
# The rule for the rate was never tried with so many features; the rate of the largest is one that was seen to train.
LARGEST = 2**20
RATES = {d_sae: learning_rate(d_sae) for d_sae in (2**i for i in range(10, 18))} | {LARGEST: 0.0005}
MOMENTS = ("keep", "decay")
TOKENS = 2_000_000
# The product with all features is the cost of an evaluation: a step selects its features with a screen, this does not.
HELD_OUT = 20_000
# Features are counted as silent since so many tokens.
SILENT_SINCE = (100_000, 200_000, 400_000, 800_000)

TEXT = """
SmolLM2-135M, attention output of layer 15, the kernel's documentation, the flag's start, SparseAdam, k = 32, batches of
1,024 (`python -m benchmarks.claims.scaling`). *Moments*: whether those of silent features stay or decay. *Silent*: on
so many tokens at the end of training, in which the weights still moved; a living feature fires once in d_sae / k tokens
on average, so the shorter counts find rare features silent that are alive. *GiB*: the peak of the process, 2.1 of them
the activations, which lie mapped on the disk. All but the largest were trained beside other work: their CPU hours
count.
"""


def cells(sizes: Iterable[int] = tuple(RATES), moments: Iterable[str] = MOMENTS) -> list[Cell]:
    """What is trained, in this order."""
    return [
        Cell(d_sae=d_sae, k=K, lr=RATES[d_sae], silent_moments=silent_moments)
        for silent_moments in moments
        for d_sae in sizes
        if (d_sae, silent_moments) != (LARGEST, "decay")
    ]


def key_of(cell: Cell) -> dict[str, Any]:
    """What tells its line from others."""
    return {"part": PART, "model": MAIN.model, "text": MAIN.text, "tokens": TOKENS, **cell.to_dict()}


def train(cell: Cell, training: SweepTraining) -> dict[str, Any]:
    """Train and measure one SAE, from its newest checkpoint on."""
    training_set, held_out = activations(MAIN, MAIN_HOOK[MAIN.model])
    trainer, record = train_cell(cell, training, training_set, checkpoints=checkpoints(cell))
    found = evaluate(trainer.sae, activations=held_out[:HELD_OUT].float(), ranks=False)
    silent = trainer.n_forward_passes_since_fired * training.batch_size
    return {
        **measured(found, trainer, training),
        **record,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "silent": [[n, _share(silent >= n)] for n in SILENT_SINCE if n <= training.training_tokens],
        "history": _history(trainer),
        "hook": MAIN_HOOK[MAIN.model],
        "d_in": training_set.shape[1],
    }


def checkpoints(cell: Cell) -> Path:
    return CACHE / "scaling" / (f"{cell.d_sae}_decay" if cell.silent_moments == "decay" else str(cell.d_sae))


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _history(trainer: SAETrainer) -> list[dict[str, Any]]:
    """Some twenty records of the run, the last one among them."""
    records: list[dict[str, Any]] = [dict(record) for record in trainer.history]
    return records[:: -max(1, len(records) // 20)][::-1]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All that is trained, in Markdown."""
    header = ["features", "moments", "tokens", "lr", "NMSE", "L0", *(f"silent on {n:,}" for n in SILENT_SINCE)]
    header += ["hours", "CPU hours", "GiB", "cores"]
    lines = [_line(row) for row in sorted(rows, key=lambda row: (decays(row), row["d_sae"]))]
    return markdown_table(header, lines, align="rl" + "r" * (len(header) - 2))


def decays(row: Mapping[str, Any]) -> bool:
    """Whether moments decay in silence; rows leave out those that stay."""
    return "silent_moments" in row


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    silent = dict((n, share) for n, share in row["silent"])
    return (
        f"{row['d_sae']:,}",
        "decay" if decays(row) else "stay",
        f"{row['tokens']:,}",
        f"{row['lr']:.2g}",
        f"{row['nmse']:.4f}",
        f"{row['l0']:.1f}",
        *(f"{silent[n]:.1%}" if n in silent else "" for n in SILENT_SINCE),
        f"{row['seconds'] / 3600:.2f}",
        f"{row['cpu_seconds'] / 3600:.2f}",
        f"{row['peak_gib']:.1f}",
        str(row["threads"]),
    )


def section(rows: Sequence[Any]) -> list[str]:
    """Lines of the page, Markdown; none without results."""
    if not rows:
        return []
    processors = ", ".join(sorted({str(row["processor"]) for row in rows}))
    laws = [
        f"Moments that {'decay' if decaying else 'stay'}: {found}"
        for decaying, own in sorted(grouped(rows, decays).items())
        if (found := law(own))
    ]
    text = " ".join([TEXT.strip(), f"Processor: {processors}.", *laws])
    return ["## Up to a million features on two cores", "", textwrap.fill(text, 120), "", table(rows), ""]


def law(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the errors say of more features, in words; nothing of one size alone."""
    by_size = sorted(rows, key=itemgetter("d_sae"))
    if len(by_size) < 2:
        return ""
    best = min(by_size, key=itemgetter("nmse"))
    falling, last = [row for row in by_size if row["d_sae"] <= best["d_sae"]], by_size[-1]
    found = "**more features did not lower the error here.**"
    if len(falling) > 1:
        fit = fit_power_law([row["d_sae"] for row in falling], [row["nmse"] for row in falling])
        found = (
            f"from {falling[0]['d_sae']:,} to {best['d_sae']:,} features the error falls, as a power law with the "
            f"exponent {fit.exponent:+.3f} (residual {fit.residual:.1%})."
        )
    if last is not best:
        found += (
            f" It is the lowest at {best['d_sae']:,}, where a feature fires {_firings(best):,.0f} times in training; "
            f"at {last['d_sae']:,}, where it fires {_firings(last):,.0f} times, it is "
            f"{last['nmse'] / best['nmse'] - 1:.1%} higher: the text is too short for so many."
        )
    return found


def _firings(row: Mapping[str, Any]) -> float:
    """Of the mean feature, in training."""
    return float(row["tokens"] * row["k"] / row["d_sae"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, nargs="+", choices=sorted(RATES), default=sorted(RATES))
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS, help="of silent features")
    parser.add_argument("--table", action="store_true", help="print what is trained, and train nothing")
    args = parser.parse_args()
    missing = [cell for cell in cells(args.d_sae, args.moments) if not is_among(read(PART), key_of(cell))]
    if args.table or not missing:
        print(table(read(PART)))
    elif len(missing) > 1:
        for cell in missing:  # each in a process of its own, whose peak of memory is that of one size
            own = ["--d-sae", str(cell.d_sae), "--moments", str(cell.silent_moments)]
            subprocess.run([sys.executable, "-m", "benchmarks.claims.scaling", *own], check=True)
    else:
        (cell,) = missing
        found = train(cell, SweepTraining(training_tokens=TOKENS))
        keep(PART, {**key_of(cell), **found, "processor": processor(), "threads": torch.get_num_threads()})
        print(table(read(PART)))


if __name__ == "__main__":
    main()

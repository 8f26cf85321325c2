"""Up to a million features on two CPU cores: the paper's headline on a machine that anybody has.

    python -m benchmarks.claims.scaling                          # go on, also after a kill; hours, 21 GiB
    python -m benchmarks.claims.scaling --d-sae 16384 32768

The flag's start, SparseAdam, 2M tokens of the main source. Checkpoints, and the history of the run, lie beside the
cached activations; each finished SAE is one line of benchmarks/results/claims/scaling.jsonl.
"""

from __future__ import annotations

import argparse
import resource
import textwrap
from collections.abc import Mapping, Sequence
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
from saelens_asi.sweep.results import fit_power_law
from saelens_asi.sweep.run import measured, train_cell

PART = "scaling"
# The rule for the rate was never tried with so many features; the rate of the largest is one that was seen to train.
RATES = {d_sae: learning_rate(d_sae) for d_sae in (8192, 16_384, 32_768, 65_536, 131_072)} | {2**20: 0.0005}
TOKENS = 2_000_000
# The product with all features is the cost of an evaluation: a step selects its features with a screen, this does not.
HELD_OUT = 20_000
# Features are counted as silent since so many tokens.
SILENT_SINCE = (100_000, 200_000, 400_000, 800_000)

TEXT = """
SmolLM2-135M, attention output of layer 15, the kernel's documentation, the flag's start, SparseAdam, k = 32, batches of
1,024 (`python -m benchmarks.claims.scaling`). *Silent*: on so many tokens at the end of training, in which the weights
still moved; a living feature fires once in d_sae / k tokens on average, so the shorter counts find rare features
silent that are alive.
"""


def train(cell: Cell, training: SweepTraining) -> dict[str, Any]:
    """Train and measure one SAE, from its newest checkpoint on."""
    training_set, held_out = activations(MAIN, MAIN_HOOK[MAIN.model])
    trainer, record = train_cell(cell, training, training_set, checkpoints=CACHE / "scaling" / str(cell.d_sae))
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


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _history(trainer: SAETrainer) -> list[dict[str, Any]]:
    """Some twenty records of the run, the last one among them."""
    records: list[dict[str, Any]] = [dict(record) for record in trainer.history]
    return records[:: -max(1, len(records) // 20)][::-1]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All that is trained, in Markdown."""
    header = ["features", "tokens", "lr", "NMSE", "L0", *(f"silent on {n:,}" for n in SILENT_SINCE)]
    header += ["hours", "GiB", "cores"]
    lines = [_line(row) for row in sorted(rows, key=lambda row: row["d_sae"])]
    return markdown_table(header, lines, align="r" * len(header))


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    silent = dict((n, share) for n, share in row["silent"])
    return (
        f"{row['d_sae']:,}",
        f"{row['tokens']:,}",
        f"{row['lr']:.2g}",
        f"{row['nmse']:.4f}",
        f"{row['l0']:.1f}",
        *(f"{silent[n]:.1%}" if n in silent else "" for n in SILENT_SINCE),
        f"{row['seconds'] / 3600:.2f}",
        f"{row['peak_gib']:.1f}",
        str(row["threads"]),
    )


def section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the page, Markdown; none without results."""
    if not rows:
        return []
    processors = ", ".join(sorted({str(row["processor"]) for row in rows}))
    text = f"{TEXT.strip()} Processor: {processors}. {law(rows)}".strip()
    return ["## Up to a million features on two cores", "", textwrap.fill(text, 120), "", table(rows), ""]


def law(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the errors say of more features, in words; nothing of one size alone."""
    if len(rows) < 2:
        return ""
    first, *_, last = sorted(rows, key=lambda row: row["d_sae"])
    fit = fit_power_law([row["d_sae"] for row in rows], [row["nmse"] for row in rows])
    best = min(rows, key=lambda row: row["nmse"])
    found = (
        f"A power law through the {len(rows)} errors has the exponent {fit.exponent:+.3f} (residual "
        f"{fit.residual:.1%}); the lowest error is that of {best['d_sae']:,} features."
    )
    if last["nmse"] >= first["nmse"]:
        found = f"**More features did not lower the error here.** {found} Of {last['d_sae']:,} features each fires " + (
            f"{last['tokens'] * last['k'] / last['d_sae']:.0f} times in training, of {first['d_sae']:,} "
            f"{first['tokens'] * first['k'] / first['d_sae']:,.0f} times: the text is too short for the former."
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, nargs="+", choices=sorted(RATES), default=sorted(RATES))
    parser.add_argument("--table", action="store_true", help="print what is trained, and train nothing")
    args = parser.parse_args()
    for d_sae in () if args.table else args.d_sae:
        cell = Cell(d_sae=d_sae, k=K, lr=RATES[d_sae], silent_moments="keep")
        training = SweepTraining(training_tokens=TOKENS)
        key = {"part": PART, "model": MAIN.model, "text": MAIN.text, "tokens": TOKENS, **cell.to_dict()}
        if not is_among(read(PART), key):
            keep(PART, {**key, **train(cell, training), "processor": processor(), "threads": torch.get_num_threads()})
    print(table(read(PART)))


if __name__ == "__main__":
    main()

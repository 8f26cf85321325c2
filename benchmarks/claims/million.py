"""A million features on two CPU cores: the paper's headline on a machine that anybody has.

    python -m benchmarks.claims.million                  # go on, also after a kill; hours, 17 GiB
    python -m benchmarks.claims.million --d-sae 262144

The flag's start, SparseAdam, 2M tokens of the main source. Checkpoints, and the history of the run, lie beside the
cached activations; the finished SAE is one line of benchmarks/results/claims/million.jsonl.
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
from saelens_asi.sweep import Cell, SweepTraining
from saelens_asi.sweep.run import measured, train_cell

PART = "million"
# The product with all features is the cost of an evaluation: a step selects its features with a screen, this does not.
HELD_OUT = 20_000
# Features are counted as silent since so many tokens.
SILENT_SINCE = (100_000, 200_000, 400_000, 800_000)

TEXT = """
SmolLM2-135M, attention output of layer 15, the kernel's documentation, the flag's start, SparseAdam, k = 32, batches of
1,024 (`python -m benchmarks.claims.million`). *Silent*: on so many tokens at the end of training, in which the weights
still moved; a living feature fires once in d_sae / k tokens on average, so the shorter counts find rare features
silent that are alive.
"""


def train(cell: Cell, training: SweepTraining) -> dict[str, Any]:
    """Train and measure one SAE, from its newest checkpoint on."""
    training_set, held_out = activations(MAIN, MAIN_HOOK[MAIN.model])
    trainer, record = train_cell(cell, training, training_set, checkpoints=CACHE / "million" / str(cell.d_sae))
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
    header = ["features", "tokens", "NMSE", "L0", *(f"silent on {n:,}" for n in SILENT_SINCE), "hours", "GiB", "cores"]
    return markdown_table(header, [_line(row) for row in rows], align="r" * len(header))


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    silent = dict((n, share) for n, share in row["silent"])
    return (
        f"{row['d_sae']:,}",
        f"{row['tokens']:,}",
        f"{row['nmse']:.4f}",
        f"{row['l0']:.1f}",
        *(f"{silent[n]:.1%}" if n in silent else "" for n in SILENT_SINCE),
        f"{row['seconds'] / 3600:.2f}",
        f"{row['peak_gib']:.1f}",
        str(row["threads"]),
    )


def section(rows: Sequence[Mapping[str, Any]], smaller: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Lines of the page, Markdown; none without results.

    Args:
        rows: of this part.
        smaller: SAEs of the same start on the same activations, one of which is named beside them.
    """
    processors = ", ".join(sorted({str(row["processor"]) for row in rows}))
    text = f"{TEXT.strip()} Processor: {processors}."
    least = min(smaller, key=lambda row: row["nmse"], default=None)
    if rows and least is not None and least["nmse"] < min(row["nmse"] for row in rows):
        text += (
            f" **More features did not lower the error here**: {least['d_sae']:,} have {least['nmse']:.4f} after "
            f"{least['tokens']:,} tokens. A feature among a million fires too rarely to learn on so short a text."
        )
    return ["## A million features on two cores", "", textwrap.fill(text, 120), "", table(rows), ""] if rows else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=2**20)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--lr", type=float, default=0.0005)
    parser.add_argument("--table", action="store_true", help="print what is trained, and train nothing")
    args = parser.parse_args()
    if args.table:
        print(table(read(PART)))
        return
    cell, training = Cell(d_sae=args.d_sae, k=K, lr=args.lr), SweepTraining(training_tokens=args.tokens)
    key = {"part": PART, "model": MAIN.model, "text": MAIN.text, "tokens": args.tokens, **cell.to_dict()}
    if is_among(read(PART), key):
        print(f"{PART}.jsonl holds this SAE")
    else:
        keep(PART, {**key, **train(cell, training), "processor": processor(), "threads": torch.get_num_threads()})
    print(table(read(PART)))


if __name__ == "__main__":
    main()

"""Dead features of the largest SAE of the goal by all tokens of the text, with its last weights.

    python -m benchmarks.claims.saes [--sweeps FOLDER]

Reads the SAEs that `make claims` saved; writes results/claims/evaluations.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from sae_lens import SAE
from torch import nn

from benchmarks.claims.evidence import RESULTS, chosen_rates
from benchmarks.claims.grid import HOOK
from saelens_asi import evaluate
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.sweep import METHODS, Cell, read_sweep
from saelens_asi.sweep.cells import SweepRow
from saelens_asi.sweep.run import sae_folder

CONTEXT, GOAL = 128, 65_536


def load(sweep: Path, cell: Cell, hook_name: str) -> SAE:
    sae = SAE.load_from_disk(sae_folder(sweep, cell, hook_name))
    sae.cfg.metadata.hook_name = hook_name
    return sae


def best_cell(rows: Sequence[SweepRow], method: str, d_sae: int) -> Cell:
    """The cell of a method at its chosen learning rate, first seed."""
    chosen = [row for row in rows if (row["method"], row["d_sae"], row["seed"]) == (method, d_sae, 0)]
    (best,) = chosen_rates(chosen)
    return Cell(**{**METHODS[method], "d_sae": d_sae, "lr": best["lr"], "silent_moments": "keep"})


def finished(sweeps: Path, model: nn.Module, text: Dataset) -> dict[str, float]:
    """Dead features of the large SAE on all of the text, with its last weights."""
    sae = load(sweeps / "d_sae", best_cell(read_sweep(sweeps / "d_sae"), "asi_sparse_adam", GOAL), HOOK)
    found = evaluate(sae, model, text, loss_tokens=0, context_size=CONTEXT)
    return {name: getattr(found, name) for name in ("n_tokens", "dead_fraction", "nmse")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=Path, default=RESULTS / "claims")
    sweeps = parser.parse_args().sweeps
    model = load_model("smollm2")
    text, held_out = load_documents("bible", 100_000)
    path = RESULTS / "claims" / "evaluations.json"
    found = {"finished": finished(sweeps, model, concatenate_datasets([held_out, text]))}
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()

"""Which part of the method does what: SAEs on a real model's attention output, one factor at a time.

    python -m benchmarks.ablation factors      # subspace x norm x centre x optimizer, 24 cells
    python -m benchmarks.ablation d_init       # dimension of the subspace
    python -m benchmarks.ablation n_tokens     # activations behind the estimate
    python -m benchmarks.ablation bias         # bias correction of SparseAdam

Every cell is one line of a JSON-lines file, written when it is done; a run that was interrupted continues. All cells
share one activation cache, see the same batches in the same order, and are evaluated on the same held-out tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from transformer_lens import HookedTransformer

from saelens_asi import ActiveSubspaceInit
from saelens_asi.activations.models import embedded_folder
from saelens_asi.activations.places import cache_dir
from saelens_asi.activations.texts import world_english_bible
from saelens_asi.evaluation.run import evaluate
from tests.helpers.hooked import load_hooked_transformer

HOOK_NAME = "blocks.15.hook_attn_out"
RESULTS = Path(__file__).parent / "results"
BATCH = 1024
CONTEXT = 128

# Settings of one run, and in a finished line what was measured too.
Cell = dict[str, Any]
BASE: Cell = {
    "d_sae": 8192,
    "steps": 150,
    "lr": 3e-4,
    "k": 32,
    "subspace": "active",
    "norm": "least_squares",
    "center": "mean",
    "optimizer": "sparse_adam",
    "bias_correction": "per_row",
    "d_init": 128,
    "n_tokens": 50_000,
    "seed": 0,
}


def grids() -> dict[str, list[Cell]]:
    """The cells of each study, as changes to ``BASE``."""
    factors = itertools.product(
        ("active", "random", "full"), (0.1, "least_squares"), ("zeros", "mean"), ("adam", "sparse_adam")
    )
    dims = (16, 32, 64, 96, 128, 192, 256, 384, 576)
    return {
        "factors": [
            {"subspace": subspace, "norm": norm, "center": center, "optimizer": optimizer}
            for subspace, norm, center, optimizer in factors
        ],
        "d_init": [{"d_init": d} for d in dims],
        "n_tokens": [{"n_tokens": n} for n in (1000, 5000, 20_000)],
        "bias": [
            {"bias_correction": bias, "center": center, "seed": seed}
            for center, seed in (("mean", 0), ("mean", 1), ("zeros", 0))
            for bias in ("global", "per_row")
        ],
    }


def activations(n_train: int, n_held_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out activations of the hook, (n, 576) float32; BOS positions left out. Cached on disk."""
    path = cache_dir() / f"ablation_{HOOK_NAME}_{n_train}_{n_held_out}.pt"
    if not path.exists():
        model = load_hooked_transformer(embedded_folder("smollm2"))
        parts = [
            torch.cat(list(_activations(model, split["text"], n)))[:n]
            for split, n in zip(world_english_bible(), (n_train, n_held_out), strict=True)
        ]
        torch.save(parts, path)
    train, held_out = torch.load(path)
    return train[torch.randperm(n_train, generator=torch.Generator().manual_seed(0))], held_out


@torch.no_grad()
def _activations(model: HookedTransformer, texts: list[str], n: int) -> Iterator[torch.Tensor]:
    per_window = CONTEXT - 1
    tokenizer, ids = model.tokenizer, []
    for text in texts:
        ids += tokenizer(text).input_ids
        if len(ids) >= n + per_window:
            break
    windows = torch.tensor(ids[: len(ids) // per_window * per_window]).view(-1, per_window)
    bos = torch.full((len(windows), 1), tokenizer.bos_token_id)
    layer = int(HOOK_NAME.split(".")[1])
    for batch in torch.cat([bos, windows], dim=1).split(32):
        _, cache = model.run_with_cache(batch, names_filter=[HOOK_NAME], stop_at_layer=layer + 1)
        yield cache[HOOK_NAME][:, 1:].flatten(0, 1).clone()


def run_cell(cell: Cell, train: torch.Tensor, held_out: torch.Tensor) -> Cell:
    """Train one SAE with SAELens's own trainer and evaluate it."""
    torch.manual_seed(cell["seed"])
    settings = ActiveSubspaceInit(
        **{name: cell[name] for name in ("subspace", "norm", "center", "d_init", "n_tokens", "seed")}
    )
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=train.shape[1], d_sae=cell["d_sae"], k=cell["k"], initializer=settings, optimizer=cell["optimizer"]
        )
    )
    estimate, training = train[: cell["n_tokens"]], train[: cell["steps"] * BATCH]
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=len(training),
            train_batch_size_samples=BATCH,
            lr=cell["lr"],
            lr_warm_up_steps=20,
            lr_decay_steps=cell["steps"] // 5,
        ),
        sae,
        itertools.chain(estimate.split(BATCH), training.split(BATCH)),
    )
    for group in trainer.optimizer.param_groups:
        group["bias_correction"] = cell["bias_correction"]
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start
    provenance = sae.cfg.metadata["active_subspace_init"]
    metrics = evaluate(sae, activations=held_out, ranks=False, progress=False)
    return {
        **cell,
        "held_out_tokens": metrics.n_tokens,
        "dead_fraction": metrics.dead_fraction,
        "nmse": metrics.nmse,
        "initial_nmse": provenance["initial_nmse"],
        "fitted_norm": provenance["norm"],
        "variance_explained": provenance["variance_explained"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=list(grids()))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--n-train", type=int, default=160_000)
    parser.add_argument("--n-held-out", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=BASE["steps"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.grid}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    train, held_out = activations(args.n_train, args.n_held_out)
    for changes in grids()[args.grid]:
        cell = {**BASE, "steps": args.steps, **changes}
        if any(all(row[name] == value for name, value in cell.items()) for row in done):
            continue
        row = run_cell(cell, train, held_out)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(changes, f"dead {row['dead_fraction']:.2%}", f"nmse {row['nmse']:.4f}", f"{row['seconds']} s", flush=True)
    print(f"results are in {path}")


if __name__ == "__main__":
    main()

"""Lorsas of a real model's attention layer: initialization x optimizer, and what a training step costs.

    python -m benchmarks.lorsa cells       # one line a cell in results/lorsa.jsonl; goes on where it stopped
    python -m benchmarks.lorsa step        # the training step against its floor
    python -m benchmarks.lorsa report      # the table in results/lorsa.md from the two

All cells read the same cached activations of SmolLM2-135M's layer 15 on the World English Bible, in the same order, and
are evaluated on the same held-out tokens. ``--seconds`` ends a call after the cell in which they are over.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from saelens_asi.activations.models import embedded_folder
from saelens_asi.activations.places import cache_dir
from saelens_asi.activations.texts import world_english_bible
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.lorsa import (
    CachedSequences,
    Lorsa,
    LorsaInit,
    LorsaTraining,
    batches,
    initialize_lorsa_,
    lorsa_metrics,
    read_attention,
    token_windows,
    train_lorsa,
)
from saelens_asi.lorsa.attention import AttentionTarget
from saelens_asi.lorsa.run import make_optimizer
from saelens_asi.lorsa.sparse_features import decode
from tests.helpers.hooked import load_hooked_transformer

Result = TypeVar("Result")

LAYER = 15
CONTEXT = 128
N_TRAIN, N_HELD_OUT = 1920, 240
RESULTS = Path(__file__).parent / "results"

_TABLE = ("<!-- table -->", "<!-- end of the table -->")

Cell = dict[str, Any]
BASE: Cell = {
    "method": "per_head",
    "norm": "least_squares",
    "center": "mean",
    "d_init": 64,
    "balance": 0.5,
    "value_share": 1.0,
    "optimizer": "sparse_adam",
    "train_qk": True,
    "n_ov_heads": 4608,
    "k": 64,
    "steps": 240,
    "batch_size": 8,
    "lr": 2e-3,
    "seed": 0,
}
_UNTIED: Cell = {"d_init": "auto", "norm": 1.0, "center": "zeros"}
STARTS: dict[str, Cell] = {
    "random (vanilla)": {**_UNTIED, "method": "random"},
    "ASI on W_O (the paper's)": {**_UNTIED, "method": "active"},
    "tied per head": {},
    "tied per head, values 8 times as long": {"value_share": 8.0},
    "tied per head, values 16 times as long": {"value_share": 16.0},
    "tied per head, values 32 times as long": {"value_share": 32.0},
    "random, centred": {**_UNTIED, "method": "random", "center": "mean"},
    "ASI on W_O, centred": {**_UNTIED, "method": "active", "center": "mean"},
}
VANILLA = "random (vanilla)"


def cells() -> list[Cell]:
    return [
        {"name": name, **BASE, **start, "optimizer": optimizer}
        for name, start in STARTS.items()
        for optimizer in ("adam", "sparse_adam")
    ]


def sequences() -> tuple[AttentionTarget, CachedSequences, CachedSequences]:
    """The layer, and its activations on training and held-out text; cached on disk (1.3 GB)."""
    folder = cache_dir() / f"lorsa_smollm2_{LAYER}_{CONTEXT}"
    names = {"training": N_TRAIN, "held_out": N_HELD_OUT}
    if not (folder / "target.pt").exists():
        model = load_hooked_transformer(embedded_folder("smollm2"))
        for (name, n), text in zip(names.items(), world_english_bible(), strict=True):
            tokens = token_windows(text, model.tokenizer, CONTEXT, n)
            CachedSequences.collect(model, LAYER, tokens).save(folder / f"{name}.safetensors")
        torch.save(read_attention(model, LAYER), folder / "target.pt")
    target = torch.load(folder / "target.pt", weights_only=False)
    training, held_out = (CachedSequences.load(folder / f"{name}.safetensors") for name in names)
    return target, training, held_out


def make(cell: Cell, target: AttentionTarget) -> Lorsa:
    return Lorsa.from_target(target, n_ov_heads=cell["n_ov_heads"], k=cell["k"], n_ctx=CONTEXT)


def run_cell(cell: Cell, target: AttentionTarget, training: CachedSequences, held_out: CachedSequences) -> Cell:
    lorsa = make(cell, target)
    names = ("method", "norm", "center", "d_init", "balance", "value_share", "seed")
    done = initialize_lorsa_(lorsa, target, batches(training, 8), LorsaInit(**{name: cell[name] for name in names}))
    start = time.perf_counter()
    train_lorsa(lorsa, training, training_settings(cell), progress=False)
    seconds = time.perf_counter() - start
    metrics = lorsa_metrics(lorsa, batches(held_out, 8))
    return {
        **cell,
        "tokens": cell["steps"] * cell["batch_size"] * CONTEXT,
        "held_out_tokens": metrics.n_tokens,
        "dead_fraction": metrics.dead_fraction,
        "nmse": metrics.nmse,
        "initial_nmse": done.initial_nmse,
        "row_norm": done.norm,
        "seconds": round(seconds, 1),
    }


def training_settings(cell: Cell) -> LorsaTraining:
    names = ("steps", "batch_size", "lr", "optimizer", "train_qk", "seed")
    return LorsaTraining(**{name: cell[name] for name in names}, lr_decay_steps=cell["steps"] // 5)


def measure_step(target: AttentionTarget, training: CachedSequences, repeats: int = 8) -> dict[str, float]:
    """Milliseconds of the parts of a training step, medians; the floor is what no implementation can leave out.

    The floor: projections forward (values of all features, queries, keys) and backward (weights' gradients), attention
    forward and backward for the selected features, top-k, and the decoder's sums, each as one dense torch call.
    """
    cell = dict(BASE)
    lorsa = make(cell, target).train()
    initialize_lorsa_(lorsa, target, batches(training, 8), LorsaInit())
    optimizer = make_optimizer(lorsa, training_settings(cell))
    x, y = training.batch(torch.arange(cell["batch_size"]))
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        out = function()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return out

    for _ in range(repeats):
        lorsa.zero_grad(set_to_none=True)
        loss = timed("forward", lambda: (lorsa(x) - y).square().sum(dim=-1).mean())
        timed("backward", loss.backward)
        timed("optimizer", optimizer.step)
        _floor(lorsa, x, timed)
    return {name: round(1000 * sorted(values)[len(values) // 2], 1) for name, values in seconds.items()}


def _floor(lorsa: Lorsa, x: Tensor, timed: Callable[[str, Callable[[], Any]], Any]) -> None:
    flat, grad_rows = x.flatten(0, 1), torch.randn(x.shape[0] * x.shape[1], lorsa.cfg.n_ov_heads)
    with torch.no_grad():
        q, k = timed("floor: queries and keys", lambda: lorsa.queries_and_keys(x))
        v = timed("floor: values", lambda: flat @ lorsa.W_V.T)
        heads = v.unflatten(0, x.shape[:2]).unflatten(-1, (lorsa.cfg.n_qk_heads, -1)).transpose(1, 2).contiguous()
        z = timed("floor: attention", lambda: lorsa.scores(x.shape[1], x.shape[1]).attend(q, k, heads))
        rows = z.transpose(1, 2).reshape(len(flat), -1)
        timed("floor: top-k", lambda: rows.topk(lorsa.cfg.k, dim=1, sorted=False))
        features = lorsa.encode(x)
        timed("floor: decode", lambda: decode(features, lorsa.W_O))
        timed("floor: gradient of W_V", lambda: grad_rows.T @ flat)
    leaves = [t.detach().requires_grad_() for t in (q, k, heads)]
    out = lorsa.scores(x.shape[1], x.shape[1]).attend(*leaves)
    timed("floor: gradient of attention", lambda: torch.autograd.grad(out, leaves, torch.ones_like(out)))
    W_O = lorsa.W_O.detach().requires_grad_()
    values = features.values.detach().requires_grad_()
    y = decode(features._replace(values=values), W_O)
    timed("floor: gradient of decode", lambda: torch.autograd.grad(y, [W_O, values], torch.ones_like(y)))


def report(folder: Path) -> str:
    """Markdown tables of the cells, and of a training step."""
    rows = [json.loads(line) for line in (folder / "lorsa.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (list(STARTS).index(row["name"]), row["optimizer"]))
    vanilla = next(row for row in rows if row["name"] == VANILLA and row["optimizer"] == "adam")
    columns = ["start", "optimizer", "dead", "of vanilla", "normalized MSE", "of vanilla", "at the start", "seconds"]
    cells = [
        (
            row["name"],
            row["optimizer"],
            f"{row['dead_fraction']:.2%}",
            f"{row['dead_fraction'] / vanilla['dead_fraction']:.2f}",
            f"{row['nmse']:.4f}",
            f"{row['nmse'] / vanilla['nmse']:.2f}",
            f"{row['initial_nmse']:.3f}",
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]
    table = markdown_table(columns, cells, align="llrrrrrr")
    steps = folder / "lorsa_step.json"
    return table if not steps.exists() else f"{table}\n\n{_step_table(json.loads(steps.read_text()))}"


def _step_table(milliseconds: dict[str, float]) -> str:
    floor = sum(value for name, value in milliseconds.items() if name.startswith("floor"))
    step = sum(milliseconds[name] for name in ("forward", "backward", "optimizer"))
    cells = [(name, f"{value:.0f}") for name, value in milliseconds.items()]
    cells += [("sum of the floor", f"{floor:.0f}"), ("the step over its floor", f"{step / floor:.2f}")]
    return markdown_table(["part of a step (1,024 positions)", "milliseconds"], cells, align="lr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cells", "step", "report"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "report":
        page = args.out / "lorsa.md"
        before, _, rest = page.read_text().partition(_TABLE[0])
        page.write_text(before + _TABLE[0] + "\n" + report(args.out) + "\n" + _TABLE[1] + rest.partition(_TABLE[1])[2])
        return
    target, training, held_out = sequences()
    if args.what == "step":
        milliseconds = measure_step(target, training)
        (args.out / "lorsa_step.json").write_text(json.dumps(milliseconds, indent=2) + "\n")
        print(json.dumps(milliseconds, indent=2))
        return
    path, start = args.out / "lorsa.jsonl", time.perf_counter()
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for cell in cells():
        if any(all(row.get(name) == value for name, value in cell.items()) for row in done):
            continue
        if time.perf_counter() - start > args.seconds:
            return
        row = run_cell(cell, target, training, held_out)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(cell["name"], cell["optimizer"], f"dead {row['dead_fraction']:.2%} nmse {row['nmse']:.4f}", flush=True)


if __name__ == "__main__":
    main()

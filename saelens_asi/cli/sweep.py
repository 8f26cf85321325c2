"""Command line: ``saelens-asi sweep``. A grid of SAEs on hooks of a model, cell by cell.

Every flag that takes several values is an axis of the grid. The same command continues after an interruption, and one
with more values trains what is missing:

    saelens-asi sweep --out sweep --methods topk auxk asi_sparse_adam --d-sae 4096 8192 16384
    saelens-asi sweep --out sweep --d-init 32 64 128 256 --subspace active random --seed 0 1
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from saelens_asi import plots
from saelens_asi.activations.cache import cache_activations
from saelens_asi.activations.hooks import SHORT_NAMES, layer_hooks, parse_layers
from saelens_asi.activations.loading import EMBEDDED_DATASET, EMBEDDED_MODEL, load_documents, load_model
from saelens_asi.plots import sweep_figures
from saelens_asi.sweep.cells import METHODS, Cell, grid, read_sweep
from saelens_asi.sweep.results import sweep_table
from saelens_asi.sweep.run import ARCHITECTURES, SweepTraining, run_sweep


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# Axes of the grid: the type of each value, and choices.
_AXES: dict[str, dict[str, Any]] = {
    "architecture": {"choices": ARCHITECTURES},
    "d_sae": {"type": int},
    "k": {"type": int},
    "initializer": {"choices": ("default", "active_subspace")},
    "subspace": {"choices": ("active", "random", "full")},
    "norm": {"type": _number_or_word},
    "center": {"choices": ("mean", "zeros")},
    "d_init": {"type": _number_or_word},
    "optimizer": {"choices": ("adam", "sparse_adam")},
    "aux_loss_coefficient": {"type": float},
    "lr": {"type": float},
    "seed": {"type": int},
}


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="saelens-asi sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    axes = parse.add_argument_group("axes of the grid", "each takes several values")
    axes.add_argument("--methods", nargs="+", choices=list(METHODS), default=[], help="sets of the settings below")
    defaults = {field.name: field.default for field in fields(Cell)}
    for name, how in _AXES.items():
        axes.add_argument(f"--{name.replace('_', '-')}", nargs="+", help=f"default: {defaults[name]}", **how)
    data = parse.add_argument_group("activations")
    data.add_argument("--model", default=EMBEDDED_MODEL, help="name on the hub, folder, or smollm2 (default)")
    data.add_argument("--dataset", default=EMBEDDED_DATASET, help="of text or tokens: name, folder, or bible (default)")
    data.add_argument("--hooks", nargs="+", default=["attn_out"],
                      help=f"{', '.join(SHORT_NAMES)}, or full names; default: attn_out")  # fmt: skip
    data.add_argument("--layers", nargs="+", help="of short names: numbers, ranges or all; default: the middle one")
    data.add_argument("--cached-tokens", type=int, default=300_000, help="activations to train on; default: 300000")
    data.add_argument("--held-out-tokens", type=int, default=80_000, help="activations to evaluate on; default: 80000")
    data.add_argument("--context-size", type=int, default=128, help="tokens in a window; default: 128")
    data.add_argument(
        "--cache", type=Path, help="folder of the activations, for several sweeps; default: OUT/activations"
    )
    training = parse.add_argument_group("training")
    for field in fields(SweepTraining):
        kind = type(field.default)
        training.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default,
                              help=f"default: {field.default}")  # fmt: skip
    parse.add_argument("--save-saes", action="store_true", help="keep each SAE as a SAELens folder in OUT/saes")
    parse.add_argument("--out", type=Path, default=Path("sweep_output"), help="folder; default: sweep_output")
    return parse


def run(args: argparse.Namespace) -> None:
    training = SweepTraining(**{field.name: getattr(args, field.name) for field in fields(SweepTraining)})
    axes = {name: getattr(args, name) for name in _AXES if getattr(args, name) is not None}
    cells = grid(axes, args.methods)
    activations = _activations(args)
    sizes = {"cached_tokens": args.cached_tokens, "held_out_tokens": args.held_out_tokens}
    source = {"model": args.model, "dataset": args.dataset, "context_size": args.context_size, **sizes}
    print(f"{len(cells)} cells of {training.steps} steps on {', '.join(activations)}", flush=True)
    try:
        rows = run_sweep(cells, training, activations, args.out, source=source, save_saes=args.save_saes)
        print(f"\n{sweep_table(rows)}")
    finally:
        written = write_report(args.out)
        print("\n".join(["", "Written:", *(f"  {path}" for path in written)]) if written else "")


def _activations(args: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """Activations to train and to evaluate on, by hook; the model is loaded only where they are not cached."""
    model = functools.cache(lambda: load_model(args.model, args.device))
    texts = functools.cache(lambda: load_documents(args.dataset, max(args.cached_tokens, 4 * args.held_out_tokens)))
    names = [hook for hook in args.hooks if "." in hook]
    if len(names) < len(args.hooks):
        n_layers = model().cfg.n_layers
        layers = parse_layers(args.layers or [str(n_layers // 2)], n_layers)
        names = layer_hooks(args.hooks, layers)
    folder = args.cache or args.out / "activations"
    hooks = names[0] if len(names) == 1 else hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]
    own = re.sub(r"\W+", "_", f"{args.model}_{args.dataset}_{hooks}")
    splits = []
    for i, (split, n_tokens) in enumerate({"training": args.cached_tokens, "held_out": args.held_out_tokens}.items()):
        path = folder / f"{own}_{n_tokens}_{split}"
        how = {"context_size": args.context_size}
        splits.append(cache_activations(path, model, lambda i=i: texts()[i], names, n_tokens, **how))
    return {name: (splits[0][name], splits[1][name]) for name in splits[0]}


def write_report(out: str | Path) -> list[Path]:
    """Table and figures of all finished cells in ``out``; returns what was written."""
    out = Path(out)
    rows = read_sweep(out)
    if not rows:
        return []
    figures = [plots.save(figure, out / name) for name, figure in sweep_figures(rows).items()]
    images = "".join(f"\n![{path.stem}]({path.name})\n" for path in figures)
    table = out / "results.md"
    table.write_text(f"{sweep_table(rows)}\n{images}")
    return [out / "cells.jsonl", table, *figures]


def main(args: Sequence[str]) -> None:
    """``saelens-asi sweep``. A flag with a bad value ends in one line, not in a traceback."""
    settings = parser().parse_args(args)
    try:
        run(settings)
    except ValueError as error:
        print(f"saelens-asi sweep: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command continues from {settings.out}", file=sys.stderr)
        raise SystemExit(130) from None

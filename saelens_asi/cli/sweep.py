"""A grid of SAEs on hooks of a model, cell by cell, and the paper's figures from them.

Every flag under Axes takes several values, and is an axis of the grid. The same command continues after an
interruption, and one with more values trains what is missing:

    saelens-asi sweep --out sweep --methods topk auxk asi_sparse_adam --d-sae 4096 8192 16384
    saelens-asi sweep --out sweep --d-init 32 64 128 256 --subspace active random --seed 0 1
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import simple_parsing
from simple_parsing.docstring import get_attribute_docstring
from torch import Tensor

from saelens_asi import plots
from saelens_asi.activations.cache import cache_activations
from saelens_asi.cli.common import Command
from saelens_asi.cli.flags import (
    DTYPES,
    DtypeFlag,
    HeldOutFlag,
    HookFlags,
    OutFlag,
    SourceFlags,
    check_device,
    hook_names,
    open_model,
    open_text,
)
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


def _axis(name: str, hint: Any, default: Any) -> Any:
    """The flag of one field of ``Cell``: any number of values of its type."""
    kinds = set(get_args(hint) or (hint,)) - {type(None)}
    kind: Callable[[str], Any] = kinds.pop() if len(kinds) == 1 else _number_or_word
    shown = "number or word" if kind is _number_or_word else kind.__name__
    values = {"choices": ARCHITECTURES} if name == "architecture" else {"metavar": f"{shown} [{shown} ...]"}
    text = get_attribute_docstring(Cell, name).desc_from_cls_docstring.rstrip(".")
    return simple_parsing.field(default=(), help=f"{text}; default: {default}", type=kind, nargs="*", **values)


# One flag for each field of Cell; an axis without values is no part of the grid.
Axes = make_dataclass(
    "Axes",
    [(one.name, tuple[Any, ...], _axis(one.name, get_type_hints(Cell)[one.name], one.default)) for one in fields(Cell)],
    frozen=True,
)


@dataclass(frozen=True, kw_only=True)
class SweepFlags(OutFlag, HeldOutFlag, HookFlags, DtypeFlag, SourceFlags):
    """Flags of ``saelens-asi sweep``.

    Attributes:
        cached_tokens: activations to train on, read once.
        cache: folder of the activations, for several sweeps; without it OUT/activations.
        cache_dtype: of the activations there; float16 takes half the disk.
        save_saes: keep each SAE as a SAELens folder in OUT/saes.
    """

    methods: tuple[str, ...] = simple_parsing.field(
        default=(), help=f"sets of the settings under Axes: {', '.join(METHODS)}; without it the last"
    )
    cached_tokens: int = 300_000
    held_out_tokens: int = 80_000
    cache: Path | None = None
    cache_dtype: Literal["float32", "float16"] = "float32"
    save_saes: bool = simple_parsing.field(default=False, action="store_true")
    out: Path = Path("sweep_output")


def run(flags: SweepFlags, axes: Any, training: SweepTraining) -> None:
    """Train what is missing of the grid, and write the report of all that is there."""
    check_device(training.device)
    cells = grid({name: list(values) for name, values in vars(axes).items() if values}, flags.methods)
    activations = _activations(flags, training.device)
    sizes = {"cached_tokens": flags.cached_tokens, "held_out_tokens": flags.held_out_tokens}
    source = {"model": flags.model, "dataset": flags.dataset, "context_size": flags.context_size, **sizes}
    print(f"{len(cells)} cells of {training.steps} steps on {', '.join(activations)}", flush=True)
    try:
        rows = run_sweep(cells, training, activations, flags.out, source=source, save_saes=flags.save_saes)
        print(f"\n{sweep_table(rows)}")
    finally:
        written = write_report(flags.out, f"{flags.model} on {flags.dataset}")
        print("\n".join(["", "Written:", *(f"  {path}" for path in written)]) if written else "")


def _activations(flags: SweepFlags, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Activations to train and to evaluate on, by hook; the model is loaded only where they are not cached."""
    model = functools.cache(lambda: open_model(flags.model, device, DTYPES[flags.dtype]))
    n_tokens = {"training": flags.cached_tokens, "held_out": flags.held_out_tokens}
    texts = functools.cache(lambda: open_text(flags.dataset, max(flags.cached_tokens, 4 * flags.held_out_tokens)))
    names = hook_names(flags.hooks, flags.layers, lambda: model().cfg.n_layers)
    folder = flags.cache or flags.out / "activations"
    hooks = names[0] if len(names) == 1 else hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]
    own = re.sub(r"\W+", "_", f"{flags.model}_{flags.dataset}_{hooks}")
    splits = []
    for i, (split, n) in enumerate(n_tokens.items()):
        path = folder / f"{own}_{n}_{split}"
        text = functools.partial(lambda i: texts()[i], i)
        splits.append(
            cache_activations(path, model, text, names, n, context_size=flags.context_size, dtype=flags.cache_dtype)
        )
    return {name: (splits[0][name], splits[1][name]) for name in splits[0]}


def write_report(out: str | Path, source: str = "") -> list[Path]:
    """Table and figures of all finished cells in ``out``, named after ``source``; returns what was written."""
    out = Path(out)
    rows = read_sweep(out)
    if not rows:
        return []
    figures = [plots.save(figure, out / name) for name, figure in sweep_figures(rows, source).items()]
    images = "".join(f"\n![{path.stem}]({path.name})\n" for path in figures)
    table = out / "results.md"
    table.write_text(f"{sweep_table(rows)}\n{images}")
    return [out / "cells.jsonl", table, *figures]


COMMAND = Command(
    name="sweep",
    about=__doc__ or "",
    run=run,
    settings=(SweepFlags, Axes, SweepTraining),
    resume=lambda flags, axes, training: f"the same command continues from {flags.out}",
)


def main(args: Sequence[str]) -> None:
    COMMAND.main(args)

"""The committed page about the ablation: tables from the result files, and a figure of error against d_init.

python -m benchmarks.ablation_report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from matplotlib.figure import Figure

from benchmarks.ablation import BASE, HOOK_NAME, RESULTS, Cell, grids
from saelens_asi.evaluation.tables import markdown_table


def read(grid: str) -> list[Cell]:
    """Rows of the current grid, in its order; rows of older settings are left out."""
    path = RESULTS / f"{grid}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    cells = [{**BASE, **changes} for changes in grids()[grid]]
    return [row for cell in cells for row in rows if all(row[key] == value for key, value in cell.items())]


def table(rows: Iterable[Cell], keys: list[str]) -> str:
    measures: dict[str, Callable[[Cell], str]] = {
        "initial NMSE": lambda row: f"{row['initial_nmse']:.3f}",
        "NMSE": lambda row: f"{row['nmse']:.4f}",
        "dead": lambda row: f"{row['dead_fraction']:.2%}",
    }
    cells = [
        [f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        + [measure(row) for measure in measures.values()]
        for row in rows
    ]
    return markdown_table([*keys, *measures], cells, align="l" * len(keys) + "r" * len(measures))


def effects(rows: list[Cell]) -> str:
    """Each factor's mean over all cells that share its value: NMSE and dead features."""
    cells = []
    for factor in ("subspace", "norm", "center", "optimizer"):
        for value in dict.fromkeys(row[factor] for row in rows):
            group = [row for row in rows if row[factor] == value]
            nmse = sum(row["nmse"] for row in group) / len(group)
            dead = sum(row["dead_fraction"] for row in group) / len(group)
            cells.append((factor, str(value), f"{nmse:.4f}", f"{dead:.2%}"))
    return markdown_table(["factor", "value", "mean NMSE", "mean dead"], cells, align="llrr")


def reading(rows: list[Cell]) -> str:
    """What changes when one factor alone moves away from the defaults (optimizer: sparse_adam)."""
    defaults = {name: BASE[name] for name in ("subspace", "norm", "center", "optimizer")}

    def cell(**changes: float | str) -> str:
        settings = {**defaults, **changes}
        row = next(row for row in rows if all(row[key] == value for key, value in settings.items()))
        return f"NMSE {row['nmse']:.3f}, {row['dead_fraction']:.1%} dead"

    lines = [
        f"- The defaults: {cell()}.",
        f"- Subspace: random instead of active {cell(subspace='random')}; all of d_in {cell(subspace='full')}. The "
        "subspace lowers the error; a random one of the same size does harm.",
        f"- Norm: 0.1 instead of least squares {cell(norm=0.1)}. The norm alone decides whether most features live.",
        f"- Centre: zeros instead of the mean {cell(center='zeros')}.",
        f"- Optimizer: Adam instead of SparseAdam {cell(optimizer='adam')}. With everything else in place there is "
        "little left to revive at this size and length.",
        f"- Nothing of it (random over all of d_in, 0.1, zeros, Adam): "
        f"{cell(subspace='full', norm=0.1, center='zeros', optimizer='adam')}.",
        f"- SparseAdam where features do die (zeros, all of d_in): {cell(subspace='full', center='zeros')}, against "
        f"{cell(subspace='full', center='zeros', optimizer='adam')} with Adam: fewer dead, at a slightly higher error.",
    ]
    return "\n".join(lines)


def d_init_figure(rows: list[Cell]) -> Figure:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    dims = [row["d_init"] for row in rows]
    left.semilogx(dims, [row["nmse"] for row in rows], "o-", color="#1f6feb", base=2)
    right.semilogx(dims, [100 * row["dead_fraction"] for row in rows], "s--", color="#d9822b", base=2)
    auto = min(rows, key=lambda row: abs(row["variance_explained"] - 0.9))["d_init"]
    left.axvspan(auto * 0.8, auto * 1.25, color="black", alpha=0.06)
    left.annotate("auto: 90 % of\nthe variance", (auto, left.get_ylim()[1]), ha="center", va="top", fontsize=8)
    left.set_xticks(dims, [str(d) for d in dims])
    left.minorticks_off()
    left.set_xlabel("d_init (of 576)")
    left.set_ylabel("normalized MSE", color="#1f6feb")
    right.set_ylabel("dead features (%)", color="#d9822b")
    left.set_title("Dimension of the active subspace")
    return figure


def main() -> None:
    rows = {grid: read(grid) for grid in grids()}
    shared = ", ".join(f"{name} = {BASE[name]}" for name in ("d_sae", "k", "steps", "lr", "bias_correction"))
    sections = [
        "# What each ingredient does",
        f"SmolLM2-135M, `{HOOK_NAME}`, World English Bible; TopK, {shared}, batches of 1024 tokens, the same batches "
        "in every cell. NMSE and dead features (fire on none of the tokens) are counted on "
        f"{rows['factors'][0]['held_out_tokens']:,} held-out tokens; initial NMSE on a sample before the first step. "
        "Made by `make ablation`.",
        "## Subspace x norm x centre x optimizer",
        reading(rows["factors"]),
        table(rows["factors"], ["subspace", "norm", "center", "optimizer"]),
        "Mean over all cells with the same value:",
        effects(rows["factors"]),
        "## Dimension of the subspace",
        table(rows["d_init"], ["d_init", "variance_explained"]),
        '`"auto"` takes the dimensions that hold 90 % of the variance, 103 to 105 here.',
        "![error and dead features against d_init](d_init.png)",
        "## Tokens behind the estimate",
        table(rows["n_tokens"] + [row for row in rows["d_init"] if row["d_init"] == BASE["d_init"]], ["n_tokens"]),
        '`"auto"` takes 32 tokens for each dimension of d_in, 18,432 here.',
        "## Bias correction of SparseAdam",
        table(rows["bias"], ["center", "seed", "bias_correction"]),
    ]
    d_init_figure(rows["d_init"]).savefig(RESULTS / "d_init.png", dpi=150)
    (RESULTS / "ablation.md").write_text("\n\n".join(sections) + "\n")
    print(f"wrote {RESULTS / 'ablation.md'} and {RESULTS / 'd_init.png'}")


if __name__ == "__main__":
    main()

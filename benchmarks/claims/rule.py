"""Which rule on the spectrum should choose d_init: every rule at every hook that several d_init were tried at.

    python -m benchmarks.claims.rule [d_init | d_init_aside]

Error and dead features at the dimension that a rule asks for are interpolated between those that were tried, in log
d_init.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.claims.records import read
from saelens_asi.initialization import auto_share

Row = dict[str, Any]

DEFAULT = 'd_init="auto"'


def default(row: Row) -> float:
    """What the package takes."""
    return min(auto_share(row["d_in"], row["d_sae"]) * row["d_in"], row["dimension_0.99"])


RULES: dict[str, Callable[[Row], float]] = {
    DEFAULT: default,
    **{f"{share:.0%} of the variance": lambda row, s=share: row[f"dimension_{s}"] for share in (0.9, 0.99)},
    **{
        f"{c:g} x effective rank": lambda row, c=c: c * row["effective_rank"]
        for c in (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
    },
    **{f"{share:.1%} of d": lambda row, s=share: s * row["d_in"] for share in (0.125, 0.1875, 0.25, 0.375)},
}


def by_hook(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows with a d_init and moments that stay, by model and hook, in order of the dimension."""
    return _of_active(rows, ("model", "hook"))


def by_size(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """The same, by model and number of features."""
    return _of_active(rows, ("model", "d_sae"))


def _of_active(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["subspace"] == "active" and "silent_moments" not in row:
            found[tuple(row[name] for name in names)].append(row)
    return {name: sorted(rows, key=lambda row: row["d_init_used"]) for name, rows in found.items() if len(rows) > 2}


def at(rows: Sequence[Row], dimension: float) -> tuple[float, float]:
    """Error over the lowest of the hook, and dead share, at a dimension."""
    x = np.log([row["d_init_used"] for row in rows])
    where = np.log(dimension)
    error = float(np.interp(where, x, [row["nmse"] for row in rows]))
    dead = float(np.interp(where, x, [row["silent_fraction"] for row in rows]))
    return error / min(row["nmse"] for row in rows) - 1, dead


@dataclass(frozen=True)
class Judged:
    """A rule over all hooks.

    Attributes:
        errors: over the lowest of each hook.
        dead: shares.
    """

    errors: Sequence[float]
    dead: Sequence[float]

    @property
    def n_met(self) -> int:
        """Hooks at which error and dead share are both as low as wanted."""
        return sum(e <= _WANTED_ERROR and d < _WANTED_DEAD for e, d in zip(self.errors, self.dead, strict=True))


# At every hook: the error within 1 % of the lowest, and under 2 % of the features dead.
_WANTED_ERROR, _WANTED_DEAD = 0.01, 0.02


def judged(hooks: Iterable[Sequence[Row]]) -> dict[str, Judged]:
    """Every rule, over the rows of each hook."""
    found = list(hooks)
    return {
        name: Judged(*zip(*(at(rows, rule(rows[0])) for rows in found), strict=True)) for name, rule in RULES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="d_init")
    part = parser.parse_args().part
    hooks = by_hook(read(part))
    if not hooks:
        parser.error(f"{part} has no results: python -m benchmarks.claims.train {part}")
    for (model, hook), rows in hooks.items():
        head = (
            f"{model} {hook}: rank {rows[0]['effective_rank']:.0f} of {rows[0]['d_in']}, gamma {rows[0]['gamma']:.2f}, "
        )
        print(head + f"90 % in {rows[0]['dimension_0.9']}, 99 % in {rows[0]['dimension_0.99']}")
        print(
            "   ",
            "; ".join(
                f"{row['d_init_used']}: {row['nmse']:.4f}, {row['dead_fraction']:.1%}, {row['silent_fraction']:.1%}"
                for row in rows
            ),
        )
    for name, one in judged(hooks.values()).items():
        print(
            f"{name}: error over the lowest {np.mean(one.errors):.1%} (at most {max(one.errors):.1%}), dead "
            f"{np.mean(one.dead):.1%} (at most {max(one.dead):.1%}), both goals at {one.n_met} of {len(hooks)} hooks"
        )


if __name__ == "__main__":
    main()

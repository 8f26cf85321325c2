"""Every comparison of the page in which another contender does better than ours, by more than seeds differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from benchmarks.claims.evidence import Record, ResultFiles
from benchmarks.claims.plan import OURS, OWN_SHARE, SLOWER
from benchmarks.claims.rivals import RIVALS
from benchmarks.claims.sources import MODEL_TITLES, TEXT_TITLES
from benchmarks.claims.statistics import Interval, Pair
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.sweep.cells import METHOD_TITLES
from saelens_asi.sweep.results import mean_of

# Ours, by the name of the sweeps: the default, but for moments that stay in silence.
OUR_METHOD = "asi_sparse_adam"
# L0 that differ by more cannot be compared by their errors.
EQUAL_L0 = 0.02
# Parts of the plan whose contenders are compared, each with its rivals.
COMPARED = {"factorial": "rivals", "slower": None, "longer": None, "elsewhere": None, "pilot": "pilot_rivals"}

Rows = Sequence[Any]


@dataclass(frozen=True)
class Comparison:
    """Ours and another contender, trained on the same.

    Attributes:
        where: what both were trained on, and how large they are.
        name: of the other.
        ours: rows, one a seed.
        theirs: likewise.
    """

    where: str
    name: str
    ours: Rows
    theirs: Rows

    @property
    def has_equal_l0(self) -> bool:
        return abs(mean_of(self.ours, "l0") / mean_of(self.theirs, "l0") - 1) <= EQUAL_L0


@dataclass(frozen=True)
class Loss:
    """A comparison that ours loses.

    Attributes:
        comparison: which.
        error: ours less theirs, where theirs is lower at equal L0; None elsewhere.
        dead: likewise, of the shares of dead features, at any L0.
        silent: likewise, of features that were silent at the end of training too, where there are seeds.
    """

    comparison: Comparison
    error: Interval | None
    dead: Interval | None
    silent: Interval | None = None


def best_try(rows: Sequence[Record]) -> list[Record]:
    """Of one contender, all seeds of the try with the lowest error, as the page's tables have it."""
    best = min(rows, key=itemgetter("nmse"))
    return [row for row in rows if (row["lr"], row["window"]) == (best["lr"], best["window"])]


def of_plan(e: ResultFiles) -> Iterator[Comparison]:
    for part, rivals in COMPARED.items():
        rows = [row for name in (part, rivals) if name for row in e.parts.get(name, [])]
        for model, text in dict.fromkeys((row["model"], row["text"]) for row in rows):
            here = [row for row in rows if (row["model"], row["text"]) == (model, text)]
            where = f"{MODEL_TITLES[model]}, {TEXT_TITLES[text]}, {_tokens(here[0]['tokens'])} tokens"
            where += f", rate {SLOWER:g}" if part == "slower" else ""
            yield from _against_ours(where, here)


def _tokens(n: int) -> str:
    return f"{n // 1_000_000}M" if n >= 1_000_000 else f"{n // 1000}k"


def _against_ours(where: str, rows: Sequence[Record]) -> Iterator[Comparison]:
    contenders = {name: [row for row in rows if row["contender"] == name] for name in map(_contender, rows)}
    own = contenders.pop(OURS, None)
    if own:
        for name, theirs in contenders.items():
            title = RIVALS[name].title if name in RIVALS else name
            yield Comparison(where, title, best_try(own), best_try(theirs))


def _contender(row: Record) -> str:
    return str(row["contender"])


def of_hooks(e: ResultFiles) -> Iterator[Comparison]:
    """Layers and kinds of hooks: the active subspace at one share of d, beside all of d, and beside TopK."""
    for part in ("d_init", "d_init_aside"):
        rows = e.parts.get(part, [])
        for model, hook in dict.fromkeys((row["model"], row["hook"]) for row in rows):
            here = [row for row in rows if (row["model"], row["hook"]) == (model, hook)]
            here = [row for row in here if row["subspace"] != "active" or row["d_init"] == OWN_SHARE]
            if here:  # not only dimensions that nobody recommends, in a part under way
                where = f"{MODEL_TITLES[model]}, {hook.removeprefix('blocks.')}, {TEXT_TITLES[here[0]['text']]}"
                yield from _against_ours(where, here)


def of_sweeps(e: ResultFiles) -> Iterator[Comparison]:
    """Sizes, levels of sparsity and architectures, each method at its chosen rate (``evidence.chosen_rates``)."""
    rows = [row for sweep in ("d_sae", "frontier", "paper", "architectures") for row in e.cells(sweep)]
    settings = itemgetter("architecture", "d_sae", "k")
    for architecture, d_sae, k in dict.fromkeys(map(settings, rows)):
        here = [row for row in rows if settings(row) == (architecture, d_sae, k) and row["norm"] == "least_squares"]
        methods = {method: _once(row for row in here if row["method"] == method) for method in METHOD_TITLES}
        own = methods.pop(OUR_METHOD)
        where = f"{MODEL_TITLES['smollm2']}, Bible, {architecture}, {d_sae:,} features, k = {k}"
        for method, theirs in methods.items():
            if own and theirs:
                yield Comparison(where, METHOD_TITLES[method], own, theirs)


def _once(rows: Iterator[Mapping[str, Any]]) -> list[Any]:
    """One row a seed: some cells stand in two sweeps."""
    return list({row["seed"]: row for row in rows}.values())


def comparisons(e: ResultFiles) -> list[Comparison]:
    return [*of_plan(e), *of_sweeps(e), *of_hooks(e)]


def losses(e: ResultFiles) -> list[Loss]:
    """Those that ours loses: an error that is higher at equal L0, or more dead features, the interval above zero."""
    found = []
    for one in comparisons(e):
        error, dead = (e.pair(one.ours, one.theirs, measure).difference for measure in ("nmse", "dead_fraction"))
        lower = error if error.side > 0 and one.has_equal_l0 else None
        fewer = dead if dead.side > 0 else None
        silent = _silent(one)
        if lower or fewer or silent:
            found.append(Loss(one, lower, fewer, silent))
    return found


def _silent(one: Comparison) -> Interval | None:
    """Ours less theirs where theirs has fewer features that were silent at the end of training too."""
    ours, theirs = (
        {row["seed"]: row["silent_fraction"] for row in rows if "silent_fraction" in row}
        for rows in (one.ours, one.theirs)
    )
    if len(set(ours) & set(theirs)) < 2:
        return None
    difference = Pair(ours, theirs).difference
    return difference if difference.side > 0 else None


def table(found: Sequence[Loss]) -> list[str]:
    lines = []
    for loss in found:
        one = loss.comparison
        counts = [len(rows) for rows in (one.theirs, one.ours)]
        lines.append(
            (
                one.where,
                one.name,
                f"{mean_of(one.theirs, 'nmse'):.4f} against {mean_of(one.ours, 'nmse'):.4f}",
                _difference(loss.error, "{:+.4f}"),
                f"{mean_of(one.theirs, 'dead_fraction'):.1%} against {mean_of(one.ours, 'dead_fraction'):.1%}",
                _difference(loss.dead, "{:+.1%}"),
                _difference(loss.silent, "{:+.1%}"),
                f"{mean_of(one.theirs, 'l0'):.1f} against {mean_of(one.ours, 'l0'):.1f}",
                str(counts[0]) if counts[0] == counts[1] else f"{counts[0]} against {counts[1]}",
            )
        )
    header = ["where", "better", "error, theirs and ours", "ours higher by", "dead", "ours more by"]
    header += ["silent: ours more by", "L0", "seeds"]
    return [markdown_table(header, lines, align="llrrrrrrr"), ""]


def _difference(value: Interval | None, form: str) -> str:
    return f"{form.format(value.mean)} ({form.format(value.low)} to {form.format(value.high)})" if value else ""


def summary(e: ResultFiles, found: Sequence[Loss]) -> str:
    """How many there are, and what could not be compared yet."""
    every = comparisons(e)
    n_error, n_dead, n_silent = (
        sum(getattr(loss, measure) is not None for loss in found) for measure in ("error", "dead", "silent")
    )
    waiting = [part for part in COMPARED if not any(row["contender"] == OURS for row in e.parts.get(part, []))]
    sentence = (
        f"{len(found)} of {len(every)} comparisons of our default ({OURS}; at each hook {OWN_SHARE:.1%} of d; on the "
        f"Bible with moments that stay) with another contender: {n_error} by a lower error at equal L0, "
        f"{n_dead} by fewer dead features, {n_silent} by fewer that were silent at the end of training "
        "too, by more than seeds differ (the 95 % interval of the difference lies on their side)."
    )
    if waiting:
        sentence += f" Not compared yet, since ours is not trained there: {', '.join(waiting)}."
    return sentence

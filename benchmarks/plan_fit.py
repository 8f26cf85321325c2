"""Fits the model behind ``saelens_asi.plan`` and tests it on hooks, models and texts that the fit has not seen.

    python -m benchmarks.plan_fit     # writes saelens_asi/planning/fitted.json and benchmarks/results/plan.{json,md}

Rows: the SAEs of ``plan_sweep`` and those of the claims' sweeps that were trained as the plan recommends (TopK, active
subspace with a dimension within a factor of 1.5 of the default, mean as centre, SparseAdam, no auxiliary loss, a rate
within a factor of 1.5 of the rule), at hooks that have pilots. Where moments stay in silence the error is the same, and
more features are dead: of such SAEs the errors are fitted and tested, the dead shares are not. Each hook counts the
same, however many SAEs it has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plan_costs
from benchmarks.claims.records import RESULTS as CLAIMS
from benchmarks.claims.records import lines
from benchmarks.plan_sweep import CELLS, PILOTS, VARIANCES
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.initialization import auto_share
from saelens_asi.planning import model as planning
from saelens_asi.planning.cost import step_cost
from saelens_asi.planning.make import D_SAE, PILOT_D_SAE, PILOT_K, anchor_of, sizes_within
from saelens_asi.planning.memory import parse_bytes
from saelens_asi.planning.model import (
    FITTED,
    Anchor,
    Fitted,
    anchor_terms,
    error_terms,
    spread_of_silence,
    spread_terms,
)
from saelens_asi.planning.pilots import STEPS, Pilot
from saelens_asi.planning.recipe import learning_rate
from saelens_asi.planning.record import Plan
from saelens_asi.plots import plan_figure, save

OUT = Path(__file__).parent / "results"
Group = tuple[str, str, str]  # model, text, hook

COVERED = 0.8
# What is kept out leaves so many hooks at least: a fit on fewer says little of one on all.
LEAST_HOOKS = 8
NEAR = 1.5  # a factor, within which a setting is as the plan recommends it
# The ridge, in units of the terms' own spread. With 0.03 to 0.3 the intervals of what is kept out are the same.
RIDGE = 0.1

# What terms are drawn to, where the SAEs are too few to tell: the slope that pilots have in k holds, and half of that
# in tokens, which is steeper in the first steps than later.
PRIOR = {"k x slope": 1.0, "tokens x slope": 0.5, "pilot": 1.0}


@dataclass(frozen=True)
class Trained:
    """An SAE that was trained as the plan recommends.

    Attributes:
        group: model, text and hook.
        source: file of results.
        d_sae: features.
        k: active on a token.
        tokens: that it was trained on.
        nmse: on held-out tokens: E|x - x_hat|^2 over the variance of the hook, where that is known, or theirs.
        counts: pairs of tokens, and share of the features that fired on none of them.
        decays: whether moments decay in silence, as the plan recommends it.
        cpu_seconds: of the training.
    """

    group: Group
    source: str
    d_sae: int
    k: int
    tokens: int
    nmse: float
    counts: tuple[tuple[int, float], ...]
    decays: bool
    cpu_seconds: float


def _counts(row: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    return (row["n_tokens"], row["dead_fraction"]), (row["silent_tokens"], row["silent_fraction"])


def _is_recommended(row: dict[str, Any]) -> bool:
    own = (row["architecture"], row["optimizer"], row["subspace"], row["center"], row["aux_loss_coefficient"])
    if own != ("topk", "sparse_adam", "active", "mean", 0.0) or row["norm"] != "least_squares":
        return False
    share = row["d_init_used"] / row["d_in"] / auto_share(row["d_in"], row["d_sae"])
    rate = row["lr"] / learning_rate(row["d_sae"])
    return all(1 / NEAR <= one <= NEAR for one in (share, rate))


@cache
def variances() -> dict[tuple[Group, int], float]:
    """Of so many held-out activations, over the variance of the hook."""
    return {
        ((row["model"], row["text"], row["hook"]), n): of_held_out / row["variance"]
        for row in lines(VARIANCES)
        for n, of_held_out in row["held_out"]
    }


def trained() -> Iterator[Trained]:
    """All of them, from all files of results."""
    for path in [CELLS, *sorted(CLAIMS.glob("*.jsonl")), *sorted(CLAIMS.glob("*/cells.jsonl"))]:
        shared: dict[str, Any] = {}
        if (path.parent / "sweep.json").exists():
            sweep = json.loads((path.parent / "sweep.json").read_text())
            shared = {"model": sweep["model"], "text": sweep["dataset"], "tokens": sweep["training"]["training_tokens"]}
        for row in ({**shared, **one} for one in lines(path)) if path.exists() else ():
            if "silent_tokens" not in row or not _is_recommended(row):
                continue
            group = (row["model"], row["text"], row.get("hook") or row["hook_name"])
            yield Trained(
                group=group,
                source=str(path.relative_to(OUT)),
                nmse=row["nmse"] * variances().get((group, row["n_tokens"]), 1.0),
                **{name: row[name] for name in ("d_sae", "k", "tokens", "cpu_seconds")},
                counts=_counts(row),
                decays=row.get("silent_moments") == "decay",
            )


@dataclass(frozen=True)
class Hook:
    """A hook with pilots.

    Attributes:
        anchor: of its pilots.
        facts: of its spectrum.
        rows: the SAEs trained there.
        timed: the pilots.
    """

    anchor: Anchor
    facts: dict[str, float]
    rows: tuple[Trained, ...]
    timed: tuple[Pilot, ...]

    @property
    def pilots(self) -> tuple[Pilot, ...]:
        """Second and third, as error at other d_sae and k."""
        return self.timed[1:]


def hooks() -> dict[Group, Hook]:
    """Those with three pilots and an SAE at least."""
    by_group: dict[Group, dict[tuple[int, int], dict[str, Any]]] = {}
    for row in lines(PILOTS):
        if row["steps"] == STEPS:
            by_group.setdefault((row["model"], row["text"], row["hook"]), {})[row["d_sae"], row["k"]] = row
    found, all_rows = {}, list(trained())
    sizes = ((PILOT_D_SAE[0], PILOT_K[0]), (PILOT_D_SAE[1], PILOT_K[0]), (PILOT_D_SAE[0], PILOT_K[1]))
    for group, by_size in by_group.items():
        rows = tuple(row for row in all_rows if row.group == group)
        if not rows or not all(size in by_size for size in sizes):
            continue
        pilots = [Pilot(**{n: by_size[size][n] for n in Pilot.__dataclass_fields__}) for size in sizes]
        facts = by_size[sizes[0]]
        anchor = anchor_of(pilots, facts["effective_rank"] / facts["d_in"], facts["gamma"])
        found[group] = Hook(anchor, facts, rows, tuple(pilots))
    return found


def ridge(terms: Sequence[dict[str, float]], values: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
    """Coefficients of weighted least squares with a penalty on each term's distance from ``PRIOR``."""
    names = list(terms[0])
    x, y, w = np.array([[row[n] for n in names] for row in terms]), np.array(values), np.array(weights)
    prior = np.array([PRIOR.get(name, 0.0) for name in names])
    y = y - x @ prior
    w = w / w.sum()
    scale = np.sqrt(w @ x**2).clip(min=1e-9)
    scaled = x / scale
    penalty = RIDGE * np.diag([0.0 if name == "one" else 1.0 for name in names])
    found = np.linalg.solve(scaled.T @ (w[:, None] * scaled) + penalty, scaled.T @ (w * y)) / scale
    return dict(zip(names, map(float, found + prior), strict=True))


def quantile(values: Sequence[float], weights: Sequence[float], q: float) -> float:
    """Of weighted values."""
    order = np.argsort(values)
    share = np.cumsum(np.array(weights)[order]) / np.sum(weights)
    return float(np.array(values)[order][min(int(np.searchsorted(share, q)), len(order) - 1)])


Hooks = dict[Group, Hook]


def _each(some: Hooks, decaying: bool = False) -> Iterator[tuple[Hook, Trained, float]]:
    """SAEs with their hook and weight; where it is told, those alone whose moments decay."""
    for hook in some.values():
        rows = [row for row in hook.rows if row.decays or not decaying]
        for row in rows:
            yield hook, row, 1 / len(rows)


def fit_error(some: Hooks) -> dict[str, float]:
    """On the SAEs, and on the pilots, which count as one SAE each."""
    known: list[tuple[Hook, Trained | Pilot, float]] = list(_each(some))
    known += [(hook, one, 1 / len(hook.rows)) for hook in some.values() for one in hook.pilots]
    terms = [error_terms(hook.anchor, row.d_sae, row.k, row.tokens) for hook, row, _ in known]
    values = [math.log(row.nmse / hook.anchor.nmse) for hook, row, _ in known]
    return ridge(terms, values, [weight for *_, weight in known])


Left = list[tuple[float, float]]


def error_left(coefficients: dict[str, float], some: Hooks) -> Left:
    """Of each SAE, log (measured / predicted), and its weight."""
    return [
        (
            math.log(row.nmse / hook.anchor.nmse)
            - planning.total(coefficients, error_terms(hook.anchor, row.d_sae, row.k, row.tokens)),
            weight,
        )
        for hook, row, weight in _each(some)
    ]


def _spreads(some: Hooks) -> Iterator[tuple[dict[str, float], float, float]]:
    """Terms, spread and weight, of each count of each SAE whose moments decay."""
    for hook, row, weight in _each(some, decaying=True):
        for n_tokens, share in row.counts:
            terms = spread_terms(hook.anchor, row.d_sae, row.k, row.tokens)
            yield terms, spread_of_silence(n_tokens, share, row.d_sae, row.k), weight / len(row.counts)


def fit_spread(some: Hooks) -> dict[str, float]:
    terms, values, weights = zip(*_spreads(some), strict=True)
    return ridge(terms, values, weights)


def spread_left(coefficients: dict[str, float], some: Hooks) -> Left:
    return [(value - planning.total(coefficients, terms), weight) for terms, value, weight in _spreads(some)]


def held_out(
    some: Hooks, of: Callable[[Group], str], fit: Callable[[Hooks], dict[str, float]],
    left: Callable[[dict[str, float], Hooks], Left],
) -> Left:  # fmt: skip
    """What fits leave of hooks that they have not seen: those of one name at a time are kept out."""
    found: Left = []
    for name in dict.fromkeys(map(of, some)):
        outside = {group: hook for group, hook in some.items() if of(group) == name}
        inside = {group: hook for group, hook in some.items() if of(group) != name}
        if len(inside) >= LEAST_HOOKS:
            found += left(fit(inside), outside)
    return found


KEPT_OUT: dict[str, Callable[[Group], str]] = {
    "hook": lambda group: " ".join(group),
    "model": lambda group: group[0],
    "text": lambda group: group[1],
}


def covered(n_hooks: int) -> float:
    """What share of what was left an interval has to hold, so that it holds 80 % of the next hook's (Vovk 2005)."""
    return min(1.0, COVERED * (1 + 1 / n_hooks))


def half_width(left: Left) -> float:
    """Of the 80 % interval: weights of each hook sum to 1; 0 without hooks."""
    if not left:
        return 0.0
    share = covered(round(sum(weight for _, weight in left)))
    return quantile([abs(one) for one, _ in left], [weight for _, weight in left], share)


def sides(left: Left) -> tuple[float, float]:
    """The middle 80 %; nothing without hooks."""
    if not left:
        return 0.0, 0.0
    values, weights = zip(*left, strict=True)
    share = covered(round(sum(weights)))
    return quantile(values, weights, (1 - share) / 2), quantile(values, weights, (1 + share) / 2)


def fit_from_spectrum(some: Hooks) -> dict[str, float]:
    terms = [_spectral(hook) for hook in some.values()]
    return ridge(terms, [math.log(hook.anchor.nmse) for hook in some.values()], [1.0] * len(some))


def _spectral(hook: Hook) -> dict[str, float]:
    return anchor_terms(hook.anchor.rank_share, 1 - hook.facts["variance_in_32"], hook.anchor.gamma)


def left_from_spectrum(coefficients: dict[str, float], some: Hooks) -> Left:
    return [(math.log(h.anchor.nmse) - planning.total(coefficients, _spectral(h)), 1.0) for h in some.values()]


# Of plain TopK: zeros as centre, all of d, Adam, 8,192 features, on 60,000 tokens.
def stock_rows() -> list[dict[str, Any]]:
    """Of every hook that the claims trained plain TopK at."""
    paths = [CLAIMS / "d_init.jsonl", CLAIMS / "d_init_aside.jsonl"]
    rows = [row for path in paths if path.exists() for row in lines(path)]
    return [row for row in rows if row["contender"] == "TopK, zeros, all of d"]


def _stock_terms(row: dict[str, Any]) -> dict[str, float]:
    share = row["effective_rank"] / row["d_in"]
    return {"one": 1.0, "log gamma": math.log(row["gamma"]), "log rank": math.log(share)}


def _logit(share: float) -> float:
    share = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(share / (1 - share))


def fit_stock(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, float], list[float]]:
    """Coefficients with the half-width of the interval, and what is left of each hook that the fit has not seen."""

    def fit(some: Sequence[dict[str, Any]]) -> dict[str, float]:
        return ridge([_stock_terms(row) for row in some], [_logit(r["dead_fraction"]) for r in some], [1.0] * len(some))

    left = []
    for i, row in enumerate(rows):
        others = fit([*rows[:i], *rows[i + 1 :]])
        left.append(_logit(row["dead_fraction"]) - planning.total(others, _stock_terms(row)))
    half = half_width([(one, 1.0) for one in left])
    return {**fit(rows), "half": half}, left


def fit_all(some: Hooks) -> Fitted:
    """The coefficients, with intervals that cover 80 % of what was left of each kind that was kept out.

    Where all hooks are of one model or text, or leave too few to fit on, that kind says nothing.
    """
    error_widths, spread_sides, spectral_widths = [], [], []
    for of in KEPT_OUT.values():
        error_widths.append(half_width(held_out(some, of, fit_error, error_left)))
        spread_sides.append(sides(held_out(some, of, fit_spread, spread_left)))
        spectral_widths.append(half_width(held_out(some, of, fit_from_spectrum, left_from_spectrum)))
    anchors = [hook.anchor for hook in some.values()]
    of_fit = [row for _, row, _ in _each(some)]
    stock, _ = fit_stock(stock_rows())
    return Fitted(
        error=fit_error(some),
        error_spread=max(error_widths),
        spread=fit_spread(some),
        spread_spread=[min(low for low, _ in spread_sides), max(high for _, high in spread_sides)],
        from_spectrum=fit_from_spectrum(some),
        from_spectrum_spread=max(spectral_widths),
        means={name: float(np.mean([getattr(one, name) for one in anchors])) for name in SLOPES},
        stock=stock,
        ranges={n: [min(getattr(r, n) for r in of_fit), max(getattr(r, n) for r in of_fit)] for n in SIZES},
        provenance={
            "made_by": "python -m benchmarks.plan_fit",
            "date": date.today().isoformat(),
            "hooks": len(some),
            "saes": len(of_fit),
            "results": sorted({row.source for row in of_fit}),
            "groups": [" ".join(group) for group in some],
        },
    )


SLOPES = ("slope_k", "slope_tokens", "spread")
SIZES = ("d_sae", "k", "tokens")


def tested(some: Hooks) -> list[dict[str, Any]]:
    """Every SAE, predicted by fits (intervals among them) that have seen neither its hook, its model, or its text."""
    found = []
    for kept_out, of in KEPT_OUT.items():
        names = list(dict.fromkeys(map(of, some)))
        for name in names:
            inside = {group: hook for group, hook in some.items() if of(group) != name}
            if len(names) < 2 or len(inside) < LEAST_HOOKS:
                continue
            own = fit_all(inside)
            for group, hook in some.items():
                if of(group) == name:
                    found += [_compared(kept_out, group, hook.anchor, row, own) for row in hook.rows]
    return found


def _compared(kept_out: str, group: Group, anchor: Anchor, row: Trained, own: Fitted) -> dict[str, Any]:
    error = planning.predict_error(anchor, row.d_sae, row.k, row.tokens, own)
    n_tokens, share = row.counts[0]
    dead = planning.predict_dead(anchor, row.d_sae, row.k, row.tokens, n_tokens, own)
    return {
        "kept_out": kept_out,
        "model": group[0],
        "text": group[1],
        "hook": group[2],
        **{name: getattr(row, name) for name in SIZES},
        "nmse": row.nmse,
        "nmse_predicted": asdict(error),
        "decays": row.decays,
        "dead": share,
        "dead_on": n_tokens,
        "dead_predicted": asdict(dead),
    }


def is_inside(value: float, interval: dict[str, float], step: float = 0.0) -> bool:
    """``step``: what one feature more or less makes."""
    return interval["low"] - step <= value <= interval["high"] + step


def coverage(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of rows of ``tested``: share inside the 80 % intervals, and how far off the middle is."""
    rows = list(rows)
    decaying = [row for row in rows if row["decays"]]
    off = [math.log(row["nmse"] / row["nmse_predicted"]["value"]) for row in rows]
    widths = [row["nmse_predicted"]["high"] / row["nmse_predicted"]["value"] - 1 for row in rows]
    dead = [abs(row["dead"] - row["dead_predicted"]["value"]) for row in decaying]
    return {
        "saes": len(rows),
        "error_inside": _share(rows, [is_inside(row["nmse"], row["nmse_predicted"]) for row in rows]),
        "error_off_median": float(np.median(np.abs(np.expm1(off)))),
        "error_off_largest": float(np.max(np.abs(np.expm1(off)))),
        "interval": float(np.median(widths)),
        "dead_saes": len(decaying),
        "dead_inside": _share(decaying, [is_inside(r["dead"], r["dead_predicted"], 1 / r["d_sae"]) for r in decaying]),
        "dead_off_median": float(np.median(dead)),
        "dead_off_largest": float(np.max(dead)),
    }


def _share(rows: Sequence[dict[str, Any]], inside: Sequence[bool]) -> float:
    """Each hook counts the same."""
    of = [(row["model"], row["text"], row["hook"]) for row in rows]
    return float(np.average(inside, weights=[1 / of.count(one) for one in of]))


def processors() -> set[str]:
    """That the pilots ran on."""
    return {row["processor"] for row in lines(PILOTS)}


def costs() -> list[str]:
    """Tables of ``plan_costs``, where it has run."""
    paths = [plan_costs.RESULTS / name for name in ("memory.json", "time.json")]
    if not all(path.exists() for path in paths):
        return []
    memory, time = (json.loads(path.read_text()) for path in paths)
    return [plan_costs.table(memory, time)]


def report(result: dict[str, Any]) -> str:
    """The page."""
    columns = ["kept out", "SAEs", "error inside", "error off, median", "largest", "interval, +", "of these decay",
               "dead inside", "dead off, median", "largest"]  # fmt: skip
    cells = [
        [name, *(str(value) if key.endswith("saes") else f"{value:.1%}" for key, value in row.items())]
        for name, row in result["coverage"].items()
    ]
    made = result["fitted"]["provenance"]
    terms = [[name, f"{value:+.4f}"] for name, value in result["fitted"]["error"].items()]
    return "\n\n".join(
        [
            "# The model behind the plan, on what it has not seen",
            f"Fitted on {made['saes']} SAEs at {made['hooks']} hooks (`make plan`; {', '.join(made['results'])}). Each "
            "SAE below was predicted by a fit, intervals among it, that had seen no SAE of its hook, of its model, or "
            "of its text (where that leaves eight hooks to fit on); inside: share within the 80 % interval, each hook "
            "counting the same; off: of the measured error, relative; of the dead share, in points. Dead shares are "
            "those of SAEs whose moments decay in silence.",
            markdown_table(columns, cells, align="lrrrrrrrrr"),
            "Error: log (NMSE / NMSE of the first pilot), linear in",
            markdown_table(["term", "coefficient"], terms, align="lr"),
            "Memory: the peak of real runs, each in a process of its own; then CPU seconds of a step, of sizes that "
            "were timed and of some that were not, one after the other, the least of four rounds "
            f"(`python -m benchmarks.plan_costs table`; {', '.join(sorted(processors()))}, one thread).",
            *costs(),
        ]
    )


# The plan that the docs show, from the pilots of this hook.
SHOWN: Group = ("smollm2", "linux-doc", "blocks.15.hook_attn_out")


def shown(hook: Hook, budget_hours: float = 0.5, memory: str = "2GiB") -> Plan:
    """The plan for a hook from its pilots, as ``saelens_asi.plan`` makes it from fresh ones."""
    cost = step_cost(hook.timed)
    sizes = sizes_within(D_SAE, PILOT_K, None, budget_hours, cost, 0.0)
    return Plan(
        hook=hook.rows[0].group[2],
        model=hook.rows[0].group[0],
        d_in=int(hook.facts["d_in"]),
        effective_rank=hook.facts["effective_rank"],
        gamma=hook.facts["gamma"],
        batch=cost.batch,
        budget_hours=budget_hours,
        memory=parse_bytes(memory),
        counted_on=1_000_000,
        model_seconds=0.0,
        model_bytes=0,
        pilots=hook.timed,
        anchor=hook.anchor,
        cost=cost,
        sizes=sizes,
    )


def main() -> None:
    some = hooks()
    own = fit_all(some)
    rows = tested(some)
    by_kind = {kind: coverage(r for r in rows if r["kept_out"] == kind) for kind in KEPT_OUT if _has(rows, kind)}
    FITTED.write_text(json.dumps(asdict(own), indent=1) + "\n")
    result = {"coverage": by_kind, "fitted": asdict(own), "rows": rows}
    (OUT / "plan.json").write_text(json.dumps(result, indent=1) + "\n")
    (OUT / "plan.md").write_text(report(result) + "\n")
    figure = plan_figure(shown(some[SHOWN]))
    save(figure, Path(__file__).parent.parent / "docs" / "plan.png")
    print(report(result))


def _has(rows: Iterable[dict[str, Any]], kind: str) -> bool:
    return any(row["kept_out"] == kind for row in rows)


if __name__ == "__main__":
    main()

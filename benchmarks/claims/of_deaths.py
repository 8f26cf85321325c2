"""Who dies: dead features over layers and kinds of hooks, against the rank of what is read and against gamma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from benchmarks.claims.evidence import Claim, Record, ResultFiles
from benchmarks.claims.plan import DECAYING, OURS, OWN_SHARE
from benchmarks.claims.sources import MODEL_TITLES, TEXT_TITLES
from benchmarks.claims.statistics import Explained, Interval, explained, verdict
from saelens_asi.activations.hooks import split_name
from saelens_asi.evaluation.tables import markdown_table

# Of one model; with fewer an interval says nothing.
FEWEST_HOOKS = 9


@dataclass(frozen=True)
class Point:
    """One hook.

    Attributes:
        model: as ``load_model`` names it.
        layer: its number.
        kind: as ``split_name`` names it.
        rank: effective rank over the width.
        gamma: length of the mean over the deviation.
        dead: share of the features, mean over seeds.
    """

    model: str
    layer: int
    kind: str
    rank: float
    gamma: float
    dead: float


@dataclass(frozen=True)
class Group:
    """SAEs that were trained alike, one a hook.

    Attributes:
        trained: how.
        where: model and text.
        points: one a hook.
    """

    trained: str
    where: str
    points: Sequence[Point]

    @property
    def found(self) -> Explained:
        causes = {name: [getattr(point, name) for point in self.points] for name in ("gamma", "rank")}
        return explained(causes, [point.dead for point in self.points])


def of_sweep(e: ResultFiles) -> Group:
    """TopK over 15 hooks of the first model, seeds averaged."""
    shared, spectra = e.shared["hooks"], {row["hook"]: row for row in e.spectra}
    rows = e.cells("hooks")
    points = []
    for hook in dict.fromkeys(map(itemgetter("hook_name"), rows)):
        own = [row for row in rows if row["hook_name"] == hook]
        layer, kind = split_name(hook)
        rank, dead = own[0]["effective_rank"] / own[0]["d_in"], sum(row["dead_fraction"] for row in own) / len(own)
        points.append(Point(shared["model"], layer, kind, rank, spectra[hook]["mean_to_deviation"], dead))
    where = f"{MODEL_TITLES[shared['model']]}, {TEXT_TITLES[shared['dataset']]}"
    return Group(f"TopK, zeros, {rows[0]['d_sae']:,} features", where, points)


def _topk(row: Record) -> bool:
    return row["contender"] == "TopK, zeros, all of d"


def _own(row: Record) -> bool:
    return row["contender"] == OURS


def of_models(e: ResultFiles, trained: str, chosen: Callable[[Record], bool]) -> list[Group]:
    """A contender of the part d_init at every hook: of all models together, and of each that has hooks enough.

    Raises:
        ValueError: where it is trained at none.
    """
    rows = [row for row in e.parts.get("d_init", []) if chosen(row)]
    points = []
    for row in rows:
        layer, kind = split_name(row["hook"])
        rank = row["effective_rank"] / row["d_in"]
        points.append(Point(row["model"], layer, kind, rank, row["gamma"], row["dead_fraction"]))
    texts = " and ".join(dict.fromkeys(TEXT_TITLES[row["text"]] for row in rows))
    if not points:
        raise ValueError(f"results/claims/d_init.jsonl holds no row of {trained}: run make claims")
    whole = Group(trained, f"both models, {texts}", sorted(points, key=lambda p: (p.model, p.kind, p.layer)))
    return [whole, *(group for group in by_model(whole) if len(group.points) >= FEWEST_HOOKS)]


def by_model(whole: Group) -> list[Group]:
    """The group's hooks, model by model, however few."""
    text = whole.where.split(", ", 1)[1]
    return [
        Group(whole.trained, f"{title}, {text}", own)
        for model, title in MODEL_TITLES.items()
        if (own := [point for point in whole.points if point.model == model])
    ]


def topk_of_models(e: ResultFiles) -> list[Group]:
    return of_models(e, "TopK, zeros, 8,192 features", _topk)


def own_of_models(e: ResultFiles) -> list[Group]:
    return of_models(e, f"{DECAYING}, mean, active subspace of {OWN_SHARE:.1%} of d", _own)


def with_interval(value: Interval) -> str:
    return f"{value.mean:+.2f} ({value.low:+.2f} to {value.high:+.2f})"


def in_words(groups: Sequence[Group]) -> str:
    """The rank correlations of each group."""
    parts = []
    for group in groups:
        found = group.found
        parts.append(
            f"{group.where}, {len(group.points)} hooks: gamma {found.alone['gamma'].mean:+.2f} alone, "
            f"{with_interval(found.beside['gamma'])} with the rank taken out; the rank {found.alone['rank'].mean:+.2f} "
            f"alone, {with_interval(found.beside['rank'])} with gamma taken out"
        )
    return "; ".join(parts)


def explains_away(groups: Sequence[Group]) -> list[bool]:
    """Of each: gamma still says something beside the rank, the rank nothing beside gamma, and gamma says more."""
    conditions = []
    for group in groups:
        found = group.found
        conditions += [found.beside["gamma"].side > 0, found.beside["rank"].side == 0, found.lead.side > 0]
    return conditions


def mean_explains_more(e: ResultFiles) -> Claim:
    group = of_sweep(e)
    return Claim(
        "...but gamma, the length of the mean over the deviation, explains the rank away (rank correlations with dead "
        "features, the other taken out)",
        "arXiv 2605.31518 names gamma; the paper looks at the rank alone",
        in_words([group]),
        verdict(explains_away([group])),
        "2",
        "make claims",
    )


def in_both_models(e: ResultFiles) -> Claim:
    groups = topk_of_models(e)
    return Claim(
        "...gamma explains the rank away in both models (TopK, zeros as centre)",
        "ours; the paper looks at the rank alone",
        in_words(groups),
        verdict(explains_away(groups)),
        "1",
        "make claims",
    )


def own_start_follows_neither(e: ResultFiles) -> Claim:
    groups = own_of_models(e)
    whole = groups[0]
    dead = [point.dead for point in whole.points]
    sides = [found.alone[name].side for found in (group.found for group in groups) for name in ("gamma", "rank")]
    return Claim(
        f"...and of a start in the active subspace ({OWN_SHARE:.1%} of d, mean as centre, SparseAdam) few features "
        "die, and neither gamma nor the rank says where",
        "ours",
        f"dead {sum(dead) / len(dead):.1%} on average, at most {max(dead):.1%}; {in_words(groups)}",
        verdict([max(dead) < 0.01, *(side == 0 for side in sides)]),
        "1",
        "make claims",
    )


def table(e: ResultFiles) -> list[str]:
    """All groups: correlations of both causes with dead features, and what is left of each beside the other."""
    lines = []
    for group in [of_sweep(e), *topk_of_models(e), *own_of_models(e)]:
        found = group.found
        dead = [point.dead for point in group.points]
        lines.append(
            (
                group.trained,
                group.where,
                str(len(group.points)),
                f"{sum(dead) / len(dead):.1%} ({min(dead):.1%} to {max(dead):.1%})",
                *(with_interval(found.alone[name]) for name in ("gamma", "rank")),
                *(with_interval(found.beside[name]) for name in ("gamma", "rank")),
                with_interval(found.lead),
            )
        )
    header = ["trained", "where", "hooks", "dead", "gamma", "rank", "gamma beside rank", "rank beside gamma", "lead"]
    return [markdown_table(header, lines, align="llrrrrrrr"), ""]


CLAIMS = (mean_explains_more, in_both_models, own_start_follows_neither)

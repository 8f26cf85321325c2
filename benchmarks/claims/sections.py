"""Sections of the page: where we lose, ranks, deaths, the plan and how far it is, what revived features do."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from operator import itemgetter

from benchmarks.claims import of_deaths, of_factorial, of_universality, where_we_lose
from benchmarks.claims.evidence import Record, ResultFiles
from benchmarks.claims.figures import CAPTIONS
from benchmarks.claims.plan import AFTER_THE_PILOT, CONTENDERS, OURS, OWN_SHARE, PARTS, items
from benchmarks.claims.records import is_among
from benchmarks.claims.rivals import RIVALS
from benchmarks.claims.rule import at, by_hook, by_size, default, judged
from benchmarks.claims.sources import MODEL_TITLES, TEXT_TITLES
from benchmarks.claims.statistics import interval
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.sweep.results import grouped


def progress(e: ResultFiles) -> list[str]:
    """How much of each part is trained."""
    lines = []
    for part in PARTS:
        known, rows = items([part]), e.parts.get(part, [])
        done = sum(is_among(rows, item.key()) for item in known)
        lines.append((part, DESCRIPTIONS[part], f"{done} of {AFTER_THE_PILOT.get(part, len(known))}"))
    return [markdown_table(["part", "", "trained"], lines, align="llr"), ""]


RIVALS_OF = {"pilot": "pilot_rivals", "factorial": "rivals"}

DESCRIPTIONS = {
    "rivals": "rivals by name at their best tries, one seed",
    "pilot_rivals": "learning rates of the rivals",
    "pilot": "learning rates, and AuxK's window, of every contender, at a tenth of the tokens",
    "factorial": "every contender at its best try, three seeds, SmolLM2-135M on the kernel's documentation",
    "slower": "some of them at a rate of 0.001, one seed",
    "longer": "some of them on twice the tokens, at both rates, one seed",
    "moments": "SparseAdam with moments that stay or decay in silence, at several rates, sizes and on both models",
    "elsewhere": "the same with one seed on Gemma-3 270M, and on Python's standard library",
    "predictions": "baselines and ours, three seeds, whose predictions are compared",
    "d_init": "dimensions of the subspace at four kinds of hooks, three layers, both models",
    "d_init_sizes": "the same at one hook of each model, with more and with fewer features",
    "d_init_aside": "the same at a layer and on a text that were set aside before the rule was looked for",
}


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and its 95 % interval where there are seeds."""
    return form.format(values[0]) if len(values) < 2 else interval(values).written(form)


def contenders(rows: Sequence[Record]) -> list[str]:
    """One line for each contender at its try of the lowest error, best first."""
    lines = []
    for name in (*CONTENDERS, *RIVALS):
        own = [row for row in rows if row["contender"] == name]
        if own:
            lines.append((min(row["nmse"] for row in own), _line(name, own)))
    header = ["trained, centre, directions", "tries", "learning rate", "normalized MSE", "dead", "silent", "L0", "s"]
    return [markdown_table(header, [line for _, line in sorted(lines)], align="lrrrrrrr"), ""]


def is_shared(row: Record) -> bool:
    """Whether it was trained on a GPU beside others, so that its seconds say nothing."""
    return str(row.get("processor", "")).startswith("NVIDIA")


def _line(name: str, rows: Sequence[Record]) -> tuple[str, ...]:
    tries = {(row["lr"], row["window"]) for row in rows}
    best = min(rows, key=itemgetter("nmse"))
    own = [row for row in rows if (row["lr"], row["window"]) == (best["lr"], best["window"])]
    window = f", window {best['window']:,}" if name.startswith("AuxK") else ""
    return (
        RIVALS[name].title if name in RIVALS else name,
        str(len(tries)),
        f"{best['lr']:g}{window}",
        spread([row["nmse"] for row in own], "{:.4f}"),
        spread([row["dead_fraction"] for row in own], "{:.1%}"),
        spread([row["silent_fraction"] for row in own], "{:.1%}") if "silent_fraction" in best else "",
        f"{sum(row['l0'] for row in own) / len(own):.1f}",
        "" if any(is_shared(row) for row in own) else f"{sum(row['cpu_seconds'] for row in own) / len(own):.0f}",
    )


def hooks(rows: Sequence[Record]) -> list[str]:
    """What each hook's spectrum says, and what each dimension gave."""
    lines = []
    for (model, hook), own in by_hook(rows).items():
        first = own[0]
        tried = "; ".join(f"{row['d_init_used']}: {row['nmse']:.4f}, {row['silent_fraction']:.1%}" for row in own)
        here = [row for row in rows if (row["model"], row["hook"]) == (model, hook)]
        topk = [row for row in here if row["optimizer"] == "adam"]
        decaying = [row for row in here if row["contender"] == OURS]
        lines.append(
            (
                model,
                hook.removeprefix("blocks."),
                f"{first['effective_rank'] / first['d_in']:.0%}",
                f"{first['gamma']:.2f}",
                tried,
                *(f"{one[0]['nmse']:.4f}, {one[0]['silent_fraction']:.1%}" if one else "" for one in (decaying, topk)),
            )
        )
    decay = f"moments decay, {OWN_SHARE:.1%} of d"
    header = ["model", "hook", "rank", "gamma", "d_init: error, silent", decay, "TopK, zeros"]
    return [markdown_table(header, lines, align="llrrlll"), ""]


def sizes(rows: Sequence[Record]) -> list[str]:
    """At each number of features what each dimension gave, and what the default takes."""
    lines = []
    for (model, d_sae), own in by_size(rows).items():
        chosen = default(own[0])
        error, _ = at(own, chosen)
        tried = "; ".join(f"{row['d_init_used']}: {row['nmse']:.4f}, {row['dead_fraction']:.1%}" for row in own)
        lines.append((model, f"{d_sae:,}", f"{own[0]['lr']:g}", tried, f"{chosen:.0f}", f"{error:.1%}"))
    header = ["model", "features", "lr", "d_init: error, dead", "default", "error over the lowest"]
    return [markdown_table(header, lines, align="lrrlrr"), ""]


def rules(rows: Sequence[Record]) -> list[str]:
    """Every rule over all hooks."""
    lines = [
        (
            name,
            f"{sum(one.errors) / len(one.errors):.1%}",
            f"{max(one.errors):.1%}",
            f"{sum(one.dead) / len(one.dead):.1%}",
            f"{max(one.dead):.1%}",
            f"{one.n_met} of {len(one.errors)}",
        )
        for name, one in judged(by_hook(rows).values()).items()
    ]
    header = ["d_init", "error over the lowest", "at most", "silent", "at most", "within 1 % and under 2 %"]
    return [markdown_table(header, lines, align="lrrrrr"), ""]


def lost(e: ResultFiles) -> list[str]:
    """Where another contender does better than ours; the page has it in front of all claims."""
    found = where_we_lose.losses(e)
    sentence = textwrap.fill(where_we_lose.summary(e, found), 120)
    return ["## Where we lose", "", sentence, "", *(where_we_lose.table(found) if found else [])]


def worth(e: ResultFiles) -> list[str]:
    """Whether features that live in one SAE and not in the baseline are worth having (worth.py)."""
    rows = e.parts.get("worth", [])
    if not rows:
        return ["Nothing has been measured yet: `python -m benchmarks.claims.worth`.", ""]
    shared = next(row["settings"] for row in rows if row["what"] == "all")
    raw = next(row["raw_activations"] for row in rows if row["what"] == "all")["all tasks"]
    in_sae_bench = {row["name"]: row["scores"] for row in rows if row["what"] == "sae_bench" and "scores" in row}
    saes = sorted(
        (row for row in rows if row["what"] == "sae"),
        key=lambda row: (row["name"] != shared["baseline"], -row["live"]),
    )
    lines = [(*_worth_line(row), _accuracy(in_sae_bench.get(row["name"]), "sae")) for row in saes]
    for name, probing in (
        *((row["name"], row["probing"]["all tasks"]) for row in rows if row["what"] == "control"),
        ("raw activations, one dimension", raw),
    ):
        label = name if probing is raw else f"random directions, {name}"
        accuracy = _accuracy(next(iter(in_sae_bench.values()), None), "llm") if probing is raw else ""
        lines.append((label, *[""] * 6, _auc(probing, "best, k=1"), "", accuracy))
    header = ["SAE", "live", "nearest other", "added", "of firings", "KL: all", "KL: added (at random)"]
    header += ["AUC", "AUC of added", "SAEBench"]
    model, text = MODEL_TITLES[shared["model"]], TEXT_TITLES[shared["dataset"]]
    return [
        f"{model}, {shared['hook_name']}, {text}; beside {shared['baseline']}.",
        "",
        markdown_table(header, lines, align="lrrrrrrrrr"),
        "",
    ]


def _worth_line(row: Record) -> tuple[str, ...]:
    beside, carried, probing = row["beside_baseline"], row["carried"], row["probing"]["all tasks"]
    added = ""
    if "added" in carried:
        own, at_random = (carried[part]["kl_recovered"] for part in ("added", "as many as added, at random"))
        added = f"{own:.1%} ({at_random:.1%})"
    return (
        row["name"],
        f"{row['live']:,}",
        f"{row['redundancy_at_equal_number']['quantile_0.5']:.2f}",
        f"{beside['added']:,}",
        f"{beside['share_of_firings']:.1%}",
        f"{carried['all']['kl_recovered']:.1%}",
        added,
        _auc(probing, "best, k=1"),
        _auc(probing, "best of added, k=1"),
    )


def _accuracy(scores: Mapping[str, Mapping[str, float]] | None, of: str) -> str:
    """SAEBench's, of the best feature (``sae``) or dimension (``llm``), in the mean over the kinds of tasks."""
    if not scores:
        return ""
    return f"{sum(one[f'{of}_top_1_test_accuracy'] for one in scores.values()) / len(scores):.3f}"


def _auc(probing: Record, what: str) -> str:
    """With the half width of its interval, and the difference to the baseline where there is one."""
    if what not in probing:
        return ""
    less = probing[what].get("auc_less_baseline")
    return _plus_minus(probing[what]["auc"], "") + (f"; {_plus_minus(less, '+')}" if less else "")


def _plus_minus(value: Record, sign: str) -> str:
    half = f" ± {value['plus_minus']:.3f}" if "plus_minus" in value else ""
    return f"{value['mean']:{sign}.3f}{half}"


def figure(name: str) -> list[str]:
    return [f"![{CAPTIONS[name]}](claims/{name})", ""]


def of_the_activations(e: ResultFiles, texts: Mapping[str, str]) -> list[str]:
    """Ranks of both families, and what rank and gamma say of dead features."""
    found = textwrap.fill(of_universality.findings(e), 120)
    return [
        *("## Ranks in two families, on three texts", "", texts["universality"], "", found, ""),
        *figure("universality.png"),
        *of_universality.table(e),
        *("## Who dies: rank, or gamma", "", texts["deaths"], ""),
        *figure("dead_against_rank.png"),
        *of_deaths.table(e),
    ]


def elsewhere(e: ResultFiles, texts: Mapping[str, str]) -> list[str]:
    """The contenders of the factorial on the second model, and on the second text."""
    lines = ["## The same on another model, and on another text", "", texts["elsewhere"], ""]
    for (model, text), rows in grouped(e.parts.get("elsewhere", []), itemgetter("model", "text")).items():
        lines += [f"### {MODEL_TITLES[model]}, {TEXT_TITLES[text]}", "", *contenders(rows)]
    return lines


def of_the_factorial(e: ResultFiles, texts: Mapping[str, str]) -> list[str]:
    """What each ingredient buys, how it goes with the tokens, and at a lower rate."""
    rows, slower, longer, moments = (e.parts.get(part, []) for part in ("factorial", "slower", "longer", "moments"))
    lines = ["### What each ingredient buys", "", texts["ingredients"], "", *of_factorial.table(rows)]
    lines += figure("tokens.png")
    lines += ["### At a lower rate", "", texts["slower"], "", *contenders(slower)] if slower else []
    for part, title, table in (
        ("longer", "### With twice the tokens", longer and of_factorial.doubled([*rows, *slower], longer)),
        ("moments", "### Moments of silent features: kept, or decaying", moments and of_factorial.moments(moments)),
    ):
        lines += [title, "", texts[part], "", table, ""] if table else []
    return lines


def sections(e: ResultFiles, texts: Mapping[str, str]) -> list[str]:
    """All sections for which there are results; ``texts`` go above them."""
    lines = [*of_the_activations(e, texts), "## What was planned", "", texts["plan"], "", *progress(e)]
    for part, title in (("factorial", "Ingredients and baselines"), ("pilot", "The pilot: every try at its best")):
        rows = [row for name in (part, RIVALS_OF[part]) for row in e.parts.get(name, [])]
        if rows:
            lines += [f"## {title}", "", texts[part], "", *contenders(rows)]
        if part == "factorial" and rows:
            lines += of_the_factorial(e, texts)
    lines += elsewhere(e, texts)
    for part, title in (("d_init", "The dimension of the subspace"), ("d_init_aside", "...where nobody had looked")):
        if e.parts.get(part):
            lines += [f"## {title}", "", texts[part], "", *rules(e.parts[part]), *hooks(e.parts[part])]
    if e.parts.get("d_init_sizes"):
        found = sizes(e.parts["d_init_sizes"])
        lines += ["## ...and the number of features", "", texts["d_init_sizes"], "", *found]
    lines += ["## Are revived features worth having", "", texts["worth"], "", *worth(e)]
    for name in ("scaling.png", "frontier.png", "d_init.png"):
        lines += [f"## {CAPTIONS[name]}", "", *figure(name)]
    return lines

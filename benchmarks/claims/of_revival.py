"""What revival did, in tables: every SAE on the page of the claims, and error and deaths by cure in the docs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.sources import MODEL_TITLES
from saelens_asi.evaluation.tables import markdown_table

Row = Mapping[str, Any]
Rows = Sequence[Row]

PART = "revival"

TEXT = """
Attention output of layer 15 (SmolLM2) and of layer 9 (Gemma), the kernel's documentation, k = 32, SparseAdam with
moments that stay in silence unless a line says *decay*, batches of 1,024 (`python -m benchmarks.claims.revival`). The
auxiliary loss has the coefficient 1/32 and a window of 102,400 tokens, resampling takes place four times in the first
half (Bricken et al. 2023), from 16,384 inputs, or from as many as features are dead. *Dead, both*: silent on the
held-out tokens and on the last 40 % of training. *Duplicates*: of the features that fire, those whose decoder row has
a cosine above 0.9 with another's. *Anew*: after how many steps `revive` started the whole SAE again. *Lived on*: of
the features that were revived (one by one, or by a new start) a million tokens or more before the end, those that are
not dead on both. With 131,072 features there are 40,000 held-out tokens.
"""

STARTS = ("SAELens's own", "the paper's", "the flag's")
CURES = ("nothing", "auxiliary loss", "resampling", "revive")
BY_CURE = ["model, features, tokens", "start", "nothing", "auxiliary loss", "resampling", '`revive="auto"`']
_STARTS = {"the flag's": "`initializer`"}
# Shares below are told with a digit more.
_FEW = 0.001


def table(rows: Rows) -> str:
    """All that is trained, in Markdown."""
    header = ["model", "SAE", "features", "tokens", "start", "lr", "cure", "seed", "dead", "dead, both", "NMSE", "L0"]
    header += ["duplicates", "revived", "lived on", "anew", "CPU s"]
    return markdown_table(header, [_line(row) for row in rows], align="llrrlrlrrrrrrrrrr")


def _line(row: Row) -> tuple[str, ...]:
    silent = row.get("silent_fraction")
    return (
        row["model"],
        row["architecture"],
        f"{row['d_sae']:,}",
        f"{row['tokens']:,}",
        row["start"] + (", decay" if "silent_moments" in row else ""),
        f"{row['lr']:g}",
        row["cure"],
        str(row["seed"]),
        f"{row['dead_fraction']:.1%}",
        "" if silent is None else f"{silent:.1%}",
        f"{row['nmse']:.4f}",
        f"{row['l0']:.1f}",
        f"{row['duplicate_fraction']:.1%}",
        f"{row['n_revived']:,}" if row["n_revived"] else "",
        f"{row['lived_on']:.1%} of {row['n_revived_long_ago']:,}" if "lived_on" in row else "",
        str(row["started_anew_after_steps"] or ""),
        f"{row['cpu_seconds']:.0f}",
    )


def section(rows: Rows) -> list[str]:
    """Lines of the page, Markdown; none without results."""
    title = "## What brings dead features back"
    return [title, "", textwrap.fill(TEXT.strip(), 120), "", table(rows), ""] if rows else []


def by_cure(rows: Rows) -> str:
    """Of the first seed: in each cell dead features on held-out tokens (on both), in percent, and the error."""
    kinds = {_kind(row): None for row in rows}
    lines, titles = [], set()
    for kind in sorted(kinds, key=_order):
        cells = ["; ".join(_cell(row) for row in rows if _is_of(row, kind, cure)) for cure in CURES]
        title = "" if kind[:4] in titles else _title(kind)
        titles.add(kind[:4])
        start, lr, decays = kind[4:]
        n_rates = len({other[5] for other in kinds if other[:5] == kind[:5]})
        rate = f", rate {lr:g}" if n_rates > 1 else ""
        lines.append((title, _STARTS.get(start, start) + rate + (", moments decay" if decays else ""), *cells))
    return markdown_table(BY_CURE, lines, align="llrrrr")


def _kind(row: Row) -> tuple[Any, ...]:
    own = tuple(row[name] for name in ("model", "architecture", "d_sae", "tokens", "start", "lr"))
    return (*own, "silent_moments" in row)


def _order(kind: tuple[Any, ...]) -> tuple[Any, ...]:
    model, architecture, d_sae, tokens, start, lr, decays = kind
    return architecture != "topk", model != "smollm2", d_sae, tokens, STARTS.index(start), decays, lr


def _is_of(row: Row, kind: tuple[Any, ...], cure: str) -> bool:
    return _kind(row) == kind and row["cure"] == cure and row["seed"] == 0


def _title(kind: tuple[Any, ...]) -> str:
    model, architecture, d_sae, tokens = kind[:4]
    many = f"{tokens // 1_000_000}M" if tokens % 1_000_000 == 0 else f"{tokens // 1000}k"
    return f"{MODEL_TITLES[model]}, {'BatchTopK ' if architecture == 'batchtopk' else ''}{d_sae:,}, {many}"


def _cell(row: Row) -> str:
    both = row.get("silent_fraction")
    return f"{_percent(row['dead_fraction'])}{'' if both is None else f' ({_percent(both)})'}, {row['nmse']:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share >= _FEW or share == 0 else 2}f}"


def written_into(page: str, rows: Rows) -> str:
    """The page with its table by cure as ``rows`` have it.

    Raises:
        ValueError: the page has no such table.
    """
    lines = page.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("| " + " | ".join(BY_CURE[:2]))), None)
    if first is None:
        raise ValueError(f"no table that begins with {BY_CURE[0]!r}")
    after = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    return "\n".join([*lines[:first], *by_cure(rows).splitlines(), *lines[after:]]) + "\n"


def update(page: Path, rows: Rows) -> None:
    page.write_text(written_into(page.read_text(), rows))

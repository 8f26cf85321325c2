"""Spectra as a table, and as sentences that a person can read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TypedDict

import pandas as pd

from saelens_asi.activations.hooks import split_name
from saelens_asi.spectra.attention import AttentionDecomposition
from saelens_asi.spectra.components import ComponentLosses
from saelens_asi.spectra.spectrum import Spectrum

# Below this share of the width, features that start anywhere mostly start outside of what the activations use.
_LOW_RANK_SHARE = 0.65

# Of one hook: ranks as numbers and as shares of the width, length of the mean, sample size. "dimension_99.9": how many
# directions hold 99.9 % of the variance. None stands for what means nothing there.
SpectrumRow = TypedDict(
    "SpectrumRow",
    {
        "hook": str,
        "layer": int,
        "kind": str,
        "width": int,
        "n_tokens": int,
        "effective_rank": float,
        "effective_rank_share": float,
        "dimension_50": int,
        "dimension_90": int,
        "dimension_99": int,
        "dimension_99.9": int,
        "dimension_99.99": int,
        "dimension_99_share": float,
        "above_5_percent": int,
        "first_component_variance_share": float,
        "mean_to_deviation": float | None,
        "total_variance": float,
        "effective_rank_shift": float | None,
    },
)


def table_rows(spectra: Mapping[str, Spectrum]) -> list[SpectrumRow]:
    """One row a hook."""
    return [_row(name, spectrum) for name, spectrum in spectra.items()]


def _row(name: str, s: Spectrum) -> SpectrumRow:
    layer, kind = split_name(name)
    return {
        "hook": name,
        "layer": layer,
        "kind": kind,
        "width": s.d,
        "n_tokens": s.n_tokens,
        "effective_rank": s.effective_rank,
        "effective_rank_share": s.effective_rank / s.d,
        "dimension_50": s.intrinsic_dimension(0.5),
        "dimension_90": s.intrinsic_dimension(0.9),
        "dimension_99": s.intrinsic_dimension(0.99),
        "dimension_99.9": s.intrinsic_dimension(0.999),
        "dimension_99.99": s.intrinsic_dimension(0.9999),
        "dimension_99_share": s.intrinsic_dimension(0.99) / s.d,
        "above_5_percent": s.components_above(0.05),
        "first_component_variance_share": s.variance_explained(1),
        "mean_to_deviation": s.gamma if s.total_variance else None,
        "total_variance": s.total_variance,
        "effective_rank_shift": s.effective_rank_shift if s.has_small_sample else None,
    }


def write_table(rows: Sequence[SpectrumRow], folder: Path) -> list[Path]:
    """``table.csv`` and ``table.json`` in a folder."""
    short = [{key: _short(value) for key, value in row.items()} for row in rows]
    # As objects, or pandas would write the integers of a column with gaps as floats.
    pd.DataFrame(short, dtype=object).to_csv(folder / "table.csv", index=False, lineterminator="\n")
    (folder / "table.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    return [folder / "table.csv", folder / "table.json"]


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def findings(
    rows: Sequence[SpectrumRow], losses: Mapping[str, ComponentLosses], parts: AttentionDecomposition | None
) -> list[str]:
    """What the numbers say, one sentence each."""
    sentences = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        ranks, dims = [row["effective_rank_share"] for row in own], [row["dimension_99_share"] for row in own]
        verdict = "low-rank" if mean(dims) < _LOW_RANK_SHARE else "not low-rank"
        sentences.append(
            f"{kind} is {verdict}: {mean(dims):.0%} of its dimensions hold 99 % of the variance "
            f"(layers: {min(dims):.0%} to {max(dims):.0%}), effective rank {mean(ranks):.0%} of the width."
        )
    dominated = [row for row in rows if row["first_component_variance_share"] > 0.5]
    if dominated:
        names = ", ".join(f"{row['hook']} ({row['first_component_variance_share']:.0%})" for row in dominated[:3])
        more = f" and {len(dominated) - 3} more" if len(dominated) > 3 else ""
        sentences.append(
            f"One direction holds over half of the variance of {names}{more}: there, dimensions for a share of the "
            "variance count that direction more than anything else, and the effective rank says more."
        )
    if parts is not None:
        sentences.append(_why_low_rank(parts))
    for kind, loss in losses.items():
        sentences.append(_loss_sentence(kind, loss))
        warning = loss.warning()
        if warning:
            sentences.append(warning + ".")
    shifts = [(row["effective_rank_shift"], row) for row in rows if row["effective_rank_shift"] is not None]
    if shifts:
        lowest, worst = min(shifts, key=lambda pair: pair[0])
        sentences.append(
            f"The sample is small for {len(shifts)} of {len(rows)} hooks: the effective rank of {worst['hook']} is at "
            f"least {-lowest:.1%} too low from {worst['n_tokens']:,} tokens."
        )
    return sentences


def _why_low_rank(parts: AttentionDecomposition) -> str:
    d = parts.variance.shape[0]
    parts_of_way = {"first half": (0, d // 2), "half behind it, up to the last tenth,": (d // 2, 9 * d // 10)}
    sentences = []
    for name, (start, end) in parts_of_way.items():
        falls = [float((values[start] / values[end]).sqrt()) for values in (parts.variance, parts.z_variance)]
        w = falls[0] / falls[1] if falls[1] else float("nan")
        sentences.append(
            f"over the {name} of the directions O falls {falls[0]:.3g}-fold, Z {falls[1]:.3g}, W_O {w:.3g}"
        )
    text = f"Layer {parts.layer}, why: {'; '.join(sentences)} (standard deviations; O = Z x W_O)."
    return f"{text} {parts.note}." if parts.note else text


def _loss_sentence(kind: str, loss: ComponentLosses) -> str:
    needed = [f"95 % of the divergence is recovered by {_number(loss.components_needed(0.95, 'zero', 'kl'))}"]
    if not loss.warning():
        k = loss.components_needed(0.95, "zero", "cross_entropy")
        needed.append(f"95 % of the cross-entropy by {_number(k)}")
    return (
        f"{kind}, on {loss.n_tokens:,} held-out tokens: cross-entropy {loss.clean.cross_entropy:.4f} as it is, "
        f"{loss.zero.cross_entropy:.4f} zero-ablated, {loss.mean.cross_entropy:.4f} mean-ablated (divergence "
        f"{loss.zero.kl:.4f} and {loss.mean.kl:.4f}). {', '.join(needed)}."
    )


def _number(k: int | None) -> str:
    return "more components than were measured" if k is None else f"{k} components"

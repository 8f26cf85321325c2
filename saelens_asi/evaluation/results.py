"""Evaluations as tables, and as a folder that goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from saelens_asi.activations.hooks import split_name
from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.evaluation.saes import SAESource
from saelens_asi.spectra.findings import Row

_COLUMNS = {
    "name": "SAE",
    "n_tokens": "tokens",
    "d_sae": "features",
    "dead_percent": "dead (%)",
    "nmse": "normalized MSE",
    "explained_variance_percent": "explained variance (%)",
    "l0": "L0",
    "ce_recovered_percent": "CE recovered (%)",
    "kl_recovered_percent": "KL recovered (%)",
    "effective_rank_percent": "effective rank (% of width)",
}


def evaluation_rows(results: Mapping[str, SAEEvaluation]) -> list[Row]:
    """One row an SAE, in plain numbers; shares in percent; None for what was not measured."""
    rows = []
    for name, result in results.items():
        layer, kind = split_name(result.hook_name or "")
        loss = result.loss.to_dict() if result.loss else {"recovered": None, "kl_recovered": None}
        rows.append(
            {
                "name": name,
                "hook": result.hook_name,
                "layer": layer,
                "kind": kind,
                "n_tokens": result.n_tokens,
                "d_in": result.d_in,
                "d_sae": result.d_sae,
                "n_dead": result.n_dead,
                "dead_percent": 100 * result.dead_fraction,
                "nmse": result.nmse,
                "explained_variance_percent": 100 * result.explained_variance,
                "l0": result.l0,
                "ce_recovered_percent": _percent(loss["recovered"]),
                "kl_recovered_percent": _percent(loss["kl_recovered"]),
                "effective_rank": result.effective_rank,
                "effective_rank_percent": _percent(result.effective_rank_share),
                "intrinsic_dimension_99": result.intrinsic_dimension,
            }
        )
    return rows


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, without columns that nobody measured."""
    columns = {key: title for key, title in _COLUMNS.items() if any(row[key] is not None for row in rows)}
    lines = [f"| {' | '.join(columns.values())} |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += [f"| {' | '.join(_cell(row[key]) for key in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None for fewer than 3 points, or where one is constant."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Mean rank of each value: those below it, and half of its equals."""
    ordered = np.asarray(values, dtype=float)
    below = (ordered[:, None] > ordered).sum(axis=1)
    return below + ((ordered[:, None] == ordered).sum(axis=1) - 1) / 2


@dataclass
class _Results:
    """results.json and firing_counts.safetensors in a folder: what is there with the same settings, and what comes."""

    out: Path
    settings: dict[str, Any]
    records: dict[str, SAEEvaluation] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path, self.counts_path = self.out / "results.json", self.out / "firing_counts.safetensors"
        self.out.mkdir(parents=True, exist_ok=True)
        if not (self.path.exists() and self.counts_path.exists()):
            return
        kept = json.loads(self.path.read_text())
        if kept.get("settings") != self.settings:
            return
        counts = load_file(self.counts_path)
        for name, values in kept["results"].items():
            if name in counts:
                self.sources[name] = values.pop("source")
                self.records[name] = SAEEvaluation.from_dict(values, counts[name])

    def has(self, source: SAESource) -> bool:
        return source.name in self.records and self.sources[source.name] == source.identity()

    def add(self, found: Mapping[str, SAEEvaluation], sources: Sequence[SAESource]) -> None:
        self.records |= found
        self.sources |= {source.name: source.identity() for source in sources}
        results = {name: {"source": self.sources[name], **record.to_dict()} for name, record in self.records.items()}
        unfinished = self.out / f"unfinished.{os.getpid()}"
        save_file({name: record.firing_counts for name, record in self.records.items()}, unfinished)
        unfinished.replace(self.counts_path)
        unfinished.write_text(
            json.dumps({"settings": self.settings, "results": results}, indent=1, allow_nan=False) + "\n"
        )
        unfinished.replace(self.path)

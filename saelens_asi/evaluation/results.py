"""Evaluations as tables, and as a folder that goes on where it stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import pandas as pd
from scipy.stats import spearmanr
from torch import Tensor

from saelens_asi.activations.fingerprint import content_checksum
from saelens_asi.activations.hooks import split_name
from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.evaluation.saes import SAESource
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.resume import load_tensors, save_tensors, write_json

logger = logging.getLogger(__name__)

RESULTS = "results.json"

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


class EvaluationRow(TypedDict):
    """One SAE's evaluation in plain numbers; shares in percent, None for what was not measured."""

    name: str
    hook: str | None
    layer: int
    kind: str
    n_tokens: int
    d_in: int
    d_sae: int
    n_dead: int
    dead_percent: float
    nmse: float
    explained_variance_percent: float
    l0: float
    ce_recovered_percent: float | None
    kl_recovered_percent: float | None
    effective_rank: float | None
    effective_rank_percent: float | None
    intrinsic_dimension_99: int | None


def evaluation_rows(results: Mapping[str, SAEEvaluation]) -> list[EvaluationRow]:
    """One row an SAE."""
    rows: list[EvaluationRow] = []
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


def evaluation_table(rows: Sequence[EvaluationRow]) -> str:
    """The rows as a Markdown table, without columns that nobody measured."""
    columns = {key: title for key, title in _COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    return markdown_table(list(columns.values()), cells, align="l" + "r" * (len(columns) - 1))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_csv(rows: Sequence[EvaluationRow], path: Path) -> None:
    """All columns of the rows, every digit; empty where nothing was measured."""
    # As objects, or pandas would write the integers of a column with gaps as floats.
    pd.DataFrame(rows, dtype=object).to_csv(path, index=False, lineterminator="\n")


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None for fewer than 3 points, or where one is constant."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(spearmanr(x, y).statistic)


def saved_settings(folder: Path) -> dict[str, Any] | None:
    """What the evaluations in a folder were measured with; None where it holds none that can be read."""
    try:
        settings = json.loads((folder / RESULTS).read_text())["settings"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


class EvaluationFolder:
    """Evaluations by name in ``results.json`` and ``firing_counts.safetensors`` of a folder.

    What the folder holds is kept where it was measured with the same settings; otherwise it starts empty, and the first
    ``add`` takes the place of what was there. An evaluation counts where it fits its checksum, and is
    missing otherwise: files that were damaged cost what they held, with a warning, and never change a number.

    Attributes:
        path: ``results.json``: settings, sources and measures, as JSON.
        counts_path: (d_sae,) firing counts of each SAE.
        evaluations: those in the folder, by the SAE's name.

    Raises:
        ValueError: where a folder has the name of one of the files.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.path, self.counts_path = folder / RESULTS, folder / "firing_counts.safetensors"
        self.evaluations: dict[str, SAEEvaluation] = {}
        self._settings = dict(settings)
        self._sources: dict[str, dict[str, str | int]] = {}
        for path in (self.path, self.counts_path):
            if path.is_dir():
                raise ValueError(f"{path} is a folder, where results are to be written: move it, or write elsewhere")
        folder.mkdir(parents=True, exist_ok=True)
        if not (self.path.exists() and self.counts_path.exists()):
            return
        try:
            saved = json.loads(self.path.read_text())
            settings, results, checksums = saved["settings"], saved["results"], saved.get("checksums", {})
            if settings != self._settings:
                return
            counts = load_tensors(self.counts_path)
            whole = {
                name: values
                for name, values in results.items()
                if name in counts and checksums.get(name) == self._checksum(name, values, counts[name])
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            # ValueErrors of load_tensors name the other file.
            logger.warning("%s cannot be gone on from: %s. All SAEs are evaluated anew", self.path, error)
            return
        for name, values in whole.items():
            self._sources[name] = values.pop("source")
            self.evaluations[name] = SAEEvaluation.from_dict(values, counts[name])
        # Counts without a result, and a result without counts, are left by an interruption between the two files.
        damaged = [name for name in results if name in counts and name not in whole]
        if damaged:
            logger.warning(
                "%s or %s is damaged, or of an earlier version, in what it holds of %s: evaluated anew",
                self.path, self.counts_path, ", ".join(damaged),
            )  # fmt: skip

    def __contains__(self, source: SAESource) -> bool:
        """Whether it holds the evaluation of this very SAE, and not of another one under its name."""
        return source.name in self.evaluations and self._sources[source.name] == source.identity()

    def add(self, evaluations: Mapping[str, SAEEvaluation], sources: Sequence[SAESource]) -> None:
        """Take more evaluations in, and write the folder's files anew."""
        self.evaluations |= evaluations
        self._sources |= {source.name: source.identity() for source in sources}
        results = {name: {"source": self._sources[name], **one.to_dict()} for name, one in self.evaluations.items()}
        checksums = {
            name: self._checksum(name, results[name], one.firing_counts) for name, one in self.evaluations.items()
        }
        # The counts first: a result without its counts would be measured again, counts without a result are ignored.
        save_tensors(self.counts_path, {name: one.firing_counts for name, one in self.evaluations.items()})
        write_json(self.path, {"settings": self._settings, "results": results, "checksums": checksums}, indent=1)

    def of(self, source: SAESource) -> SAEEvaluation | None:
        """The evaluation of an SAE, whatever its name, also where its folder was moved since; None without one.

        The same are a config with the same content and weights of the same size; in the same place also of the same
        time.
        """
        own = source.identity()
        for name, saved in self._sources.items():
            names = ["cfg", "bytes"] + (["modified_ns"] if saved.get("folder") == own.get("folder") else [])
            if all(saved.get(key) == own.get(key) is not None for key in names):
                return self.evaluations[name]
        return None

    def _checksum(self, name: str, values: Mapping[str, Any], counts: Tensor) -> str:
        """Of one evaluation with its name, counts and the settings it was measured with."""
        return content_checksum({name: counts}, json.dumps([self._settings, values], sort_keys=True))

"""The history of a training run: records in memory, and the same as JSON lines in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saelens_asi.resume import written_whole

TRAINING_HISTORY = "training_history.jsonl"
LORSA_HISTORY = "history.jsonl"

Record = dict[str, Any]


class History:
    """Records, one a logged step, in the order of the steps; see ``read_history`` for their file."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records = list(records)
        self._path: Path | None = None

    @property
    def path(self) -> Path | None:
        """The file that grows with the records."""
        return self._path

    def write_to(self, path: Path) -> None:
        """Write all records to a file, in place of what it holds, and every later one as it comes."""
        self.copy_to(path)
        self._path = path

    def copy_to(self, path: Path) -> None:
        """Write all records to a file, whole or not at all: what it held before stays until then."""
        with written_whole(path) as unfinished:
            unfinished.write_text("".join(map(_line, self.records)))

    def append(self, record: Record) -> None:
        self.records.append(record)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(_line(record))

    def keep_in_memory(self) -> None:
        """Write no further record to the file."""
        self._path = None

    def restart(self, records: Iterable[Record]) -> None:
        """Go on after these records; the list that ``records`` is stays the same object."""
        self.records[:] = records
        self._path = None


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_strict(record), allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_history(path: str | Path) -> list[Record]:
    """The records of a training run, of an SAE or of a Lorsa.

    A run with ``initializer``, ``optimizer`` or ``revive`` set writes a record every ``logger.wandb_log_frequency``
    steps, with or without W&B, and one at its end. What is not finite is null.

    - ``step`` (steps done), ``n_tokens`` (activations drawn), ``n_skipped_tokens`` (of them left out, because they were
      not finite), ``seconds`` of training, ``lr``, ``coefficients``,
      ``grad_norm`` (before clipping; null where SAELens keeps it to itself);
    - of that step's batch, in the space that the SAE is trained in: ``loss`` and its parts (``losses``), ``metrics``,
      ``l0``, ``nmse``, and ``explained_variance`` (1 - nmse, against the variance within the batch);
    - ``dead_features`` and ``dead_fraction``: silent for more than ``dead_feature_window`` steps, as SAELens counts,
      and that window in tokens (``dead_window_tokens``);
    - ``silent_features``: from a number of tokens to how many features have not fired within the last so many, once
      they have been seen; ``never_fired``: since the run began; ``d_sae``: of how many;
    - ``revived_features``, with ``revive="auto"``: how many were revived before this step, each as often as it was.

    Args:
        path: the file, or the folder that holds it: of checkpoints, of one checkpoint, of the finished SAE, of a Lorsa.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a line that is not JSON. A last line that was cut off is left out.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in (TRAINING_HISTORY, LORSA_HISTORY) if (path / name).exists()]
        if not files:
            raise FileNotFoundError(
                f"{path} holds no {TRAINING_HISTORY}: runs without initializer or optimizer write none"
            )
        path = files[0]
    lines = path.read_text().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
    return records

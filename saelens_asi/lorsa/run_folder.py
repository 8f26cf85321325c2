"""What a run keeps in its folder: in checkpoints all that its future depends on, and at the end the Lorsa itself."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saelens_asi.history import LORSA_HISTORY, History, Record, read_history
from saelens_asi.lorsa.checkpoints import CHECKPOINTS, checkpoints_in, last_checkpoint
from saelens_asi.lorsa.config import read_json_object
from saelens_asi.lorsa.io import CONFIG, WEIGHTS, load_lorsa, save_lorsa
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.resume import differences, load_tensors, save_tensors, write_json

FILE_FORMAT = "saelens_asi.lorsa_run.v1"
STATE, TENSORS = "run.json", "run.safetensors"
FILES = (WEIGHTS, CONFIG, STATE, TENSORS, LORSA_HISTORY)

# Settings that a resumed run may change: what is trained does not follow from them.
_FREE = ("log_every", "checkpoint_every", "checkpoint_minutes", "max_skipped_fraction")


@dataclass(frozen=True)
class RunFacts:
    """What a resumed run must have in common with the one that it goes on from.

    Attributes:
        settings: of the training.
        config: of the Lorsa.
        data: what the sequences are; None stands for what is not known.
    """

    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class RunState:
    """A run after some of its steps.

    Attributes:
        lorsa: its weights and provenance.
        done: steps.
        n_skipped: positions that were left out because they, or others of their sequence, were not finite.
        tensors: moments, positions since each feature fired, generators.
        history: records so far.
    """

    lorsa: Lorsa
    done: int
    n_skipped: int
    tensors: Mapping[str, Tensor]
    history: list[Record]


def write_state(folder: Path, state: RunState, facts: RunFacts) -> None:
    """The files of a checkpoint."""
    save_lorsa(state.lorsa, folder)
    save_tensors(folder / TENSORS, state.tensors)
    History(state.history).copy_to(folder / LORSA_HISTORY)
    record = {"format": FILE_FORMAT, "step": state.done, "n_skipped_tokens": state.n_skipped}
    write_json(folder / STATE, {**record, "settings": dict(facts.settings), "data": dict(facts.data)}, indent=1)


def read_last(folder: Path, facts: RunFacts) -> RunState | None:
    """The newest whole checkpoint of a run's folder; None where there is none at all.

    Raises:
        ValueError: where none is whole, and for one of another Lorsa, or of other settings or data.
    """
    checkpoint = last_checkpoint(folder, FILES)
    if checkpoint is None:
        return None
    record, saved = read_json_object(checkpoint / STATE), load_lorsa(checkpoint)
    if record.get("format") != FILE_FORMAT:
        raise ValueError(f"{checkpoint / STATE} has format {record.get('format')!r}, expected {FILE_FORMAT!r}")
    try:
        _check_same(checkpoint, RunFacts(record["settings"], saved.cfg.to_dict(), record["data"]), facts)
        done, n_skipped = int(record["step"]), int(record["n_skipped_tokens"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint / STATE} is not what a run writes ({error!r})") from None
    return RunState(saved, done, n_skipped, load_tensors(checkpoint / TENSORS), read_history(checkpoint))


def read_finished(folder: Path, facts: RunFacts) -> RunState | None:
    """The finished Lorsa of a run whose checkpoints are gone; None where there is none.

    Raises:
        ValueError: for a Lorsa of another run, or of none.
    """
    if not is_saved(folder):
        return None
    saved = load_lorsa(folder)
    settings = saved.provenance.get("training")
    if not isinstance(settings, dict):
        raise ValueError(f"out={str(folder)!r} holds a Lorsa that no run has written there: give another folder")
    _check_same(folder, RunFacts(settings, saved.cfg.to_dict(), {}), facts)
    history = read_history(folder) if (folder / LORSA_HISTORY).exists() else []
    return RunState(saved, int(facts.settings["steps"]), int(saved.provenance.get("n_skipped_tokens", 0)), {}, history)


def _check_same(where: Path, saved: RunFacts, now: RunFacts) -> None:
    way_out = "resume with the same, or give another folder"
    then, today = (
        {name: value for name, value in one.items() if name not in _FREE} for one in (saved.settings, now.settings)
    )
    detail = differences(then, today)
    if detail:
        raise ValueError(f"{where} was written with other settings ({detail}): {way_out}")
    detail = differences(saved.config, now.config)
    if detail:
        raise ValueError(f"{where} was written with other settings of the Lorsa ({detail}): {way_out}")
    known = [name for name, value in saved.data.items() if value is not None and now.data.get(name) is not None]
    detail = differences({name: saved.data[name] for name in known}, {name: now.data[name] for name in known})
    if detail:
        raise ValueError(f"{where} was trained on other data ({detail}): {way_out}")


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a finished Lorsa."""
    return (folder / CONFIG).exists()


def check_unused(folder: Path) -> None:
    """Raise ValueError for a folder with the checkpoints of a run, or a finished Lorsa."""
    found = "a finished Lorsa" if is_saved(folder) else None
    found = found or ("the checkpoints of another run" if checkpoints_in(folder) else None)
    if found:
        raise ValueError(
            f"out={str(folder)!r} holds {found}: set resume=True to go on with it, overwrite=True to replace it, or "
            "give another folder"
        )


def forget_run(folder: Path) -> None:
    """Remove the Lorsa, history and checkpoints of an earlier run; the config first, without which weights are none."""
    for name in (CONFIG, WEIGHTS, LORSA_HISTORY):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)

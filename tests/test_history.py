"""The history of a run in memory and on disk, without SAELens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saelens_asi import plots, read_history
from saelens_asi.history import LORSA_HISTORY, TRAINING_HISTORY, History

RECORDS = [{"step": step, "n_tokens": 32 * step, "nmse": 1 / step} for step in (1, 2, 3)]


def test_records_before_and_after_the_file_is_named_are_in_it(tmp_path: Path) -> None:
    history = History(RECORDS[:1])
    history.append(RECORDS[1])
    history.write_to(tmp_path / "new" / TRAINING_HISTORY)
    history.append(RECORDS[2])
    assert history.records == RECORDS == read_history(tmp_path / "new")
    history.copy_to(tmp_path / "copy.jsonl")
    assert read_history(tmp_path / "copy.jsonl") == RECORDS


def test_a_restart_replaces_what_came_after(tmp_path: Path) -> None:
    history, path = History(RECORDS), tmp_path / TRAINING_HISTORY
    records = history.records
    history.write_to(path)
    history.restart(RECORDS[:1])
    history.append({"step": 9})
    assert read_history(path) == RECORDS
    history.write_to(path)
    assert records == read_history(path) == [RECORDS[0], {"step": 9}]


def test_what_is_not_finite_is_null_in_strict_json(tmp_path: Path) -> None:
    history = History()
    history.write_to(tmp_path / TRAINING_HISTORY)
    history.append({"step": 1, "nmse": float("nan"), "losses": {"mse_loss": float("inf")}})
    text = (tmp_path / TRAINING_HISTORY).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert read_history(tmp_path) == [{"step": 1, "nmse": None, "losses": {"mse_loss": None}}]


def test_a_line_that_was_cut_off_at_the_end_is_left_out_and_any_other_named(tmp_path: Path) -> None:
    path = tmp_path / LORSA_HISTORY
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_history(tmp_path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 of"):
        read_history(path)


def test_a_folder_without_a_history_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=TRAINING_HISTORY):
        read_history(tmp_path)


def test_the_figure_draws_what_there_is() -> None:
    figure = plots.training_history({"a": RECORDS, "b": [{"n_tokens": 1, "nmse": None, "l0": 3.0}]})
    assert [len(axis.lines) for axis in figure.axes] == [1, 0, 1]
    dead = plots.training_history({"a": [{"n_tokens": 1, "dead_fraction": 0.5, "never_fired": 3, "d_sae": 4}]}).axes[1]
    assert [line.get_ydata().tolist() for line in dead.lines] == [[0.5], [0.75]]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [32, 64, 96]


def test_a_rewrite_that_fails_leaves_the_history_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / TRAINING_HISTORY
    History([{"step": 1}, {"step": 2}]).copy_to(path)

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        History([{"step": 1}]).write_to(path)
    assert read_history(path) == [{"step": 1}, {"step": 2}]
    assert list(tmp_path.iterdir()) == [path]

"""Evaluations as tables and as a folder: what the files hold, byte for byte, and when what they hold is used."""

from __future__ import annotations

import csv
import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from saelens_asi.evaluation.metrics import SAEEvaluation, SAELossRecovered
from saelens_asi.evaluation.results import EvaluationFolder, evaluation_rows, evaluation_table, write_csv
from saelens_asi.evaluation.saes import SAESource
from saelens_asi.evaluation.tables import markdown_table
from tests.helpers.damage import Damage, Hostile, damages

SETTINGS = {"model": "tiny", "n_tokens": 100}


def evaluation(seed: int = 0, **changes: Any) -> SAEEvaluation:
    counts = torch.randint(0, 5, (7,), generator=torch.Generator().manual_seed(seed))
    values: dict[str, Any] = {"n_tokens": 100, "dead_fraction": 1 / 7, "nmse": 0.1, "l0": 2.5, "d_in": 16}
    return SAEEvaluation(**{**values, "hook_name": "blocks.1.hook_attn_out", **changes}, firing_counts=counts)


def source(name: str = "a", sae_id: str = "x") -> SAESource:
    return SAESource(name, None, "release", sae_id)


def as_plain(one: SAEEvaluation) -> dict[str, Any]:
    return {**one.to_dict(), "firing_counts": one.firing_counts.tolist()}


def test_a_folder_gives_back_what_was_put_in(tmp_path: Path) -> None:
    loss = SAELossRecovered(2.0, 3.0, 2.25, 1.0, 0.25, 90)
    first, second = evaluation(0, effective_rank=3.5, intrinsic_dimension=4), evaluation(1, loss=loss)
    folder = EvaluationFolder(tmp_path, SETTINGS)
    folder.add({"a": first}, [source("a")])
    folder.add({"b": second}, [source("b")])
    again = EvaluationFolder(tmp_path, SETTINGS)
    assert list(again.evaluations) == ["a", "b"]
    assert [as_plain(one) for one in again.evaluations.values()] == [as_plain(first), as_plain(second)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["firing_counts.safetensors", "results.json"]


def test_a_folder_holds_an_sae_and_not_its_namesake(tmp_path: Path) -> None:
    EvaluationFolder(tmp_path, SETTINGS).add({"a": evaluation()}, [source("a", "x")])
    again = EvaluationFolder(tmp_path, SETTINGS)
    assert source("a", "x") in again
    assert source("a", "y") not in again
    assert source("b", "x") not in again


def test_a_folder_of_other_settings_starts_empty_and_is_replaced_by_the_first_result(tmp_path: Path) -> None:
    EvaluationFolder(tmp_path, SETTINGS).add({"a": evaluation()}, [source("a")])
    other = EvaluationFolder(tmp_path, {**SETTINGS, "n_tokens": 200})
    assert not other.evaluations
    assert list(EvaluationFolder(tmp_path, SETTINGS).evaluations) == ["a"]
    other.add({"b": evaluation()}, [source("b")])
    assert not EvaluationFolder(tmp_path, SETTINGS).evaluations


def test_a_result_without_its_counts_is_not_in_the_folder(tmp_path: Path) -> None:
    EvaluationFolder(tmp_path, SETTINGS).add({"a": evaluation()}, [source("a")])
    (tmp_path / "firing_counts.safetensors").unlink()
    assert source("a") not in EvaluationFolder(tmp_path, SETTINGS)


def test_the_csv_has_the_bytes_that_the_csv_module_writes(tmp_path: Path) -> None:
    results = {
        'a "b", c': evaluation(nmse=1e-7, dead_fraction=1 / 3),
        "given": evaluation(hook_name=None, nmse=1e16, l0=32.0),
        "ranked": evaluation(effective_rank=1 / 7, intrinsic_dimension=9),
    }
    rows = evaluation_rows(results)
    write_csv(rows, tmp_path / "rows.csv")
    expected = io.StringIO(newline="")
    writer = csv.DictWriter(expected, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    assert (tmp_path / "rows.csv").read_bytes() == expected.getvalue().encode()


def test_the_table_leaves_out_what_nobody_measured() -> None:
    table = evaluation_table(evaluation_rows({"a": evaluation(), "b": evaluation(effective_rank=4.0)})).splitlines()
    assert "CE recovered" not in table[0]
    assert table[1] == "|---|---:|---:|---:|---:|---:|---:|---:|"
    assert table[2].endswith("| 2.5 | - |")
    assert table[3].endswith("| 2.5 | 25 |")


@pytest.mark.parametrize("rows", [[], [["x", "1.0e-3"], [" long text ", "-"], ["a", "0012"]]])
def test_markdown_cells_stay_as_they_are(rows: list[list[str]]) -> None:
    expected = ["| name | n |", "|---|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
    assert markdown_table(["name", "n"], rows, align="lr").splitlines() == expected


def test_a_markdown_cell_without_text_is_one_space() -> None:
    assert markdown_table(["", "n"], [["1", ""]], align="rl").splitlines() == ["| | n |", "|---:|---|", "| 1 | |"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    loss = SAELossRecovered(2.0, 3.0, 2.25, 1.0, 0.25, 90)
    records = {"a": evaluation(0, effective_rank=3.5, intrinsic_dimension=4), "b": evaluation(1, loss=loss)}
    EvaluationFolder(folder, SETTINGS).add(records, [source("a"), source("b")])
    return folder


@settings(deadline=None, max_examples=300)
@given(damage=damages())
def test_of_a_damaged_folder_only_what_is_right_is_used(
    damage: Damage, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "results"
    shutil.copytree(saved, folder)
    path = folder / damage.choose(["results.json", "firing_counts.safetensors"])
    damage.apply(path)
    whole = EvaluationFolder(saved, SETTINGS).evaluations
    if path.is_dir():
        with pytest.raises(ValueError, match=f"{path} is a folder"):
            EvaluationFolder(folder, SETTINGS)
        return
    found = EvaluationFolder(folder, SETTINGS)
    assert all(as_plain(one) == as_plain(whole[name]) for name, one in found.evaluations.items())
    for name in found.evaluations:
        assert (source(name) in found) == (source(name) in EvaluationFolder(saved, SETTINGS))
    found.add({"c": evaluation(2)}, [source("c")])
    assert source("c") in EvaluationFolder(folder, SETTINGS)


@pytest.mark.parametrize(("old", "new"), [('"nmse": 0.1,', '"nmse": 0.2,'), ('"sae_id": "x"', '"sae_id": "y"')])
def test_a_number_that_was_changed_is_measured_again_with_a_warning(
    old: str, new: str, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved, tmp_path / "results")
    path = tmp_path / "results" / "results.json"
    path.write_text(path.read_text().replace(old, new, 1))
    folder = EvaluationFolder(tmp_path / "results", SETTINGS)
    assert list(folder.evaluations) == ["b"]
    assert f"{path} or " in caplog.text
    assert "holds of a: evaluated anew" in caplog.text


def test_results_of_other_settings_under_these_are_not_used(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "results")
    path = tmp_path / "results" / "results.json"
    path.write_text(path.read_text().replace('"n_tokens": 100\n', '"n_tokens": 200\n', 1))
    assert not EvaluationFolder(tmp_path / "results", {**SETTINGS, "n_tokens": 200}).evaluations


def test_no_pickle_is_read(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(saved, tmp_path / "results")
    for name in ("firing_counts.safetensors", "results.json"):
        (tmp_path / "results" / name).write_bytes(pickle.dumps(Hostile(tmp_path / "marker")))
        assert not EvaluationFolder(tmp_path / "results", SETTINGS).evaluations
        assert str(tmp_path / "results" / name) in caplog.text
    assert not (tmp_path / "marker").exists()

"""The page of claims is what the result files say, and its verdicts turn with them."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.claims import grid, of_training, page
from benchmarks.claims.evidence import RESULTS, Claim, ResultFiles
from benchmarks.claims.statistics import FAILS, HOLDS, PARTLY, UNJUDGED
from saelens_asi import cli
from saelens_asi.sweep import Cell, SweepTraining, read_sweep


@pytest.fixture(scope="module")
def evidence() -> ResultFiles:
    return ResultFiles()


def test_the_page_is_what_the_results_make(evidence):
    """Where this fails: python -m benchmarks.claims.page."""
    assert page.PAGE.read_text() == page.claims_page(evidence)


@pytest.mark.parametrize("claim", page.CLAIMS, ids=lambda claim: claim.__name__)
def test_every_claim_is_whole(claim: Callable[[ResultFiles], Claim], evidence):
    found = claim(evidence)
    assert found.verdict in (HOLDS, PARTLY, FAILS, UNJUDGED)
    assert all(vars(found).values())
    assert any(character.isdigit() for character in found.ours)


@pytest.mark.parametrize("name", page.CAPTIONS)
def test_figures_are_there(name):
    assert (page.FIGURES / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "claim",
    [of_training.equal_size, of_training.frontier, of_training.half_size, of_training.goal],
    ids=lambda claim: claim.__name__,
)
def test_a_worse_result_takes_the_verdict_away(claim, evidence):
    worse: Any = copy.deepcopy(evidence)
    for rows in worse.sweeps.values():
        for row in rows:
            if row["method"] in ("asi", "asi_sparse_adam"):
                row.update(nmse=9.0, dead_fraction=0.9, silent_fraction=0.9, seconds=1e9)
    worse.steps["seconds"]["asi_sparse_adam 65536"] = 1e9
    worse.evaluations["finished"]["dead_fraction"] = 0.9
    assert claim(worse).verdict == FAILS


def test_a_cell_that_is_missing_is_named(evidence):
    with pytest.raises(ValueError, match="holds no cell with"):
        evidence.cells("d_sae", d_sae=3)


def test_the_grid_holds_the_committed_cells_and_no_others():
    committed = {
        (path.parent.name, row["hook_name"], Cell(**{name: row[name] for name in Cell.__dataclass_fields__}))
        for path in RESULTS.glob("claims/*/cells.jsonl")
        for row in read_sweep(path.parent)
    }
    planned = {(one.folder, hook, cell) for one in grid.SWEEPS for hook in one.hooks for cell in one.cells()}
    assert planned == committed


IDS = [f"{one.folder}_{i}" for i, one in enumerate(grid.SWEEPS)]


@pytest.mark.parametrize("one", grid.SWEEPS, ids=IDS)
def test_the_flags_of_a_sweep_say_its_cells(one):
    flags: dict[str, list[str]] = {}
    for word in one.arguments():
        if word.startswith("--"):
            values = flags[word.removeprefix("--").replace("-", "_")] = []
        else:
            values.append(word)
    axes = {
        name: [type(value)(word) for value, word in zip(one.axes[name], flags[name], strict=True)] for name in one.axes
    }
    assert grid.grid(axes, flags.get("methods", ())) == one.cells()
    assert flags["hooks"] == list(one.hooks)
    assert ("save_saes" in flags) == one.save_saes


@pytest.mark.parametrize("one", grid.SWEEPS, ids=IDS)
def test_the_command_takes_the_flags_of_a_sweep(one, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sweep", *one.arguments(), "--k", "0"])
    assert "k=0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("one", grid.SWEEPS, ids=IDS)
def test_a_sweep_goes_on_in_the_folder_of_its_results(one, evidence):
    sizes = {"cached_tokens": 300_000, "held_out_tokens": 80_000, **SweepTraining().to_dict(), **one.sizes}
    shared = evidence.shared[one.folder]
    saved = {**shared, **shared["training"]}
    assert {name: saved[name] for name in sizes} == sizes


def test_the_grid_stops_at_the_first_sweep_that_fails(monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, len(calls) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["grid"])
    with pytest.raises(SystemExit) as exit_info:
        grid.main()
    assert exit_info.value.code == 1
    assert [command[1:] for command in calls] == [
        ["-m", "saelens_asi", "sweep", *one.arguments()] for one in grid.SWEEPS[:2]
    ]

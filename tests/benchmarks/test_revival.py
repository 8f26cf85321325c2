"""What revival is measured against: the trials, and what is measured of an SAE."""

import pytest
import torch

from benchmarks.claims import of_revival, page, revival
from benchmarks.claims.records import is_among, read
from saelens_asi.sweep import Cell, SweepTraining
from saelens_asi.sweep.run import train_cell
from tests.helpers import tiny


def test_no_trial_is_there_twice_and_results_are_those_of_the_plan():
    keys = [trial.key() for trial in revival.trials()]
    assert all(keys.count(key) == 1 for key in keys)
    assert all(any(is_among([row], key) for key in keys) for row in read(revival.PART))


def test_every_start_meets_every_cure_and_each_is_its_own():
    cells = {(trial.start, trial.cure): trial.cell for trial in revival.trials()}
    assert set(cells) == {(start, cure) for start in revival.STARTS for cure in revival.CURES}
    assert {cell.revive for (_, cure), cell in cells.items() if cure == "revive"} == {"auto"}
    assert {cell.revive for (_, cure), cell in cells.items() if cure != "revive"} == {"off"}


@torch.no_grad()
def test_duplicates_are_counted_among_features_that_fire():
    cell = Cell(d_sae=64, k=4, d_init=5, lr=3e-3)
    x = tiny.activations(2048)
    sae = train_cell(cell, SweepTraining(training_tokens=20 * 64, batch_size=64), x)[0].sae
    fires = (sae.encode(x) > 0).any(dim=0)
    before = revival.duplicates(sae, fires)["duplicate_fraction"]
    sae.W_dec[:] = sae.W_dec[0]
    sae.W_dec[32:] = -sae.W_dec[0]
    assert before < 1
    assert revival.duplicates(sae, fires)["duplicate_fraction"] == pytest.approx(1.0)


def test_features_that_were_revived_long_ago_are_looked_at_again():
    training = SweepTraining(training_tokens=2_000_000, batch_size=1000)
    born, alive = torch.tensor([0, 10, 1000, 1001]), torch.tensor([True, True, False, True])
    assert revival.lived_on(born, alive, training) == {"n_revived_long_ago": 2, "lived_on": 0.5}
    assert revival.lived_on(0 * born, alive, training) == {"n_revived_long_ago": 0}


def test_the_section_has_a_line_for_each_row():
    assert of_revival.section([]) == []
    row = {"model": "m", "architecture": "topk", "d_sae": 64, "tokens": 1000, "start": "the flag's",
           "lr": 0.001, "cure": "revive", "seed": 0, "dead_fraction": 0.25, "nmse": 0.2, "l0": 4.0,
           "duplicate_fraction": 0.0, "n_revived": 64,
           "started_anew_after_steps": 50, "cpu_seconds": 3.0}  # fmt: skip
    lived = {"lived_on": 0.75, "n_revived_long_ago": 8}
    assert "| 64 | 75.0% of 8 | 50 |" in of_revival.section([{**row, **lived}])[-2]
    *_, table, _ = of_revival.section([row, {**row, "silent_fraction": 0.125}])
    assert "| 25.0% | | 0.2000 |" in table
    assert "| 25.0% | 12.5% | 0.2000 |" in table


def test_starts_are_lines_and_cures_are_columns():
    assert (tuple(revival.STARTS), tuple(revival.CURES)) == (of_revival.STARTS, of_revival.CURES)
    of_both = {"model": "smollm2", "architecture": "topk", "d_sae": 64, "tokens": 2000, "lr": 0.001, "seed": 0}
    dead = {"start": "the flag's", "cure": "nothing", "dead_fraction": 0.25, "silent_fraction": 0.0005, "nmse": 0.2}
    revived = {"start": "the paper's", "cure": "revive", "dead_fraction": 0.0, "nmse": 0.125}
    *_, first, second = of_revival.by_cure([{**of_both, **dead}, {**of_both, **revived}]).splitlines()
    assert first == "| SmolLM2-135M, 64, 2k | the paper's | | | | 0.0, 0.125 |"
    assert second == "| | `initializer` | 25.0 (0.05), 0.200 | | | |"


def test_rates_are_told_where_there_is_more_than_one():
    row = {"model": "smollm2", "architecture": "topk", "d_sae": 64, "tokens": 2000, "seed": 0, "start": "the flag's",
           "cure": "nothing", "dead_fraction": 0.25, "nmse": 0.2}  # fmt: skip
    table = of_revival.by_cure([{**row, "lr": 0.001}, {**row, "lr": 0.002, "silent_moments": "decay"}])
    assert "`initializer`, rate 0.001 |" in table
    assert "`initializer`, rate 0.002, moments decay |" in table


def test_the_docs_have_the_table_of_the_results():
    docs = page.DEAD_FEATURES.read_text()
    assert of_revival.written_into(docs, read(revival.PART)) == docs


def test_a_page_without_the_table_is_an_error():
    with pytest.raises(ValueError, match="no table that begins with 'model, features, tokens'"):
        of_revival.written_into("# a page\n", [])

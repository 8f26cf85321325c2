"""The page of claims is what the result files say, and its verdicts turn with them."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.claims import (
    figures,
    grid,
    of_deaths,
    of_training,
    of_universality,
    page,
    plan,
    sections,
    where_we_lose,
)
from benchmarks.claims.evidence import RESULTS, Claim, ResultFiles
from benchmarks.claims.statistics import FAILS, HOLDS, PARTLY, UNJUDGED
from saelens_asi import cli
from saelens_asi.sweep import SweepTraining, read_sweep
from saelens_asi.sweep.cells import cell_of


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


@pytest.mark.parametrize("name", figures.CAPTIONS)
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


def test_where_we_lose_stands_in_the_first_half(evidence):
    text = page.claims_page(evidence)
    assert text.index("## Where we lose") < text.index("## Claim by claim") < len(text) / 2


def test_predictions_are_compared_seed_by_seed(evidence):
    changed: Any = copy.deepcopy(evidence)
    for row in changed.parts["kl"]:
        row["kl_recovered"] = (0.9 if row["contender"] == plan.OURS else 0.8) + 0.001 * row["seed"]
    assert of_training.downstream(changed).verdict == HOLDS
    for row in changed.parts["kl"]:
        if row["contender"] == plan.BASELINE:
            row["kl_recovered"] = 0.95
    assert of_training.downstream(changed).verdict == PARTLY


def test_a_comparison_is_lost_beyond_seeds_alone(evidence):
    one = next(one for one in where_we_lose.comparisons(evidence) if one.name == "TopK")
    lost = {(loss.comparison.where, loss.comparison.name) for loss in where_we_lose.losses(evidence)}
    assert (one.where, one.name) not in lost
    changed: Any = copy.deepcopy(evidence)
    error = {row["seed"]: row["nmse"] for row in one.ours}
    for rows in changed.sweeps.values():
        for row in rows:
            settings = [row[name] for name in ("method", "d_sae", "k", "architecture", "lr")]
            if settings == [one.theirs[0][name] for name in ("method", "d_sae", "k", "architecture", "lr")]:
                row.update(nmse=0.9 * error[row["seed"]] if row["seed"] in error else 0.1)
    (loss,) = [
        loss
        for loss in where_we_lose.losses(changed)
        if (loss.comparison.where, loss.comparison.name) == (one.where, one.name)
    ]
    assert loss.error is not None
    assert loss.error.low > 0
    assert loss.dead is None
    assert one.where in "\n".join(where_we_lose.table([loss]))


def test_errors_at_other_l0_are_not_compared(evidence):
    apart = [one for one in where_we_lose.comparisons(evidence) if not one.has_equal_l0]
    assert {one.where.split(", ")[2] for one in apart} <= {"batchtopk", "matryoshka_batchtopk"}
    assert apart


def test_only_cells_that_differ_in_the_seed_alone_say_what_seeds_do(evidence):
    """Cells of two sweeps can have equal columns, and windows of the auxiliary loss that differ."""
    changed: Any = copy.deepcopy(evidence)
    before = evidence.deviation("dead_fraction")
    for row in changed.sweeps["aux_late"]:
        row["dead_fraction"] += 0.5
    assert changed.deviation("dead_fraction") == pytest.approx(before)
    assert evidence.deviation("dead_fraction", 0.01, 0.02) < before


def test_a_model_of_high_rank_takes_the_verdict_away(evidence):
    changed: Any = copy.deepcopy(evidence)
    for row in changed.parts["universality"]:
        row["effective_rank_share"] = 0.95 if row["kind"] == "attn_out" else 0.9
    assert of_universality.collapse_everywhere(changed).verdict == PARTLY  # the levels of the others are the paper's
    for row in changed.parts["universality"]:
        row["effective_rank_share"] = 0.8
    assert of_universality.collapse_everywhere(changed).verdict == FAILS
    changed.parts["universality"] = []
    with pytest.raises(ValueError, match="holds no whole pass"):
        of_universality.passes(changed)


def test_gamma_alone_explains_the_rank_away(evidence):
    """Features that die by gamma and nothing else; the rank goes with gamma, as it does in real models."""
    changed: Any = copy.deepcopy(evidence)
    gammas = {row["hook"]: row["mean_to_deviation"] for row in changed.spectra}
    for row in changed.sweeps["hooks"]:
        row["dead_fraction"] = gammas[row["hook_name"]] / 2
    assert of_deaths.mean_explains_more(changed).verdict == HOLDS


WORTH = [
    {
        "what": "all",
        "settings": {"model": "smollm2", "dataset": "linux-doc", "hook_name": "h", "baseline": "base"},
        "raw_activations": {"all tasks": {"best, k=1": {"auc": {"mean": 0.6}}}},
    },
    {
        "what": "sae",
        "name": "ours",
        "live": 8000,
        "redundancy_at_equal_number": {"quantile_0.5": 0.4},
        "beside_baseline": {"added": 7000, "share_of_firings": 0.5},
        "carried": {
            name: {"kl_recovered": share}
            for name, share in (("all", 0.9), ("added", 0.7), ("as many as added, at random", 0.6))
        },
        "probing": {
            "all tasks": {
                "best, k=1": {
                    "auc": {"mean": 0.8, "plus_minus": 0.01},
                    "auc_less_baseline": {"mean": 0.05, "plus_minus": 0.02},
                }
            }
        },
    },
    {"what": "control", "name": "d_sae=8", "probing": {"all tasks": {"best, k=1": {"auc": {"mean": 0.5}}}}},
]


def test_what_revived_features_are_worth_is_said_once_it_is_measured(evidence):
    changed: Any = copy.deepcopy(evidence)
    changed.parts.pop("worth", None)
    assert "Nothing has been measured yet" in sections.worth(changed)[0]
    changed.parts["worth"] = WORTH
    text = "\n".join(sections.worth(changed))
    assert "| ours | 8,000 | 0.40 | 7,000 | 50.0% | 90.0% | 70.0% (60.0%) | 0.800 ± 0.010; +0.050 ± 0.020 | |" in text
    assert "random directions, d_sae=8" in text


def test_a_cell_that_is_missing_is_named(evidence):
    with pytest.raises(ValueError, match="holds no cell with"):
        evidence.cells("d_sae", d_sae=3)


def test_the_grid_holds_the_committed_cells_and_no_others():
    committed = {
        (path.parent.name, row["hook_name"], cell_of(row))
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
        name: [type(value)(word) for value, word in zip(values, flags[name], strict=True)]
        for name, values in one.all_axes.items()
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

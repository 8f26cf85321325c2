"""The page of claims is what the result files say, and its verdicts turn with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.claims import of_training, page
from benchmarks.claims.evidence import FAILS, HOLDS, PARTLY, Claim, Evidence, verdict


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence()


def test_the_page_is_what_the_results_make(evidence):
    """Where this fails: python -m benchmarks.claims.page."""
    assert page.PAGE.read_text() == page.page(evidence)


@pytest.mark.parametrize("claim", page.CLAIMS, ids=lambda claim: claim.__name__)
def test_every_claim_is_whole(claim: Callable[[Evidence], Claim], evidence):
    found = claim(evidence)
    assert found.verdict in (HOLDS, PARTLY, FAILS)
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


def test_verdicts():
    assert [verdict(True, True), verdict(True, False), verdict(False, False)] == [HOLDS, PARTLY, FAILS]

"""Intervals cover what they say, verdicts follow them, and what explains what."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.claims.statistics import (
    FAILS,
    HOLDS,
    PARTLY,
    Pair,
    explained,
    interval,
    partial_correlation,
    rank_correlations,
    seed_deviation,
    t95,
    verdict,
)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_intervals_cover_the_mean_as_often_as_they_say(n):
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, n))
    covered = [found.low < 3.0 < found.high for found in map(interval, draws)]
    assert 0.93 < np.mean(covered) < 0.97


def test_quantiles_between_those_of_the_table_are_never_too_narrow():
    assert t95(12) == t95(9) > t95(14)
    assert t95(1000) == t95(29)


def test_a_pair_is_paired_by_seed():
    """Seeds differ by more than the contenders do; in each the first is better."""
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.1, 1: 2.1, 2: 3.11}
    assert Pair(ours, theirs).holds
    assert not Pair(ours, theirs, higher=True).holds
    assert not Pair(ours, {0: 1.1, 1: 1.9, 2: 3.1}).holds


def test_one_seed_is_judged_by_what_seeds_do_elsewhere():
    ours, theirs = {0: 1.00}, {0: 1.05}
    assert Pair(ours, theirs, deviation=0.01).holds
    assert not Pair(ours, theirs, deviation=0.05).holds
    with pytest.raises(ValueError, match="needs the deviation"):
        _ = Pair(ours, theirs).holds


def test_verdicts():
    good, unclear = Pair({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.1}), Pair({0: 1.0, 1: 1.0}, {0: 0.0, 1: 2.1})
    assert verdict([good, True]) == HOLDS
    assert verdict([good, unclear]) == PARTLY
    assert verdict([unclear, False]) == FAILS
    with pytest.raises(ValueError, match="at least one condition"):
        verdict([])


def test_the_deviation_of_a_seed_is_pooled_over_cells():
    draws = np.random.default_rng(1).normal(0, 0.02, (300, 3))
    rows = [{"cell": i, "nmse": (1 + i % 5) * (1 + value)} for i, values in enumerate(draws) for value in values]
    assert seed_deviation(rows, "nmse", lambda row: row["cell"]) == pytest.approx(0.02, rel=0.1)
    with pytest.raises(ValueError, match="no cell has two seeds"):
        seed_deviation(rows, "nmse", lambda row: row["nmse"])


def test_a_common_cause_is_taken_out():
    """x and y follow a cause, and nothing else joins them; z follows x itself."""
    rng = np.random.default_rng(2)
    cause = rng.normal(size=500)
    x, y = (cause + 0.5 * rng.normal(size=500) for _ in range(2))
    z = x + 0.5 * rng.normal(size=500)
    assert abs(partial_correlation(x, y, cause)) < 0.1
    assert partial_correlation(x, z, cause) > 0.5


def test_rank_correlations_are_spearmans_and_nan_where_nothing_varies():
    columns = np.random.default_rng(3).integers(0, 6, (4, 3, 12)).astype(float)  # with ties
    for found, own in zip(rank_correlations(columns), columns, strict=True):
        np.testing.assert_allclose(found, spearmanr(own, axis=1).statistic)
    assert np.isnan(rank_correlations(np.array([[1.0, 1, 1], [1, 2, 3]]))[0, 1])
    with pytest.raises(ValueError, match="have no correlation"):
        partial_correlation([1, 1, 1], [1, 2, 3], [3, 1, 2])


def test_of_two_causes_the_one_that_acts_explains_the_other_away():
    rng = np.random.default_rng(4)
    acts = rng.normal(size=40)
    goes_along = -acts + 0.5 * rng.normal(size=40)
    found = explained({"acts": acts, "goes along": goes_along}, acts + 0.2 * rng.normal(size=40))
    assert found.alone["acts"].side == 1
    assert found.alone["goes along"].side == -1
    assert (found.beside["acts"].side, found.beside["goes along"].side, found.lead.side) == (1, 0, 1)
    assert found.beside["acts"].low < found.beside["acts"].mean < found.beside["acts"].high


def test_intervals_of_a_correlation_cover_it_about_as_often_as_they_say():
    """Twenty-four hooks, both causes act: a correlation of normal variables is known."""
    rng, covered = np.random.default_rng(5), []
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman's of normal variables with a correlation of 0.6
    for _ in range(150):
        x, z, noise = rng.normal(size=(3, 24))
        interval_of_x = explained({"x": x, "z": z}, 0.6 * x + 0.8 * noise, draws=400).alone["x"]
        covered.append(interval_of_x.low < truth < interval_of_x.high)
    assert np.mean(covered) > 0.85

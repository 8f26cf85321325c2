"""What each ingredient of the factorial buys: differences that were planted are found, paired by seed."""

import math

import pytest

from benchmarks.claims import of_factorial
from benchmarks.claims.plan import CONTENDERS, OURS, STARTS, TRAINED


def _rows(contender, factor=1.0, dead=0.0):
    return [
        {
            "contender": contender,
            "model": "smollm2",
            "text": "linux-doc",
            "hook": "blocks.15.hook_attn_out",
            "seed": seed,
            "nmse": (0.2 + 0.05 * seed) * factor,
            "dead_fraction": 0.1 * seed + dead,
            "silent_fraction": 0.05 * seed,
            "tokens": 200,
            "curve": [[100, 0.5 + seed, 0.25]],
        }
        for seed in range(3)
    ]


def test_a_planted_difference_is_found_whatever_the_seeds_have_in_common():
    rows = [*_rows("TopK, zeros, all of d"), *_rows("TopK, mean, all of d", 0.9, 0.2)]
    (one,) = of_factorial.effects(rows)
    assert (one.change, one.where) == ("the mean as centre", "TopK, all of d")
    assert one.error.mean == pytest.approx(math.log(0.9))
    assert one.error.high - one.error.low < 1e-9
    assert one.dead.mean == pytest.approx(0.2)
    assert "| the mean as centre | TopK, all of d | -10.0 (-10.0 to -10.0) | +20.0" in of_factorial.table(rows)[0]


def test_every_change_has_a_line_where_all_is_trained():
    rows = [row for name in CONTENDERS for row in _rows(name)]
    found = [(one.change, one.where) for one in of_factorial.effects(rows)]
    assert len(set(found)) == len(found) == 4 * len(TRAINED) + len(STARTS) + 1


def test_without_seeds_there_is_no_table():
    assert of_factorial.table(_rows("TopK, zeros, all of d")[:1]) == []


def test_a_curve_is_the_mean_of_the_seeds_and_ends_with_the_finished_sae():
    assert of_factorial.curve(_rows("TopK, zeros, all of d")) == [(100, 1.5, 0.25), (200, 0.25, pytest.approx(0.1))]
    figure = of_factorial.curves([*_rows("TopK, zeros, all of d"), *_rows(OURS)])
    assert [sum(len(line.get_xdata()) for line in axis.lines) for axis in figure.axes] == 2 * [2, 0, 0, 2]
    assert figure.get_suptitle() == "SmolLM2-135M, kernel documentation: blocks.15.hook_attn_out"


def test_moments_are_paired_by_what_else_is_the_same_and_averaged_over_seeds():
    row = {"model": "m", "d_sae": 64, "tokens": 100, "lr": 0.001, "nmse": 0.2, "dead_fraction": 0.5,
           "silent_fraction": 0.25}  # fmt: skip
    decaying = {**row, "silent_moments": "decay", "dead_fraction": 0.0}
    rows = [row, decaying, {**decaying, "nmse": 0.3}, {**row, "lr": 0.002}]
    *_, both, alone = of_factorial.moments(rows).splitlines()
    assert both == "| m | 64 | 100 | 0.001 | 0.2000, 50.00%, 25.00% | 0.2500, 0.00%, 25.00% | 2 |"
    assert alone == "| m | 64 | 100 | 0.002 | 0.2000, 50.00%, 25.00% | | 0 |"


def test_twice_the_tokens_stand_beside_the_mean_of_the_same_settings_before():
    row = {"contender": "TopK", "lr": 0.001, "tokens": 100, "nmse": 0.2, "dead_fraction": 0.5, "silent_fraction": 0.25}
    before = [row, {**row, "nmse": 0.3}, {**row, "lr": 0.002}, {**row, "contender": "AuxK"}]
    after = [{**row, "tokens": 200, "nmse": 0.2, "dead_fraction": 0.75}, {**row, "tokens": 200, "lr": 0.004}]
    _, _, paired, alone = of_factorial.doubled(before, after).splitlines()
    assert paired == "| TopK | 0.001 | 0.2500, 50.00%, 25.00% | 0.2000, 75.00%, 25.00% | -20.0% |"
    assert alone == "| TopK | 0.004 | | 0.2000, 50.00%, 25.00% | |"

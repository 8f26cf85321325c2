"""The model behind the plan: what holds whatever its coefficients are, and how well they did on what is kept out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plan_fit
from saelens_asi.planning.cost import step_cost
from saelens_asi.planning.make import anchor_of
from saelens_asi.planning.model import (
    Anchor,
    beyond,
    fitted,
    predict_dead,
    predict_error,
    predict_stock_dead,
    silent_share,
    spread_of_silence,
    tokens_to_tell,
)
from saelens_asi.planning.pilots import Pilot
from saelens_asi.planning.recipe import learning_rate, recommended

ANCHOR = Anchor(
    d_sae=4096, k=32, tokens=40_960, nmse=0.25, slope_k=-0.45, slope_tokens=-0.15, spread=1.0,
    rank_share=0.5, gamma=0.9,
)  # fmt: skip
RESULT = json.loads((Path(plan_fit.OUT) / "plan.json").read_text())


def pilot(d_sae: int = 4096, k: int = 32, nmse: float = 0.25, seconds: float = 0.1) -> Pilot:
    return Pilot(d_sae, k, 40, 1024, nmse, 0.3, seconds, seconds, 0.5, (0.5,) * 8, 0.0, 8192)


def test_the_prediction_at_the_pilot_itself_is_what_the_pilot_measured():
    assert predict_error(ANCHOR, 4096, 32, 40_960).value == pytest.approx(0.25)


@pytest.mark.parametrize("d_sae", [4096, 32768])
def test_more_tokens_and_more_active_features_never_raise_the_error(d_sae):
    by_tokens = [predict_error(ANCHOR, d_sae, 32, n).value for n in (50_000, 200_000, 1_000_000, 10_000_000)]
    assert by_tokens == sorted(by_tokens, reverse=True)
    by_k = [predict_error(ANCHOR, d_sae, k, 200_000).value for k in (8, 16, 32, 64)]
    assert by_k == sorted(by_k, reverse=True)


def test_intervals_hold_the_prediction_and_widen_outside_of_what_was_fitted():
    inside, outside = (predict_error(ANCHOR, 8192, 32, n) for n in (200_000, 100_000_000))
    assert inside.low < inside.value < inside.high
    assert outside.high / outside.value > inside.high / inside.value
    assert beyond(fitted(), 8192, 32, 200_000) == 0 < beyond(fitted(), 8192, 32, 100_000_000)


def test_an_anchor_of_a_spectrum_alone_has_a_wider_interval():
    guessed = predict_error(replace(ANCHOR, measured=False), 8192, 32, 200_000)
    known = predict_error(ANCHOR, 8192, 32, 200_000)
    assert guessed.high / guessed.value > known.high / known.value


def test_no_slope_is_steep_for_long():
    steep, steeper = (predict_error(replace(ANCHOR, slope_tokens=slope), 4096, 32, 400_000) for slope in (-0.3, -0.9))
    assert steeper == steep


def test_features_seem_dead_the_more_the_fewer_tokens_they_are_counted_on():
    shares = [predict_dead(ANCHOR, 32768, 32, 1_000_000, n) for n in (10_000, 100_000, 1_000_000)]
    assert [one.value for one in shares] == sorted((one.value for one in shares), reverse=True)
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in shares)


def test_the_silent_share_is_that_of_log_normal_rates():
    rates = np.exp(1.3 * np.random.default_rng(0).standard_normal(200_000) - 1.3**2 / 2)
    assert silent_share(20.0, 1.3) == pytest.approx(float(np.exp(-20 * rates).mean()), rel=0.02)
    assert silent_share(20.0, 0.0) == pytest.approx(math.exp(-20))


def test_on_the_tokens_that_it_takes_to_tell_hardly_a_living_feature_is_silent():
    n = tokens_to_tell(1.3, d_sae=32768, k=32)
    assert silent_share(n * 32 / 32768, 1.3) < 0.005


@pytest.mark.parametrize("spread", [0.5, 1.3, 2.5])
def test_the_spread_is_found_again_in_the_share_that_is_silent(spread):
    share = silent_share(8192 * 32 / 65536, spread)
    assert spread_of_silence(8192, share, d_sae=65536, k=32) == pytest.approx(spread, rel=1e-3)


def test_a_longer_mean_lets_plain_topk_lose_more_features():
    assert predict_stock_dead(2.0, 0.5).value > predict_stock_dead(0.3, 0.5).value


def test_slopes_are_those_between_the_pilots():
    anchor = anchor_of([pilot(), pilot(8192, nmse=0.2), pilot(k=64, nmse=0.125)], 0.5, 0.9)
    assert anchor.slope_k == pytest.approx(-1)


def test_the_cost_of_a_step_is_found_again_at_sizes_that_were_not_timed():
    def seconds(d_sae: int, k: int) -> float:
        return 0.01 + 3e-6 * d_sae + 5e-4 * k

    sizes = ((4096, 32), (8192, 32), (4096, 64), (32768, 32))
    cost = step_cost([pilot(*size, seconds=seconds(*size)) for size in sizes])
    assert cost.seconds(131072, 16) == pytest.approx(seconds(131072, 16), rel=1e-6)
    tokens = cost.tokens(16384, 32, hours=2.0, model_seconds=1e-3)
    assert cost.hours(16384, 32, tokens, model_seconds=1e-3) == pytest.approx(2.0)


def test_timings_that_noise_has_turned_around_give_no_negative_cost():
    cost = step_cost([pilot(4096, seconds=0.2), pilot(8192, seconds=0.1), pilot(k=64, seconds=0.05)])
    assert min(cost.base, cost.per_feature, cost.per_active) >= 0
    assert cost.seconds(1_000_000, 1) > 0


def test_one_pilot_is_no_cost():
    with pytest.raises(ValueError, match="two pilots at least, of different sizes"):
        step_cost([pilot()])


def test_the_rate_falls_with_the_root_of_the_size():
    assert learning_rate(8192) == 1e-3
    assert learning_rate(32768) == pytest.approx(5e-4)
    assert learning_rate(16) == 2e-3
    assert recommended(8192, 32).method == "asi_sparse_adam"


@pytest.mark.parametrize("kind", ["hook", "model", "text"])
def test_held_out_coverage_follows_from_the_committed_rows(kind):
    rows = [row for row in RESULT["rows"] if row["kept_out"] == kind]
    assert plan_fit.coverage(rows) == pytest.approx(RESULT["coverage"][kind])


@pytest.mark.parametrize("kind", ["hook", "model", "text"])
def test_eight_in_ten_of_the_errors_that_were_kept_out_lie_inside(kind):
    assert RESULT["coverage"][kind]["error_inside"] >= 0.8


@pytest.mark.parametrize("kind", ["hook", "model", "text"])
def test_eight_in_ten_of_the_dead_shares_that_were_kept_out_lie_inside(kind):
    found = RESULT["coverage"][kind]
    assert found["dead_inside"] >= 0.8


def test_steps_at_sizes_that_were_not_timed_are_within_fifteen_percent():
    time = json.loads((plan_fit.plan_costs.RESULTS / "time.json").read_text())
    ratios = [row["predicted"] / row["cpu_seconds"] for row in time["rows"] if not row["timed"]]
    assert ratios == pytest.approx([1.0] * 3, abs=0.15)


def test_the_package_brings_the_coefficients_of_the_committed_results():
    assert json.loads(json.dumps(RESULT["fitted"])) == json.loads(plan_fit.FITTED.read_text())


def test_the_fit_finds_planted_coefficients():
    rng = np.random.default_rng(0)
    terms = [{"x": float(x), "k x slope": float(y)} for x, y in rng.standard_normal((200, 2))]
    found = plan_fit.ridge(terms, [0.5 * row["x"] + 0.9 * row["k x slope"] for row in terms], [1.0] * 200)
    assert found == pytest.approx({"x": 0.5, "k x slope": 0.9}, abs=0.05)

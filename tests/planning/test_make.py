"""A plan from a model, from activations, from a spectrum; and what it says to those who ask for the impossible."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import saelens_asi as asi
from saelens_asi.planning import PilotSizes, Plan
from saelens_asi.planning.pilots import run_pilot
from saelens_asi.plots import plan_figure
from saelens_asi.spectra.moments import RunningMoments
from tests.helpers import tiny

PILOTS = PilotSizes(d_sae=(48, 96), k=(4, 8), steps=10, batch=32, held_out=128, timed_d_sae=192)
SIZES: dict[str, Any] = {"d_sae": (48, 96, 192), "k": (4, 8), "pilots": PILOTS, "progress": False}


def planned(**changes: Any) -> Plan:
    return asi.plan(tiny.activations(1000), **{**SIZES, "tokens": (1000, 100_000), **changes})


@pytest.fixture(scope="module")
def made() -> Plan:
    return planned(budget_hours=1.0, memory="24GiB")


def test_there_is_a_row_for_every_size(made):
    sizes = {(row.d_sae, row.k, row.tokens) for row in made.rows}
    assert sizes == {(d, k, n) for d in (48, 96, 192) for k in (4, 8) for n in (1000, 100_000)}


def test_more_takes_more(made):
    least, most = made.predict(48, 4, 1000), made.predict(1920, 4, 100_000)
    assert least.hours < most.hours
    assert least.gib < most.gib
    assert least.disk_gib < most.disk_gib
    assert least.lr >= most.lr


def test_of_a_model_its_own_time_counts(model, dataset):
    made = asi.plan(model, dataset, tiny.ATTN_OUT, **SIZES, tokens=(1000,), context_size=tiny.CONTEXT)
    assert made.hook == tiny.ATTN_OUT
    assert made.model_seconds > 0
    assert made.model_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    own = made.cost.hours(48, 4, 1000)
    assert made.predict(48, 4, 1000).hours == pytest.approx(own + 1000 * made.model_seconds / 3600)


def test_a_spectrum_is_no_measurement(made):
    spectrum = asi.Spectrum.from_moments(RunningMoments.zeros(tiny.D_MODEL).update_(tiny.activations(1000)))
    guessed = asi.plan(spectrum, **SIZES, tokens=(1000,))
    assert not guessed.measured
    assert any("guesses" in warning for warning in guessed.warnings)
    row, known = guessed.predict(96, 4, 1000), made.predict(96, 4, 1000)
    assert row.nmse.high / row.nmse.value > known.nmse.high / known.nmse.value


def test_without_tokens_the_budget_says_how_many(made):
    reached = planned(tokens=None, budget_hours=0.05)
    assert all(row.hours <= 0.05 for row in reached.rows)
    assert max(row.hours for row in reached.rows if row.d_sae == 48) > 0.04


def test_limits_exclude(made):
    assert made.largest is not None
    assert made.largest.d_sae == 192
    assert not planned(memory="1MiB").within
    slow = planned(budget_hours=1e-9)
    assert slow.largest is None
    with pytest.raises(ValueError, match=r"nothing in the table fits budget_hours=1e-09: .* give more"):
        slow.settings()
    assert "nothing in the table fits" in str(slow)


def test_its_config_is_one_that_saelens_takes(made, tmp_path):
    names: dict[str, Any] = {}
    settings = made.settings()
    sae = settings.pop("sae")
    cfg = tiny.runner_config(tiny.sae_config(**sae), tmp_path, **settings)
    assert cfg.sae.optimizer == "sparse_adam"
    assert cfg.lr == made.largest.lr
    exec(made.config(), names)
    assert names["cfg"].sae.initializer == "active_subspace"
    assert names["cfg"].lr_warm_up_steps == settings["lr_warm_up_steps"]


def test_it_says_what_will_go_wrong(made):
    said = "\n".join(made.warnings)
    assert "gamma = " in said
    assert "the mean is long" in said
    assert "Too few tokens for d_sae = 48, 96, 192" in said


def test_a_token_that_holds_the_variance_is_named_and_decides_nothing():
    activations = tiny.activations(1000)
    massive = activations.clone()
    massive[::250] += 300 * activations.std(dim=0)
    assert not any("massive" in warning for warning in planned().warnings)
    made = asi.plan(massive, **SIZES, tokens=(1000,))
    assert any("A thousandth of the tokens hold" in warning for warning in made.warnings)

    train, without = massive[:500], massive[[i for i in range(500, 900) if i % 250]]
    pilot = functools.partial(run_pilot, train, d_sae=48, k=4, steps=10, batch=32)
    of_hook = float(massive.double().var(dim=0, correction=0).sum())
    by_hook, by_itself = (pilot(held_out=without, variance=variance) for variance in (of_hook, None))
    ratio = float(without.double().var(dim=0, correction=0).sum()) / of_hook
    assert ratio < 0.5
    assert by_hook.nmse == pytest.approx(by_itself.nmse * ratio)
    assert by_hook.nmse_at_quarter == pytest.approx(by_itself.nmse_at_quarter * ratio)


def test_few_tokens_are_no_evidence_of_death():
    said = "\n".join(planned(counted_on=100).warnings)
    assert "100 tokens are too few to call a feature dead" in said


def test_it_is_kept_as_json(made, tmp_path):
    read = json.loads(made.save(tmp_path / "plan.json").read_text())
    assert len(read["rows"]) == len(made.rows)
    assert read["rows"][0]["memory"]["peak"] == made.rows[0].memory.peak
    assert read["settings"]["lr"] == made.largest.lr


def test_the_same_activations_give_the_same_predictions():
    first, second = planned(), planned()
    assert [row.nmse for row in first.rows] == [row.nmse for row in second.rows]
    assert [row.dead for row in first.rows] == [row.dead for row in second.rows]


def test_its_figure_shows_a_line_for_every_size(made):
    figure = plan_figure(made)
    left, right = figure.axes
    labels = [line.get_label() for line in left.lines if not line.get_label().startswith("_")]
    assert labels == ["48", "96", "192"]
    assert left.get_xlabel() == right.get_xlabel() == "hours on this machine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (64,)}, r"k=64 must be at least 1, and at most d_sae=48: give a smaller k or a larger d_sae"),
        ({"tokens": (8,)}, r"tokens=8 do not fill one batch of 32"),
        ({"tokens": ()}, r"tokens is empty"),
        ({"d_sae": (0,)}, r"d_sae=0 must be at least 1"),
        ({"memory": "lots"}, r"memory='lots' is no amount of memory: .* '24GiB'"),
        ({"budget_hours": 0.0}, r"budget_hours=0.0 must be more than 0"),
        ({"counted_on": 0}, r"counted_on=0 must be at least 1"),
        ({"tokens": None, "budget_hours": 1e-12}, r"budget_hours=1e-12 ends before"),
    ],
)
def test_errors_name_the_setting_and_a_way_out(changes, message):
    with pytest.raises(ValueError, match=message):
        planned(**changes)


def test_what_it_cannot_read_it_names(model, dataset):
    with pytest.raises(ValueError, match="hook=None: a plan for a model needs"):
        asi.plan(model, dataset, **SIZES)
    with pytest.raises(ValueError, match="source is a str"):
        asi.plan("gpt2", dataset, "h", **SIZES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="100 activations are too few"):
        asi.plan(tiny.activations(100), **SIZES)
    with pytest.raises(ValueError, match=r"shape \(3,\) are no vectors"):
        asi.plan(torch.zeros(3), **SIZES)
    with pytest.raises(ValueError, match="give two different values of each"):
        PilotSizes(k=(4, 4))


def test_a_file_that_is_no_path_is_not_written(made, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        made.save(tmp_path / "missing" / "plan.json")

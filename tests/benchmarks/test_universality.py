"""Each model is read over each text once, and one line a hook is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.claims import records, universality
from benchmarks.claims.of_universality import Measured
from benchmarks.claims.universality import MODELS, PASSES, TEXTS, Pass
from tests.helpers import tiny


@pytest.fixture
def places(tmp_path, monkeypatch, model):
    """Two passes of a tiny model."""
    for module in (records, universality):
        monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(universality, "N_TOKENS", 400)
    monkeypatch.setattr(universality, "CONTEXT", tiny.CONTEXT)
    monkeypatch.setattr(universality, "PASSES", (Pass("tiny", "a"), Pass("tiny", "b")))
    monkeypatch.setattr(universality, "load_documents", lambda text, n: (tiny.tokens(40), None))
    monkeypatch.setattr(universality, "load_model", lambda name, dtype: model)
    monkeypatch.setattr("sys.argv", ["universality"])
    return tmp_path


def test_every_model_is_read_over_every_text():
    assert {(one.model, one.text) for one in PASSES} == {(model, text) for model in MODELS for text in TEXTS}
    assert {one.text for one in PASSES[:3]} == set(TEXTS)


def test_a_line_a_hook_is_kept_and_nothing_is_read_twice(places, monkeypatch, model):
    universality.main()
    rows = records.read("universality")
    names = universality.hook_names(model)
    assert [row["hook"] for row in rows] == 2 * names
    assert [row["hook"] for row in rows if row["last"]] == 2 * names[-1:]
    assert {row["n_tokens"] for row in rows} == {400}
    assert all(0 < row["effective_rank_share"] <= 1 for row in rows)
    assert all((row["effective_rank_shift"] is None) == bool(row["layer"]) for row in rows)
    assert not list((places / "cache" / "universality").iterdir())
    monkeypatch.setattr(universality, "measure", None)
    universality.main()
    assert records.read("universality") == rows


def test_a_pass_that_was_cut_short_writes_what_is_missing(places, model):
    universality.main()
    path = records.results_file("universality")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    universality.main()
    assert path.read_text().splitlines(keepends=True) == lines


def test_what_is_before_a_norm_is_a_kind_of_its_own():
    points = {name: object() for name in ("blocks.0.attn.hook_z", "blocks.0.hook_resid_post")}
    for kind in ("attn", "mlp"):
        points |= {f"blocks.0.hook_{kind}_out": object(), f"blocks.0.{kind}.hook_out": object()}
    model = SimpleNamespace(cfg=SimpleNamespace(n_layers=1), hook_dict=points)
    names = universality.hook_names(model)
    assert names[4:] == ["blocks.0.attn.hook_out", "blocks.0.mlp.hook_out"]
    points["blocks.0.attn.hook_out"] = points["blocks.0.hook_attn_out"]  # no norm there
    assert universality.hook_names(model)[4:] == ["blocks.0.mlp.hook_out"]
    rows = [{"kind": kind, "layer": 0} for kind in ("attn_out", "hook_z", "attn_out before the norm")]
    assert Measured("m", "t", rows).written_by_attention == "attn_out before the norm"
    assert Measured("m", "t", rows[:2]).written_by_attention == "attn_out"

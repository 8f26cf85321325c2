"""The plan gives every contender the same, results belong to it, and several processes may train it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.claims import page, plan, records, rule, sections, sources, train
from benchmarks.claims.evidence import ResultFiles
from benchmarks.claims.plan import CONTENDERS, PARTS, Item, items, tries
from benchmarks.claims.records import is_among
from benchmarks.claims.rivals import RIVALS
from benchmarks.claims.train import asked
from saelens_asi.sweep import Cell
from tests.helpers import tiny
from tests.helpers.processes import in_processes

ITEM = Item(
    part="pilot", contender="TopK, zeros, all of d", model="m", text="t", hook="blocks.0.hook_attn_out",
    cell=Cell(d_sae=48, k=4), tokens=320, batch=32,
)  # fmt: skip


def test_every_contender_has_as_many_tries():
    tries = Counter(item.contender for item in items(["pilot", "pilot_rivals"]))
    assert set(tries) == {*CONTENDERS, *RIVALS}
    assert set(tries.values()) == {4}


def test_a_window_of_the_pilot_lets_the_auxiliary_loss_act():
    assert all(item.window < item.tokens for item in items(["pilot"]) if item.contender.startswith("AuxK"))


def test_no_item_is_there_twice():
    keys = [json.dumps(item.key(), sort_keys=True) for item in items(PARTS)]
    assert len(set(keys)) == len(keys)


def test_contenders_differ_in_what_their_names_say():
    for name, cell in CONTENDERS.items():
        trained, centre, directions = name.split(", ")
        assert cell["center"] == centre
        assert cell["subspace"] == ("full" if directions == "all of d" else "active")
        assert cell["optimizer"] == ("sparse_adam" if trained.startswith("SparseAdam") else "adam")
        assert cell.get("silent_moments") == ("decay" if trained.endswith("(moments decay)") else None)


@pytest.mark.parametrize("part", PARTS)
def test_results_are_those_of_the_plan(part):
    planned = [item.key() for item in items([part])]
    for row in records.read(part):
        assert any(all(row.get(name) == value for name, value in key.items()) for key in planned), row


def test_the_smallest_source_that_is_large_enough_is_taken():
    hook = sources.MAIN_HOOK["smollm2"]
    assert sources.find("smollm2", "linux-doc", hook, 200_000).n_training == 300_000
    assert sources.find("smollm2", "linux-doc", hook, 1_000_000) == sources.MAIN
    assert sources.find("smollm2", "python", hook, 10**9).n_training == 500_000
    with pytest.raises(ValueError, match="no source holds activations of nowhere"):
        sources.find("smollm2", "python", "nowhere")


def test_what_was_set_aside_was_not_looked_at():
    for model, layers in sources.SET_ASIDE.items():
        assert not set(layers) & set(sources.LOOKED_AT[model])
    assert {source.text for source in sources.BY_HOOK}.isdisjoint(source.text for source in sources.BY_HOOK_ASIDE)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "CACHE", tmp_path / "cache")
    return tmp_path


def test_a_line_is_kept_and_found_again(places):
    assert records.read("pilot") == []
    records.keep("pilot", {**ITEM.key(), "nmse": 0.5})
    assert records.is_among(records.read("pilot"), ITEM.key())
    assert not records.is_among(records.read("pilot"), {**ITEM.key(), "seed": 1})


def _take(cache: Path) -> bool:
    records.CACHE = cache
    with records.taken(ITEM.key()) as mine:
        torch.distributed.barrier()
        return mine


def test_one_process_at_a_time_has_an_item(places):
    taken = in_processes(2, _take, places / "cache")
    assert sorted(taken) == [False, True]
    with records.taken(ITEM.key()) as mine:  # whoever had it has ended
        assert mine


def test_an_item_is_trained_once_and_measured_on_held_out_activations(places, monkeypatch, capsys):
    x = tiny.activations(600) + 1
    calls: list[Item] = []
    monkeypatch.setattr(train, "activations", lambda source, hook: (x[:400].half(), x[400:].half()))
    monkeypatch.setattr(Item, "source", "a source")
    monkeypatch.setattr(train, "items", lambda parts: [ITEM])
    monkeypatch.setattr(train, "LEAST_FOR_A_CURVE", 1)
    original = train.train
    monkeypatch.setattr(train, "train", lambda *given: calls.append(given[0]) or original(*given))
    monkeypatch.setattr("sys.argv", ["train", "pilot"])
    threads = torch.get_num_threads()
    try:
        train.main()
        train.main()
    finally:
        torch.set_num_threads(threads)
    (row,) = records.read("pilot")
    assert calls == [ITEM]
    assert row["n_tokens"] == 200
    assert row["gamma"] > 0.5
    assert [point[0] for point in row["curve"]] == [32, 64, 160, 256]
    assert row["curve"][-1][1] < row["curve"][0][1]


def test_rules_are_read_off_between_the_dimensions_that_were_tried():
    rows = [{"d_init_used": d, "nmse": e, "silent_fraction": s} for d, e, s in ((10, 1.1, 0.2), (100, 1.0, 0.0))]
    assert rule.at(rows, 10) == (pytest.approx(0.1), 0.2)
    assert rule.at(rows, 1000) == (0.0, 0.0)
    assert rule.at(rows, 10**1.5) == (pytest.approx(0.05), pytest.approx(0.1))


def test_a_line_with_a_setting_that_a_cell_leaves_out_is_no_line_of_that_cell():
    kept, decaying = (Cell(silent_moments=name).to_dict() for name in ("keep", "decay"))
    assert is_among([kept], kept)
    assert is_among([decaying], decaying)
    assert not is_among([decaying], kept)
    assert not is_among([kept], decaying)


def test_items_are_asked_for_by_model_and_by_contender_in_its_order():
    names = ["TopK, mean, active", "AuxK, zeros, all of d"]
    found = asked(["pilot", "d_init"], "smollm2", names)
    assert list(dict.fromkeys(item.contender for item in found)) == names
    assert len(found) == sum(len(tries(name)) for name in names)
    assert {item.model for item in asked(["d_init"], "gemma3-270m", None)} == {"gemma3-270m"}


def test_the_page_names_every_part_of_the_plan():
    text = "\n".join(sections.progress(ResultFiles()))
    for part in PARTS:
        assert f"| {part} |" in text
        assert sections.DESCRIPTIONS[part] in text
    assert page.TEXTS.keys() >= {"plan", "pilot", "factorial", "d_init", "d_init_aside"}


def test_best_tries_go_on(monkeypatch):
    rows: list[dict[str, Any]] = [
        {"contender": "TopK, zeros, all of d", "lr": lr, "window": 1, "nmse": abs(lr - 0.002)} for lr in plan.RATES
    ]
    monkeypatch.setattr(plan, "read", lambda part: rows)
    assert plan.chosen("TopK, zeros, all of d") == {"lr": 0.002, "window": 1}
    monkeypatch.setattr(plan, "read", lambda part: rows[:3])
    assert plan.chosen("TopK, zeros, all of d") is None

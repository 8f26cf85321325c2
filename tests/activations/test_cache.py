"""Activations on disk: what the model computes, whatever interrupts the pass, and none but what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saelens_asi.activations import cache as activation_cache
from saelens_asi.activations import reader
from saelens_asi.activations.cache import cache_activations
from saelens_asi.activations.hooks import hook_points, read_activations
from tests.helpers import tiny

HOOKS = ["blocks.0.hook_attn_out", "blocks.1.attn.hook_z"]
HOW: dict[str, Any] = {"batch_size": 4, "context_size": 16, "progress": False}


def _expected(model: Any, name: str, n: int) -> torch.Tensor:
    tokens = torch.tensor(tiny.tokens()["tokens"])
    found: list[torch.Tensor] = []
    read_activations(model, tokens, hook_points(model, [name]), {name: found.append})
    return found[0].flatten(0, 1).flatten(1)[:n]


def test_it_holds_what_the_model_computes(model, dataset, tmp_path):
    cached = cache_activations(tmp_path, model, dataset, HOOKS, 500, **HOW)
    assert list(cached) == HOOKS
    for name in HOOKS:
        torch.testing.assert_close(cached[name], _expected(model, name, 500))


def test_a_finished_cache_needs_neither_model_nor_data(model, dataset, tmp_path):
    first = cache_activations(tmp_path, model, dataset, HOOKS, 300, **HOW)

    def never() -> Any:
        raise AssertionError("was asked for")

    again = cache_activations(tmp_path, never, never, HOOKS, 300, **HOW)
    assert all(torch.equal(again[name], first[name]) for name in HOOKS)


def test_an_interrupted_pass_continues_to_the_same_activations(model, dataset, tmp_path, monkeypatch):
    whole = cache_activations(tmp_path / "whole", model, dataset, HOOKS, 400, **HOW)
    monkeypatch.setattr(activation_cache, "_SAVE_SECONDS", 0)
    stock, calls = reader.read_activations, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        stock(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_activations", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache_activations(tmp_path / "parts", model, dataset, HOOKS, 400, **HOW)
    state = json.loads((tmp_path / "parts" / "cache.json").read_text())
    assert state["n_batches"] == 3
    assert not state["complete"]
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_activations", lambda *args: (calls.append(args), stock(*args)))
        parts = cache_activations(tmp_path / "parts", model, dataset, HOOKS, 400, **HOW)
    assert all(torch.equal(parts[name], whole[name]) for name in HOOKS)
    assert len(calls) == -(-400 // (4 * 16)) - 3


def test_data_that_ends_before_gives_fewer_rows_and_says_so(model, dataset, tmp_path, caplog):
    cached = cache_activations(tmp_path, model, dataset.select(range(8)), HOOKS, 10_000, **HOW)
    assert {len(x) for x in cached.values()} == {8 * 16}
    assert "the data ended after 128 of n_tokens=10000" in caplog.text


def test_a_folder_of_other_settings_is_refused(model, dataset, tmp_path: Path):
    cache_activations(tmp_path, model, dataset, HOOKS, 100, **HOW)
    with pytest.raises(ValueError, match="n_tokens was 100 and is 200"):
        cache_activations(tmp_path, model, dataset, HOOKS, 200, **HOW)


def test_data_without_tokens_that_count_is_refused(model, dataset, tmp_path):
    bos_only = torch.full((4, 16), tiny.tokenizer().bos_token_id)
    with pytest.raises(ValueError, match="no token that counts"):
        cache_activations(tmp_path, model, bos_only, HOOKS, 100, **HOW)

"""The batches of a run with the flags are SAELens's own, and a place among them leads to the very next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.training.activations_store import ActivationsStore

from saelens_asi.plugin.batches import (
    SaveableStore,
    generators,
    load_place,
    make_saveable,
    place_after,
    save_place,
    set_generators,
)
from tests.helpers import tiny


def _rows(kind: str, folder: Path) -> Any:
    if kind == "tokens":
        return tiny.tokens(40)
    files = str(tiny.save_text(folder, 30, 21) / "train.jsonl")
    return load_dataset(
        "json", data_files=files, split="train", streaming=kind == "streamed", cache_dir=str(folder / "hf")
    )


def _store(model: Any, dataset: Any, **changes: Any) -> ActivationsStore:
    cfg = tiny.runner_config(tiny.sae_config(), "unused", **changes)
    return ActivationsStore.from_config(model, cfg, override_dataset=dataset)


@pytest.mark.parametrize("kind", ["tokens", "text", "streamed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activations_mixing_fraction": 0.0},
        {"activations_mixing_fraction": 0.9},
        {"disable_concat_sequences": True},
        {"prepend_bos": False},
        {"sequence_separator_token": None},
        {"sequence_separator_token": "eos", "exclude_special_tokens": True},
        {"context_size": 7, "n_batches_in_buffer": 9, "store_batch_size_prompts": 3},
        {"seqpos_slice": (2, 9), "n_batches_in_buffer": 31},
    ],
    ids=str,
)
def test_batches_are_saelens_own(kind, changes, model, tmp_path):
    """Over more than two epochs, with the same random numbers drawn."""
    seen, states = [], []
    for saveable in (False, True):
        store = _store(model, _rows(kind, tmp_path), **changes)
        if saveable:
            assert make_saveable(store)
        torch.manual_seed(1)
        seen.append([next(store) for _ in range(60)])
        states.append((torch.get_rng_state(), store.n_dataset_processed))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1] > 60


@given(n_before=st.integers(0, 70), context=st.sampled_from([5, 16]), with_activations=st.just(True))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("kind", ["tokens", "text", "streamed"])
def test_any_place_leads_to_the_next_batch(kind, n_before, context, with_activations, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    changes = {"context_size": context, "store_batch_size_prompts": 3}
    store = _store(model, _rows(kind, folder), **changes)
    make_saveable(store)
    torch.manual_seed(2)
    for _ in range(n_before):
        next(store)
    assert isinstance(store, SaveableStore)
    place = store.batches.place() if store.batches is not None else store.read_anew(None).place()
    save_place(folder / "place.safetensors", place, with_activations)
    states = generators()
    expected = [next(store).clone() for _ in range(25)]

    other = _store(model, _rows(kind, folder), **changes)
    make_saveable(other)
    assert isinstance(other, SaveableStore)
    other.read_anew(load_place(folder / "place.safetensors", "cpu"))
    set_generators(states)
    assert all(torch.equal(next(other), batch) for batch in expected)


def test_without_its_activations_a_place_keeps_the_row(model, tmp_path):
    store = _store(model, tiny.tokens(200))
    make_saveable(store)
    for _ in range(5):
        batch = next(store)
    place = place_after(batch)
    assert place is not None
    save_place(tmp_path / "place", place, with_activations=False)
    again = load_place(tmp_path / "place", "cpu")
    assert (again.mixing, again.serving) == (None, None)
    assert again.sequences == place.sequences
    assert place.n_activations > 0
    assert again.n_activations == 0


def test_a_store_that_was_read_from_cannot_be_made_saveable(model):
    store = _store(model, tiny.tokens())
    next(store)
    assert not make_saveable(store)


def test_a_second_look_does_not_move_a_saveable_store(model):
    from saelens_asi.plugin.stream import rewound

    store = _store(model, tiny.tokens())
    make_saveable(store)
    next(store)
    before = store.batches.place()
    rewound(store).get_batch_tokens(4)
    assert store.batches.place().sequences == before.sequences
    assert store.n_dataset_processed == before.n_rows


def test_generators_go_back_to_where_they_were():
    import random

    import numpy as np

    states = generators()
    drawn = [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(3).tolist(), random.random()]
    set_generators(states)
    assert drawn == [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(3).tolist(), random.random()]

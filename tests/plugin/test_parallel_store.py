"""The language model of several processes, each with a share of the sequences: activations are those of one process."""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, cache_activations_runner
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from saelens_asi.plugin.batches import SaveableStore, make_saveable
from saelens_asi.plugin.parallel_store import (
    ParallelStore,
    paused_together,
    share_model_,
    stop_together,
    world_of,
)
from saelens_asi.plugin.stream import open_stream
from saelens_asi.sparse.shards import ALONE, Processes
from tests.helpers import tiny
from tests.helpers.processes import in_processes

HOOKS = {tiny.ATTN_OUT: tiny.D_MODEL, "blocks.0.attn.hook_z": tiny.HOOK_Z_WIDTH}


class RowByRow:
    """A model that has the same bits for a sequence whatever else is in its batch, and counts the sequences it saw."""

    def __init__(self) -> None:
        self.model, self.n_seen = tiny.hooked_transformer(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def run_with_cache(self, tokens: Tensor, **how: Any) -> tuple[None, dict[str, Tensor]]:
        self.n_seen += len(tokens)
        caches = [self.model.run_with_cache(row[None], **how)[1] for row in tokens]
        return None, {name: torch.cat([cache[name] for cache in caches]) for name in how["names_filter"]}


def _store(changes: dict[str, Any], model: Any = None) -> ActivationsStore:
    settings = dict(changes)
    sae = tiny.sae_config(d_in=settings.pop("d_in", tiny.D_MODEL))
    cfg: LanguageModelSAERunnerConfig[Any] = tiny.runner_config(sae, "unused", **settings)
    return ActivationsStore.from_config(model or RowByRow(), cfg, override_dataset=tiny.tokens(60))


def _multi_hook_store(changes: dict[str, Any]) -> ActivationsStore:
    sizes: dict[str, Any] = {
        "context_size": tiny.CONTEXT,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": tiny.BATCH,
    }
    return ActivationsStore.from_config_multi_hook(
        RowByRow(),
        dataset=tiny.tokens(60),
        hook_names=list(HOOKS),
        hook_d_ins=HOOKS,
        **{**sizes, **changes},
    )


def _shared(store: ActivationsStore, saveable: bool = True, saveable_first: bool = True) -> ActivationsStore:
    world = Processes.spread(1, "cpu").world
    if saveable and saveable_first:
        assert make_saveable(store)
    share_model_(store, world)
    if saveable and not saveable_first:
        assert make_saveable(store)
    return store


def _batches(changes: dict[str, Any], saveable: bool, saveable_first: bool) -> tuple[list[Tensor], Tensor, int, int]:
    store = _shared(_store(changes), saveable, saveable_first)
    torch.manual_seed(1)
    batches = [next(store).clone() for _ in range(40)]
    world = world_of(store)
    return batches, torch.get_rng_state(), store.model.n_seen, world.traffic.calls


@pytest.mark.parametrize(
    ("n", "changes"),
    [
        (2, {}),
        (3, {}),
        (4, {"store_batch_size_prompts": 3, "n_batches_in_buffer": 9}),
        (2, {"seqpos_slice": (2, 9), "n_batches_in_buffer": 31}),
        (3, {"exclude_special_tokens": [7, 9, 30]}),
        (2, {"hook_name": "blocks.0.attn.hook_z", "d_in": tiny.HOOK_Z_WIDTH}),
        (2, {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 1, "d_in": 4}),
        (2, {"autocast_lm": True}),
    ],
    ids=str,
)
def test_batches_have_the_bits_of_one_process(n: int, changes: dict[str, Any]) -> None:
    """Over more than two epochs, and each sequence goes through the model once."""
    expected, state, n_seen, _ = _batches(changes, True, True)
    told = in_processes(n, _batches, changes, True, True)
    for batches, own_state, _, n_calls in told:
        assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
        assert torch.equal(own_state, state)
        assert n_calls >= n_seen / changes.get("store_batch_size_prompts", 8)
    shares = [own for _, _, own, _ in told]
    assert sum(shares) == n_seen
    assert min(shares) < n_seen


@pytest.mark.parametrize(("saveable", "saveable_first"), [(False, False), (True, False)])
def test_any_store_can_be_shared(saveable: bool, saveable_first: bool) -> None:
    expected = _batches({}, saveable, saveable_first)[0]
    for batches, *_ in in_processes(2, _batches, {}, saveable, saveable_first):
        assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))


def _multi_hook_batches(changes: dict[str, Any]) -> list[dict[str, Tensor]]:
    loader = _shared(_multi_hook_store(changes)).get_multi_hook_data_loader()
    torch.manual_seed(1)
    return [{name: x.clone() for name, x in next(loader).items()} for _ in range(20)]


@pytest.mark.parametrize(("n", "changes"), [(2, {}), (4, {"store_batch_size_prompts": 3, "autocast_lm": True})])
def test_batches_of_several_hooks_too(n: int, changes: dict[str, Any]) -> None:
    expected = _multi_hook_batches(changes)
    for batches in in_processes(n, _multi_hook_batches, changes):
        for one, other in zip(batches, expected, strict=True):
            assert one.keys() == other.keys() == HOOKS.keys()
            assert all(torch.equal(one[name], other[name]) for name in HOOKS)


def _of_plain_model() -> tuple[Tensor, float, int]:
    store = _shared(_store({}, tiny.hooked_transformer()))
    acts = store.get_activations(store.get_batch_tokens(5))
    world = world_of(store)
    return acts, world.traffic.n_bytes, world.traffic.calls


def test_a_real_model_gives_the_same_up_to_rounding_and_each_activation_travels_once() -> None:
    expected, n_bytes, n_calls = _of_plain_model()
    assert (n_bytes, n_calls) == (0, 0)
    for acts, n_bytes, n_calls in in_processes(2, _of_plain_model):
        torch.testing.assert_close(acts, expected, rtol=1e-5, atol=1e-6)
        # Of five sequences three, to one other process.
        assert (n_bytes, n_calls) == (3 * expected[0].numel() * 4, 1)


def test_a_process_that_is_alone_keeps_its_store() -> None:
    store = _store({})
    share_model_(store, ALONE)
    assert type(store) is ActivationsStore
    assert world_of(store) is ALONE


def _cached(folder: str) -> tuple[list[Tensor], float]:
    changes = {"use_cached_activations": True, "cached_activations_path": folder}
    store = _shared(_store(changes))
    torch.manual_seed(1)
    return [next(store).clone() for _ in range(10)], world_of(store).traffic.n_bytes


def test_of_activations_from_a_cache_their_order_alone_travels(tmp_path, model, dataset, monkeypatch) -> None:
    monkeypatch.setattr(cache_activations_runner, "load_model", lambda **_: model)
    folder = str(tmp_path / "cache")
    CacheActivationsRunner(tiny.cache_config(folder), override_dataset=dataset).run()
    expected, _ = _cached(folder)
    for batches, n_bytes in in_processes(2, _cached, folder):
        assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
        assert 0 < n_bytes < batches[0].nbytes * len(batches) / 4


def _second_look(is_prefetched: bool) -> tuple[list[Tensor], list[Tensor], int]:
    store = _shared(_store({}))
    world = world_of(store)
    torch.manual_seed(1)
    provider: Any = PrefetchingIterator(iter(store), prefetch=2) if is_prefetched else store
    evaluator = type("Evaluator", (), {"activations_store": store})()
    if world.rank == 1:  # so that the prefetchers have come to different places
        time.sleep(0.3)
    first = [next(provider).clone() for _ in range(3)]
    with open_stream(provider, evaluator, [tiny.ATTN_OUT]) as stream:
        assert not stream.is_training_stream
        looks = [batch[tiny.ATTN_OUT].clone() for batch in itertools.islice(stream.batches, 5)]
        # The main thread speaks with the others meanwhile, in a group of its own.
        total = int(world.sum_(torch.tensor(world.rank)))
    later = [next(provider).clone() for _ in range(20)]
    if is_prefetched:
        if world.rank == 1:
            time.sleep(0.3)
        stop_together(provider, store)
        provider.close()
    return looks, first + later, total


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("is_prefetched", [False, True])
def test_a_second_look_is_shared_too_and_moves_nothing(n: int, is_prefetched: bool) -> None:
    looks, batches, _ = _second_look(False)
    for own_looks, own_batches, total in in_processes(n, _second_look, is_prefetched):
        assert all(torch.equal(a, b) for a, b in zip(own_looks, looks, strict=True))
        # A prefetcher draws its orders while others draw; without one the batches are to the bit those of one process.
        if not is_prefetched:
            assert all(torch.equal(a, b) for a, b in zip(own_batches, batches, strict=True))
        assert [batch.shape for batch in own_batches] == [batch.shape for batch in batches]
        assert total == n * (n - 1) // 2


def _copy_is_shared() -> tuple[bool, int]:
    store = _shared(_store({}))
    other = copy.copy(store)
    other.get_activations(other.get_batch_tokens(4))
    return isinstance(other, ParallelStore) and isinstance(other, SaveableStore), store.model.n_seen


def test_a_copy_runs_its_share_and_no_more() -> None:
    assert in_processes(2, _copy_is_shared) == [(True, 2), (True, 2)]


def _pause_at_once(n_times: int) -> list[int]:
    """How many sequences each process's model has seen whenever all prefetchers are held."""
    store = _shared(_store({"activations_mixing_fraction": 0.0}))
    world = world_of(store)
    prefetcher: PrefetchingIterator[Tensor] = PrefetchingIterator(iter(store), prefetch=4)
    seen = []
    for i in range(n_times):
        if world.rank == i % world.size:
            time.sleep(0.05)
        next(prefetcher)
        with paused_together(prefetcher, world):
            seen.append(store.model.n_seen)
    stop_together(prefetcher, store)
    prefetcher.close()
    return seen


def test_prefetchers_are_held_between_the_same_two_readings() -> None:
    first, second = in_processes(2, _pause_at_once, 12)
    assert first == second
    assert first[-1] > first[0] > 0

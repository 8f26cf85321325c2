"""SAELens's activations, where the language model runs on a share of the sequences in each of several processes.

Each activation is computed once and travels once: all processes have all of them then, in the order of the sequences,
and what follows (special tokens, mixing, batches) is as in one process. One thing may differ: a model that sees fewer
sequences at a time multiplies smaller matrices, which may round in another way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from saelens_asi.plugin.batches import SaveableStore
from saelens_asi.sparse.shards import ALONE, Group, Shard

# How long a process waits for its own prefetcher, and then before it tries again, in seconds.
_PATIENCE, _PAUSE = 0.5, 0.01


class ParallelStore(ActivationsStore):
    """Mixed into a store's class: its model runs on this process's share of the sequences. Copies share them too.

    Attributes:
        world: the processes, as their main threads speak with one another.
        readers: the same processes, for activations alone: a prefetcher reads them in a thread of its own.
    """

    world: Group
    readers: Group

    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        """As SAELens has it, (n_sequences, n_positions, d_in). Collective."""
        read = super().get_activations
        return self._of_all(batch_tokens, lambda own: {self.hook_name: read(own)})[self.hook_name]

    def get_multi_hook_activations(self, batch_tokens: Tensor) -> dict[str, Tensor]:
        """As SAELens has it, but on the store's device. Collective."""
        return self._of_all(batch_tokens, super().get_multi_hook_activations)

    @torch.no_grad()
    def _of_all(self, tokens: Tensor, read: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The activations of all sequences by hook, of which this process reads its share."""
        n, group = len(tokens), self.readers
        parts = group.parts(n)
        own = tokens[parts[group.rank].start : parts[group.rank].stop]
        acts = {name: x.to(self.device) for name, x in read(own).items()} if len(own) else {}
        if n < group.size:
            described = group.gather_objects({name: (x.shape, x.dtype) for name, x in acts.items()})
            acts = acts or self._none_of(described)
        return {name: torch.cat(group.gather_rows(x, list(map(len, parts)))) for name, x in acts.items()}

    def _none_of(self, described: list[dict[str, tuple[torch.Size, torch.dtype]]]) -> dict[str, Tensor]:
        """Activations of no sequence, as others have them of some."""
        shapes = next(one for one in described if one)
        return {
            name: torch.empty(0, *shape[1:], dtype=dtype, device=self.device) for name, (shape, dtype) in shapes.items()
        }


@cache
def _parallel_class(base: Any) -> Any:
    return type(base.__name__, (ParallelStore, base), {"__module__": __name__})


def share_model_(store: ActivationsStore, world: Group) -> None:
    """Have the processes of a group share a store's forward passes; all must call it, and read the same sequences.

    Makes a process group, of which activations alone make use: gloo for a store on a CPU, otherwise the default. One
    process that is alone leaves the store as it is; activations that come from a cache are read as ever.
    """
    if world.size == 1 or isinstance(store, ParallelStore):
        return
    handle = dist.new_group(backend="gloo" if store.device.type == "cpu" else None)
    store.__class__ = _parallel_class(type(store))  # type: ignore[arg-type]
    vars(store).update(world=world, readers=replace(world, handle=handle))


@contextmanager
def paused_together(prefetcher: PrefetchingIterator[Any], group: Group) -> Iterator[None]:
    """Hold the prefetchers of all processes still, between the same two readings of the model. Collective.

    One that is stopped while another waits for its activations would never get them: a process that finds its own
    prefetcher at work lets the others go on, and they all try again.
    """
    lock = prefetcher._lock
    while True:
        is_held = lock.acquire(timeout=_PATIENCE)
        try:
            all_held = all(group.gather_objects(is_held))
        except BaseException:
            if is_held:
                lock.release()
            raise
        if all_held:
            break
        if is_held:
            lock.release()
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class _Together:
    """An evaluator in several processes, which hold their prefetchers still and count the features of all."""

    evaluator: Any
    prefetcher: PrefetchingIterator[Any] | None
    shard: Shard

    @property
    def activations_store(self) -> ActivationsStore | None:
        return getattr(self.evaluator, "activations_store", None)

    def __call__(self, sae: Any, data_provider: object, activation_scaler: Any) -> dict[str, Any]:
        with ExitStack() as stack:
            if self.prefetcher is not None:
                stack.enter_context(paused_together(self.prefetcher, self.shard.world))
                data_provider = self.activations_store  # or SAELens would pause the prefetcher once more
            metrics: dict[str, Any] = self.evaluator(sae, data_provider, activation_scaler)
        counted = metrics.get("sparsity")
        if isinstance(counted, dict):  # l0 and l1 of this process's features
            of_all = self.shard.features.sum_(torch.tensor(list(counted.values()), dtype=torch.float64))
            metrics["sparsity"] = dict(zip(counted, of_all.tolist(), strict=True))
        return metrics


def evaluated_together(evaluator: Any, data_provider: object, shard: Shard) -> Any:
    """SAELens's evaluator for an SAE that is spread over processes, all of which call it; as it is for a whole one."""
    if evaluator is None or shard.is_whole:
        return evaluator
    prefetcher = data_provider if isinstance(data_provider, PrefetchingIterator) else None
    return _Together(evaluator, prefetcher, shard)


def stop_together(prefetcher: PrefetchingIterator[Any], store: ActivationsStore) -> None:
    """Have the prefetchers of all processes end before their next reading, so that each can be closed. Collective.

    One that is closed alone leaves the others waiting for its activations, and whoever closes those with them.
    """
    with paused_together(prefetcher, world_of(store)):
        if isinstance(store, SaveableStore) and store.batches is not None:
            store.batches.stop()


def world_of(store: ActivationsStore) -> Group:
    """The processes that share a store's forward passes, as their main threads speak with one another."""
    return store.world if isinstance(store, ParallelStore) else ALONE

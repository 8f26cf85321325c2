"""The place of a run in its data: saved with a checkpoint, gone back to by a resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from sae_lens.synthetic.training import SyntheticActivationIterator
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from saelens_asi.activations.fingerprint import data_fingerprint, model_fingerprint
from saelens_asi.plugin.batches import (
    Place,
    SaveableStore,
    generators,
    load_place,
    make_saveable,
    place_after,
    save_place,
    set_generators,
)
from saelens_asi.plugin.parallel_store import stop_together, world_of
from saelens_asi.plugin.stream import Provider, find_store
from saelens_asi.resume import load_tensors, save_tensors

logger = logging.getLogger(__name__)

PLACE, GENERATORS, PROVIDER = "data_place.safetensors", "generators.safetensors", "data_provider.pt"


class DataState:
    """Where a trainer's data provider is: one of SAELens's own, or one with ``state_dict`` and ``load_state_dict``."""

    def __init__(self, provider: Provider, evaluator: object) -> None:
        self.provider = self._source = provider
        self._store = find_store(provider, evaluator)
        self.place: Place | None = None
        self._pending: Mapping[str, Tensor] | None = None
        self._prefetch: int | None = None
        self._own_prefetcher: PrefetchingIterator[Any] | None = None
        self.untrained: Tensor | None = None
        self._warned = False
        if self._store is not None and not isinstance(provider, PrefetchingIterator):
            make_saveable(self._store)

    def drawn(self, batch: Tensor) -> None:
        """Note a batch whose step begins: if that fails, a resume has to begin with it."""
        self.untrained = batch

    def trained_on(self, batch: Tensor) -> None:
        """Note the place after a batch whose step is done: a prefetcher may be ahead of it."""
        self.place, self.untrained = place_after(batch) or self.place, None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What of a store decides on its batches: its settings, and what tells its model and data from others."""
        store = self._store
        if store is None:
            return {}
        names = (
            *("context_size", "store_batch_size_prompts", "n_batches_in_buffer", "activations_mixing_fraction"),
            *("prepend_bos", "seqpos_slice", "disable_concat_sequences", "sequence_separator_token"),
            *("use_chat_formatting",),
        )
        excluded = store.exclude_special_tokens
        hook_names = store._hook_names or [store.hook_name]
        return {
            **{name: getattr(store, name) for name in names},
            "exclude_special_tokens": None if excluded is None else excluded.tolist(),
            "hook_names": hook_names,
            "model": model_fingerprint(store.model),
            "dataset": None if store.dataset is None else data_fingerprint(store.dataset),
        }

    def save(self, folder: Path, buffer_bytes: float) -> None:
        """Write what later batches follow from.

        Args:
            folder: of the checkpoint.
            buffer_bytes: up to this size, the activations of the mixing buffer are written too.
        """
        place = self._current_place()
        states = generators()
        if place is not None:
            with_activations = place.n_bytes <= buffer_bytes
            save_place(folder / PLACE, place, with_activations)
            if isinstance(self.provider, PrefetchingIterator):
                states["torch"] = place.rng
            if not with_activations:
                logger.warning(
                    "checkpoint_buffer is below the %.2f GiB of the mixing buffer: a resume does not repeat its %d "
                    "activations, which training then never sees, and mixes those after them in another order",
                    place.n_bytes / 2**30,
                    place.n_activations,
                )
        elif hasattr(self._source, "state_dict"):
            torch.save(self._source.state_dict(), folder / PROVIDER)
        elif not isinstance(self._source, SyntheticActivationIterator):
            self._warn_of_place()
        if place is None and self.untrained is not None:
            states["untrained"] = self.untrained
        save_tensors(folder / GENERATORS, states)

    def _current_place(self) -> Place | None:
        store = self._store
        if not isinstance(store, SaveableStore):
            return None
        if isinstance(self.provider, PrefetchingIterator):
            return self.place
        place = store.batches.place() if store.batches is not None else store.read_anew(None).place()
        return place if self.untrained is None else place.one_batch_before(store.train_batch_size_tokens)

    def _warn_of_place(self) -> None:
        if not self._warned:
            logger.warning(
                "checkpoints do not hold the place in the data: %s has no state_dict. A resume goes on with whatever "
                "it gives then",
                type(self._source).__name__,
            )
        self._warned = True

    def load(self, folder: Path) -> None:
        """Go to the place of a checkpoint; what a prefetcher has read before is dropped. Random states wait for
        ``start``: until then, others may draw."""
        self._stop_prefetching()
        store = self._store
        if isinstance(store, SaveableStore) and (folder / PLACE).exists():
            self.place = load_place(folder / PLACE, store.device)
            batches = store.read_anew(self.place)
            store.is_placed = True
            if self.place.mixing is None and self.place.serving is None:
                logger.warning("this checkpoint holds no mixing buffer: the batches from here on are others")
            if store._hook_names is not None:
                self.provider = batches
        elif isinstance(store, SaveableStore):
            batches = store.read_anew(None)
            if store._hook_names is not None:
                self.provider = batches
            logger.warning("%s holds no place in the data, only the row that was reached: no exact resume", folder)
        elif (folder / PROVIDER).exists() and hasattr(self._source, "load_state_dict"):
            self._source.load_state_dict(torch.load(folder / PROVIDER, weights_only=True))
        elif store is None and not isinstance(self._source, SyntheticActivationIterator):
            self._warn_of_place()
        if (folder / GENERATORS).exists():
            states = load_tensors(folder / GENERATORS)
            if "untrained" in states:
                first: Any = [states.pop("untrained")]
                self.provider = chain(first, self._source)
            self._pending = states

    def _stop_prefetching(self) -> None:
        """A runner winds its store forward next, which must not happen while a prefetcher reads from it."""
        if not isinstance(self.provider, PrefetchingIterator) or self._store is None:
            return
        stop_together(self.provider, self._store)
        self._prefetch = self.provider._queue.maxsize
        self.provider.close()

    def stop_together(self) -> None:
        """Have a prefetcher of several processes read no more, so that each can close its own. Collective."""
        provider, store = self.provider, self._store
        if isinstance(provider, PrefetchingIterator) and store is not None and world_of(store).size > 1:
            stop_together(provider, store)

    def start(self) -> Provider:
        """Set the generators as they were; returns what the trainer draws from."""
        if self._pending is not None:
            set_generators(self._pending)
            self._pending = None
        if self._prefetch is not None and self._store is not None:
            source: Any = self._store
            if self._store._hook_names is not None and isinstance(self._store, SaveableStore):
                source = self._store.batches
            self._own_prefetcher = self.provider = PrefetchingIterator(iter(source), prefetch=self._prefetch)
        return self.provider

    def close(self) -> None:
        """End the prefetcher of a resumed run; a runner closes its own."""
        if self._own_prefetcher is not None:
            self._own_prefetcher.close()

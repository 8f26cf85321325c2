"""Activations for the estimate, without moving the training stream where that is possible."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import GeneratorType
from typing import Protocol, runtime_checkable

import torch
from sae_lens.synthetic.training import SyntheticActivationIterator
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from saelens_asi.plugin.batches import MixedBatches
from saelens_asi.plugin.parallel_store import paused_together, world_of

Batch = Mapping[str, Tensor]

# What trainers draw from: batches of one hook, or of several by name.
Provider = Iterator[Tensor] | Iterator[Batch]


@runtime_checkable
class LooksTwice(Protocol):
    """A data provider of the user's own whose data can be read a second time."""

    def second_look(self) -> Provider:
        """Batches as the provider gives them, from the beginning; the provider stays where it is."""


@dataclass(frozen=True)
class ActivationStream:
    """Raw activation batches for the estimate.

    Attributes:
        batches: from hook name to (n, d_in) activations.
        is_training_stream: whether training will not see the batches that are taken from here.
    """

    batches: Iterator[Batch]
    is_training_stream: bool


def find_store(data_provider: Provider, evaluator: object) -> ActivationsStore | None:
    """The store behind a provider that SAELens's runners make; None where the batches come from elsewhere."""
    if isinstance(data_provider, ActivationsStore):
        return data_provider
    store = getattr(evaluator, "activations_store", None)
    made_by_runner = isinstance(data_provider, PrefetchingIterator) or _is_multi_hook_loader(data_provider)
    return store if made_by_runner and isinstance(store, ActivationsStore) else None


@contextmanager
def open_stream(data_provider: Provider, evaluator: object, hook_names: Collection[str]) -> Iterator[ActivationStream]:
    """Give a second look at the data of ``data_provider``; draw from itself where it allows none.

    SAELens's own stores are read through a copy that starts at the beginning, synthetic data is drawn with the random
    state put back afterwards, and a provider with a method ``second_look`` is asked for batches by that: the training
    stream stays bit-identical in all three cases.

    Args:
        data_provider: what the trainer draws from.
        evaluator: the trainer's; SAELens's own hold the store that a prefetcher hides.
        hook_names: the hooks that are asked for; see ``check_hooks``.
    """
    store = find_store(data_provider, evaluator)
    with _undisturbed(data_provider, store):
        if store is not None:
            yield ActivationStream(_read_store(rewound(store)), is_training_stream=False)
        elif isinstance(data_provider, LooksTwice):
            again = _with_hook_names(data_provider.second_look(), hook_names)
            yield ActivationStream(again, is_training_stream=False)
        else:
            is_synthetic = isinstance(data_provider, SyntheticActivationIterator)
            yield ActivationStream(_with_hook_names(data_provider, hook_names), is_training_stream=not is_synthetic)


def check_hooks(data_provider: Provider, evaluator: object, hook_widths: Mapping[str, int]) -> None:
    """Look at one sequence, where there is a second look.

    Raises:
        ValueError: when the model has no such hook, or its activations have another width.
    """
    store = find_store(data_provider, evaluator)
    if store is None or store.cached_activation_dataset is not None:
        return  # SAELens checked name and width when it opened a cache
    with _undisturbed(data_provider, store):
        _check_hooks(rewound(store), hook_widths)


@contextmanager
def _undisturbed(data_provider: Provider, store: ActivationsStore | None) -> Iterator[None]:
    """Hold a prefetcher still, and put the random state back afterwards, where the data is looked at twice."""
    with ExitStack() as stack:
        if isinstance(data_provider, PrefetchingIterator) and store is not None:
            stack.enter_context(paused_together(data_provider, world_of(store)))
        if store is not None or isinstance(data_provider, SyntheticActivationIterator):
            stack.enter_context(torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))))
        yield


def rewound(store: ActivationsStore) -> ActivationsStore:
    """A shallow copy that reads the same data from its beginning; ``store`` does not move."""
    fresh = copy.copy(store)
    fresh.n_dataset_processed = 0
    fresh._dataloader = None
    if fresh.dataset is not None:
        fresh.iterable_sequences = fresh._iterate_tokenized_sequences()
    if fresh.cached_activation_dataset is not None:
        fresh.current_row_idx = 0
    return fresh


def _read_store(store: ActivationsStore) -> Iterator[Batch]:
    """One pass over the data, in its own order, without the shuffling buffer of training."""
    try:
        while True:
            if store._hook_names is not None:
                yield store._get_filtered_multi_hook_llm_batch(raise_on_epoch_end=True)
            else:
                yield {store.hook_name: store.get_filtered_llm_batch(raise_on_epoch_end=True)}
    except StopIteration:
        return


def _with_hook_names(data_provider: Provider, hook_names: Collection[str]) -> Iterator[Batch]:
    for batch in data_provider:
        yield batch if isinstance(batch, Mapping) else {name: batch for name in hook_names}


def _is_multi_hook_loader(data_provider: Provider) -> bool:
    if isinstance(data_provider, MixedBatches):
        return True
    # By the generator's own name: its code is that of the decorator (torch.no_grad) around SAELens's function.
    return isinstance(data_provider, GeneratorType) and data_provider.__name__ == multi_hook_concat_split_iter.__name__


def _check_hooks(store: ActivationsStore, hook_widths: Mapping[str, int]) -> None:
    known = list(getattr(store.model, "hook_dict", {}))
    tokens = store.get_batch_tokens(batch_size=1)
    for name, d_in in hook_widths.items():
        cache: Mapping[str, Tensor] = {}
        try:
            _, cache = store.model.run_with_cache(tokens, names_filter=[name], prepend_bos=False, **store.model_kwargs)
        except (KeyError, ValueError) as error:
            if name in known:
                raise
            raise ValueError(_no_such_hook(name, known)) from error
        if name not in cache:
            raise ValueError(_no_such_hook(name, known))
        head = store._hook_head_indices.get(name) if store._hook_names is not None else store.hook_head_index
        activations = cache[name]
        width = activations.shape[-1] if head is not None else activations[0, 0].numel()
        if width != d_in:
            raise ValueError(
                f"hook_name={name!r} has activations of width {width} ({tuple(activations.shape[2:])} a position), "
                f"but the SAE has d_in={d_in}: set d_in={width}"
            )


def _no_such_hook(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ": see model.hook_dict for its names"
    return f"hook_name={name!r} is not a hook that this model caches under that name{hint}"

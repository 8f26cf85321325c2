"""SAELens's batches from a store whose place can be saved: the very same ones, in the same order."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.tokenization_and_batching import _add_tokens_to_batch
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from saelens_asi.resume import load_tensors, save_tensors, tensor_metadata
from saelens_asi.sparse.shards import ALONE, Group

_PLACE = "_saelens_asi_place"


@dataclass(frozen=True)
class SequencePlace:
    """Where in the dataset the next token sequence begins.

    Attributes:
        row: rows of this epoch that are used up.
        offset: tokens of the next row that are used up.
        is_start: whether the begin of that row's sequence is still to come.
        begun: tokens of a sequence that is not full yet, int64.
    """

    row: int = 0
    offset: int = 0
    is_start: bool = True
    begun: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """What all later batches of a store follow from, beside model and dataset.

    Its tensors are those of the buffer itself, which never writes to them: to keep a place costs no copy.

    Attributes:
        mixing: (n, d) activations that are kept to be mixed with later ones.
        serving: (n, d) activations whose batches are being served.
        n_served: of those batches.
        sequences: where the next sequence begins; None where activations come from a cache.
        n_rows: rows of the dataset that were used up, over all epochs.
        cached_row: the next row of cached activations.
        rng: torch's CPU generator, which draws the order of the buffer.
    """

    mixing: Tensor | None
    serving: Tensor | None
    n_served: int
    sequences: SequencePlace | None
    n_rows: int
    cached_row: int | None
    rng: Tensor

    @property
    def n_bytes(self) -> int:
        """Size of the activations."""
        return sum(one.numel() * one.element_size() for one in (self.mixing, self._unserved()) if one is not None)

    @property
    def n_activations(self) -> int:
        """Activations of the buffer that training has not seen."""
        return sum(len(one) for one in (self.mixing, self._unserved()) if one is not None)

    def one_batch_before(self, batch: int) -> Place:
        """The place before the last batch of that size was served."""
        return replace(self, n_served=self.n_served - batch)

    def _unserved(self) -> Tensor | None:
        return None if self.serving is None else self.serving[self.n_served :]


class TokenSequences(Iterator[Tensor]):
    """One epoch of ``ActivationsStore._iterate_tokenized_sequences``, from any place on."""

    def __init__(self, store: ActivationsStore, place: SequencePlace | None = None) -> None:
        self._store, self._place = store, place or SequencePlace()
        self._rows: Iterator[Tensor] | None = None
        self._tokens: Tensor | None = None  # of the row under way

    @property
    def place(self) -> SequencePlace:
        """Where the next sequence begins."""
        return self._place

    def __next__(self) -> Tensor:
        if self._rows is None:
            self._rows = self._open()
        if self._store.is_dataset_tokenized or self._store.disable_concat_sequences:
            try:
                sequence = next(self._rows)
            finally:
                self._count()
            self._place = SequencePlace(row=self._first_row + self._reader.n_dataset_processed + 1)
            return sequence
        return self._joined(self._rows)

    def _open(self) -> Iterator[Tensor]:
        # SAELens's own iterators read from a shallow copy of the store, whose dataset starts at the place.
        store, self._first_row = self._store, self._place.row
        self._reader = copy.copy(store)
        self._reader.__class__ = _stock_class(type(store))
        self._reader.dataset = _from_row(store.dataset, self._first_row)
        self._reader.n_dataset_processed = 0
        self._n_rows_before = store.n_dataset_processed
        if store.is_dataset_tokenized or store.disable_concat_sequences:
            return self._reader._iterate_tokenized_sequences()
        tokenizer = getattr(store.model, "tokenizer", None)
        self._separator = None
        if tokenizer is not None:
            self._separator = get_special_token_from_cfg(store.sequence_separator_token, tokenizer)
        self._bos = tokenizer.bos_token_id if tokenizer is not None and store.prepend_bos else None
        return self._reader._iterate_raw_dataset_tokens()

    def _joined(self, rows: Iterator[Tensor]) -> Tensor:
        """The next full sequence of ``concat_and_batch_sequences``."""
        row, offset, is_start, begun = (getattr(self._place, name) for name in ("row", "offset", "is_start", "begun"))
        while True:
            if self._tokens is None:
                try:
                    self._tokens = next(rows)
                finally:
                    self._count()
            while offset < len(self._tokens):
                begun, offset, is_start = _add_tokens_to_batch(
                    batch=begun,
                    tokens=self._tokens,
                    offset=offset,
                    context_size=self._store.context_size,
                    is_start_of_sequence=is_start,
                    begin_batch_token_id=self._bos,
                    begin_sequence_token_id=None,
                    sequence_separator_token_id=self._separator,
                )
                if len(begun) == self._store.context_size:
                    self._place = SequencePlace(row, offset, is_start)
                    return begun
            self._tokens, row, offset, is_start = None, row + 1, 0, True
            self._place = SequencePlace(row, offset, is_start, begun)

    def _count(self) -> None:
        self._store.n_dataset_processed = self._n_rows_before + self._reader.n_dataset_processed


def _from_row(dataset: Any, row: int) -> Any:
    """The dataset without its first rows; an index where there is one, so that they are not read."""
    if row == 0:
        return dataset
    if hasattr(dataset, "select"):
        return dataset.select(range(min(row, len(dataset)), len(dataset)))
    return dataset.skip(row) if hasattr(dataset, "skip") else _Rest(dataset, row)


@dataclass(frozen=True)
class _Rest:
    rows: Iterable[Any]
    start: int

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.rows), self.start, None)


class MixedBatches(Iterator[Any]):
    """``mixing_buffer`` over a store, and ``multi_hook_concat_split_iter`` for one of several hooks.

    Each batch carries the place after it (``place_after``): also one that a prefetcher holds back.
    """

    def __init__(self, store: ActivationsStore, hook_names: list[str] | None = None) -> None:
        self._store, self._hook_names = store, hook_names
        self._buffer_size = store.n_batches_in_buffer * store.training_context_size
        self._batch = store.train_batch_size_tokens
        if self._buffer_size < self._batch:
            raise ValueError("Buffer size must be greater than or equal to batch size")
        if not 0 <= store.activations_mixing_fraction <= 1:
            raise ValueError("mix_fraction must be in [0, 1]")
        self._mixing: Tensor | None = None
        self._serving: Tensor | None = None
        self._n_served = 0
        self._widths: list[int] = []
        self._stopped = False

    @torch.no_grad()
    def __next__(self) -> Any:
        while self._serving is None or self._n_served + self._batch > len(self._serving):
            self._fill()
        batch = self._serving[self._n_served : self._n_served + self._batch]
        self._n_served += self._batch
        if self._hook_names is None:
            setattr(batch, _PLACE, self.place())
            return batch
        by_hook = dict(zip(self._hook_names, batch.split(self._hook_widths(), dim=1), strict=True))
        place = self.place()
        for view in by_hook.values():
            setattr(view, _PLACE, place)
        return by_hook

    def _fill(self) -> None:
        """Read activations until there are batches to serve."""
        new = self._read()
        mixing = new if self._mixing is None else torch.cat([self._mixing, new], dim=0)
        if len(mixing) < self._buffer_size:
            self._mixing = mixing
            return
        mix_fraction = self._store.activations_mixing_fraction
        if mix_fraction > 0:
            # Of several processes all mix as the first does, whatever else has drawn from their generators.
            readers: Group = getattr(self._store, "readers", ALONE)
            mixing = mixing[readers.as_first_(torch.randperm(len(mixing)))]
        n_batches = max(1, (len(mixing) - int(self._buffer_size * mix_fraction)) // self._batch)
        self._serving, self._n_served = mixing[: n_batches * self._batch], 0
        self._mixing = mixing[n_batches * self._batch :]

    def _read(self) -> Tensor:
        if self._stopped:
            raise RuntimeError("these batches are read no further")
        store = self._store
        # The store's own generators keep nothing between two batches: a new one goes on as the old one would.
        if self._hook_names is None:
            return next(store._iterate_filtered_activations())
        by_hook = next(store._iterate_filtered_multi_hook_activations())
        return torch.cat([by_hook[name] for name in self._hook_names], dim=1)

    def _hook_widths(self) -> list[int]:
        widths = self._store._hook_d_ins or {}
        return [widths[name] for name in self._hook_names or ()]

    def stop(self) -> None:
        """Have a prefetcher that reads from here end at its next read."""
        self._stopped = True

    def place(self) -> Place:
        """Where the next batch comes from."""
        store = self._store
        sequences = getattr(store, "iterable_sequences", None)
        return Place(
            self._mixing,
            self._serving,
            self._n_served,
            sequences.place if isinstance(sequences, TokenSequences) else None,
            store.n_dataset_processed,
            getattr(store, "current_row_idx", None),
            torch.get_rng_state(),
        )

    def go_to(self, place: Place) -> None:
        """Go on from a place; the generator is the caller's to set."""
        store = self._store
        self._mixing, self._serving, self._n_served = place.mixing, place.serving, place.n_served
        store.n_dataset_processed = place.n_rows
        if place.sequences is not None:
            store.iterable_sequences = TokenSequences(store, place.sequences)
        if place.cached_row is not None:
            store.current_row_idx = place.cached_row


class SaveableStore(ActivationsStore):
    """A store whose sequences and batches have a place; mixed into the store's class."""

    batches: MixedBatches | None = None
    is_placed = False  # a runner's own call of ``load`` then has nothing left to do

    def load(self, file_path: str) -> None:
        if not self.is_placed:
            super().load(file_path)

    def _iterate_tokenized_sequences(self) -> Any:
        return TokenSequences(self)

    def get_data_loader(self) -> Iterator[Any]:
        self.batches = MixedBatches(self)
        return self.batches

    def get_multi_hook_data_loader(self) -> Iterator[dict[str, Tensor]]:
        if self._hook_names is None:
            return super().get_multi_hook_data_loader()
        self.batches = MixedBatches(self, list(self._hook_names))
        return self.batches

    def read_anew(self, place: Place | None) -> MixedBatches:
        """Batches from a place on, or from the beginning; a prefetcher of those before has to be closed first."""
        self._dataloader, self.n_dataset_processed = None, 0
        if self.dataset is not None:
            self.iterable_sequences = self._iterate_tokenized_sequences()
        if self.cached_activation_dataset is not None:
            self.current_row_idx = 0
        names = None if self._hook_names is None else list(self._hook_names)
        self.batches = batches = MixedBatches(self, names)
        if names is None:
            self._dataloader = batches
        if place is not None:
            batches.go_to(place)
        return batches


@cache
def _saveable_class(base: Any) -> type[ActivationsStore]:
    return type(base.__name__, (SaveableStore, base), {"__module__": __name__, "stock": base})


def _stock_class(cls: type[ActivationsStore]) -> type[ActivationsStore]:
    return getattr(cls, "stock", cls)


def make_saveable(store: ActivationsStore) -> bool:
    """Give a store a place that can be saved; False for one that has been read from already."""
    if isinstance(store, SaveableStore):
        return True
    if store._dataloader is not None or store.n_dataset_processed:
        return False
    store.__class__ = _saveable_class(type(store))  # type: ignore[arg-type]
    if store.dataset is not None:
        store.iterable_sequences = store._iterate_tokenized_sequences()
    return True


def place_after(batch: Tensor) -> Place | None:
    """The place after a batch; None where it is no batch of a store that can be saved."""
    return getattr(batch, _PLACE, None)


def save_place(path: Path, place: Place, with_activations: bool) -> None:
    """A place as one safetensors file; the buffer as it lies in memory, less what was served."""
    sequences = place.sequences
    tensors = {"rng": place.rng}
    numbers: dict[str, Any] = {"n_rows": place.n_rows, "cached_row": place.cached_row}
    if sequences is not None:
        numbers["sequences"] = {"row": sequences.row, "offset": sequences.offset, "is_start": sequences.is_start}
        if sequences.begun is not None:
            tensors["begun"] = sequences.begun
    if with_activations:
        if place.mixing is not None:
            tensors["mixing"] = place.mixing
        if place.serving is not None:
            tensors["serving"] = place.serving[place.n_served :]
            numbers |= {"n_served": place.n_served}
    save_tensors(path, tensors, {"place": json.dumps(numbers)})


def load_place(path: Path, device: torch.device | str) -> Place:
    """What ``save_place`` has written."""
    tensors, numbers = load_tensors(path), json.loads(tensor_metadata(path)["place"])
    sequences = numbers.get("sequences")
    if sequences is not None:
        begun = tensors.get("begun")
        sequences = SequencePlace(**sequences, begun=None if begun is None else begun.to(device))
    serving = tensors.get("serving")
    n_served = numbers.get("n_served", 0)
    if serving is not None:
        # Batches are views: at the same offset into memory, so that the processor adds in the same order.
        rest, serving = serving, torch.zeros(n_served + len(serving), serving.shape[1], dtype=serving.dtype)
        serving[n_served:] = rest
        serving = serving.to(device)
    mixing = tensors.get("mixing")
    return Place(
        None if mixing is None else mixing.to(device),
        serving,
        n_served,
        sequences,
        numbers["n_rows"],
        numbers["cached_row"],
        tensors["rng"],
    )


def generators() -> dict[str, Tensor]:
    """The state of every global generator: torch's, CUDA's, numpy's and Python's."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, gauss_next = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss_next is None else gauss_next], dtype=torch.float64),
    }
    for index in range(torch.cuda.device_count()):
        states[f"cuda_{index}"] = torch.cuda.get_rng_state(index)
    return states


def set_generators(states: Mapping[str, Tensor]) -> None:
    """The counterpart of ``generators``; a CUDA device that is not there any more is left out."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, *words = states["python"].tolist()
    gauss_next = states["python_gauss"].item()
    random.setstate((version, tuple(words), None if gauss_next != gauss_next else gauss_next))
    for index in range(torch.cuda.device_count()):
        if f"cuda_{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda_{index}"], index)

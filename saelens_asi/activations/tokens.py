"""Windows of token ids from a tensor, a tokenized dataset, or a dataset of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby, islice
from typing import Any

import torch
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from torch import Tensor

from saelens_asi.activations.hooks import HookedModel

_ID_COLUMNS = ("tokens", "input_ids")

# Token ids and whether each is a token of the text (not padding), both (n_windows, n_positions).
TokenBatch = tuple[Tensor, Tensor]

# What they are made of: (n_windows, n_positions) ids, or rows of a dataset.
TokenData = Tensor | Iterable[Mapping[str, Any]]


def token_batches(model: HookedModel, data: TokenData, batch_size: int, context_size: int) -> Iterator[TokenBatch]:
    """Batches of at most ``batch_size`` windows of one length, in the order of the data.

    Args:
        model: whose tokenizer reads text.
        data: (n_windows, n_positions) token ids, taken as they are; or rows with a column ``tokens`` or
            ``input_ids`` (and ``attention_mask``, if any), one window each, cut at ``context_size``; or rows with a
            column ``text``, tokenized and packed into windows as SAELens does: BOS in front and between documents.
        batch_size: windows in a batch.
        context_size: longest window.

    Raises:
        ValueError: for data of another form.
    """
    if batch_size < 1 or context_size < 2:
        raise ValueError(f"batch_size={batch_size} must be at least 1 and context_size={context_size} at least 2")
    if isinstance(data, Tensor):
        tokens = data[None] if data.ndim == 1 else data
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens must be (n_windows, n_positions) ids, got {tuple(data.shape)} of {data.dtype}")
        return ((batch, torch.ones_like(batch, dtype=torch.bool)) for batch in torch.split(tokens, batch_size))
    return _stack(_windows_of_rows(model, data, context_size), batch_size)


def _windows_of_rows(model: HookedModel, rows: Iterable[Mapping[str, Any]], context_size: int) -> Iterator[TokenBatch]:
    iterator = iter(rows)
    try:
        first = next(iterator)
    except StopIteration:
        return
    rows = chain([first], iterator)
    columns = list(first) if isinstance(first, Mapping) else []
    column = next((name for name in _ID_COLUMNS if name in columns), None)
    if column is not None:
        for row in rows:
            ids = torch.as_tensor(row[column], dtype=torch.long)[:context_size]
            mask = torch.as_tensor(row["attention_mask"])[:context_size] if "attention_mask" in row else ids == ids
            yield ids, mask.bool()
    elif "text" in columns:
        for ids in _packed_text(model, (row["text"] for row in rows), context_size):
            yield ids, torch.ones_like(ids, dtype=torch.bool)
    else:
        raise ValueError(
            f"the data has columns {columns}: give token ids as a tensor, or rows with one of {[*_ID_COLUMNS, 'text']}"
        )


def _packed_text(model: HookedModel, texts: Iterable[str], context_size: int) -> Iterator[Tensor]:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("a dataset of text needs a model with a tokenizer: give token ids instead")
    bos = tokenizer.bos_token_id
    encoded = (tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts)
    documents = (torch.tensor(ids, dtype=torch.long) for ids in encoded if ids)
    windows: Iterator[Tensor] = concat_and_batch_sequences(
        documents, context_size, begin_batch_token_id=bos, sequence_separator_token_id=bos
    )
    return windows


def _stack(windows: Iterator[TokenBatch], batch_size: int) -> Iterator[TokenBatch]:
    for _, same_length in groupby(windows, key=lambda window: len(window[0])):
        while batch := list(islice(same_length, batch_size)):
            yield torch.stack([ids for ids, _ in batch]), torch.stack([mask for _, mask in batch])

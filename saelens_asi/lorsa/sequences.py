"""Sequences of what an attention layer reads and puts out: from a model, or cached."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from saelens_asi.activations.fingerprint import content_checksum, data_fingerprint, model_fingerprint
from saelens_asi.lorsa.attention import AttentionModel, attention_activations
from saelens_asi.resume import load_tensors, save_tensors, tensor_metadata
from saelens_asi.sparse.finite import finite_rows

FILE_FORMAT = "saelens_asi.lorsa_sequences.v1"


class Sequences(Protocol):
    """Pairs of input and output of an attention layer, by index.

    A method ``identity`` that returns plain values, as those below have one, lets a resumed run see other data.
    """

    @property
    def n_sequences(self) -> int: ...

    @property
    def n_positions(self) -> int: ...

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(x, y), each (len(index), n_positions, d_model)."""
        ...


@dataclass(frozen=True)
class ModelSequences:
    """Runs the model whenever a batch is asked for: no storage, and a forward pass up to the layer each time.

    Attributes:
        model: a HookedTransformer or TransformerBridge.
        layer: index of the block.
        tokens: (n_sequences, n_positions) token ids.
    """

    model: AttentionModel
    layer: int
    tokens: Tensor

    @property
    def n_sequences(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_positions(self) -> int:
        return self.tokens.shape[1]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = next(attention_activations(self.model, self.layer, [self.tokens[index]]))
        return x.float(), y.float()

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again: kind of sequences, tokens, model, layer."""
        return {"sequences": "model", "tokens": data_fingerprint(self.tokens), **_source(self.model, self.layer)}


@dataclass(frozen=True)
class CachedSequences:
    """Activations held in memory: 8 * d_model bytes a token.

    Attributes:
        x, y: (n_sequences, n_positions, d_model) what the layer reads, and what it puts out.
        tokens: (n_sequences, n_positions) token ids.
        source: fingerprint of the model, and the layer, as ``collect`` notes them; None where they are not known.
    """

    x: Tensor
    y: Tensor
    tokens: Tensor
    source: Mapping[str, Any] | None = None

    @property
    def n_sequences(self) -> int:
        return self.x.shape[0]

    @property
    def n_positions(self) -> int:
        return self.x.shape[1]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again: kind of sequences, tokens, and the source where it is known."""
        return {"sequences": "cached", "tokens": data_fingerprint(self.tokens), **(self.source or {})}

    @classmethod
    def collect(cls, model: AttentionModel, layer: int, tokens: Tensor, batch_size: int = 16) -> CachedSequences:
        """Run the model once over (n_sequences, n_positions) token ids."""
        pairs = list(attention_activations(model, layer, tokens.split(batch_size)))
        x, y = (torch.cat(parts).float().cpu() for parts in zip(*pairs, strict=True))
        return cls(x, y, tokens.cpu(), _source(model, layer))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; returns its path."""
        path = Path(path)
        tensors, source = {"x": self.x, "y": self.y, "tokens": self.tokens}, json.dumps(self.source)
        checksum = content_checksum(tensors, source)
        save_tensors(path, tensors, {"format": FILE_FORMAT, "source": source, "checksum": checksum})
        return path

    @classmethod
    def load(cls, path: str | Path) -> CachedSequences:
        """Read a file that ``save`` wrote. Raises ValueError when the file holds something else, or is damaged."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is no file: give what CachedSequences.save returned")
        metadata = tensor_metadata(path)
        if metadata.get("format") != FILE_FORMAT:
            raise ValueError(
                f"{path} does not hold cached sequences: format {metadata.get('format')!r}, expected {FILE_FORMAT!r}"
            )
        tensors = load_tensors(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        x = shapes.get("x", ())
        if shapes != {"x": x, "y": x, "tokens": x[:2]} or len(x) != 3:
            raise ValueError(f"{path} does not hold cached sequences that fit each other: its tensors are {shapes}")
        source = metadata.get("source", "null")  # earlier versions wrote neither this nor a checksum
        if "checksum" in metadata and metadata["checksum"] != content_checksum(tensors, source):
            raise ValueError(f"{path} is damaged: its checksum differs")
        return cls(**tensors, source=json.loads(source))


def _source(model: AttentionModel, layer: int) -> dict[str, Any]:
    return {"model": model_fingerprint(model), "layer": layer}


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers; ``bos_token_id`` or ``eos_token_id`` besides, where it has them."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """An object with ``input_ids``, a list of token ids."""
        ...


def token_windows(
    dataset: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, n_positions: int, n_sequences: int | None = None
) -> Tensor:
    """(n, n_positions) token ids: texts one after the other, cut into windows, each with a BOS token in front.

    ``activations.tokens.token_batches`` cuts text as SAELens does, with a separator between documents, and a BOS token
    only where the stream has one. Here documents follow each other without a separator, and every window starts with
    BOS: the first position attends to itself alone and is left out of training (``skip_positions``), so it must not be
    a word of the text.

    Args:
        dataset: a Hugging Face dataset, or any iterable of rows, with a column ``text``, ``tokens`` or ``input_ids``.
        tokenizer: of the model; not used where the rows hold token ids.
        n_positions: length of a window, BOS included.
        n_sequences: stop after so many; all that the dataset gives when None.

    Raises:
        ValueError: for rows without such a column, or too little text.
    """
    length = n_positions - 1
    n_ids = None if n_sequences is None else n_sequences * length
    ids: list[int] = []
    for row in dataset:
        ids += _row_ids(row, tokenizer)
        if n_ids is not None and len(ids) >= n_ids:
            break
    n_windows = len(ids) // length
    if n_windows < (n_sequences or 1):
        raise ValueError(
            f"the dataset gives {n_windows} windows of {n_positions} positions, fewer than {n_sequences or 1}: give "
            "more text, or ask for fewer or shorter windows"
        )
    windows = torch.tensor(ids[: (n_sequences or n_windows) * length]).view(-1, length)
    bos = getattr(tokenizer, "bos_token_id", None)
    bos = getattr(tokenizer, "eos_token_id", None) if bos is None else bos  # GPT-NeoX and others have one for both
    if bos is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token to put in front of each window")
    return torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


def _row_ids(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    for column in ("tokens", "input_ids"):
        if column in row:
            return list(row[column])
    if "text" not in row:
        raise ValueError(f"rows need a column 'text', 'tokens' or 'input_ids'; these have {sorted(row)}")
    return list(tokenizer(row["text"], add_special_tokens=False).input_ids)


def finite_sequences(x: Tensor, y: Tensor, skip_positions: int) -> Tensor:
    """(n,) bool of (n, n_positions, d_model) input and output: which sequences hold finite numbers only, of the output
    those beyond the skipped positions.
    """
    return finite_rows(x.flatten(1)) & finite_rows(y[:, skip_positions:].flatten(1))


def batches(data: Sequences, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All sequences once, in order: (x, y) of at most ``batch_size`` sequences, each (n, n_positions, d_model)."""
    for index in torch.arange(data.n_sequences).split(batch_size):
        yield data.batch(index)

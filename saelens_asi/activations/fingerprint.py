"""What models, data and files are known by: short checksums that tell others apart. Knows torch and xxhash alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from saelens_asi.resume import differences

logger = logging.getLogger(__name__)

# Elements of each tensor, and rows of a dataset, that are looked at.
_ELEMENTS = 1024
_ROWS = 64

_SEAL = "checksum"

_COLUMNS = ("tokens", "input_ids", "attention_mask", "text")

# By what they are of ("model", "data"); None for one that cannot be had.
Fingerprints = Mapping[str, str | None]


def model_fingerprint(model: Any) -> str:
    """Number of parameters, and a checksum of their names, shapes, dtypes and 1,024 elements spread over each.

    The same in every process, on every device and with any number of threads. Changed layers (fine-tuned, a LoRA merged
    into them) differ nearly everywhere, and are seen; a change of a few elements of a large matrix may not be. Buffers
    of integers count too: quantized models keep weights there. Milliseconds a parameter at most.
    """
    digest, n = xxhash.xxh3_128(), 0
    for name, parameter in _weights(model):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)};".encode())
        digest.update(_bytes(_spread(parameter)))
        n += parameter.numel()
    return f"{n:,} parameters, checksum {digest.hexdigest()[:16]}"


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point() and buffer.dtype not in (torch.bool, torch.complex64):
            yield name, buffer


@torch.no_grad()
def _spread(tensor: Tensor) -> Tensor:
    """At most 1,024 elements of a tensor, the same ones for a shape: one somewhere in each of as many stretches."""
    if tensor.is_meta or not tensor.numel():
        return torch.empty(0)
    n = min(_ELEMENTS, tensor.numel())
    i = torch.arange(n)
    stretch = tensor.numel() // n
    # Not at the start of each, or all might lie in one column.
    places = i * tensor.numel() // n + (i * 2654435761) % stretch
    if not tensor.ndim:
        return tensor.detach()[None]
    return tensor.detach()[torch.unravel_index(places.to(tensor.device), tensor.shape)]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def data_fingerprint(data: Any) -> str | None:
    """Length, where data has one, and a checksum of what is in it; None for an iterator, which can be read once only.

    Of a tensor the shape and elements spread over it; of rows that can be reached by number, 64 spread over all; of
    others the first 64, from an iteration of their own.
    """
    if isinstance(data, Tensor):
        values = _bytes(_spread(data if data.is_floating_point() else data.long()))
        return f"{tuple(data.shape)}, checksum {xxhash.xxh3_128_hexdigest(values)[:16]}"
    if isinstance(data, Iterator):
        return None
    length = len(data) if hasattr(data, "__len__") else None
    digest = xxhash.xxh3_128()
    for row in _some_rows(data, length):
        for column in _COLUMNS:
            if column in row:
                digest.update(f"{column};".encode())
                digest.update(_value(row[column]))
    rows = f"{length:,} rows" if length is not None else "rows"
    return f"{rows}, checksum {digest.hexdigest()[:16]}"


def _some_rows(data: Any, length: int | None) -> Iterable[Any]:
    rows: Iterable[Any]
    if length is None or not hasattr(data, "__getitem__"):
        rows = islice(iter(data), _ROWS)
    else:
        n = min(length, _ROWS)
        rows = (data[i * length // n] for i in range(n))
    return (row for row in rows if isinstance(row, Mapping))


def _value(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else _bytes(torch.as_tensor(value).long())


def content_checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Of all bytes of tensors, their names, dtypes and shapes, and of what is told beside them."""
    digest = xxhash.xxh3_128(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)};".encode())
        if tensors[name].numel():
            digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def changed_since_written(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], text_name: str) -> str:
    """How a file differs from what was written, in words; empty where it does not.

    Files of the first versions have no checksum. One whose header has a name that is in none of them is not such a
    file: a letter of the checksum's name may have changed.

    Args:
        metadata: its header: a format, a text, and a checksum of text and tensors.
        tensors: that it holds.
        text_name: name of the text.
    """
    unknown = metadata.keys() - {"format", text_name, "checksum"}
    if unknown:
        return f"its header has {sorted(unknown)}, which is in none of these files"
    if metadata.get("checksum") not in (None, content_checksum(tensors, metadata.get(text_name, ""))):
        return "its checksum differs, so that its content has changed since it was written"
    return ""


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with a checksum of them, which ``unsealed`` compares."""
    return {**values, _SEAL: _json_checksum(values)}


def unsealed(values: Any) -> dict[str, Any]:
    """What ``sealed`` was given; values without a checksum, of earlier versions, as they are.

    Raises:
        ValueError: for another checksum, or what is no JSON object.
    """
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    own = {name: value for name, value in values.items() if name != _SEAL}
    if values.get(_SEAL, _json_checksum(own)) != _json_checksum(own):
        raise ValueError("its checksum differs, so that its content has changed since it was written")
    return own


def _json_checksum(values: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(dict(values)))
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())


def fingerprints(model: Any, data: Any) -> dict[str, str | None]:
    """Of a model and data; None of what is None."""
    return {
        "model": None if model is None else model_fingerprint(model),
        "data": None if data is None else data_fingerprint(data),
    }


def check_fingerprints(
    saved: Fingerprints | None, now: Fingerprints, where: str | Path, way_out: str
) -> dict[str, str | None]:
    """Compare what a file was made of with what there is now; returns what is known of both.

    Args:
        saved: of the file; None for that of an earlier version, which goes on with a warning.
        now: of what there is now. What is None, on either side, is not compared.
        where: the file or folder, for messages.
        way_out: what to do instead, for the error.

    Raises:
        ValueError: where they differ, with both sides.
    """
    if saved is None:
        logger.warning(
            "%s was written by an earlier version, which kept no fingerprint of the model and the data: whether they "
            "are the same cannot be checked", where,
        )  # fmt: skip
        return dict(now)
    known = {name for name in saved.keys() & now.keys() if saved[name] is not None and now[name] is not None}
    changed = differences({name: saved[name] for name in known}, {name: now[name] for name in known})
    if changed:
        raise ValueError(f"{where} was made from something else ({changed}): {way_out}")
    return {**now, **{name: value for name, value in saved.items() if value is not None}}

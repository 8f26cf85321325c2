"""What interrupted work goes on from: files that are whole or not there, and tensors that give equal bits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the block has ended well.

    A reader sees the old file or the new one, never a part, also after a crash: the content is synced before the
    rename. After an error the old file stays, and nothing else is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Strict JSON and a line break, whole or not at all; options of ``json.dumps``."""
    text = json.dumps(value, allow_nan=False, **options) + "\n"
    with written_whole(path) as unfinished:
        unfinished.write_text(text)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as unfinished:
        save_file(own, unfinished, metadata=None if metadata is None else dict(metadata))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, in memory that torch allocated.

    A file's memory is not aligned as torch's is. MKL then adds in another order on some processors, and what continues
    from such a tensor differs in the last bit: hence the copies.
    """
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict


def tensor_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``name was 1 and is 2; ...`` for settings that differ once written as JSON; empty where none do."""
    now = json.loads(json.dumps(dict(now)))
    names = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    return "; ".join(f"{name} was {saved.get(name)!r} and is {now.get(name)!r}" for name in names)

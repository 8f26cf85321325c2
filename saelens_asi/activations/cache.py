"""Activations of a model on disk: one pass over text for any number of hooks, read back without loading them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelens_asi.activations.hooks import HookedModel, hook_points
from saelens_asi.activations.reader import TextPass
from saelens_asi.activations.tokens import TokenData
from saelens_asi.resume import differences, write_json

_STATE = "cache.json"
_SAVE_SECONDS = 30


def cache_activations(
    folder: str | Path,
    model: HookedModel | Callable[[], HookedModel],
    data: TokenData | Callable[[], TokenData],
    hook_names: str | Iterable[str],
    n_tokens: int,
    *,
    batch_size: int = 32,
    context_size: int = 128,
    exclude_special_tokens: bool | Sequence[int] = True,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Write (n_tokens, width) float32 activations of each hook to ``folder``, and return them.

    The tensors are views of the files: they take no memory until they are read, and are not to be written to. A pass
    that was interrupted continues where it was last saved; one that is complete is read back without the model.

    Args:
        folder: one for each model, dataset and n_tokens.
        model: a HookedTransformer or TransformerBridge, or a function that returns one, called only where it is needed.
        data: token ids or rows of a dataset, as ``activation_spectra`` takes them, or a function that returns them.
        hook_names: names, aliases or patterns, as in ``model.hook_dict``.
        n_tokens: activations of each hook. Where the data ends before, there are fewer, and the log says so.
        batch_size: windows in one forward pass.
        context_size: tokens in a window.
        exclude_special_tokens: leave out BOS, EOS, padding and the like: True, False or token ids.
        progress: show a progress bar.

    Raises:
        ValueError: for a folder that was written with other settings, a hook that does not exist, or data without
            tokens that count.
    """
    folder = Path(folder)
    names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
    settings = {
        "hook_names": names,
        "n_tokens": n_tokens,
        "batch_size": batch_size,
        "context_size": context_size,
        "exclude_special_tokens": exclude_special_tokens,
    }
    state = _read_state(folder, settings)
    if not state.complete:
        loaded: Any = model if hasattr(model, "hook_dict") or not callable(model) else model()
        text = TextPass(
            loaded,
            data() if callable(data) else data,
            hook_points(loaded, names),
            n_tokens,
            batch_size=batch_size,
            context_size=context_size,
            exclude_special_tokens=exclude_special_tokens,
        )
        _Files(folder, state, n_tokens).fill(text, progress)
    return {
        name: torch.from_numpy(np.load(folder / file, mmap_mode="c")[: state.n_kept])
        for name, file in state.files.items()
    }


@dataclass
class _State:
    """What ``cache.json`` holds."""

    settings: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    n_batches: int = 0
    n_kept: int = 0
    complete: bool = False


def _read_state(folder: Path, settings: dict[str, Any]) -> _State:
    path = folder / _STATE
    if not path.exists():
        return _State(settings)
    state = _State(**json.loads(path.read_text()))
    changed = differences({name: state.settings.get(name) for name in settings}, settings)
    if changed:
        raise ValueError(f"{folder} holds other activations ({changed}): use those settings, or another folder")
    return state


class _Files:
    """The files of a cache, which grow with a pass."""

    def __init__(self, folder: Path, state: _State, n_rows: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.state, self.n_rows = folder, state, n_rows
        self.arrays = {name: np.load(folder / file, mmap_mode="r+") for name, file in state.files.items()}

    def fill(self, text: TextPass, progress: bool) -> None:
        text.skip(self.state.n_batches, self.state.n_kept)
        saved_at = time.monotonic()
        readers = {name: self._writer(name, text) for name in text.points}
        for _ in text.read(readers, description="Caching activations", progress=progress):
            self.state.n_kept, self.state.n_batches = text.n_read, text.n_batches
            if time.monotonic() - saved_at > _SAVE_SECONDS:
                self._save()
                saved_at = time.monotonic()
        text.check_length()
        self.state.complete = True
        self._save()

    def _writer(self, name: str, text: TextPass) -> Callable[[Tensor], None]:
        def write(vectors: Tensor) -> None:
            if name not in self.arrays:
                self.state.files[name] = f"{name}.npy"
                self.arrays[name] = np.lib.format.open_memmap(
                    self.folder / self.state.files[name], "w+", np.float32, (self.n_rows, vectors.shape[1])
                )
            self.arrays[name][text.n_read : text.n_read + len(vectors)] = vectors.float().cpu().numpy()

        return write

    def _save(self) -> None:
        """The activations first: what the state counts must be there."""
        for array in self.arrays.values():
            array.flush()
        write_json(self.folder / _STATE, asdict(self.state), indent=1)

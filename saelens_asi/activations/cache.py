"""Activations of a model on disk: one pass over text for any number of hooks, read back without loading them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.activations.hooks import as_vectors, hook_points, keep_mask, read_activations, special_token_ids
from saelens_asi.activations.tokens import token_batches

logger = logging.getLogger(__name__)

_STATE = "cache.json"
_SAVE_SECONDS = 30


def cache_activations(
    folder: str | Path,
    model: Any,
    data: Any,
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
    asked = [hook_names] if isinstance(hook_names, str) else list(hook_names)
    settings = {
        "hook_names": asked,
        "n_tokens": n_tokens,
        "batch_size": batch_size,
        "context_size": context_size,
        "exclude_special_tokens": exclude_special_tokens,
    }
    state = _read_state(folder, settings)
    if not state["complete"]:
        model = model() if not hasattr(model, "hook_dict") and callable(model) else model
        data = data() if callable(data) else data
        batches = token_batches(model, data, batch_size, context_size)
        _fill(folder, state, model, batches, asked, settings, progress)
    rows = state["n_kept"]
    return {
        name: torch.from_numpy(np.load(folder / file, mmap_mode="c")[:rows]) for name, file in state["files"].items()
    }


def _read_state(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    path = folder / _STATE
    if not path.exists():
        return {"settings": settings, "files": {}, "n_batches": 0, "n_kept": 0, "complete": False}
    state = json.loads(path.read_text())
    saved, now = state["settings"], json.loads(json.dumps(settings))
    other = [name for name in now if saved.get(name) != now[name]]
    if other:
        differences = "; ".join(f"{name} was {saved.get(name)!r} and is {now[name]!r}" for name in other)
        raise ValueError(f"{folder} holds other activations ({differences}): use those settings, or another folder")
    return state


def _fill(
    folder: Path,
    state: dict[str, Any],
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    asked: list[str],
    settings: dict[str, Any],
    progress: bool,
) -> None:
    points = hook_points(model, asked)
    special_ids = special_token_ids(model, settings["exclude_special_tokens"])
    device = getattr(model.cfg, "device", None) or "cpu"
    n_tokens = settings["n_tokens"]
    files = {name: np.load(folder / file, mmap_mode="r+") for name, file in state["files"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    saved_at, start = time.monotonic(), state["n_batches"]
    with tqdm(
        total=n_tokens, initial=state["n_kept"], desc="Caching activations", unit="token", disable=not progress
    ) as bar:
        for i, (tokens, is_text) in enumerate(batches):
            if state["n_kept"] >= n_tokens:
                break
            if i < start:
                continue
            keep = (keep_mask(tokens, special_ids) & is_text).flatten().nonzero().squeeze(1)
            rows = keep[: n_tokens - state["n_kept"]]
            first = state["n_kept"]

            def write(name: str, activations: Tensor, tokens: Tensor = tokens, rows: Tensor = rows) -> None:
                vectors = as_vectors(activations, tokens.shape, name).index_select(0, rows.to(activations.device))
                if name not in files:
                    state["files"][name] = f"{name}.npy"
                    files[name] = np.lib.format.open_memmap(
                        folder / state["files"][name], "w+", np.float32, (n_tokens, vectors.shape[1])
                    )
                files[name][first : first + len(rows)] = vectors.float().cpu().numpy()  # noqa: B023 - read at once

            readers = {name: lambda x, name=name, write=write: write(name, x) for name in points}
            read_activations(model, tokens.to(device), points, readers, is_text.to(device))
            state["n_kept"] += len(rows)
            state["n_batches"] += 1
            bar.update(len(rows))
            if time.monotonic() - saved_at > _SAVE_SECONDS:
                _save(folder, state, files)
                saved_at = time.monotonic()
    if not state["n_kept"]:
        raise ValueError("the data holds no tokens that count: check the data and exclude_special_tokens")
    if state["n_kept"] < n_tokens:
        logger.warning("the data ended after %d of n_tokens=%d tokens", state["n_kept"], n_tokens)
    state["complete"] = True
    _save(folder, state, files)


def _save(folder: Path, state: dict[str, Any], files: dict[str, Any]) -> None:
    for file in files.values():
        file.flush()
    unfinished = folder / f"{_STATE}.tmp"
    unfinished.write_text(json.dumps(state, indent=1) + "\n")
    unfinished.replace(folder / _STATE)

"""Spectra of a model's activations: one pass over text, any number of hooks, O(d^2) memory a hook."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.activations.hooks import (
    as_vectors,
    hook_points,
    keep_mask,
    read_activations,
    resolve_hook_names,
    special_token_ids,
)
from saelens_asi.activations.tokens import token_batches
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

logger = logging.getLogger(__name__)

# A checkpoint is not written again before this many times the time that the last one took.
_CHECKPOINT_PAUSE = 20


def activation_spectra(
    model: Any,
    data: Any,
    hook_names: str | Iterable[str],
    n_tokens: int | None = None,
    *,
    batch_size: int = 8,
    context_size: int = 256,
    exclude_special_tokens: bool | Sequence[int] = True,
    exclude_positions: Sequence[int] = (),
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60,
    progress: bool = True,
) -> dict[str, Spectrum]:
    """Spectra of the activations at each hook, from one pass that stops after the last layer that is needed.

    Time: the forward pass up to that layer, and 5/4 d^2 operations in float64 a token and hook. Memory: 8 d^2 bytes a
    hook, whatever the number of tokens. Neither the batch size nor the order of the data changes the result.

    Args:
        model: a HookedTransformer or TransformerBridge, in any dtype.
        data: (n_windows, n_positions) token ids; or rows of a dataset with a column ``tokens``, ``input_ids`` or
            ``text``, as ``token_batches`` reads them.
        hook_names: names or aliases as in ``model.hook_dict``; ``*`` stands for anything without a dot.
        n_tokens: activations of each hook; None for all of the data.
        batch_size: windows in one forward pass.
        context_size: length of the windows that text is packed into; longer tokenized rows are cut.
        exclude_special_tokens: leave out BOS, EOS, padding and the like, as in SAELens: True, False or token ids.
        exclude_positions: positions of every window that are left out too; negative ones count from its end.
        checkpoint: file that keeps the state. Where it exists, the pass continues from it, to the same result.
        checkpoint_seconds: how often it is written.
        progress: show a progress bar.

    Returns:
        From each name that was asked for to its spectrum. Hook widths may differ; ``hook_z`` has n_heads * d_head.

    Raises:
        ValueError: for a hook that does not exist, is not reached, or holds no vectors; for activations that are not
            finite; for fewer than 2 tokens; for a checkpoint of another pass.
    """
    if n_tokens is not None and n_tokens < 2:
        raise ValueError(f"n_tokens={n_tokens} must be at least 2")
    points = hook_points(model, hook_names)
    special_ids = special_token_ids(model, exclude_special_tokens)
    settings = {
        "model": str(getattr(model.cfg, "model_name", "")),
        "hooks": list(points),
        "n_tokens": n_tokens,
        "batch_size": batch_size,
        "context_size": context_size,
        "excluded_ids": sorted(special_ids.tolist()),
        "exclude_positions": list(exclude_positions),
    }
    state = _Pass(points, settings, None if checkpoint is None else Path(checkpoint), checkpoint_seconds)
    batches = token_batches(model, data, batch_size, context_size)
    state.skip_what_was_read(batches)
    device = getattr(model.cfg, "device", None) or "cpu"
    with tqdm(
        total=n_tokens, initial=state.n_kept, desc="Activation spectra", unit="token", disable=not progress
    ) as bar:
        for tokens, is_text in batches:
            if n_tokens is not None and state.n_kept >= n_tokens:
                break
            keep = keep_mask(tokens, special_ids, exclude_positions) & is_text
            rows = keep.flatten().nonzero().squeeze(1)[: None if n_tokens is None else n_tokens - state.n_kept]
            if len(rows):
                read_activations(model, tokens.to(device), points, state.readers(tokens, rows), is_text.to(device))
            state.finish_batch(tokens, len(rows))
            bar.update(len(rows))
    state.save()
    if state.n_kept < 2:
        raise ValueError(
            f"the data holds {state.n_kept} tokens that count: a spectrum needs at least 2. Check the data, "
            "exclude_special_tokens and exclude_positions"
        )
    if n_tokens is not None and state.n_kept < n_tokens:
        logger.warning("the data ended after %d of n_tokens=%d tokens", state.n_kept, n_tokens)
    spectra = {name: Spectrum.from_moments(state.moments[first]).to("cpu") for name, first in state.first_names.items()}
    warn_of_small_samples(spectra)
    return spectra


class _Pass:
    """Moments by hook and the place in the data; both are saved together, between batches."""

    def __init__(self, points: Mapping[str, Any], settings: dict[str, Any], path: Path | None, seconds: float) -> None:
        self.settings = settings
        self.path = path
        self.seconds = seconds
        self.moments: dict[str, RunningMoments] = {}
        self.n_batches = self.n_kept = 0
        self.digest = hashlib.sha256()
        first_name: dict[int, str] = {}
        self.first_names = {name: first_name.setdefault(id(point), name) for name, point in points.items()}
        self.saved_at = time.monotonic()

    def readers(self, tokens: Tensor, rows: Tensor) -> dict[str, Any]:
        return {name: self._reader(name, tokens, rows) for name in dict.fromkeys(self.first_names.values())}

    def _reader(self, name: str, tokens: Tensor, rows: Tensor) -> Any:
        def read(activations: Tensor) -> None:
            vectors = as_vectors(activations, tokens.shape, name)
            moments = self.moments.get(name)
            if moments is None:
                moments = RunningMoments.zeros(vectors.shape[1])
            self.moments[name] = moments.to(vectors.device)
            _update_(self.moments[name], vectors, rows, name)

        return read

    def finish_batch(self, tokens: Tensor, n_kept: int) -> None:
        self.n_batches += 1
        self.n_kept += n_kept
        self.digest.update(tokens.cpu().numpy().tobytes())
        if self.path is not None and time.monotonic() - self.saved_at >= self.seconds:
            start = time.monotonic()
            self.save()
            self.saved_at = time.monotonic()
            self.seconds = max(self.seconds, _CHECKPOINT_PAUSE * (self.saved_at - start))

    def save(self) -> None:
        if self.path is not None:
            place = {"n_batches": self.n_batches, "n_kept": self.n_kept, "digest": self.digest.hexdigest()}
            save_pass(self.path, self.moments, self.settings, place)

    def skip_what_was_read(self, batches: Iterable[Any]) -> None:
        if self.path is None or not self.path.exists():
            return
        self.moments, place = load_pass(self.path, self.settings)
        iterator = iter(batches)
        for _ in range(place["n_batches"]):
            tokens, _ = next(iterator, (None, None))
            if tokens is None:
                break
            self.digest.update(tokens.cpu().numpy().tobytes())
        if self.digest.hexdigest() != place["digest"]:
            raise ValueError(f"{self.path} was written while reading other data: give that data, or delete the file")
        self.n_batches, self.n_kept = place["n_batches"], place["n_kept"]
        logger.info("continuing after %d tokens", self.n_kept)


def _update_(moments: RunningMoments, vectors: Tensor, rows: Tensor, name: str) -> None:
    if len(rows) < len(vectors):
        vectors = vectors.index_select(0, rows.to(vectors.device))
    try:
        moments.update_(vectors)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def spectra_from_cache(cache: Any, hook_names: str | Iterable[str], mask: Tensor | None = None) -> dict[str, Spectrum]:
    """Spectra of activations that are at hand: an ActivationCache of either kind of model, or a plain dict.

    Args:
        cache: from hook names to (n_windows, n_positions, ...) activations. Names that it holds under an alias only
            are found through its model.
        hook_names: names, aliases or patterns, as for ``activation_spectra``.
        mask: (n_windows, n_positions) bool, which tokens count; None for all, BOS and padding included.

    Raises:
        ValueError: for a name that is not there, or activations that are not one vector a token.
    """
    keys = {name: name for name in cache.keys()}  # noqa: SIM118 - an ActivationCache iterates over its values
    for alias, point in getattr(getattr(cache, "model", None), "hook_dict", {}).items():
        if point.name in keys:
            keys.setdefault(alias, point.name)
    has_windows = getattr(cache, "has_batch_dim", True)
    shapes = Counter(tuple(x.shape[:-1]) for x in cache.values() if x.ndim == 2 + has_windows)
    spectra = {}
    for name in resolve_hook_names(hook_names, keys):
        activations = cache[keys[name]]
        activations = activations if has_windows else activations[None]
        # Activations with one vector a token give the shape; heads and attention patterns alone would not.
        shape = shapes.most_common(1)[0][0] if shapes else activations.shape[:2]
        shape = shape if len(shape) == 2 else (1, *shape)
        vectors = as_vectors(activations, shape, name)
        if mask is not None and mask.numel() != len(vectors):
            raise ValueError(
                f"the mask is {tuple(mask.shape)}, but {name!r} holds {shape[0]} windows of {shape[1]} tokens"
            )
        rows = torch.arange(len(vectors)) if mask is None else mask.flatten().nonzero().squeeze(1)
        moments = RunningMoments.zeros(vectors.shape[1], vectors.device)
        _update_(moments, vectors, rows, name)
        spectra[name] = Spectrum.from_moments(moments).to("cpu")
    warn_of_small_samples(spectra)
    return spectra


def warn_of_small_samples(spectra: Mapping[str, Spectrum]) -> None:
    """One warning for all spectra whose sample is small for their width, about the widest of them."""
    small = [name for name, spectrum in spectra.items() if spectrum.has_small_sample]
    if small:
        name = max(small, key=lambda name: spectra[name].d)
        others = f" (and {len(small) - 1} more hooks)" if len(small) > 1 else ""
        warnings.warn(f"{name}{others}: {spectra[name].sample_size_warning()}", stacklevel=3)


FILE_FORMAT = "saelens_asi.pass.v1"


def save_pass(path: Path, moments: Mapping[str, RunningMoments], settings: Mapping[str, Any], place: Any) -> None:
    """Write moments, settings and place (plain values); a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, running in moments.items():
        tensors[f"{name}/mean"] = running.mean.cpu().contiguous()
        tensors[f"{name}/scatter"] = running.scatter.cpu().contiguous()
    counts = {name: running.n_tokens for name, running in moments.items()}
    state = json.dumps({"settings": settings, "place": place, "n_tokens": counts})
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, metadata={"format": FILE_FORMAT, "state": state})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_pass(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, RunningMoments], Any]:
    """Moments and place of a pass with these settings.

    Raises:
        ValueError: for a file of something else, or of a pass with other settings.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FILE_FORMAT:
            raise ValueError(f"{path} is not the checkpoint of a pass over activations: give another path")
        state = json.loads(metadata["state"])
        saved = state["settings"]
        now = json.loads(json.dumps(settings))
        other = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
        if other:
            differences = "; ".join(f"{key} was {saved.get(key)!r} and is {now.get(key)!r}" for key in other)
            raise ValueError(f"{path} belongs to a pass with other settings ({differences}): use those, or delete it")
        # A file's memory is not aligned as torch's is: what is added to it differs in the last bit on some processors.
        return {
            name: RunningMoments(n, file.get_tensor(f"{name}/mean").clone(), file.get_tensor(f"{name}/scatter").clone())
            for name, n in state["n_tokens"].items()
        }, state["place"]

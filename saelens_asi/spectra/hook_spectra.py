"""Spectra of a model's activations: one pass over text, any number of hooks, O(d^2) memory a hook."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from saelens_asi.activations.hooks import HookedModel, as_vectors, hook_points, resolve_hook_names
from saelens_asi.activations.reader import TextPass
from saelens_asi.activations.tokens import TokenData
from saelens_asi.resume import differences, load_tensors, save_tensors, tensor_metadata
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

logger = logging.getLogger(__name__)

PASS_FORMAT = "saelens_asi.pass.v1"

# A checkpoint is not written again before this many times the time that the last one took.
_CHECKPOINT_PAUSE = 20


def activation_spectra(
    model: HookedModel,
    data: TokenData,
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
    text = TextPass(
        model,
        data,
        points,
        n_tokens,
        batch_size=batch_size,
        context_size=context_size,
        exclude_special_tokens=exclude_special_tokens,
        exclude_positions=exclude_positions,
    )
    settings = {"batch_size": batch_size, "context_size": context_size, "exclude_positions": list(exclude_positions)}
    running = _RunningSpectra(points)
    saved = None if checkpoint is None else _Checkpoint(Path(checkpoint), text, settings, checkpoint_seconds)
    if saved is not None:
        saved.restore(running)
    for _ in text.read(running.readers(), description="Activation spectra", progress=progress):
        if saved is not None and saved.is_due():
            saved.write(running)
    if saved is not None:
        saved.write(running)
    text.check_length(at_least=2)
    spectra = running.spectra()
    warning = _small_sample_warning(spectra)
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return spectra


class _RunningSpectra:
    """Moments of each hook; those of aliases of one hook point are the same."""

    def __init__(self, points: Mapping[str, nn.Module]) -> None:
        self.moments: dict[str, RunningMoments] = {}
        first_name: dict[int, str] = {}
        self._first_names = {name: first_name.setdefault(id(point), name) for name, point in points.items()}

    def readers(self) -> dict[str, Callable[[Tensor], None]]:
        return {name: self._reader(name) for name in dict.fromkeys(self._first_names.values())}

    def _reader(self, name: str) -> Callable[[Tensor], None]:
        def read(vectors: Tensor) -> None:
            moments = self.moments.get(name)
            if moments is None:
                moments = RunningMoments.zeros(vectors.shape[1])
            self.moments[name] = moments.to(vectors.device)
            _update_(self.moments[name], vectors, name)

        return read

    def spectra(self) -> dict[str, Spectrum]:
        return {name: Spectrum.from_moments(self.moments[own]).to("cpu") for name, own in self._first_names.items()}


def _update_(moments: RunningMoments, vectors: Tensor, name: str) -> None:
    try:
        moments.update_(vectors)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class _Checkpoint:
    """Moments and the place in the text, saved together between batches, in one file that is replaced as a whole."""

    def __init__(self, path: Path, text: TextPass, settings: Mapping[str, Any], seconds: float) -> None:
        self.path, self.text, self.seconds = path, text, seconds
        self.settings = {
            "model": str(getattr(text.model.cfg, "model_name", "")),
            "hooks": list(text.points),
            "n_tokens": text.n_tokens,
            "excluded_ids": sorted(text.special_ids.tolist()),
            **settings,
        }
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.seconds

    def write(self, running: _RunningSpectra) -> None:
        start, text = time.monotonic(), self.text
        place = {"n_batches": text.n_batches, "n_kept": text.n_read, "digest": text.digest.hexdigest()}
        save_pass(self.path, running.moments, self.settings, place)
        self._saved_at = time.monotonic()
        self.seconds = max(self.seconds, _CHECKPOINT_PAUSE * (self._saved_at - start))

    def restore(self, running: _RunningSpectra) -> None:
        """Go on from the file, where there is one. Raises ValueError for that of another pass."""
        if not self.path.exists():
            return
        running.moments, place = load_pass(self.path, self.settings)
        self.text.skip(place["n_batches"], place["n_kept"])
        if self.text.digest.hexdigest() != place["digest"]:
            raise ValueError(f"{self.path} was written while reading other data: give that data, or delete the file")
        logger.info("continuing after %d tokens", self.text.n_read)


def save_pass(
    path: Path, moments: Mapping[str, RunningMoments], settings: Mapping[str, Any], place: Mapping[str, Any]
) -> None:
    """Write moments, settings and place (plain values); a reader sees the old file or the new one, never a part."""
    tensors = {}
    for name, running in moments.items():
        tensors[f"{name}/mean"] = running.mean
        tensors[f"{name}/scatter"] = running.scatter
    counts = {name: running.n_tokens for name, running in moments.items()}
    state = json.dumps({"settings": settings, "place": place, "n_tokens": counts})
    save_tensors(path, tensors, {"format": PASS_FORMAT, "state": state})


def load_pass(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, RunningMoments], dict[str, Any]]:
    """Moments and place of a pass with these settings.

    Raises:
        ValueError: for a file of something else, or of a pass with other settings.
    """
    metadata = tensor_metadata(path)
    if metadata.get("format") != PASS_FORMAT:
        raise ValueError(f"{path} is not the checkpoint of a pass over activations: give another path")
    state = json.loads(metadata["state"])
    changed = differences(state["settings"], settings)
    if changed:
        raise ValueError(f"{path} belongs to a pass with other settings ({changed}): use those, or delete it")
    tensors = load_tensors(path)
    return {
        name: RunningMoments(n, tensors[f"{name}/mean"], tensors[f"{name}/scatter"])
        for name, n in state["n_tokens"].items()
    }, state["place"]


def spectra_from_cache(
    cache: Any, hook_names: str | Iterable[str], mask: Bool[Tensor, ...] | None = None
) -> dict[str, Spectrum]:
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
        if mask is not None:
            vectors = vectors.index_select(0, mask.flatten().nonzero().squeeze(1).to(vectors.device))
        moments = RunningMoments.zeros(vectors.shape[1], vectors.device)
        _update_(moments, vectors, name)
        spectra[name] = Spectrum.from_moments(moments).to("cpu")
    warning = _small_sample_warning(spectra)
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return spectra


def _small_sample_warning(spectra: Mapping[str, Spectrum]) -> str | None:
    """For all spectra whose sample is small for their width, about the widest of them; None where there are none."""
    small = [name for name, spectrum in spectra.items() if spectrum.has_small_sample]
    if not small:
        return None
    name = max(small, key=lambda name: spectra[name].d)
    others = f" (and {len(small) - 1} more hooks)" if len(small) > 1 else ""
    return f"{name}{others}: {spectra[name].sample_size_warning()}"

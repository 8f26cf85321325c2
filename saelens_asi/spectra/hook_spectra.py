"""Spectra of a model's activations: one pass over text, any number of hooks, O(d^2) memory a hook."""

from __future__ import annotations

import errno
import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor, nn

from saelens_asi.activations.fingerprint import (
    Fingerprints,
    changed_since_written,
    check_fingerprints,
    content_checksum,
    fingerprints,
)
from saelens_asi.activations.hooks import HookedModel, as_vectors, device_of, hook_points, resolve_hook_names
from saelens_asi.activations.reader import TextPass
from saelens_asi.activations.tokens import TokenData
from saelens_asi.interrupts import signals_held_back
from saelens_asi.resume import differences, load_tensors, save_tensors, tensor_metadata
from saelens_asi.sparse.shards import Group
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

    Where torch.distributed was initialised, all its processes have to call this, with the same arguments. They take
    batches in turn, and what each has seen is merged at the end: all return the spectra of one process, up to rounding.

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
        checkpoint: file that keeps the state. Where it exists, the pass continues from it, to the same result. With
            it, SIGINT and SIGTERM let the batch end, and save it first. Not where several processes share the pass.
        checkpoint_seconds: how often it is written.
        progress: show a progress bar.

    Returns:
        From each name that was asked for to its spectrum. Hook widths may differ; ``hook_z`` has n_heads * d_head.

    Raises:
        ValueError: for a hook that does not exist, is not reached, or holds no vectors; for activations that are not
            finite; for fewer than 2 tokens; for a checkpoint of another pass, model or data, or a damaged one, and for
            any where several processes share the pass.
        OSError: where the disk is full. The last checkpoint stays.
    """
    if n_tokens is not None and n_tokens < 2:
        raise ValueError(f"n_tokens={n_tokens} must be at least 2")
    group = _all_processes(checkpoint)
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
        group=group,
    )
    settings = {"batch_size": batch_size, "context_size": context_size, "exclude_positions": list(exclude_positions)}
    running = _RunningSpectra(points)
    if checkpoint is None:
        for _ in text.read(running.readers(), description="Activation spectra", progress=progress):
            pass
    else:
        made_of = fingerprints(model, data)
        saved = _Checkpoint(Path(checkpoint), text, settings, made_of, checkpoint_seconds)
        saved.restore(running)
        saved.read(running, progress)
    text.check_length(at_least=2)
    running.merge_(group, device_of(model))
    spectra = running.spectra()
    warning = _small_sample_warning(spectra)
    if warning is not None and group.is_first:
        warnings.warn(warning, stacklevel=2)
    return spectra


def _all_processes(checkpoint: str | Path | None) -> Group:
    """The processes that share the pass. Raises ValueError for a checkpoint of several."""
    is_initialized = dist.is_available() and dist.is_initialized()
    group = Group(dist.get_rank(), dist.get_world_size()) if is_initialized else Group()
    if group.size > 1 and checkpoint is not None:
        raise ValueError(
            f"checkpoint={str(checkpoint)!r} keeps what one process has seen, but {group.size} share this pass: set "
            "checkpoint=None, or start one process"
        )
    return group


class _RunningSpectra:
    """Moments of each hook; those of aliases of one hook point are the same."""

    def __init__(self, points: Mapping[str, nn.Module]) -> None:
        self.moments: dict[str, RunningMoments] = {}
        self.between_batches = True  # False while some hooks have got a batch, and others not
        first_name: dict[int, str] = {}
        self._first_names = {name: first_name.setdefault(id(point), name) for name, point in points.items()}

    def readers(self) -> dict[str, Callable[[Tensor], None]]:
        return {name: self._reader(name) for name in dict.fromkeys(self._first_names.values())}

    def _reader(self, name: str) -> Callable[[Tensor], None]:
        def read(vectors: Tensor) -> None:
            self.between_batches = False
            moments = self.moments.get(name)
            if moments is None:
                moments = RunningMoments.zeros(vectors.shape[1])
            self.moments[name] = moments.to(vectors.device)
            _update_(self.moments[name], vectors, name)

        return read

    def merge_(self, group: Group, device: torch.device | str) -> None:
        """Give each process the moments of what all have seen; one that has seen nothing starts on ``device``."""
        own = {name: moments.d for name, moments in self.moments.items()}
        widths = {name: d for widths in group.gather_objects(own) for name, d in widths.items()}
        for name in sorted(widths):
            moments = self.moments.get(name) or RunningMoments.zeros(widths[name], device)
            self.moments[name] = moments.merged(group)

    def spectra(self) -> dict[str, Spectrum]:
        return {name: Spectrum.from_moments(self.moments[own]).to("cpu") for name, own in self._first_names.items()}


def _update_(moments: RunningMoments, vectors: Tensor, name: str) -> None:
    try:
        moments.update_(vectors)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class _Checkpoint:
    """Moments and the place in the text, saved together between batches, in one file that is replaced as a whole."""

    def __init__(
        self, path: Path, text: TextPass, settings: Mapping[str, Any], made_of: Fingerprints, seconds: float
    ) -> None:
        self.path, self.text, self.made_of, self.seconds = path, text, made_of, seconds
        self.settings = {
            "model": str(getattr(text.model.cfg, "model_name", "")),
            "hooks": list(text.points),
            "n_tokens": text.n_tokens,
            "excluded_ids": sorted(text.special_ids.tolist()),
            **settings,
        }
        self._saved_at = time.monotonic()
        self._n_saved = 0

    def read(self, running: _RunningSpectra, progress: bool) -> None:
        """Read the text to its end, and save what has been read now and then, before a signal and after an error."""
        with signals_held_back() as stopped:
            try:
                for _ in self.text.read(running.readers(), description="Activation spectra", progress=progress):
                    running.between_batches = True
                    if stopped():
                        break
                    if time.monotonic() - self._saved_at >= self.seconds:
                        self._try_to_write(running)
            except BaseException:
                if running.between_batches and self.text.n_batches > self._n_saved:
                    with suppress(OSError):
                        self.write(running)
                raise
            self.write(running)

    def _try_to_write(self, running: _RunningSpectra) -> None:
        """In the middle of a pass: what fails is tried again later."""
        try:
            self.write(running)
        except OSError as error:
            logger.warning("the pass goes on, and tries again later to save: %s", error)
            self._saved_at = time.monotonic()

    def write(self, running: _RunningSpectra) -> None:
        start, text = time.monotonic(), self.text
        place = {"n_batches": text.n_batches, "n_kept": text.n_read, "digest": text.digest.hexdigest()}
        try:
            save_pass(self.path, running.moments, self.settings, place, self.made_of)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                message = (
                    f"no space left for checkpoint={str(self.path)!r}: the last one stays, the pass goes on from it"
                )
                raise OSError(errno.ENOSPC, message) from None
            raise
        self._saved_at, self._n_saved = time.monotonic(), text.n_batches
        self.seconds = max(self.seconds, _CHECKPOINT_PAUSE * (self._saved_at - start))

    def restore(self, running: _RunningSpectra) -> None:
        """Go on from the file, where there is one. Raises ValueError for that of another pass."""
        if not self.path.exists():
            return
        running.moments, place, saved = load_pass(self.path, self.settings)
        self.made_of = check_fingerprints(saved, self.made_of, self.path, "give that, or delete the file")
        self.text.skip(place["n_batches"], place["n_kept"])
        self._n_saved = place["n_batches"]
        if self.text.digest.hexdigest() != place["digest"]:
            raise ValueError(f"{self.path} was written while reading other data: give that data, or delete the file")
        logger.info("continuing after %d tokens", self.text.n_read)


class SavedPass(NamedTuple):
    """What the file of a pass holds.

    Attributes:
        moments: by hook.
        place: in the text.
        fingerprints: of the model and the data; None in files of earlier versions.
    """

    moments: dict[str, RunningMoments]
    place: dict[str, Any]
    fingerprints: Fingerprints | None


def save_pass(
    path: Path,
    moments: Mapping[str, RunningMoments],
    settings: Mapping[str, Any],
    place: Mapping[str, Any],
    made_of: Fingerprints | None = None,
) -> None:
    """Write moments, settings and place (plain values); a reader sees the old file or the new one, never a part."""
    tensors = {}
    for name, running in moments.items():
        tensors[f"{name}/mean"] = running.mean
        tensors[f"{name}/scatter"] = running.scatter
    counts = {name: running.n_tokens for name, running in moments.items()}
    state = json.dumps({"settings": settings, "place": place, "n_tokens": counts, "fingerprints": made_of})
    metadata = {"format": PASS_FORMAT, "state": state, "checksum": content_checksum(tensors, state)}
    save_tensors(path, tensors, metadata)


def load_pass(path: Path, settings: Mapping[str, Any]) -> SavedPass:
    """What was saved of a pass with these settings.

    Raises:
        ValueError: for a file of something else, a damaged one, or that of a pass with other settings.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not the checkpoint of a pass: give another path")
    metadata = tensor_metadata(path)
    if metadata.get("format") != PASS_FORMAT:
        raise ValueError(f"{path} is not the checkpoint of a pass over activations: give another path")
    tensors = load_tensors(path)
    damage = changed_since_written(metadata, tensors, "state")
    if damage:
        raise ValueError(f"{path} is damaged: {damage}. Delete it, and the pass begins anew")
    try:
        state = json.loads(metadata["state"])
        changed = differences(state["settings"], settings)
        moments = {
            name: RunningMoments(n, tensors[f"{name}/mean"], tensors[f"{name}/scatter"])
            for name, n in state["n_tokens"].items()
        }
        saved = SavedPass(moments, state["place"], state.get("fingerprints"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: it lacks parts. Delete it, and the pass begins anew") from None
    if changed:
        raise ValueError(f"{path} belongs to a pass with other settings ({changed}): use those, or delete it")
    return saved


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

"""Evaluate SAEs: dead features by tokens, error, sparsity and predictions, any number of them in one pass over text."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, TypeVar, overload

import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.activations.hooks import HookedModel, hook_of_module, hook_points
from saelens_asi.activations.reader import TextPass, Windows
from saelens_asi.activations.tokens import TokenData
from saelens_asi.evaluation.loss import Place, sae_losses_recovered
from saelens_asi.evaluation.metrics import RunningReconstruction, SAEEvaluation, SAELossRecovered
from saelens_asi.evaluation.reconstruction import measure_
from saelens_asi.evaluation.saes import check_sae, inference_form, on_flat_vectors, warn_of_other_windows
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

logger = logging.getLogger(__name__)

# Windows in a forward pass of the loss: all logits of each are held, for two models at a time.
_LOSS_BATCH = 4

# Given activations that are looked at together.
_ROWS = 4096

_T = TypeVar("_T")


@overload
def evaluate(
    sae: Mapping[str, SAE[Any]],
    model: HookedModel | None = ...,
    data: TokenData | None = ...,
    *,
    activations: Tensor | Iterable[Tensor] | None = ...,
    hook_name: str | None = ...,
    n_tokens: int | None = ...,
    loss_tokens: int = ...,
    ranks: bool = ...,
    batch_size: int = ...,
    context_size: int = ...,
    exclude_special_tokens: bool | Sequence[int] = ...,
    exclude_positions: Sequence[int] = ...,
    progress: bool = ...,
) -> dict[str, SAEEvaluation]: ...


@overload
def evaluate(
    sae: SAE[Any],
    model: HookedModel | None = ...,
    data: TokenData | None = ...,
    *,
    activations: Tensor | Iterable[Tensor] | None = ...,
    hook_name: str | None = ...,
    n_tokens: int | None = ...,
    loss_tokens: int = ...,
    ranks: bool = ...,
    batch_size: int = ...,
    context_size: int = ...,
    exclude_special_tokens: bool | Sequence[int] = ...,
    exclude_positions: Sequence[int] = ...,
    progress: bool = ...,
) -> SAEEvaluation: ...


def evaluate(
    sae: SAE[Any] | Mapping[str, SAE[Any]],
    model: HookedModel | None = None,
    data: TokenData | None = None,
    *,
    activations: Tensor | Iterable[Tensor] | None = None,
    hook_name: str | None = None,
    n_tokens: int | None = None,
    loss_tokens: int = 4096,
    ranks: bool = True,
    batch_size: int = 8,
    context_size: int = 256,
    exclude_special_tokens: bool | Sequence[int] = True,
    exclude_positions: Sequence[int] = (),
    progress: bool = True,
) -> SAEEvaluation | dict[str, SAEEvaluation]:
    """Evaluate one SAE, or several in a single pass, on activations or on a model and text.

    Any SAE that SAELens loads, with or without this package behind it, is used as SAELens uses it in inference: with
    its normalization, threshold (BatchTopK) and reshaping of heads. Each activation is encoded once. Several SAEs, on
    any hooks and layers, share one forward pass, and stop it after the last hook that is needed.

    Time: the forward pass, and for each SAE its encoder and decoder. Memory: 8 bytes a feature, 8 d_in^2 bytes a hook
    for the ranks, and at most 2^25 feature activations at a time.

    Args:
        sae: an SAE of SAELens, or SAEs by name.
        model: a HookedTransformer or TransformerBridge, with ``data``.
        data: token ids or rows of a dataset, as in ``activation_spectra``.
        activations: instead of model and data: a tensor (..., d_in), or batches of such.
        hook_name: where the activations are read, for all SAEs; that of each SAE's own metadata unless told. Names of
            transformers modules (``model.layers.15.self_attn.o_proj``) are understood.
        n_tokens: activations to count on; None for all of the data.
        loss_tokens: on how many tokens, in whole windows, the predictions are compared; 0 leaves it out.
        ranks: measure effective rank and intrinsic dimension of the activations too.
        batch_size: windows in a forward pass.
        context_size: length of the windows that text is packed into.
        exclude_special_tokens: as in ``activation_spectra``. Their activations are neither counted nor replaced.
        exclude_positions: as in ``activation_spectra``.
        progress: show a progress bar.

    Returns:
        One SAEEvaluation, or one by each name. Of several SAEs, those that cannot be evaluated are left out, with a
        warning that says why.

    Raises:
        ValueError: for a hook that does not exist or has another width than the SAE, for a transcoder or a temporal
            SAE, for weights that are not finite, for fewer than 2 activations, and for activations that are constant
            or not finite. Where several SAEs are given: if that is so for all of them; names them.
    """
    found = evaluate_each(
        sae if isinstance(sae, Mapping) else {"": sae}, model, data,
        activations=activations, hook_name=hook_name, n_tokens=n_tokens, loss_tokens=loss_tokens, ranks=ranks,
        batch_size=batch_size, context_size=context_size, exclude_special_tokens=exclude_special_tokens,
        exclude_positions=exclude_positions, progress=progress,
    )  # fmt: skip
    if not found.records:
        raise ValueError(none_left(found.left_out))
    for reason in found.left_out.values():
        logger.warning("Left out of the evaluation: %s", reason)
    return found.records if isinstance(sae, Mapping) else found.records[""]


class Evaluations(NamedTuple):
    """What came of several SAEs.

    Attributes:
        records: by name, of those that could be evaluated.
        left_out: by name, in words, why the others could not.
    """

    records: dict[str, SAEEvaluation]
    left_out: dict[str, str]


def none_left(left_out: Mapping[str, str]) -> str:
    """The error where no SAE can be evaluated."""
    if len(left_out) == 1:
        return next(iter(left_out.values()))
    return f"none of {', '.join(left_out)} can be evaluated: {'; '.join(left_out.values())}"


def evaluate_each(
    saes: Mapping[str, SAE[Any]],
    model: HookedModel | None,
    data: TokenData | None,
    *,
    activations: Tensor | Iterable[Tensor] | None = None,
    hook_name: str | None = None,
    n_tokens: int | None = None,
    loss_tokens: int = 4096,
    ranks: bool = True,
    batch_size: int = 8,
    context_size: int = 256,
    exclude_special_tokens: bool | Sequence[int] = True,
    exclude_positions: Sequence[int] = (),
    progress: bool = True,
) -> Evaluations:
    """``evaluate`` of several SAEs by name, which raises nothing for what is wrong with single ones.

    Raises:
        ValueError: for arguments, text and activations that no SAE can be evaluated on.
    """
    if (activations is None) == (model is None or data is None):
        raise ValueError("give either activations=..., or a model and data (token ids or a dataset)")
    if n_tokens is not None and n_tokens < 2:
        raise ValueError(f"n_tokens={n_tokens} must be at least 2")
    if not saes:
        raise ValueError("no SAE is given: name at least one")
    left_out: dict[str, str] = {}
    forms = _each(saes, _checked_form, left_out)
    given = activations is not None or model is None or data is None
    places: Mapping[str, Place | None] = dict.fromkeys(forms)
    if model is not None and not given:
        places = _each(forms, lambda name, one: place_of(one, name, model, hook_name), left_out)
    running = _RunningEvaluations({name: forms[name] for name in places}, places, ranks, left_out)
    losses: Mapping[str, SAELossRecovered] = {}
    with ExitStack() as stack:
        stack.enter_context(suppress(_NoneLeft))
        for name, one in running.left.items():
            stack.enter_context(on_flat_vectors(one))
            warn_of_other_windows(one, name, data, exclude_positions)
        running.check_left()
        if given or model is None or data is None:
            _read_given(running, activations if activations is not None else (), n_tokens, progress)
        else:
            points = hook_points(model, running.by_hook)
            text = TextPass(
                model, data, points, n_tokens, batch_size=batch_size, context_size=context_size,
                exclude_special_tokens=exclude_special_tokens, exclude_positions=exclude_positions,
            )  # fmt: skip
            losses = _read_text(running, text, loss_tokens, progress)
    records = _each(running.left, lambda name, _: running.result(name, losses.get(name)), left_out)
    return Evaluations(records, left_out)


def _each(
    saes: Mapping[str, SAE[Any]], function: Callable[[str, SAE[Any]], _T], left_out: dict[str, str]
) -> dict[str, _T]:
    """The function's value for each SAE; in ``left_out`` for which it raised ValueError, and why."""
    values = {}
    for name, sae in saes.items():
        try:
            values[name] = function(name, sae)
        except ValueError as error:
            left_out[name] = str(error)
    return values


def _checked_form(name: str, sae: SAE[Any]) -> SAE[Any]:
    form = inference_form(sae)
    check_sae(form, name)
    return form


def place_of(sae: SAE[Any], name: str, model: HookedModel, hook_name: str | None = None) -> Place:
    """Where an SAE is used; ``hook_name`` goes before its own. Raises ValueError, with ``name``, for no such hook."""
    metadata = sae.cfg.metadata
    hook_name = hook_name or metadata.hook_name
    if not hook_name:
        which = f" of {name!r}" if name else ""
        raise ValueError(f"the metadata{which} name no hook: give hook_name=...")
    try:
        hook = hook_of_module(model, hook_name)
        hook_points(model, [hook])  # raises where there is none of that name
        return Place(hook, metadata.hook_head_index)
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from None


class _NoneLeft(Exception):
    """No SAE is left for which reading on would be of use."""


class _RunningEvaluations:
    """Sums of several SAEs, and moments of the places that they read.

    Attributes:
        by_hook: from a hook's name to those of the SAEs on it.
        n_read: activations so far, where they were given.
        left_out: why an SAE is measured no more.
    """

    def __init__(
        self, saes: Mapping[str, SAE[Any]], places: Mapping[str, Place | None], ranks: bool, left_out: dict[str, str]
    ) -> None:
        self.saes, self.places, self.ranks, self.left_out = saes, places, ranks, left_out
        self.n_read = 0
        self.by_hook: dict[str, list[str]] = {}
        for name, place in places.items():
            self.by_hook.setdefault(place.hook_name if place else "", []).append(name)
        self._running: dict[str, RunningReconstruction] = {}
        self._moments: dict[tuple[Place | None, int], RunningMoments] = {}

    @property
    def left(self) -> dict[str, SAE[Any]]:
        return {name: sae for name, sae in self.saes.items() if name not in self.left_out}

    def check_left(self) -> None:
        if not self.left:
            raise _NoneLeft

    def add(self, names: Iterable[str], vectors: Tensor) -> None:
        """Vectors (n, width) of one hook, for the SAEs on it."""
        measured = set()
        for name in names:
            if name in self.left_out:
                continue
            sae, place = self.saes[name], self.places[name]
            try:
                x = vectors[:, (place or Place("activations")).columns(sae.cfg.d_in, vectors.shape[1])]
                key = (place, sae.cfg.d_in)
                if self.ranks and key not in measured:
                    measured.add(key)
                    moments = self._moments.get(key) or RunningMoments.zeros(sae.cfg.d_in)
                    self._moments[key] = moments.to(x.device).update_(x)
                running = self._running.get(name) or RunningReconstruction.zeros(sae.cfg.d_sae, sae.cfg.d_in)
                self._running[name] = measure_(running, sae, x)
            except ValueError as error:
                self.left_out[name] = f"{name}: {error}" if name else str(error)
        self.check_left()

    def result(self, name: str, loss: SAELossRecovered | None) -> SAEEvaluation:
        sae, place, running = self.saes[name], self.places[name], self._running[name]
        try:
            metrics = running.metrics()
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from None
        if loss is not None and not math.isfinite(loss.reconstructed + loss.kl_reconstructed):
            which = f"of {name} " if name else ""
            raise ValueError(
                f"the predictions with the reconstructions {which}in place are NaN or infinite: check its weights, or "
                "run the model in a wider dtype (bfloat16 or float32)"
            )
        spectrum = None
        if self.ranks:
            spectrum = Spectrum.from_moments(self._moments[place, sae.cfg.d_in])
        return SAEEvaluation(
            **asdict(metrics),
            firing_counts=running.firing_counts.cpu(),
            d_in=sae.cfg.d_in,
            hook_name=None if place is None else place.hook_name,
            effective_rank=None if spectrum is None else spectrum.effective_rank,
            intrinsic_dimension=None if spectrum is None else spectrum.intrinsic_dimension(0.99),
            loss=loss,
        )


def _read_given(
    running: _RunningEvaluations, activations: Tensor | Iterable[Tensor], n_tokens: int | None, progress: bool
) -> None:
    batches = [activations] if isinstance(activations, Tensor) else activations
    with tqdm(total=n_tokens, desc="Evaluation", unit="token", disable=not progress) as bar:
        for batch in batches:
            for vectors in batch.reshape(-1, batch.shape[-1]).split(_ROWS):
                vectors = vectors if n_tokens is None else vectors[: n_tokens - running.n_read]
                if len(vectors):
                    running.add(running.saes, vectors)
                running.n_read += len(vectors)
                bar.update(len(vectors))
            if n_tokens is not None and running.n_read >= n_tokens:
                return
    if not running.n_read:
        raise ValueError("activations holds no vectors: give a tensor (n, d_in), or batches of such")
    if n_tokens is not None:
        logger.warning("the activations ended after %d of n_tokens=%d", running.n_read, n_tokens)


def _read_text(
    running: _RunningEvaluations, text: TextPass, loss_tokens: int, progress: bool
) -> Mapping[str, SAELossRecovered]:
    """Measure on the text's activations, and on its first windows what reconstructions do to the predictions."""
    windows = _LossWindows(loss_tokens)
    readers: dict[str, Callable[[Tensor], None]] = {
        hook: partial(running.add, names) for hook, names in running.by_hook.items()
    }
    for read in text.read(readers, description="Evaluation", progress=progress, until=windows.complete):
        windows.add(read)
    text.check_length()
    return windows.losses(text.model, running) if loss_tokens else {}


class _LossWindows:
    """The first windows of the pass, of one length, on which predictions are compared."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self._windows: list[tuple[Tensor, Tensor]] = []

    def complete(self) -> bool:
        return sum(tokens.numel() for tokens, _ in self._windows) >= self.n_tokens

    def add(self, windows: Windows) -> None:
        for tokens, keep in zip(windows.tokens, windows.keep, strict=True):
            if not self.complete() and (not self._windows or tokens.shape == self._windows[0][0].shape):
                self._windows.append((tokens.cpu(), keep.cpu()))

    def losses(self, model: HookedModel, running: _RunningEvaluations) -> dict[str, SAELossRecovered]:
        if not self._windows:
            raise ValueError("the data fills no window to compare predictions on: give more text, or loss_tokens=0")
        tokens, keep = (torch.stack(parts) for parts in zip(*self._windows, strict=True))
        places = {name: running.places[name] for name in running.left}
        saes = {name: (running.saes[name], place) for name, place in places.items() if place is not None}
        return sae_losses_recovered(
            model, saes, tokens, replaced=keep, predicted=keep[:, :-1] & keep[:, 1:], batch_size=_LOSS_BATCH
        )

"""Evaluate SAEs: dead features by tokens, error, sparsity and predictions, any number of them in one pass over text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.activations.hooks import (
    as_vectors,
    hook_of_module,
    hook_points,
    keep_mask,
    read_activations,
    special_token_ids,
)
from saelens_asi.activations.tokens import token_batches
from saelens_asi.evaluation.loss import Place, sae_losses_recovered
from saelens_asi.evaluation.metrics import RunningReconstruction, SAEEvaluation, SAELossRecovered
from saelens_asi.evaluation.saes import check_sae, inference_form, measure_, on_flat_vectors, warn_of_other_windows
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

logger = logging.getLogger(__name__)

# Windows in a forward pass of the loss: all logits of each are held, for two models at a time.
_LOSS_BATCH = 4
_ROWS = 4096


def evaluate(
    sae: Any,
    model: Any = None,
    data: Any = None,
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
) -> Any:
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
        One SAEEvaluation, or one by each name.

    Raises:
        ValueError: for a hook that does not exist or has another width than the SAE, for a transcoder or a temporal
            SAE, for fewer than 2 activations, and for activations that are constant or not finite.
    """
    if (activations is None) == (model is None or data is None):
        raise ValueError("give either activations=..., or a model and data (token ids or a dataset)")
    if n_tokens is not None and n_tokens < 2:
        raise ValueError(f"n_tokens={n_tokens} must be at least 2")
    several = isinstance(sae, Mapping)
    saes: dict[str, Any] = {name: inference_form(one) for name, one in (sae.items() if several else [("", sae)])}
    if not saes:
        raise ValueError("no SAE is given: name at least one")
    for name, one in saes.items():
        check_sae(one, name)
    with ExitStack() as stack:
        for one in saes.values():
            stack.enter_context(on_flat_vectors(one))
        losses: Mapping[str, SAELossRecovered] = {}
        if activations is not None:
            state = _Pass(saes, dict.fromkeys(saes), ranks)
            _read_given(state, activations, n_tokens, progress)
        else:
            for name, one in saes.items():
                warn_of_other_windows(one, name, data, exclude_positions)
            exclude = (special_token_ids(model, exclude_special_tokens), exclude_positions)
            state = _Pass(saes, {name: _place(one, name, model, hook_name) for name, one in saes.items()}, ranks)
            batches = token_batches(model, data, batch_size, context_size)
            windows = _LossWindows(loss_tokens)
            _read_model(state, model, batches, exclude, n_tokens, windows, progress)
            if loss_tokens:
                losses = windows.losses(model, state)
    results = {name: state.result(name, losses.get(name)) for name in saes}
    return results if several else results[""]


def _place(sae: Any, name: str, model: Any, hook_name: str | None) -> Place:
    metadata = sae.cfg.metadata
    hook_name = hook_name or metadata.hook_name
    if not hook_name:
        which = f" of {name!r}" if name else ""
        raise ValueError(f"the metadata{which} name no hook: give hook_name=...")
    return Place(hook_of_module(model, hook_name), metadata.hook_head_index)


class _Pass:
    """Sums of several SAEs, and moments of the places that they read."""

    def __init__(self, saes: Mapping[str, Any], places: Mapping[str, Place | None], ranks: bool) -> None:
        self.saes, self.places, self.ranks = saes, places, ranks
        self.running: dict[str, RunningReconstruction] = {}
        self.moments: dict[Any, RunningMoments] = {}
        self.n_kept = 0

    def add(self, names: Iterable[str], vectors: Tensor) -> None:
        """Vectors (n, width) of one hook, for the SAEs on it."""
        seen = set()
        for name in names:
            sae, place = self.saes[name], self.places[name]
            try:
                x = vectors[:, (place or Place("activations")).columns(sae.cfg.d_in, vectors.shape[1])]
                key = (place, sae.cfg.d_in)
                if self.ranks and key not in seen:
                    seen.add(key)
                    moments = self.moments.get(key) or RunningMoments.zeros(sae.cfg.d_in)
                    self.moments[key] = moments.to(x.device).update_(x)
                running = self.running.get(name) or RunningReconstruction.zeros(sae.cfg.d_sae, sae.cfg.d_in)
                self.running[name] = measure_(running, sae, x)
            except ValueError as error:
                raise ValueError(f"{name}: {error}" if name else str(error)) from None

    def result(self, name: str, loss: SAELossRecovered | None) -> SAEEvaluation:
        sae, place, running = self.saes[name], self.places[name], self.running[name]
        try:
            metrics = running.metrics()
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from None
        spectrum = None
        if self.ranks:
            spectrum = Spectrum.from_moments(self.moments[place, sae.cfg.d_in])
        return SAEEvaluation(
            **asdict(metrics),
            firing_counts=running.firing_counts.cpu(),
            d_in=sae.cfg.d_in,
            hook_name=None if place is None else place.hook_name,
            effective_rank=None if spectrum is None else spectrum.effective_rank,
            intrinsic_dimension=None if spectrum is None else spectrum.intrinsic_dimension(0.99),
            loss=loss,
        )


def _read_given(state: _Pass, activations: Tensor | Iterable[Tensor], n_tokens: int | None, progress: bool) -> None:
    batches = [activations] if isinstance(activations, Tensor) else activations
    with tqdm(total=n_tokens, desc="Evaluation", unit="token", disable=not progress) as bar:
        for batch in batches:
            for vectors in batch.reshape(-1, batch.shape[-1]).split(_ROWS):
                vectors = vectors if n_tokens is None else vectors[: n_tokens - state.n_kept]
                if len(vectors):
                    state.add(state.saes, vectors)
                state.n_kept += len(vectors)
                bar.update(len(vectors))
            if n_tokens is not None and state.n_kept >= n_tokens:
                return
    _check_length(state, n_tokens)


def _read_model(
    state: _Pass,
    model: Any,
    batches: Iterator[tuple[Tensor, Tensor]],
    exclude: tuple[Tensor, Sequence[int]],
    n_tokens: int | None,
    windows: _LossWindows,
    progress: bool,
) -> None:
    by_hook: dict[str, list[str]] = {}
    for name, place in state.places.items():
        by_hook.setdefault(place.hook_name if place else "", []).append(name)
    points = hook_points(model, by_hook)
    device = getattr(model.cfg, "device", None) or "cpu"
    with tqdm(total=n_tokens, desc="Evaluation", unit="token", disable=not progress) as bar:
        for tokens, is_text in batches:
            n_missing = None if n_tokens is None else n_tokens - state.n_kept
            if n_missing == 0 and windows.complete:
                return
            keep = keep_mask(tokens, *exclude) & is_text
            windows.add(tokens, keep)
            rows = keep.flatten().nonzero().squeeze(1)[:n_missing]
            if not len(rows):
                continue

            def reader(hook: str, tokens: Tensor = tokens, rows: Tensor = rows) -> Any:
                return lambda x: state.add(by_hook[hook], as_vectors(x, tokens.shape, hook)[rows.to(x.device)])

            read_activations(
                model, tokens.to(device), points, {hook: reader(hook) for hook in points}, is_text.to(device)
            )
            state.n_kept += len(rows)
            bar.update(len(rows))
    _check_length(state, n_tokens)


def _check_length(state: _Pass, n_tokens: int | None) -> None:
    if not state.n_kept:
        raise ValueError(
            "the data holds no token that counts: check the data, exclude_special_tokens and exclude_positions"
        )
    if n_tokens is not None and state.n_kept < n_tokens:
        logger.warning("the data ended after %d of n_tokens=%d tokens", state.n_kept, n_tokens)


class _LossWindows:
    """The first windows of the pass, of one length, on which predictions are compared."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.windows: list[tuple[Tensor, Tensor]] = []

    @property
    def complete(self) -> bool:
        return sum(tokens.numel() for tokens, _ in self.windows) >= self.n_tokens

    def add(self, tokens: Tensor, keep: Tensor) -> None:
        for window, kept in zip(tokens, keep, strict=True):
            if not self.complete and (not self.windows or window.shape == self.windows[0][0].shape):
                self.windows.append((window.cpu(), kept.cpu()))

    def losses(self, model: Any, state: _Pass) -> dict[str, SAELossRecovered]:
        if not self.windows:
            raise ValueError("the data fills no window to compare predictions on: give more text, or loss_tokens=0")
        tokens, keep = (torch.stack(parts) for parts in zip(*self.windows, strict=True))
        saes = {name: (state.saes[name], place) for name, place in state.places.items() if place is not None}
        return sae_losses_recovered(
            model, saes, tokens, replaced=keep, predicted=keep[:, :-1] & keep[:, 1:], batch_size=_LOSS_BATCH
        )

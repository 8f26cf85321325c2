"""From a stream of activations to initialised SAEs: the space that each encoder sees, one pass for all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.activations.sae_state import shard_of, statistics_forgotten
from saelens_asi.initialization import (
    NORM_SAMPLE,
    ActiveSubspaceInit,
    Initialization,
    check_fresh,
    initialize_,
    write_provenance,
)
from saelens_asi.plugin.fields import AnyTrainingSAE, initializer_settings
from saelens_asi.plugin.quirks import WHITENING_EPS
from saelens_asi.plugin.sharded_sae import TopKOfAll
from saelens_asi.plugin.stream import ActivationStream
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

logger = logging.getLogger(__name__)

# With a spectrum file, activations are read for the norm alone: enough to spread its sample over many documents.
_TOKENS_FOR_NORM = 8 * NORM_SAMPLE


def check_settings(settings: ActiveSubspaceInit, sae: AnyTrainingSAE) -> None:
    """Raise ValueError, before anything long starts, for settings that cannot work for this SAE."""
    d_in, mode = sae.cfg.d_in, sae.cfg.normalize_activations
    settings.check_width(d_in)
    check_fresh(sae)
    if settings.spectrum is None:
        return
    if mode not in ("none", "expected_average_only_in"):
        raise ValueError(
            f"spectrum={settings.spectrum!r} describes raw activations, but with normalize_activations={mode!r} the "
            "encoder sees others: set normalize_activations to 'none' or 'expected_average_only_in', or spectrum=None"
        )
    try:
        width = Spectrum.load(settings.spectrum).d
    except ValueError as error:
        raise ValueError(f"spectrum={settings.spectrum!r} cannot be loaded: {error}") from None
    if width != d_in:
        raise ValueError(f"spectrum={settings.spectrum!r} was made for width {width}, but the SAE has d_in={d_in}")


def initialize_together(trainers: Mapping[str, Sequence[InitializedTrainer]], stream: ActivationStream) -> None:
    """Initialise the SAEs of ``trainers`` (by hook name) from one pass over ``stream``, and record how.

    Processes that share SAEs all call this with the same activations, and share the work.

    Raises:
        ValueError: when the activations are not finite, are constant, or are too few.
    """
    estimates = {name: [_Estimate(trainer) for trainer in group] for name, group in trainers.items()}
    open_ones = [estimate for group in estimates.values() for estimate in group]
    is_first = all(estimate.is_first for estimate in open_ones)
    if is_first:
        _warn_of_twins(estimates)
    total = max(estimate.n_wanted for estimate in open_ones)
    if stream.is_training_stream and is_first:
        logger.warning("this data provider allows no second look: %d activations are used up for the estimate", total)
    with tqdm(total=total, desc="Estimating active subspace", unit="token", disable=not is_first) as bar:
        for batch in stream.batches:
            for name, group in estimates.items():
                for estimate in group:
                    estimate.add(batch[name])
            bar.update(min(next(iter(batch.values())).shape[0], total - bar.n))
            if all(estimate.n_missing <= 0 for estimate in open_ones):
                break
    for estimate in open_ones:
        estimate.finish(stream.is_training_stream)


def _warn_of_twins(estimates: Mapping[str, Sequence[_Estimate]]) -> None:
    for name, group in estimates.items():
        starts = [(type(one.sae), one.sae.cfg.d_sae, one.settings) for one in group]
        if len(set(starts)) < len(starts):
            logger.warning("SAEs on %s start with the same weights: give each an ActiveSubspaceInit(seed=...)", name)


class InitializedTrainer(Protocol):
    """What the estimate needs of a trainer, and what it leaves there."""

    sae: AnyTrainingSAE
    activation_scaler: ActivationScaler
    initialization_pending: bool
    unsaved_spectrum: Spectrum | None


class _Estimate:
    """Moments and a small even sample of one SAE's activations, in the space that its encoder sees."""

    def __init__(self, trainer: InitializedTrainer) -> None:
        self.trainer = trainer
        self.sae = trainer.sae
        settings = initializer_settings(self.sae.cfg)
        if settings is None:
            raise ValueError("this SAE's config asks for no initializer")
        self.settings = settings
        n_tokens = settings.tokens_for(self.sae.cfg.d_in)
        self.n_wanted = n_tokens if settings.spectrum is None else min(n_tokens, _TOKENS_FOR_NORM)
        self.moments = RunningMoments.zeros(self.sae.cfg.d_in, self.sae.device, shard_of(self.sae).world)
        self.is_first = self.moments.group.is_first
        self.sample: list[Tensor] = []
        self.n_drawn = 0

    @property
    def n_missing(self) -> int:
        return self.n_wanted - self.moments.n_tokens

    @torch.no_grad()
    def add(self, batch: Tensor) -> None:
        self.n_drawn += batch.shape[0]
        x = batch[: max(self.n_missing, 0)].to(self.sae.device)
        if not len(x):
            return
        x = self.trainer.activation_scaler(x)
        start = self.moments.n_tokens
        self.moments.update_(self._as_encoder_sees(x))
        index = torch.arange(start, start + len(x), device=x.device)
        sample_size = min(NORM_SAMPLE, self.n_wanted)
        self.sample.append(x[(index + 1) * sample_size // self.n_wanted > index * sample_size // self.n_wanted])

    def _as_encoder_sees(self, x: Tensor) -> Tensor:
        with statistics_forgotten(self.sae):
            return self.sae.run_time_activation_norm_fn_in(x)

    def finish(self, is_training_stream: bool) -> None:
        n_tokens = self.moments.n_tokens
        if n_tokens < self.n_wanted:
            if n_tokens < 2:
                raise ValueError(f"the data ended after {n_tokens} activations: the estimate needs at least 2")
            if self.is_first:
                logger.warning("the data ended after %d of n_tokens=%d activations", n_tokens, self.n_wanted)
        self.moments.together_()
        spectrum = self._spectrum()
        if spectrum.total_variance <= 1e-12 * float(spectrum.mean.square().sum()) or spectrum.total_variance == 0:
            raise ValueError(
                f"the {n_tokens} activations of the estimate are constant: they span no subspace. Check hook_name and "
                "that the data holds more than one text"
            )
        if self._space_is_raw() and self.settings.spectrum is None:
            self.trainer.unsaved_spectrum = spectrum.scaled(1 / (self.trainer.activation_scaler.scaling_factor or 1.0))
        sample = torch.cat(self.sample)
        result = initialize_as_selected_(self.sae, self.settings, spectrum, sample)
        self._record(spectrum, result, self.n_drawn if is_training_stream else 0)
        self.trainer.initialization_pending = False

    def _spectrum(self) -> Spectrum:
        scaler = self.trainer.activation_scaler
        if self.settings.spectrum is not None:
            return Spectrum.load(self.settings.spectrum).scaled(scaler.scaling_factor or 1.0)
        if scaler.whitening is not None:
            # Whitened activations have the identity as covariance, so the raw variances order the coordinates.
            variances = (scaler.whitening.inverse_matrix.double().square().sum(dim=1) - WHITENING_EPS).clamp(min=0)
            return Spectrum(self.moments.mean.cpu(), torch.diag(variances).cpu(), self.moments.n_tokens)
        return Spectrum.from_moments(self.moments).to("cpu")

    def _space_is_raw(self) -> bool:
        return self.sae.cfg.normalize_activations in ("none", "expected_average_only_in")

    def _record(self, spectrum: Spectrum, result: Initialization, n_used_up: int) -> None:
        record = {
            "settings": self.settings.to_dict(),
            "space": self.sae.cfg.normalize_activations,
            "n_tokens": spectrum.n_tokens,
            "n_tokens_taken_from_training": n_used_up,
            "d_init": result.d_init,
            "variance_explained": result.variance_explained,
            "effective_rank": spectrum.effective_rank,
            "mean_to_deviation": spectrum.gamma,
            "norm": result.norm,
            "initial_nmse": result.initial_nmse,
        }
        write_provenance(self.sae.cfg.metadata, record)
        if not self.is_first:
            return
        tqdm.write(
            f"Active subspace: {result.d_init} of {spectrum.d} dimensions hold {result.variance_explained:.1%} of the "
            f"variance of {spectrum.n_tokens:,} activations (effective rank {spectrum.effective_rank:.0f}); decoder "
            f"norm {result.norm:.3g}, initial normalized MSE {result.initial_nmse:.3f}"
        )


def initialize_as_selected_(
    sae: AnyTrainingSAE, settings: ActiveSubspaceInit, spectrum: Spectrum, sample: Tensor
) -> Initialization:
    """``initialize_`` as it suits the way in which an SAE selects its features; the arguments are the same."""
    return initialize_(sae, settings, spectrum, sample, fit_activation_fn(sae))


def fit_activation_fn(sae: AnyTrainingSAE) -> TopKOfAll | None:
    """Under what the norm is fitted, where that is not the SAE's own activation function.

    Untrained features fire by the length of a vector: of a batch, the longest take hundreds each, and many nothing. A
    norm that suits these is too short for features to last: 71 % of 8,192 died on attention output of SmolLM2-135M,
    11 % with the norm that suits k features at every token.
    """
    if not isinstance(sae, BatchTopKTrainingSAE):
        return None
    return TopKOfAll(max(1, round(sae.cfg.k)), shard_of(sae).features)

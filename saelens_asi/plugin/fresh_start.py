"""A new start by Active Subspace Initialization for an SAE whose own start has failed, in a run with ``revive``."""

from __future__ import annotations

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from torch import Tensor

from saelens_asi.activations.sae_state import shard_of
from saelens_asi.dead_features.revive import FAILED, Silence, missed, start_has_failed
from saelens_asi.initialization import ActiveSubspaceInit, Initialization
from saelens_asi.plugin.estimate import initialize_as_selected_
from saelens_asi.plugin.fields import AnyTrainingSAE, initializer_settings
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

# Share of the steps after which what was learned is not given up any more.
_FIRST_SHARE = 0.2


class FreshStart:
    """Streams the moments of a run's first tokens, and starts its SAE anew where many features never fired.

    It happens once at most, in the first fifth of the steps, and never to an SAE that was initialised with the mean as
    its centre. Memory: one (d_in, d_in) matrix in float64, until that fifth is over.

    Args:
        cfg: of the run.
        sae: that may start anew.
    """

    def __init__(self, cfg: SAETrainerConfig, sae: AnyTrainingSAE) -> None:
        settings = initializer_settings(sae.cfg)
        is_centered = settings is not None and settings.center == "mean"
        self.settings = ActiveSubspaceInit(seed=0 if settings is None else settings.seed)
        self.last_step = 0 if is_centered else int(_FIRST_SHARE * cfg.total_training_steps)
        self.moments: RunningMoments | None = None
        self._sae, self._shard, self._batch = sae, shard_of(sae), cfg.train_batch_size_samples
        self._n_wanted = self.settings.tokens_for(sae.cfg.d_in)

    def see(self, sae_in: Tensor, steps_done: int) -> None:
        """Take in a step's (batch, d_in) tokens: as many as an estimate before training would have read."""
        if steps_done > self.last_step:
            self.moments = None
            return
        if self.moments is None:
            self.moments = RunningMoments.zeros(sae_in.shape[-1], sae_in.device)
        self.moments.update_(sae_in[: max(0, self._n_wanted - self.moments.n_tokens)])

    def is_needed(self, silence: Silence, mean_rate: float, steps_done: int) -> bool:
        """Whether the SAE is to start anew; the same in all processes. Collective."""
        if steps_done > self.last_step or self.moments is None or self.moments.n_tokens < self._n_wanted:
            return False
        counts = torch.stack([missed(silence, self._batch, mean_rate, firings).sum() for firings, _ in FAILED])
        shares = [count / self._shard.d_sae for count in self._shard.features.sum_(counts).tolist()]
        seen = Spectrum(self._centred(self.moments.mean), self.moments.covariance(), self.moments.n_tokens)
        return self._shard.world.of_first(start_has_failed(shares, seen))

    def _centred(self, mean: Tensor) -> Tensor:
        return mean - self._sae.b_dec.detach().to(mean) if self._sae.cfg.apply_b_dec_to_input else mean

    @torch.no_grad()
    def make_(self, sample: Tensor) -> Initialization:
        """Write new weights for all features. Collective.

        Args:
            sample: (n, d_in) of the last tokens, for the norm.
        """
        sae, moments = self._sae, self.moments
        if moments is None:
            raise ValueError("there is nothing to start from: no step was taken, or too many")
        for tensor in (moments.mean, moments.scatter):  # the last bits are those of each process's processor
            self._shard.world.as_first_(tensor)
        sae.b_dec.zero_()
        sae.b_enc.zero_()
        if isinstance(sae, BatchTopKTrainingSAE):
            sae.topk_threshold.zero_()
        self.last_step = 0
        self.moments = None
        return initialize_as_selected_(sae, self.settings, Spectrum.from_moments(moments), sample)

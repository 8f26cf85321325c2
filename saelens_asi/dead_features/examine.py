"""Why did my features die? One pass over activations, then every dead feature is tried with one thing changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.dead_features.advice import advise
from saelens_asi.dead_features.changes import ContestSample, Parts
from saelens_asi.dead_features.contests import Encoding
from saelens_asi.dead_features.firings import Firings, read_firing_rates
from saelens_asi.dead_features.momentum import OptimizerState, load_optimizer_state
from saelens_asi.dead_features.record import Autopsy, AutopsySettings, FeatureTable
from saelens_asi.dead_features.verdicts import Trial, decide
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum


@torch.no_grad()
def autopsy(
    sae: SAE,
    activations: Tensor | Iterable[Tensor],
    *,
    optimizer_state: str | Path | Mapping[str, Any] | None = None,
    firing_rates: str | Path | Tensor | None = None,
    progress: bool = True,
    **settings: Any,
) -> Autopsy:
    """Find each dead feature's cause by measurement: would it fire if one thing were different?

    A feature is dead that fires on none of the activations. Its score is affine in what the encoder sees, and it fires
    where the score is above 0 and above the bar: the k-th highest score of the token (TopK, AbsTopK), the lowest that
    is chosen among a block of tokens (BatchTopK, Matryoshka), the highest at each step of a matching pursuit, or 0
    (ReLU, gated, JumpReLU, transcoders; the feature's own threshold is taken off its score). Each change below is made
    to one feature alone, all others stay, and its wins are counted on a sample of the tokens.

    The verdict is the first of these that holds:

    1. ``broken``: the encoder row is zero or not finite.
    2. ``duplicate``: the row's cosine to a live feature's is at least ``duplicate_cosine``, and that feature scores
       higher on ``outscored_share`` of the tokens where this one scores above 0. To revive it would be to copy.
    3. ``starved``: ``more_tokens`` times the tokens would show it firing; extrapolated from the tail of its margins
       on the sample (peaks over threshold). Or it fired in training (``optimizer_state`` of a checkpoint or
       ``firing_rates`` tell) at a rate that lets less than 3 firings be expected of these tokens: silence then says
       nothing (rule of three).
    4. ``momentum``: it fires, at least 3 times on these tokens, with the movement undone that momentum alone made in
       the steps since its last gradient (needs ``optimizer_state``; moments can be traced back for about 600 steps,
       with the learning rates of the training history beside it, or one that never changed). It would not have
       happened with SparseAdam (arXiv 2508.16929).
    5. ``undecided``: nothing says that it still fires, but the tokens, read here and silent in training, are less than
       3 / ``dead_rate``: a feature that is rare, on a direction of its own, looks like one outside the subspace.
       ``if_dead`` tells what it is if it is dead.
    6. the change under which it fires most often, and at least ``revived_share`` as often as features do on average:
       ``outside``: what of its row lies outside the top principal directions that hold ``variance_share`` of the
       variance (and outside the mean's direction) is turned inside, at the same mean score (arXiv 2508.16929);
       ``mean``: the mean is subtracted from what all features see, and the bar is what they then set: the feature was
       opposed to the mean, or outscored by those along it (arXiv 2605.31518). Not tried for matching pursuit;
       ``norm``: its row is as long as the median live one;
       ``bias``: its bias and threshold are the median live feature's.
    7. ``several``: no single change revives it, all four together do; which of them it needs is measured too.
    8. ``unexplained``.

    One pass; memory O(d_in^2 + d_sae + n_sample d_in) besides the weights and blocks of scores. Time: that of encoding
    the activations once, and about six times that of scoring the dead features on the sample.

    Args:
        sae: any SAELens SAE or transcoder, for inference or training.
        activations: (n, d_in), or any iterable of such batches (also (..., d_in)), as ``sae.encode`` takes them: a
            training SAE that normalises its data outside (``expected_average_only_in``) wants them scaled.
            BatchTopK chooses among the tokens of one batch, as in training.
        optimizer_state: folder of a SAELens checkpoint, its ``trainer_state.pt``, or ``optimizer.state_dict()``, of
            exactly these weights.
        firing_rates: (d_sae,) share of tokens on which each feature fired in training, or the folder that holds
            SAELens's ``sparsity.safetensors``; None for the counters of ``optimizer_state``.
        progress: show progress bars.
        **settings: of ``AutopsySettings``.

    Raises:
        ValueError: for an architecture that it cannot read, activations of another width or that are not finite, fewer
            than 2 tokens, an optimizer state of another SAE, or a bad setting.
    """
    unknown = sorted(settings.keys() - AutopsySettings.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(
            f"autopsy has no setting {unknown}; its settings are {list(AutopsySettings.__dataclass_fields__)}"
        )
    thresholds = AutopsySettings(**settings)
    state = None if optimizer_state is None else load_optimizer_state(optimizer_state)
    firings = _firings(sae, state, firing_rates)
    encoding = Encoding.of(sae)
    statistics = _FiringStatistics(encoding, thresholds)
    for batch in _batches(activations, sae, progress):
        statistics.add(batch)
    n_tokens = statistics.moments.n_tokens
    if n_tokens < 2:
        raise ValueError(f"an autopsy needs at least 2 activations, got {n_tokens}")
    return _diagnose(sae, encoding, statistics, thresholds, state, firings, progress)


def _firings(sae: SAE, state: OptimizerState | None, rates: str | Path | Tensor | None) -> Firings | None:
    if rates is None:
        firings = None if state is None else state.firings
    else:
        firings = Firings.of_rates(rates if isinstance(rates, Tensor) else read_firing_rates(rates))
    if firings is not None and len(firings.rates) != sae.cfg.d_sae:
        raise ValueError(
            f"training counted the firings of {len(firings.rates)} features, this SAE has {sae.cfg.d_sae}: give the "
            "optimizer_state and the firing_rates that belong to it"
        )
    return firings


def _batches(activations: Tensor | Iterable[Tensor], sae: SAE, progress: bool) -> Iterator[Tensor]:
    d_in = sae.cfg.d_in
    total = activations.numel() // d_in if isinstance(activations, Tensor) else getattr(activations, "n_tokens", None)
    with tqdm(total=total, desc="Activations", unit="token", disable=not progress) as bar:
        for batch in [activations] if isinstance(activations, Tensor) else activations:
            # hook_z comes with its heads apart
            width = batch.shape[-1] if batch.ndim and batch.shape[-1] == d_in else batch.shape[-2:].numel()
            if not isinstance(batch, Tensor) or width != d_in:
                raise ValueError(f"activations of shape {tuple(batch.shape)} do not fit an SAE of d_in={d_in}")
            batch = batch.reshape(-1, d_in).to(sae.device)
            yield batch
            bar.update(len(batch))


class _FiringStatistics:
    """What one pass over the activations keeps: firings and margins of all features, moments, a sample of contests."""

    def __init__(self, encoding: Encoding, settings: AutopsySettings) -> None:
        d_sae, d_in = encoding.rows.weight.shape
        device = encoding.rows.bias.device
        self.encoding = encoding
        self.moments = RunningMoments.zeros(d_in, device)
        self.sample = ContestSample(settings.n_sample, settings.seed)
        self.fires = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.best_margin = torch.full((d_sae,), -torch.inf, device=device)
        self.bar_sum, self.n_contests = 0.0, 0

    @property
    def average_rate(self) -> float:
        """Share of the contests that a feature wins, mean over all features, dead ones included."""
        return float(self.fires.double().mean()) / self.n_contests

    def add(self, batch: Tensor) -> None:
        if not self.n_contests and batch.isfinite().all():
            self.encoding.check(batch)
        for x in batch.split(self.encoding.block):
            for step, contest in enumerate(self.encoding.contests(x)):
                if step == 0:  # a pursuit goes on with what is left
                    self.moments.update_(contest.inputs)
                self.fires += contest.fired.sum(dim=0)
                self.sample.add(contest)
                self.bar_sum += float(contest.bars.double().sum())
                self.n_contests += len(contest.bars)
                margins = contest.scores.sub_(contest.bars[:, None]).amax(dim=0)
                self.best_margin = torch.maximum(self.best_margin, margins)


def _diagnose(
    sae: SAE,
    encoding: Encoding,
    statistics: _FiringStatistics,
    settings: AutopsySettings,
    state: OptimizerState | None,
    firings: Firings | None,
    progress: bool,
) -> Autopsy:
    """The record of what became of every feature, from the pass and from trials of the dead ones."""
    spectrum = Spectrum.from_moments(statistics.moments)
    mean = spectrum.mean.to(encoding.rows.weight)
    d_active = spectrum.intrinsic_dimension(settings.variance_share)
    basis = spectrum.principal_directions(d_active).to(mean)
    alive = statistics.fires > 0
    dead = (~alive).nonzero().squeeze(1)
    fires_at_least = max(1.0, settings.revived_share * statistics.average_rate * len(statistics.sample.bars))
    trial = Trial(
        sae, encoding, dead, alive.nonzero().squeeze(1), statistics.sample, statistics.moments.n_tokens,
        statistics.n_contests, mean, basis, settings, progress,
    )  # fmt: skip
    evidence = trial.evidence(state, firings, fires_at_least)
    table = _table(encoding, statistics, basis, mean, spectrum)
    offset = sae.b_dec.detach().to(mean) if sae.cfg.apply_b_dec_to_input else torch.zeros_like(mean)
    deviation = max(spectrum.total_variance**0.5, torch.finfo(torch.float64).tiny)
    dead = dead.cpu()
    sampled = len(statistics.sample.bars) / statistics.n_contests
    verdicts, if_dead = decide(evidence, encoding.broken.cpu()[dead], fires_at_least, sampled, settings)
    record = Autopsy(
        n_tokens=statistics.moments.n_tokens,
        n_sample=len(statistics.sample.bars),
        fires_at_least=fires_at_least,
        d_in=spectrum.d,
        d_active=d_active,
        gamma=float((mean + offset).norm()) / deviation,
        gamma_seen=float(mean.norm()) / deviation,
        mean_bar=statistics.bar_sum / statistics.n_contests,
        dead=dead,
        verdicts=verdicts,
        if_dead=if_dead,
        features=table,
        evidence=evidence,
        settings=settings,
        has_optimizer_state=state is not None,
        knows_learning_rates=state is None or state.knows_learning_rates,
    )
    return replace(record, advice=advise(record, sae.cfg, sae.cfg.metadata.get(METADATA_KEY)))


def _table(
    encoding: Encoding, statistics: _FiringStatistics, basis: Tensor, mean: Tensor, spectrum: Spectrum
) -> FeatureTable:
    weight, bias = encoding.rows
    square = weight.square().sum(dim=1)
    outside = Parts.of(weight, basis, mean).outside.square().sum(dim=1)
    covariance = spectrum.covariance.to(weight)
    return FeatureTable(
        fires=statistics.fires.cpu(),
        outside=(outside / square.clamp(min=1e-30)).clamp(0, 1).cpu(),
        norm=square.sqrt().cpu(),
        mean_score=(weight @ mean + bias).cpu(),
        deviation=((weight @ covariance) * weight).sum(dim=1).clamp(min=0).sqrt().cpu(),
        best_margin=statistics.best_margin.cpu(),
    )

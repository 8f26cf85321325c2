"""Revival of dead features in a run with ``revive="auto"``: what it counts between rounds, and what a round writes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor, nn
from torch.optim import Optimizer

from saelens_asi.activations.sae_state import NORMALIZED_INSIDE, feature_dim, shard_of
from saelens_asi.dead_features.revive import (
    MAX_COSINE,
    Revived,
    Sample,
    Scoring,
    Silence,
    apart,
    dead_features,
    forgetting,
    largest_cosines,
    placed,
    residual_directions,
)
from saelens_asi.initialization import Initialization, write_provenance
from saelens_asi.plugin.fields import AnyTrainingSAE
from saelens_asi.plugin.fresh_start import FreshStart
from saelens_asi.plugin.sparse_steps import SparseSteps
from saelens_asi.plugin.topk_pass import encoder_of, is_of_family
from saelens_asi.resume import load_tensors
from saelens_asi.sparse.gradients import stack_levels
from saelens_asi.sparse.rows import Entries, Workspace, row_norms
from saelens_asi.sparse.selection import batch_top_k, batch_width, select_top_k
from saelens_asi.sparse.shards import ALONE
from saelens_asi.sparse.topk import Encoder, Query, TopK, encode_top_k
from saelens_asi.spectra.moments import RunningMoments

logger = logging.getLogger(__name__)

REVIVAL = "revival.safetensors"

# Steps from one round to the next, and tokens of the sample: those of the last steps, as many of each.
ROUND_STEPS, _SAMPLE, _SAMPLED_STEPS = 50, 2048, 64

# A round with fewer dead features than this share of all costs more than it brings.
_MIN_DEAD = 1e-3

# Share of the steps at the end, if the learning rate does not decay for longer, in which nothing is revived: Adam moves
# a row by about a learning rate a step, and a row that came too late would stay what a single token has made it.
_LAST_SHARE = 0.2

# Directions that are drawn at least.
_MIN_DRAWN = 256

# Tokens that are encoded at a time: their scores are the largest tensor of a round.
_TOKENS = 256


def check_revival(sae: AnyTrainingSAE) -> None:
    """Raise ValueError for an SAE whose features cannot be revived."""
    if sae.cfg.revive == "off":
        return
    if not is_of_family(sae):
        raise ValueError(
            f"revive={sae.cfg.revive!r} does not suit {type(sae).__name__}: where a feature enters is known of the "
            "TopK family alone (topk, abstopk, batchtopk, matryoshka_batchtopk). Set revive='off', or one of these"
        )
    if sae.cfg.normalize_activations in NORMALIZED_INSIDE:
        raise ValueError(
            f"revive={sae.cfg.revive!r} needs one scale for all tokens, and normalize_activations="
            f"{sae.cfg.normalize_activations!r} gives each its own: set 'none' or 'expected_average_only_in', or "
            "revive='off'"
        )


class Counters(NamedTuple):
    """SAELens's counters of firings, of the features that lie here.

    Attributes:
        silent: steps since each fired, or since it was revived.
        fired: on how many tokens of SAELens's window.
    """

    silent: Tensor
    fired: Tensor


class Revival:
    """Counts how features fire, keeps a sample of the last tokens, and moves dead features every ``ROUND_STEPS`` steps.

    Between rounds a step costs a comparison of (n_features,) numbers and a copy of 32 tokens, and waits for no device.
    A round that finds dead features encodes the sample, and moves rows; its memory is that of 256 tokens' scores.

    All processes of a run call it with the same tokens. Each finds the dead among its own features, all draw the same
    directions, and each moves its own rows.

    Args:
        cfg: of the run.
        sae: whose features are revived.

    Attributes:
        n_revived: features so far, each as often as it was revived.
    """

    def __init__(self, cfg: SAETrainerConfig, sae: TopKTrainingSAE) -> None:
        self.n_revived = 0
        self._sae, self._shard = sae, shard_of(sae)
        self._batch = cfg.train_batch_size_samples
        n_steps = cfg.total_training_steps
        self._last_step = n_steps - max(cfg.lr_decay_steps, round(_LAST_SHARE * n_steps))
        self._fired = torch.zeros(self._shard.n_features, dtype=torch.int32, device=cfg.device)
        self._born = torch.zeros_like(self._fired)
        self._sample: Tensor | None = None
        self._n_sampled = 0
        self._moments: RunningMoments | None = None
        self._fresh = FreshStart(cfg, sae)

    @property
    def _scoring(self) -> Scoring:
        cfg, is_magnitude = self._sae.cfg, isinstance(self._sae, AbsTopKTrainingSAE)
        return Scoring(cfg.k, self._shard.d_sae, cfg.rescale_acts_by_decoder_norm, is_magnitude)

    def see(self, sae_in: Tensor, silent: Tensor, steps_done: int) -> None:
        """Take in a step that is done.

        Args:
            sae_in: (batch, d_in), scaled, all tokens of the batch.
            silent: (n_features,) steps since each feature that lies here has fired.
            steps_done: of the run.
        """
        self._fresh.see(sae_in, steps_done)
        self._fired += silent == 0
        if self._sample is None:
            self._sample = sae_in.new_zeros(_SAMPLE, sae_in.shape[-1])
        n = _SAMPLE // _SAMPLED_STEPS
        tokens = sae_in[:: max(1, len(sae_in) // n)][:n]
        first = self._n_sampled % _SAMPLE
        head = tokens[: _SAMPLE - first]
        self._sample[first : first + len(head)] = head
        self._sample[: len(tokens) - len(head)] = tokens[len(head) :]
        self._n_sampled += len(tokens)

    def is_due(self, steps_done: int) -> bool:
        """Whether a round follows this step."""
        return steps_done % ROUND_STEPS == 0 and steps_done <= self._last_step

    @torch.no_grad()
    def find(self, steps_done: int, silent: Tensor) -> Found | None:
        """Which features are to be revived, and with what weights; None where there is nothing to do. Writes nothing.

        Collective.
        """
        silence, scoring, d_sae = self._silence(steps_done, silent), self._scoring, self._shard.d_sae
        dead = dead_features(silence, self._batch, scoring.k / d_sae, d_sae)
        rows = self._of_all(dead, silence.silent)
        if self._sample is None or len(rows) < max(1.0, _MIN_DEAD * d_sae):
            return None
        sample = self._look()
        self._moments = forgetting(self._moments, sample.residual)
        n = min(len(rows), scoring.most_at_once(len(sample.x)))
        generator = torch.Generator().manual_seed(steps_done)
        # More than are needed: duplicates are left out, and of the rest the best are taken.
        drawn = residual_directions(sample, self._moments, max(2 * n, _MIN_DRAWN), generator)
        W_dec, magnitude = self._sae.W_dec.detach(), scoring.magnitude
        near = largest_cosines(drawn, W_dec, ~dead, magnitude, self._shard.features) > MAX_COSINE
        revived, gain = placed(drawn[apart(drawn, near, magnitude)], sample, scoring)
        best = gain.argsort(descending=True, stable=True)[:n]
        best = best[gain[best] > 0]
        revived = self._as_first(Revived(*(one[best] for one in revived)))
        return self._own(rows[: len(revived.norm)], revived) if len(revived.norm) else None

    def _silence(self, steps_done: int, silent: Tensor) -> Silence:
        age = steps_done - self._born.long()
        return Silence(age, self._fired.long(), torch.minimum(silent.long(), age))

    def is_failed_start(self, steps_done: int, silent: Tensor) -> bool:
        """Whether the SAE is to start anew, instead of a round. Collective."""
        return self._fresh.is_needed(self._silence(steps_done, silent), self._scoring.k / self._shard.d_sae, steps_done)

    def start_anew_(self, optimizer: Optimizer, steps: SparseSteps, counters: Counters, steps_done: int) -> None:
        """Give all features new weights by Active Subspace Initialization, and moments and counters of a beginning.

        Collective. The arguments are those of ``write_``.
        """
        if self._sample is None:
            raise ValueError("no step was taken yet: there is nothing to look at")
        begun = self._fresh.make_(self._sample[: self._n_sampled])
        steps.invalidate()
        forget_rows_(self._sae, optimizer, torch.arange(self._shard.n_features, device=self._fired.device))
        state = optimizer.state.get(self._sae.b_dec) or {}
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                state[moment].zero_()
        for counts in (*counters, self._fired):
            counts.zero_()
        self._born.fill_(steps_done)
        self.n_revived += self._shard.d_sae
        self._record(begun, steps_done)

    def _record(self, begun: Initialization, steps_done: int) -> None:
        record = {"settings": self._fresh.settings.to_dict(), "started_anew_after_steps": steps_done, **begun.to_dict()}
        write_provenance(self._sae.cfg.metadata, record)
        if self._shard.world.is_first:
            logger.warning(
                "many features do not fire, and the mean is in what the encoder sees: after %d steps the SAE starts "
                "anew, by Active Subspace Initialization (%d dimensions, decoder norm %.3g). With "
                "initializer='active_subspace' these steps would not have been lost",
                steps_done,
                begun.d_init,
                begun.norm,
            )

    def _of_all(self, dead: Tensor, silent: Tensor) -> Tensor:
        """Dead features of all processes by their numbers in the whole, those that have been silent longest first."""
        own = dead.nonzero().squeeze(1)
        rows = self._shard.of_all(own + self._shard.first)
        return rows[self._shard.of_all(silent[own]).argsort(descending=True, stable=True)]

    def _as_first(self, revived: Revived) -> Revived:
        """The first process's, in all: the last bits of residuals are those of each one's processor."""
        world = self._shard.world
        n = world.of_first(len(revived.norm))
        packed = torch.cat([revived.directions, revived.norm[:, None], revived.bias[:, None]], dim=1)
        if len(packed) != n:
            packed = packed.new_zeros(n, packed.shape[1])
        packed = world.as_first_(packed.contiguous())
        return Revived(packed[:, :-2], packed[:, -2], packed[:, -1])

    def _own(self, rows: Tensor, revived: Revived) -> Found:
        here = (rows >= self._shard.first) & (rows < self._shard.stop)
        own, order = (rows[here] - self._shard.first).sort()
        return Found(own, Revived(*(one[here][order] for one in revived)), len(rows))

    def _look(self) -> Sample:
        """The sampled tokens, and what the SAE makes of them now, in float32 or wider."""
        sae, shard = self._sae, replace(self._shard, world=self._shard.features, tokens=ALONE)
        if self._sample is None:
            raise ValueError("no step was taken yet: there is nothing to look at")
        sae_in = self._sample[: self._n_sampled].to(sae.W_dec.dtype)
        x = sae_in - sae.b_dec if sae.cfg.apply_b_dec_to_input else sae_in
        norms = row_norms(sae.W_dec.detach()) if sae.cfg.rescale_acts_by_decoder_norm else None
        encoder, workspace = encoder_of(sae, norms), Workspace()
        n_tokens, n_entries = len(x), int(sae.activation_fn.k * len(x))
        if isinstance(sae, BatchTopKTrainingSAE):
            first = _best(x, encoder, batch_width(n_entries, n_tokens, shard.n_features), workspace)
            batch = batch_top_k(
                first, n_entries, shard, n_tokens, lambda some, k: _best(x[some], encoder, k, workspace)
            )
            active, lowest = batch.entries, x.new_zeros(n_tokens)
            lowest += 0.0 if batch.lowest is None else batch.lowest
        else:
            k = int(sae.activation_fn.k)
            best = _best(x, encoder, min(k, shard.n_features), workspace)
            active = select_top_k(best, k, shard.features, encoder.magnitude)
            active = active.where(active.scores != 0 if encoder.magnitude else active.scores > 0)
            lowest = self._lowest(active, n_tokens, k)
        scores = active.scores if norms is None else active.scores / norms[active.features]
        decoded = stack_levels([active._replace(scores=scores)], n_tokens).decode(sae.W_dec.detach())
        residual = sae_in - shard.features.sum_(decoded) - sae.b_dec
        wide = torch.promote_types(x.dtype, torch.float32)
        return Sample(x.to(wide), residual.to(wide), lowest.to(wide))

    def _lowest(self, active: Entries, n_tokens: int, k: int) -> Tensor:
        """Of each token the lowest score that is among its k, of all processes; 0 where fewer fire."""
        own = active.scores.new_full((n_tokens,), torch.inf)
        own.scatter_reduce_(0, active.tokens, active.scores.abs(), "amin")
        lowest = -self._shard.features.max_(-own)
        n_active = self._shard.features.sum_(torch.bincount(active.tokens, minlength=n_tokens))
        return lowest.masked_fill_(n_active < k, 0.0)

    @torch.no_grad()
    def write_(
        self, found: Found, optimizer: Optimizer, steps: SparseSteps, counters: Counters, steps_done: int
    ) -> None:
        """Move the rows of this process, with moments and counters as at a beginning.

        Args:
            found: what ``find`` gave.
            optimizer: of the SAE's parameters.
            steps: which keep something of the weights.
            counters: of SAELens.
            steps_done: of the run.
        """
        (rows, (directions, norm, bias), n), sae = found, self._sae
        weights = (directions * norm[:, None]).to(sae.W_dec.dtype)
        with steps.rows_written(sae, rows):
            sae.W_dec.index_copy_(0, rows, weights)
            sae.W_enc.index_copy_(1, rows, weights.t())
            sae.b_enc.index_copy_(0, rows, bias.to(sae.b_enc.dtype))
        forget_rows_(sae, optimizer, rows)
        for counts in (*counters, self._fired):
            counts.index_fill_(0, rows, 0)
        self._born.index_fill_(0, rows, steps_done)
        self.n_revived += n

    def state(self) -> dict[str, Tensor]:
        """All that later rounds follow from, of all features. Collective."""
        kept = {"residual": self._moments, "seen": self._fresh.moments}
        moments = {name: of for name, of in kept.items() if of is not None}
        counts = [0 if of is None else of.n_tokens for of in kept.values()]
        numbers = [self._n_sampled, self.n_revived, self._fresh.last_step, *counts]
        tensors = {"fired": self._shard.of_all(self._fired), "born": self._shard.of_all(self._born)}
        tensors["numbers"] = torch.tensor(numbers)
        if self._sample is not None:
            tensors["sample"] = self._sample
        for name, of in moments.items():
            tensors |= {f"{name}.mean": of.mean, f"{name}.scatter": of.scatter}
        return tensors

    def load(self, folder: Path, steps_done: int, silent: Tensor) -> None:
        """Go on from a checkpoint; one of a run without revival says only since when features have been silent.

        Of its past no more is taken for known than that a feature has fired, if it has.
        """
        if not (folder / REVIVAL).exists():
            logger.info("%s is of a run without revive: firings are counted from here on", folder)
            self._fresh.last_step = 0  # its first tokens are gone
            self._fired = (silent < steps_done).to(self._fired)
            return
        self._take(load_tensors(folder / REVIVAL))

    def _take(self, saved: Mapping[str, Tensor]) -> None:
        device = self._fired.device
        self._fired, self._born = (self._shard.own(saved[name]).to(device).clone() for name in ("fired", "born"))
        self._n_sampled, self.n_revived, self._fresh.last_step, *counts = saved["numbers"].tolist()
        self._sample = saved["sample"].to(device) if "sample" in saved else None
        self._moments, self._fresh.moments = (
            RunningMoments(n, saved[f"{name}.mean"], saved[f"{name}.scatter"]).to(device) if n else None
            for name, n in zip(("residual", "seen"), counts, strict=True)
        )


class Found(NamedTuple):
    """What a round writes.

    Attributes:
        rows: features of this process, ascending.
        revived: weights of each.
        n: features in all processes.
    """

    rows: Tensor
    revived: Revived
    n: int


def _best(x: Tensor, encoder: Encoder, k: int, workspace: Workspace) -> TopK:
    parts = [encode_top_k(part, encoder, [Query(k)], workspace)[0] for part in torch.split(x, _TOKENS)]
    return TopK(*(torch.cat([getattr(part, name) for part in parts]) for name in TopK._fields))


def forget_rows_(sae: nn.Module, optimizer: Optimizer, rows: Tensor) -> None:
    """Give rows of an Adam's or a SparseAdam's state the values that they have before their first update."""
    n_features: int = sae.cfg.d_sae  # type: ignore[assignment, union-attr]
    for name, param in sae.named_parameters():
        dim = feature_dim(name, param, n_features)
        state = optimizer.state.get(param)
        if dim is None or not state:
            continue
        for key, tensor in state.items():
            if key == "last_step":  # silence of its moments counts from here
                tensor.index_fill_(0, rows, int(state["step"]))
            elif tensor.ndim:
                tensor.index_fill_(dim if tensor.shape == param.shape else 0, rows, 0)

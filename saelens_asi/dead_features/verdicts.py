"""Evidence about dead features, and the verdicts that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.dead_features.changes import (
    Change,
    ContestSample,
    Split,
    Typical,
    firing_counts,
    highest_expected,
    nearest,
    share_outscored,
    single_changes,
    together,
    undone,
    without_mean,
)
from saelens_asi.dead_features.contests import Encoding, Rows, feature_parameters, rows_of
from saelens_asi.dead_features.firings import Firings
from saelens_asi.dead_features.momentum import OptimizerState, silent_drift
from saelens_asi.dead_features.record import SURE_FIRINGS, AutopsySettings, Evidence, Verdict

# Single changes of a row, in the order that decides ties.
_SINGLE: tuple[Verdict, ...] = ("outside", "mean", "norm", "bias")

# A changed row may itself be the one that sets a bar; it then passes it, whatever the rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Trial:
    """Dead features of an SAE, the tokens to try them on, and what the changes refer to.

    Attributes:
        dead, live: indices.
        sample: of the contests, as they were.
        n_tokens: that were read.
        n_contests: of how many the sample was drawn; more than tokens for a pursuit.
        mean: (d_in,) of what the encoder sees.
        basis: (d_in, r) of the active subspace.
    """

    sae: SAE
    encoding: Encoding
    dead: Tensor
    live: Tensor
    sample: ContestSample
    n_tokens: int
    n_contests: int
    mean: Tensor
    basis: Tensor
    settings: AutopsySettings
    progress: bool

    def evidence(self, state: OptimizerState | None, firings: Firings | None, fires_at_least: float) -> Evidence:
        """Everything that is measured on the dead features; without ``state`` nothing is known of momentum."""
        rows, inputs = self.encoding.rows.at(self.dead), self.sample.inputs - self.mean
        split, bars = Split.of(rows, self.mean), self.sample.bars
        fires_if, needs = self._revivals(split, inputs, fires_at_least)
        twin, cosine, outscored = self._duplicates(rows)
        decoder = self.sae.W_dec.detach().to(cosine)
        n_more = self.settings.more_tokens * self.n_contests
        silent_steps, drift = torch.zeros_like(twin), torch.zeros_like(cosine)
        dead, nothing = self.dead.cpu(), torch.zeros(len(self.dead), dtype=torch.float64)
        past_rate = nothing + torch.nan if firings is None else firings.rates[dead]
        silent_tokens = nothing if firings is None else firings.silent_tokens[dead]
        tokens_needed = SURE_FIRINGS / torch.where(past_rate > 0, past_rate, self.settings.dead_rate)
        if state is not None:
            fires_if["momentum"], silent_steps, drift = self._momentum(state, rows, inputs)
        return Evidence(
            fires_if={cause: fires.cpu() for cause, fires in fires_if.items()},
            needs={cause: needed.cpu() for cause, needed in needs.items()},
            expected_margin=highest_expected(split.centred(), inputs, bars, n_more, self.encoding.signed).cpu(),
            twin=twin.cpu(),
            twin_cosine=cosine.cpu(),
            twin_decoder_cosine=torch.cosine_similarity(decoder[self.dead], decoder[twin], dim=1).cpu(),
            outscored=outscored.cpu(),
            silent_steps=silent_steps.cpu(),
            drift=drift.cpu(),
            past_rate=past_rate,
            silent_tokens=silent_tokens,
            tokens_needed=tokens_needed,
            tokens_missing=(tokens_needed - silent_tokens - self.n_tokens).round().clamp(min=0),
        )

    def _revivals(
        self, rows: Split, inputs: Tensor, fires_at_least: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``fires_if`` and ``needs`` of ``Evidence``."""
        typical = Typical.of(self.encoding.rows.at(self.live))
        single = single_changes(self.basis, typical, self.sample.bars, self._centred_bars(inputs))
        fires_if = self._firings(rows, {**single, "several": together(list(single.values()))}, inputs)
        revived = torch.stack([fires_if[cause] >= fires_at_least for cause in single]).any(dim=0)
        several = (~revived & (fires_if["several"] >= fires_at_least)).nonzero().squeeze(1)
        without = {cause: together([one for name, one in single.items() if name != cause]) for cause in single}
        needs = {cause: torch.zeros_like(revived) for cause in single}
        # Only of those: a feature that one change revives needs none of the others.
        for cause, fires in self._firings(rows.at(several), without, inputs).items():
            needs[cause][several] = fires < fires_at_least
        return fires_if, needs

    def _duplicates(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Live feature with the nearest row (-1 where none lives), its cosine, and the share of contests it wins."""
        live, signed = self.encoding.rows.at(self.live), self.encoding.signed
        index, cosine = nearest(rows, live, signed)
        outscored = torch.zeros_like(cosine)
        near = (cosine >= self.settings.duplicate_cosine).nonzero().squeeze(1)
        outscored[near] = share_outscored(rows.at(near), live.at(index[near]), self.sample.inputs, signed)
        twin = self.live[index] if len(self.live) else torch.full_like(index, -1)
        return twin, cosine, outscored

    def _momentum(self, state: OptimizerState, rows: Rows, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contests won by the rows as they were before momentum moved them, silent steps, and relative movement."""
        drift = silent_drift(self.sae, state, self.dead)
        before = rows_of(self.sae, undone(feature_parameters(self.sae, self.dead), drift.moved))
        unchanged = {"momentum": Change(lambda own: own, self.sample.bars)}
        fires = self._firings(Split.of(before, self.mean), unchanged, inputs)["momentum"] * drift.is_traced
        length = before.weight.norm(dim=1).clamp(min=1e-30)
        return fires, drift.steps, (rows.weight - before.weight).norm(dim=1) / length

    def _firings(self, rows: Split, changes: Mapping[str, Change], inputs: Tensor) -> dict[str, Tensor]:
        """Sampled contests that each row would win, by change."""
        total = len(changes) * len(rows.bias)
        with tqdm(total=total, desc="Changed rows", unit="row", disable=not self.progress or not total) as bar:
            return {
                cause: firing_counts(
                    change.apply(rows).centred(), inputs, change.bars, self.encoding.signed, bar.update
                )
                for cause, change in changes.items()
            }

    def _centred_bars(self, inputs: Tensor) -> Tensor | None:
        """Bars that all features set when none of their scores holds the mean's part; not for pursuits."""
        if self.encoding.rule == "pursuit":  # what is left of a token after the first step has another mean
            return None
        rows = without_mean(Split.of(self.encoding.rows, self.mean)).centred()
        blocks = inputs.split(self.encoding.block)
        bars = torch.cat([self.encoding.bars(rows.scores(x, self.encoding.signed)) for x in blocks])
        return bars * (1 - _ROUNDING)


def decide(
    evidence: Evidence, broken: Tensor, fires_at_least: float, sampled: float, settings: AutopsySettings
) -> tuple[tuple[Verdict, ...], tuple[Verdict, ...]]:
    """For each dead feature the first verdict that holds, in the order of ``autopsy``'s docstring; and the first that
    would hold were none undecided.

    ``sampled`` is the share of the contests on which changed rows were tried.
    """
    is_silence_no_evidence = evidence.tokens_missing > 0
    single = [cause for cause in _SINGLE if cause in evidence.fires_if]
    highest, change_index = torch.stack([evidence.fires_if[cause] for cause in single]).max(dim=0)
    none = torch.zeros_like(highest)
    resembles = evidence.twin_cosine >= settings.duplicate_cosine
    is_outscored = evidence.outscored >= settings.outscored_share
    criteria: list[tuple[Tensor, Verdict]] = [
        (broken, "broken"),
        (resembles & is_outscored, "duplicate"),
        ((evidence.expected_margin > 0) | (is_silence_no_evidence & (evidence.past_rate > 0)), "starved"),
        # It stayed silent where three firings were to be expected: the movement made the difference.
        (evidence.fires_if.get("momentum", none) >= SURE_FIRINGS * sampled, "momentum"),
        (is_silence_no_evidence, "undecided"),
        *(((highest >= fires_at_least) & (change_index == i), cause) for i, cause in enumerate(single)),
        (evidence.fires_if["several"] >= fires_at_least, "several"),
        (none == 0, "unexplained"),
    ]
    return _first(criteria), _first([(mask, verdict) for mask, verdict in criteria if verdict != "undecided"])


def _first(criteria: Sequence[tuple[Tensor, Verdict]]) -> tuple[Verdict, ...]:
    holds = torch.stack([mask for mask, _ in criteria])
    return tuple(criteria[i][1] for i in holds.int().argmax(dim=0).tolist())

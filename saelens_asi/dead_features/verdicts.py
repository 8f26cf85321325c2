"""Evidence about dead features, and the verdicts that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
from saelens_asi.dead_features.contests import Encoding, feature_parameters, rows_of
from saelens_asi.dead_features.momentum import silent_drift
from saelens_asi.dead_features.record import AutopsySettings, Evidence, Verdict

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
        n_contests: of how many it was drawn.
        mean: (d_in,) of what the encoder sees.
        basis: (d_in, r) of the active subspace.
    """

    sae: Any
    encoding: Encoding
    dead: Tensor
    live: Tensor
    sample: ContestSample
    n_contests: int
    mean: Tensor
    basis: Tensor
    how: AutopsySettings
    progress: bool

    def evidence(self, state: Mapping[str, Any] | None, fires_at_least: float) -> Evidence:
        """Everything that is measured on the dead features; ``state`` of ``momentum.load_optimizer_state``."""
        rows, signed = self.encoding.rows.at(self.dead), self.encoding.signed
        live_rows = self.encoding.rows.at(self.live)
        split, inputs, bars = Split.of(rows, self.mean), self.sample.inputs - self.mean, self.sample.bars
        single = single_changes(self.basis, Typical.of(live_rows), bars, self._centred_bars(inputs))
        fires_if = self._try(split, {**single, "several": together(list(single.values()))}, inputs)

        revived = torch.stack([fires_if[cause] >= fires_at_least for cause in single]).any(dim=0)
        several = (~revived & (fires_if["several"] >= fires_at_least)).nonzero().squeeze(1)
        without = {cause: together([one for name, one in single.items() if name != cause]) for cause in single}
        fires_without = self._try(split.at(several), without, inputs)
        needs = {cause: torch.zeros_like(revived) for cause in single}
        for cause, fires in fires_without.items():
            needs[cause][several] = fires < fires_at_least

        twin, cosine = nearest(rows, live_rows, signed)
        outscored = torch.zeros_like(cosine)
        near = (cosine >= self.how.duplicate_cosine).nonzero().squeeze(1)
        outscored[near] = share_outscored(rows.at(near), live_rows.at(twin[near]), self.sample.inputs, signed)
        twin = self.live[twin] if len(self.live) else torch.full_like(twin, -1)
        decoder = self.sae.W_dec.detach().to(cosine)

        n_more = self.how.more_tokens * self.n_contests
        steps, moved = torch.zeros_like(twin), torch.zeros_like(cosine)
        if state is not None:
            drift = silent_drift(self.sae, state, self.dead)
            before = rows_of(self.sae, undone(feature_parameters(self.sae, self.dead), drift.moved))
            stayed = {"momentum": Change(lambda own: own, bars)}
            fires_if |= self._try(Split.of(before, self.mean), stayed, inputs)
            fires_if["momentum"] *= drift.is_traced
            steps, moved = drift.steps, (rows.weight - before.weight).norm(dim=1)
            moved = moved / before.weight.norm(dim=1).clamp(min=1e-30)
        return Evidence(
            fires_if={cause: fires.cpu() for cause, fires in fires_if.items()},
            needs={cause: needed.cpu() for cause, needed in needs.items()},
            expected_margin=highest_expected(split.centred(), inputs, bars, n_more, signed).cpu(),
            twin=twin.cpu(),
            twin_cosine=cosine.cpu(),
            twin_decoder_cosine=torch.cosine_similarity(decoder[self.dead], decoder[twin], dim=1).cpu(),
            outscored=outscored.cpu(),
            silent_steps=steps.cpu(),
            drift=moved.cpu(),
        )

    def _try(self, rows: Split, tries: Mapping[str, Change], inputs: Tensor) -> dict[str, Tensor]:
        total = len(tries) * len(rows.bias)
        with tqdm(total=total, desc="Changed rows", unit="row", disable=not self.progress or not total) as bar:
            return {
                cause: firing_counts(
                    change.apply(rows).centred(), inputs, change.bars, self.encoding.signed, bar.update
                )
                for cause, change in tries.items()
            }

    def _centred_bars(self, inputs: Tensor) -> Tensor | None:
        """Bars that all features set when none of their scores holds the mean's part; not for pursuits."""
        if self.encoding.rule == "pursuit":  # what is left of a token after the first step has another mean
            return None
        rows = without_mean(Split.of(self.encoding.rows, self.mean)).centred()
        blocks = inputs.split(self.encoding.block)
        bars = torch.cat([self.encoding.bars(rows.scores(x, self.encoding.signed)) for x in blocks])
        return bars * (1 - _ROUNDING)


def decide(evidence: Evidence, broken: Tensor, fires_at_least: float, how: AutopsySettings) -> tuple[Verdict, ...]:
    """For each dead feature the first verdict that holds, in the order of ``autopsy``'s docstring."""
    single = [cause for cause in _SINGLE if cause in evidence.fires_if]
    most, which = torch.stack([evidence.fires_if[cause] for cause in single]).max(dim=0)
    nothing = torch.zeros_like(most)
    held: list[tuple[Tensor, Verdict]] = [
        (broken, "broken"),
        ((evidence.twin_cosine >= how.duplicate_cosine) & (evidence.outscored >= how.outscored_share), "duplicate"),
        (evidence.expected_margin > 0, "starved"),
        (evidence.fires_if.get("momentum", nothing) > 0, "momentum"),
        *(((most >= fires_at_least) & (which == i), cause) for i, cause in enumerate(single)),
        (evidence.fires_if["several"] >= fires_at_least, "several"),
        (nothing == 0, "unexplained"),
    ]
    holds = torch.stack([mask for mask, _ in held])
    return tuple(held[i][1] for i in holds.int().argmax(dim=0).tolist())

"""The record of an autopsy: measurements, one verdict a dead feature, and what to change."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from saelens_asi.evaluation.tables import markdown_table

Verdict = Literal[
    "broken",
    "duplicate",
    "starved",
    "momentum",
    "undecided",
    "outside",
    "mean",
    "norm",
    "bias",
    "several",
    "unexplained",
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

# Expected firings from which on none at all is evidence: at a rate r, n tokens show none with a chance of exp(-r n).
SURE_FIRINGS = 3.0

VERDICT_TITLES: dict[Verdict, str] = {
    "broken": "row is zero or not finite",
    "duplicate": "duplicate of a live feature",
    "starved": "fires, but rarely: too few tokens",
    "momentum": "carried off by stale momentum",
    "undecided": "dead or rare: too few tokens to tell",
    "outside": "outside the active subspace",
    "mean": "kept out by the mean",
    "norm": "row too short",
    "bias": "bias too low or threshold too high",
    "several": "several of these together",
    "unexplained": "unexplained",
}


@dataclass(frozen=True)
class AutopsySettings:
    """Thresholds of an autopsy; the keyword arguments of ``autopsy`` that have these names.

    Attributes:
        variance_share: of the activations, inside the active subspace.
        duplicate_cosine: to a live feature's encoder row, from which on a row is its duplicate.
        outscored_share: of the contests that it enters, in which the live feature must score higher.
        revived_share: a change revives a feature that would then fire at least this share as often as features do on
            average (live and dead together: k / d_sae for TopK).
        more_tokens: a feature that so many times the tokens would show to fire is starved, not dead.
        dead_rate: a feature that fires on a smaller share of tokens is dead. To exclude a rate takes 3 / rate silent
            tokens, read here or in training; until then a feature that never fired is undecided. SAELens logs how many
            features are below 1e-5.
        n_sample: tokens on which changed rows are tried.
        seed: of the sample.
    """

    variance_share: float = 0.99
    duplicate_cosine: float = 0.95
    outscored_share: float = 0.99
    revived_share: float = 0.1
    more_tokens: float = 10.0
    dead_rate: float = 1e-5
    n_sample: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("variance_share", "duplicate_cosine", "outscored_share", "revived_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]")
        if not 1 <= self.more_tokens < math.inf:
            raise ValueError(f"more_tokens={self.more_tokens} must be a factor of at least 1")
        if not 0 < self.dead_rate < 1:
            raise ValueError(f"dead_rate={self.dead_rate} must lie in (0, 1): it is a share of tokens")
        if self.n_sample < 2:
            raise ValueError(f"n_sample={self.n_sample} must be at least 2 tokens")


@dataclass(frozen=True)
class FeatureTable:
    """Measurements of every feature, (d_sae,) each, in the space that the encoder sees.

    Attributes:
        fires: contests won (tokens; for matching pursuit, steps of its pursuits).
        outside: share of the encoder row's squared length outside the active subspace and the mean's direction.
        norm: of the row, as the selection scales it.
        mean_score: at the mean input, bias included, less a threshold of the feature's own.
        deviation: standard deviation of the score.
        best_margin: highest score less bar; negative for dead features, -inf for rows that are not finite.
    """

    fires: Tensor
    outside: Tensor
    norm: Tensor
    mean_score: Tensor
    deviation: Tensor
    best_margin: Tensor


@dataclass(frozen=True)
class Evidence:
    """What was measured on dead features only, (n_dead,) each.

    Attributes:
        fires_if: from a single change (``"outside"``: inside the subspace, and so on), and ``"several"`` for all, to
            the sampled contests that the feature would win.
        needs: from a cause to whether all changes together would fail without its own; only asked of features that
            no single change revives.
        expected_margin: the best margin expected of ``more_tokens`` times the tokens.
        twin: the live feature with the nearest encoder row, -1 where none lives.
        twin_cosine, twin_decoder_cosine: between the two.
        outscored: share of the contests that it enters in which that live feature scores higher.
        silent_steps: steps since its last gradient, as far as its moments can be traced back; 0 where they cannot.
        drift: how far momentum moved its encoder row in those steps, relative to the row's length before.
        past_rate: share of the tokens on which it fired in the last window of training; NaN where nothing is known.
        silent_tokens: tokens of training since it last fired, at least; 0 where nothing is known.
        tokens_needed: silent tokens, of training included, that tell it from a feature that still fires: at its past
            rate, or at ``dead_rate`` where it has none.
        tokens_missing: how many of those are still to be read; 0 where silence is evidence.
    """

    fires_if: dict[str, Tensor]
    needs: dict[str, Tensor]
    expected_margin: Tensor
    twin: Tensor
    twin_cosine: Tensor
    twin_decoder_cosine: Tensor
    outscored: Tensor
    silent_steps: Tensor
    drift: Tensor
    past_rate: Tensor
    silent_tokens: Tensor
    tokens_needed: Tensor
    tokens_missing: Tensor


@dataclass(frozen=True)
class Autopsy:
    """Why features of an SAE are dead.

    Attributes:
        n_tokens: activations read; a feature that fires on none of them is dead.
        n_sample: contests on which changed rows were tried.
        fires_at_least: how many of them a revived feature wins.
        d_in: width of the activations.
        d_active: dimensions that hold ``variance_share`` of their variance, in the space that the encoder sees.
        gamma: |mean| / deviation of the activations, normalised as the encoder sees them, the decoder bias not
            subtracted (arXiv 2605.31518: large values kill features).
        gamma_seen: the same with the decoder bias subtracted, where the SAE does so.
        mean_bar: mean of the score that a feature must pass.
        dead: (n_dead,) indices.
        verdicts: one a dead feature.
        if_dead: the same, but for features that are undecided the verdict that they have if they are dead, not rare.
        features: measurements of all features.
        evidence: measurements of the dead ones.
        settings: the thresholds used.
        has_optimizer_state: whether stale momentum could be looked for.
        knows_learning_rates: whether it could be traced: not where a schedule moved the rates and none recorded them.
        advice: what to change, one sentence each, most frequent cause first.
    """

    n_tokens: int
    n_sample: int
    fires_at_least: float
    d_in: int
    d_active: int
    gamma: float
    gamma_seen: float
    mean_bar: float
    dead: Tensor
    verdicts: tuple[Verdict, ...]
    if_dead: tuple[Verdict, ...]
    features: FeatureTable
    evidence: Evidence
    settings: AutopsySettings
    has_optimizer_state: bool
    knows_learning_rates: bool = True
    advice: tuple[str, ...] = ()

    @property
    def d_sae(self) -> int:
        return len(self.features.fires)

    @property
    def dead_fraction(self) -> float:
        return len(self.dead) / self.d_sae

    @property
    def counts(self) -> dict[Verdict, int]:
        """Dead features by verdict, most frequent first; verdicts that do not occur are left out."""
        return dict(Counter(self.verdicts).most_common())

    @property
    def rate_excluded(self) -> float:
        """Firings a token that these tokens exclude, at 95 %: one that fires less often is like one that never does."""
        return SURE_FIRINGS / self.n_tokens

    @property
    def merely_rare(self) -> float:
        """At least so many dead features are only rare, going by those that fired once and twice.

        Chao's bound for unseen species (Chao 1984, bias-corrected). It takes tokens for independent; those of one text
        are less than that.
        """
        once, twice = (int((self.features.fires == n).sum()) for n in (1, 2))
        return min(float(len(self.dead)), once * (once - 1) / (2 * (twice + 1)))

    def having(self, verdict: str) -> Tensor:
        """Indices of the dead features with a verdict. Raises ValueError for a verdict that does not exist."""
        if verdict not in VERDICTS:
            raise ValueError(f"verdict={verdict!r} must be one of {VERDICTS}")
        return self.dead[self.mask(verdict)]

    def mask(self, verdict: str) -> Tensor:
        """(n_dead,) bool: which dead features have a verdict."""
        return torch.tensor([own == verdict for own in self.verdicts], dtype=torch.bool)

    def summary(self) -> str:
        """A Markdown table of the verdicts, and what to change."""
        lines = [
            f"{len(self.dead):,} of {self.d_sae:,} features ({self.dead_fraction:.1%}) fire on none of "
            f"{self.n_tokens:,} tokens. {self.settings.variance_share:.0%} of the variance lies in {self.d_active} of "
            f"{self.d_in} dimensions; |mean| / deviation (gamma) is {self.gamma:.2f}, {self.gamma_seen:.2f} as the "
            "encoder sees it.",
            "",
            markdown_table(
                ["why", "dead features", "share", "revived by that change", "firing then, median share of tokens"],
                [self._cells(verdict, count) for verdict, count in self.counts.items()],
                align="lrrrr",
            ),
        ]
        if len(self.dead):
            lines += ["", self._certainty()]
        if not self.has_optimizer_state and len(self.dead):
            lines += ["", "Stale momentum was not looked for: it needs the optimizer's state."]
        elif not self.knows_learning_rates and len(self.dead):
            lines += [
                "",
                "Stale momentum was not looked for: the learning rate changed in training, and no training history "
                "beside the optimizer's state tells how.",
            ]
        return "\n".join([*lines, "", *(f"- {sentence}" for sentence in self.advice)])

    def _certainty(self) -> str:
        """What silence on these tokens tells, and how many more a verdict takes."""
        said = [
            f"No firing on {self.n_tokens:,} tokens excludes more than one in {round(1 / self.rate_excluded):,} "
            "(95 %), and nothing rarer."
        ]
        if self.merely_rare >= 1:
            said.append(
                f"Going by the {int((self.features.fires == 1).sum()):,} features that fired once, at least "
                f"{self.merely_rare:,.0f} of the silent ones are merely rare (Chao's bound)."
            )
        rare = (self.evidence.past_rate > 0) & (self.evidence.tokens_missing > 0)
        if rare.any():
            needed = self.evidence.tokens_needed[rare]
            said.append(
                f"{len(needed):,} fired in training, so seldom that these tokens may miss them: "
                f"{round(float(needed.median())):,} tokens would tell of half of them, "
                f"{round(float(needed.max())):,} of all."
            )
        missing = self.evidence.tokens_missing[self.mask("undecided")]
        if len(missing):
            said.append(
                f"{len(missing):,} are dead or rare: {round(float(missing.max())):,} more silent tokens, or the record "
                f"of their training, would exclude that they fire on one in {round(1 / self.settings.dead_rate):,}."
            )
        return " ".join(said)

    def _cells(self, verdict: Verdict, count: int) -> list[str]:
        revived, rate = "-", "-"
        if verdict in self.evidence.fires_if:
            fires = self.evidence.fires_if[verdict]
            revived = f"{int((fires >= self.fires_at_least).sum()):,}"
            rate = f"{float(fires[self.mask(verdict)].double().median()) / self.n_sample:.2%}"
        return [VERDICT_TITLES[verdict], f"{count:,}", f"{count / len(self.dead):.1%}", revived, rate]

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON: totals, thresholds, advice, measurements of the dead features in columns."""
        evidence = {name: value for name, value in vars(self.evidence).items() if isinstance(value, Tensor)}
        columns = {
            "feature": self.dead,
            **{name: value[self.dead] for name, value in vars(self.features).items() if name != "fires"},
            **evidence,
            **{f"fires_if_{cause}": fires for cause, fires in self.evidence.fires_if.items()},
            **{f"needs_{cause}": needs.int() for cause, needs in self.evidence.needs.items()},
        }
        return {
            "n_tokens": self.n_tokens,
            "n_sample": self.n_sample,
            "fires_at_least": self.fires_at_least,
            "d_sae": self.d_sae,
            "d_in": self.d_in,
            "d_active": self.d_active,
            "gamma": _plain(self.gamma),
            "gamma_seen": _plain(self.gamma_seen),
            "mean_bar": _plain(self.mean_bar),
            "n_dead": len(self.dead),
            "counts": dict(self.counts),
            "has_optimizer_state": self.has_optimizer_state,
            "knows_learning_rates": self.knows_learning_rates,
            "rate_excluded": _plain(self.rate_excluded),
            "merely_rare": _plain(self.merely_rare),
            "settings": asdict(self.settings),
            "advice": list(self.advice),
            "dead": {
                "verdict": list(self.verdicts),
                "if_dead": list(self.if_dead),
                **{name: [_plain(value) for value in column.tolist()] for name, column in columns.items()},
            },
        }


def _plain(value: float) -> float | None:
    """To six digits, and None where it is not finite."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None

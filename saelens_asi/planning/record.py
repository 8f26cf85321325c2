"""A plan: what was measured, what follows from it for each size, and what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.planning.advice import ENOUGH_FIRINGS
from saelens_asi.planning.cost import StepCost
from saelens_asi.planning.memory import GIB, Memory, run_memory, store_bytes
from saelens_asi.planning.model import Anchor, Estimate, beyond, fitted, predict_dead, predict_error
from saelens_asi.planning.pilots import Pilot
from saelens_asi.planning.recipe import learning_rate


@dataclass(frozen=True)
class PlanRow:
    """One SAE that could be trained.

    Attributes:
        d_sae: features.
        k: active on a token.
        tokens: to train on.
        nmse: normalized MSE, with its 80 % interval.
        dead: share of the features that fire on none of the plan's ``counted_on`` tokens, with its 80 % interval; of
            moments that decay in silence, a run's default.
        hours: on this machine: steps, the language model, and what comes before the first step.
        memory: of the process, in parts.
        firings: of a feature in training, in the mean.
        fits: whether it stays within the budget and the memory.
        extrapolated: whether it lies outside of what the figures were fitted on: they are guesses there.
    """

    d_sae: int
    k: int
    tokens: int
    nmse: Estimate
    dead: Estimate
    hours: float
    memory: Memory
    firings: float
    fits: bool
    extrapolated: bool

    @property
    def gib(self) -> float:
        """Peak memory."""
        return self.memory.peak / GIB

    @property
    def disk_gib(self) -> float:
        """Two checkpoints and the SAE."""
        return self.memory.disk / GIB

    @property
    def lr(self) -> float:
        return learning_rate(self.d_sae)


@dataclass(frozen=True)
class Plan:
    """What ``saelens_asi.plan`` found. ``print`` shows it; ``plots.plan_figure`` draws it.

    Attributes:
        hook: where the activations are read.
        model: name of the language model.
        d_in: width.
        effective_rank: of the activations.
        gamma: length of their mean over their deviation.
        batch: tokens in a step.
        budget_hours: that a run may take; None for any.
        memory: bytes that it may take; None for any.
        counted_on: tokens that dead features are counted on.
        model_seconds: of the language model for a token; 0 where activations were given.
        model_bytes: of its weights.
        pilots: the short trainings behind the figures.
        anchor: what they say of the hook.
        cost: of a step on this machine.
        sizes: d_sae, k and tokens of the rows.
        warnings: what will go wrong, and what to do about it.
        measured: False where a spectrum alone was given: error and dead share are guesses then.
        dataset: name of the text, for the settings; None leaves it out of them.
    """

    hook: str
    model: str
    d_in: int
    effective_rank: float
    gamma: float
    batch: int
    budget_hours: float | None
    memory: int | None
    counted_on: int
    model_seconds: float
    model_bytes: int
    pilots: Sequence[Pilot]
    anchor: Anchor
    cost: StepCost
    sizes: Sequence[tuple[int, int, int]]
    warnings: Sequence[str] = field(default=())
    measured: bool = True
    dataset: str | None = None

    @cached_property
    def rows(self) -> list[PlanRow]:
        """One for each of ``sizes``."""
        return [self.predict(*size) for size in self.sizes]

    def predict(self, d_sae: int, k: int, tokens: int) -> PlanRow:
        """What training ``d_sae`` features, ``k`` active on a token, on ``tokens`` tokens gives and takes.

        Raises:
            ValueError: for sizes that no SAE can have.
        """
        check_size(d_sae, k, tokens, self.batch)
        held = store_bytes(self.d_in, self.batch)
        memory = run_memory(self.d_in, d_sae, k, self.batch, store=held, model=self.model_bytes)
        hours = self.cost.hours(d_sae, k, tokens, self.model_seconds)
        in_time = self.budget_hours is None or hours <= self.budget_hours
        return PlanRow(
            d_sae=d_sae,
            k=k,
            tokens=tokens,
            nmse=predict_error(self.anchor, d_sae, k, tokens),
            dead=predict_dead(self.anchor, d_sae, k, tokens, self.counted_on),
            hours=hours,
            memory=memory,
            firings=tokens * k / d_sae,
            fits=in_time and (self.memory is None or memory.peak <= self.memory),
            extrapolated=beyond(fitted(), d_sae, k, tokens) > 0,
        )

    @property
    def within(self) -> list[PlanRow]:
        """Rows within budget and memory."""
        return [row for row in self.rows if row.fits]

    @property
    def largest(self) -> PlanRow | None:
        """Of what fits, the most features that fire 100 times in training or more; then the lowest error.

        At the k of the pilots, where there are such rows.
        """
        candidates = [row for row in self.within if row.firings >= ENOUGH_FIRINGS]
        usual = [row for row in candidates if row.k == self.anchor.k] or candidates
        return max(usual, key=lambda row: (row.d_sae, -row.nmse.value), default=None)

    @property
    def best(self) -> PlanRow | None:
        """Of what fits, the lowest error at the k of the pilots; where there is none, at any."""
        usual = [row for row in self.within if row.k == self.anchor.k] or self.within
        return min(usual, key=lambda row: row.nmse.value, default=None)

    def settings(self, row: PlanRow | None = None) -> dict[str, Any]:
        """Of SAELens's ``LanguageModelSAERunnerConfig``, with those of its ``sae`` under that name.

        Args:
            row: of ``rows``; ``largest`` unless told.

        Raises:
            ValueError: where no row is told and none fits.
        """
        row = row or self.largest or self.best
        if row is None:
            raise ValueError(self._nothing_fits())
        steps = row.tokens // self.batch
        return {
            "sae": {
                "d_in": self.d_in,
                "d_sae": row.d_sae,
                "k": row.k,
                "aux_loss_coefficient": 0.0,
                "initializer": "active_subspace",
                "optimizer": "sparse_adam",
            },
            "model_name": self.model,
            "hook_name": self.hook,
            **({} if self.dataset is None else {"dataset_path": self.dataset}),
            "training_tokens": row.tokens,
            "train_batch_size_tokens": self.batch,
            "lr": row.lr,
            "lr_warm_up_steps": round(0.07 * steps),
            "lr_decay_steps": round(0.2 * steps),
        }

    def config(self, row: PlanRow | None = None) -> str:
        """The same as Python, to paste into a script."""
        settings = self.settings(row)
        own = settings.pop("sae")
        sae = "".join(f"        {name}={value!r},\n" for name, value in own.items())
        rest = "".join(f"    {name}={value!r},\n" for name, value in settings.items())
        return (
            "import saelens_asi\nfrom sae_lens import LanguageModelSAERunnerConfig, TopKTrainingSAEConfig\n\n"
            f"cfg = LanguageModelSAERunnerConfig(\n    sae=TopKTrainingSAEConfig(\n{sae}    ),\n{rest})\n"
        )

    def _nothing_fits(self) -> str:
        least = min(self.rows, key=lambda row: (row.hours, row.gib))
        limits = {"budget_hours": self.budget_hours, "memory": self.memory and f"{self.memory / GIB:.1f}GiB"}
        given = ", ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
        return (
            f"nothing in the table fits {given}: the least, {least.d_sae:,} features on {least.tokens:,} tokens, takes "
            f"{least.hours:.3g} hours and {least.gib:.2f} GiB; give more, or a smaller d_sae or tokens"
        )

    def table(self, rows: Sequence[PlanRow] | None = None) -> str:
        """Markdown."""
        cells = [
            (
                f"{row.d_sae:,}",
                str(row.k),
                f"{row.tokens:,}",
                f"{row.nmse.value:.3f} ({row.nmse.low:.3f} to {row.nmse.high:.3f})",
                f"{row.dead.value:.1%} ({row.dead.low:.1%} to {row.dead.high:.1%})",
                f"{row.hours:.3g}",
                f"{row.gib:.2f}",
                f"{row.disk_gib:.2f}",
                f"{row.lr:g}",
                ("yes" if row.fits else "no") + (", a guess" if row.extrapolated else ""),
            )
            for row in (self.rows if rows is None else rows)
        ]
        columns = ["d_sae", "k", "tokens", "NMSE", "dead", "hours", "GiB", "disk, GiB", "lr", "fits"]
        return markdown_table(columns, cells, align="rrrrrrrrrl")

    def __str__(self) -> str:
        of_model = f", language model {1e6 * self.model_seconds:.0f} us a token" if self.model_seconds else ""
        first = self.pilots[0] if self.pilots else None
        timed = "" if first is None else f", a step of {self.batch:,} tokens at {first.d_sae:,} {first.seconds:.3f} s"
        head = (
            f"{self.hook} of {self.model}: width {self.d_in}, effective rank {self.effective_rank:.0f}, gamma "
            f"{self.gamma:.2f}{timed}{of_model}\nDead: fires on none of {self.counted_on:,} tokens. In brackets 80 % "
            "intervals."
        )
        chosen = self.largest
        parts = [head, self.table()]
        if chosen is None:
            parts.append(self._nothing_fits() if not self.within else TOO_FEW_FIRINGS)
        else:
            parts.append(
                f"The largest that fits: {chosen.d_sae:,} features, k = {chosen.k}, {chosen.tokens:,} tokens.\n\n"
                f"```python\n{self.config(chosen)}```"
            )
        if self.warnings:
            parts.append("\n".join(f"- {warning}" for warning in self.warnings))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [{**asdict(row), "memory": row.memory.to_dict()} for row in self.rows]
        return {**asdict(self), "rows": rows, "settings": self.settings() if self.within else None}

    def save(self, path: str | Path) -> Path:
        """Write ``to_dict`` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return Path(path)


TOO_FEW_FIRINGS = (
    f"Nothing that fits gives a feature {ENOUGH_FIRINGS} firings in training (tokens x k / d_sae): give more tokens, "
    "more hours, or fewer features."
)


def check_size(d_sae: int, k: int, tokens: int, batch: int) -> None:
    """Raise ValueError, with the setting, for sizes that no SAE can have."""
    if d_sae < 1:
        raise ValueError(f"d_sae={d_sae} must be at least 1")
    if not 1 <= k <= d_sae:
        raise ValueError(f"k={k} must be at least 1, and at most d_sae={d_sae}: give a smaller k or a larger d_sae")
    if tokens < batch:
        raise ValueError(f"tokens={tokens} do not fill one batch of {batch}: give more")

"""The figure of a model card."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.history import Record
from saelens_asi.plots.style import COLORS, make_axes

_LOWEST = -5.0  # log10 of the rarest firing rate that has a bar of its own


def card_figure(history: Sequence[Record], evaluation: SAEEvaluation | None) -> Figure:
    """How an SAE was trained, and how often its features fire: error, live features, firing rates.

    Args:
        history: of ``saelens_asi.read_history``; empty for none.
        evaluation: of ``saelens_asi.evaluate``; None for none.

    Raises:
        ValueError: where there is neither.
    """
    panels = (2 if history else 0) + (1 if evaluation is not None else 0)
    if not panels:
        raise ValueError("neither a training history nor an evaluation is given: a card has no figure without them")
    figure, axes = make_axes(3.8 * panels, 3.3, columns=panels)
    if history:
        _over_training(axes[0], axes[1], history)
    if evaluation is not None:
        _firing_rates(axes[-1], evaluation)
    return figure


def _over_training(error: Axes, live: Axes, history: Sequence[Record]) -> None:
    tokens = [record["n_tokens"] for record in history if record.get("nmse") is not None]
    error.plot(tokens, [one["nmse"] for one in history if one.get("nmse") is not None], color=COLORS[1], linewidth=1.4)
    error.set_title("normalized MSE of the batch", fontsize=10)
    error.set_ylim(bottom=0)
    counted = [one for one in history if "dead_fraction" in one]
    live.plot([one["n_tokens"] for one in counted], [1 - one["dead_fraction"] for one in counted], color=COLORS[1])
    fired = [one for one in history if "never_fired" in one]
    ever = [1 - one["never_fired"] / one["d_sae"] for one in fired]
    live.plot([one["n_tokens"] for one in fired], ever, "--", color=COLORS[2], linewidth=1.2)
    live.set_title("live features (dashed: that ever fired)", fontsize=10)
    live.set_ylim(-0.02, 1.04)
    live.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axis in (error, live):
        axis.set_xlabel("tokens trained on")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _firing_rates(axis: Axes, evaluation: SAEEvaluation) -> None:
    rates = evaluation.firing_rates
    alive = rates[rates > 0].log10().clamp(min=_LOWEST)
    bins = [_LOWEST + i / 6 for i in range(int(-_LOWEST * 6) + 1)]
    axis.hist(alive.numpy(), bins=bins, weights=[1 / len(rates)] * len(alive), color=COLORS[1], alpha=0.75)
    ticks = list(range(int(_LOWEST), 1))
    axis.set_xticks(ticks, [f"$10^{{{tick}}}$" for tick in ticks])
    axis.set_xlabel(f"share of {evaluation.n_tokens:,} tokens on which a feature fires")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axis.set_title(f"share of features; {evaluation.dead_fraction:.1%} never fire", fontsize=10)

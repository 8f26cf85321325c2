"""The figure of a plan. It returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from saelens_asi.planning.record import Plan, PlanRow
from saelens_asi.plots.style import make_axes

_POINTS = 40
_OUT_OF_REACH = "#b3b3b3"


def plan_figure(plan: Plan, k: int | None = None, title: str | None = None) -> Figure:
    """Error, and dead features, against hours, one line for each size; what the budget does not reach is grey.

    Args:
        plan: of ``saelens_asi.plan``.
        k: features active on a token; that of the pilots unless told.
        title: of the figure.
    """
    k = plan.anchor.k if k is None else k
    sizes = sorted({d_sae for d_sae, _, _ in plan.sizes if d_sae >= k})
    figure, (left, right) = make_axes(11.5, 4.4, columns=2)
    shades = colormaps["viridis"](np.linspace(0.85, 0.1, len(sizes)))
    for d_sae, color in zip(sizes, shades, strict=True):
        rows = _along(plan, d_sae, k)
        _draw(left, rows, [row.nmse.value for row in rows], color, f"{d_sae:,}")
        _draw(right, rows, [row.dead.value for row in rows], color, "")
    for axis in (left, right):
        _hours(axis, plan)
    _error(left)
    right.set_ylabel(f"dead on {plan.counted_on:,} tokens")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_ylim(bottom=0)
    low, high = left.get_ylim()
    _mark(left, plan, k)
    left.set_ylim(low / 1.25, high * 1.25)  # the lines are to be told apart; an interval may go beyond
    figure.legend(loc="outside right center", title="d_sae", frameon=False, fontsize=9)
    figure.suptitle(title or f"{plan.hook}, k = {k}: what hours buy", fontsize=11)
    return figure


def _along(plan: Plan, d_sae: int, k: int) -> list[PlanRow]:
    """Predictions from the tokens of a pilot to ten times the largest of the table, of that size."""
    most = max(tokens for size, active, tokens in plan.sizes if size == d_sae)
    tokens = np.geomspace(plan.anchor.tokens, max(3 * most, 10 * plan.anchor.tokens), _POINTS)
    return [plan.predict(d_sae, k, int(n)) for n in tokens]


def _draw(axis: Axes, rows: list[PlanRow], values: list[float], color: object, label: str) -> None:
    """In colour what fits, grey beyond; dotted where the figures are guesses."""
    hours = np.array([row.hours for row in rows])
    found, fits = np.array(values), np.array([row.fits for row in rows])
    guessed = np.array([row.extrapolated for row in rows])
    for is_guess, style in ((False, "-"), (True, ":")):
        for within, shade in ((True, color), (False, _OUT_OF_REACH)):
            part = (guessed == is_guess) & (fits == within)
            if part.any():
                shown = np.where(part | np.roll(part, 1), found, np.nan)  # to the next point, so that lines meet
                shown[0] = found[0] if part[0] else np.nan
                axis.plot(hours, shown, color=shade, linestyle=style, linewidth=1.8, zorder=3 if within else 1)
    axis.plot([], [], color=color, label=label or None)


def _hours(axis: Axes, plan: Plan) -> None:
    axis.set_xscale("log")
    axis.set_xlabel("hours on this machine")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if plan.budget_hours is not None:
        axis.axvline(plan.budget_hours, color="black", linewidth=0.8, linestyle="--")
        axis.annotate(
            f" {plan.budget_hours:g} h", (plan.budget_hours, 1.0), xycoords=("data", "axes fraction"),
            fontsize=8, va="top",
        )  # fmt: skip


def _error(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.set_ylabel("normalized MSE (predicted)")
    axis.yaxis.set_major_formatter("{x:.3g}")
    axis.yaxis.set_minor_formatter("{x:.3g}")
    axis.tick_params(axis="y", which="both", labelsize=8)


def _mark(axis: Axes, plan: Plan, k: int) -> None:
    """The largest that fits, with its interval."""
    row = plan.largest
    if row is None or row.k != k:
        shown = [one for one in plan.within if one.k == k]
        row = max(shown, key=lambda one: (one.d_sae, -one.nmse.value), default=None)
    if row is None:
        return
    below, above = row.nmse.value - row.nmse.low, row.nmse.high - row.nmse.value
    axis.errorbar(row.hours, row.nmse.value, yerr=[[below], [above]], fmt="o", color="#c2405a", capsize=3, zorder=5)
    axis.annotate(
        f"{row.d_sae:,} features\n{row.tokens:,} tokens", (row.hours, 0.03), xycoords=("data", "axes fraction"),
        xytext=(-6, 0), textcoords="offset points", va="bottom", ha="right", fontsize=8, color="#c2405a",
    )  # fmt: skip

"""Figures of the page, from the result files alone. Shares have axes from 0 to 100 %: nothing is magnified."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.claims import of_deaths, of_factorial, of_universality
from benchmarks.claims.evidence import ResultFiles
from benchmarks.claims.of_deaths import Group
from benchmarks.claims.sources import MODEL_TITLES, TEXT_TITLES
from benchmarks.claims.universality import BEFORE_NORM, TEXTS
from saelens_asi import plots
from saelens_asi.plots import sweep_figures
from saelens_asi.plots.spectra import KIND_COLORS
from saelens_asi.plots.style import label_points, make_axes

_STYLES = dict(zip(TEXTS, ("-", "--", ":"), strict=True))
_MARKERS = {"attn_out": "o", "hook_z": "D", "mlp_out": "s", "resid_post": "^"}
_GAMMA = "viridis"
_BEFORE = dict(zip(BEFORE_NORM.values(), ("attn_out", "mlp_out"), strict=True))


def universality(e: ResultFiles) -> Figure:
    """Effective rank over the width by layer: a panel a model, and one for what is before Gemma's norms."""
    found = of_universality.by_model(e)
    panels = [(MODEL_TITLES[model], own, of_universality.KINDS) for model, own in found.items()]
    panels += [
        (f"{MODEL_TITLES[model]}, before the norms", own, tuple(_BEFORE))
        for model, own in found.items()
        if set(_BEFORE) & set(own[0].kinds)
    ]
    figure, axes = make_axes(4.4 * len(panels), 4.2, columns=len(panels))
    for axis, (title, own, kinds) in zip(axes, panels, strict=True):
        for one in own:
            for kind in kinds:
                points = sorted(one.by_layer(kind).items())
                color = KIND_COLORS[_BEFORE.get(kind, kind)]
                axis.plot(*zip(*points, strict=True), _STYLES[one.text], color=color, linewidth=1.4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer")
        axis.set_ylim(0, 1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].set_ylabel("effective rank / width")
    handles = [Line2D([], [], color=KIND_COLORS[kind], label=kind) for kind in of_universality.KINDS]
    handles += [Line2D([], [], color="black", linestyle=_STYLES[text], label=TEXT_TITLES[text]) for text in TEXTS]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def dead_against_rank(e: ResultFiles) -> Figure:
    """Dead features of TopK: above against the rank, gamma as colour; below against gamma, the rank as colour."""
    groups = [of_deaths.of_sweep(e), *of_deaths.by_model(of_deaths.topk_of_models(e)[0])]
    width = max(point.gamma for group in groups for point in group.points)
    figure = Figure(figsize=(4.2 * len(groups) + 0.8, 7.6), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False, sharey=True)
    scales, labels = (Normalize(0, width), Normalize(0, 1)), {}
    for column, group in enumerate(groups):
        found = group.found.alone
        for row, cause in enumerate(("rank", "gamma")):
            axis = axes[row, column]
            labels[axis] = _points(axis, group, cause, scales[row])
            said = f"rank correlation {found[cause].mean:+.2f}, {len(group.points)} hooks"
            axis.set_title(f"{group.where}\n{group.trained}\n{said}" if not row else said, fontsize=9)
            axis.set_xlim(0, 1 if cause == "rank" else 1.08 * width)
        axes[0, column].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[0, column].set_xlabel("effective rank / width")
        axes[1, column].set_xlabel("gamma: length of the mean / deviation")
    for row, (name, scale) in enumerate(zip(("gamma", "effective rank / width"), scales, strict=True)):
        axes[row, 0].set_ylabel("dead features")
        form = PercentFormatter(1.0, decimals=0) if row else None
        figure.colorbar(ScalarMappable(scale, _GAMMA), ax=list(axes[row]), label=name, format=form, pad=0.01)
    shown = {point.kind for group in groups for point in group.points}
    handles = [
        Line2D([], [], color="grey", marker=marker, linestyle="", label=kind)
        for kind, marker in _MARKERS.items()
        if kind in shown
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.draw_without_rendering()
    for axis, (places, layers) in labels.items():
        label_points(axis, places, layers)
    return figure


def _points(axis: Axes, group: Group, cause: str, scale: Normalize) -> tuple[list[tuple[float, float]], list[str]]:
    """Draw them; returns where they are, and the numbers of their layers."""
    other = "gamma" if cause == "rank" else "rank"
    places, layers = [], []
    for kind, marker in _MARKERS.items():
        own = [point for point in group.points if point.kind == kind]
        x, y = [getattr(point, cause) for point in own], [point.dead for point in own]
        shade = [getattr(point, other) for point in own]
        axis.scatter(x, y, s=44, c=shade, cmap=_GAMMA, norm=scale, marker=marker, edgecolors="white", linewidths=0.5)
        places += list(zip(x, y, strict=True))
        layers += [str(point.layer) for point in own]
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return places, layers


def of_sweeps(e: ResultFiles) -> dict[str, Figure]:
    """Sizes, frontier and dimension of the subspace, each with the model's name."""
    drawn = {}
    for name, sweep in (("scaling.png", "d_sae"), ("frontier.png", "frontier"), ("d_init.png", "d_init")):
        shared = e.shared[sweep]
        source = f"{MODEL_TITLES[shared['model']]}, {TEXT_TITLES[shared['dataset']]}"
        drawn[name] = sweep_figures(e.cells(sweep), source)[name]
    return drawn


CAPTIONS = {
    "universality.png": "Effective rank by layer, two families, three texts",
    "dead_against_rank.png": "Dead features against effective rank, and against gamma",
    "tokens.png": "Error and dead features against tokens, every contender of the factorial",
    "scaling.png": "Error, dead features and live features by size",
    "frontier.png": "Sparsity and reconstruction",
    "d_init.png": "Dimension of the subspace, against a random one",
}


def write(e: ResultFiles, folder: Path) -> Sequence[Path]:
    """Draw all of them into a folder."""
    drawn = {"universality.png": universality(e), "dead_against_rank.png": dead_against_rank(e), **of_sweeps(e)}
    if e.parts.get("factorial"):
        drawn["tokens.png"] = of_factorial.curves(e.parts["factorial"])
    return [plots.save(figure, folder / name) for name, figure in drawn.items()]

"""Figures. Every function returns a matplotlib Figure and touches no global state."""

from saelens_asi.plots.autopsy import autopsy_figure
from saelens_asi.plots.card import card_figure
from saelens_asi.plots.evaluation import (
    comparison_bars,
    dead_against_rank,
    firing_rate_map,
    firing_rates,
    training_history,
)
from saelens_asi.plots.lorsa import plot_reading
from saelens_asi.plots.plan import plan_figure
from saelens_asi.plots.spectra import (
    attention_decomposition,
    loss_by_components,
    ranks_across_layers,
    relative_singular_values,
    subspace_energy,
)
from saelens_asi.plots.style import COLORS, save
from saelens_asi.plots.sweep import sweep_figures

__all__ = [
    "COLORS",
    "attention_decomposition",
    "autopsy_figure",
    "card_figure",
    "comparison_bars",
    "dead_against_rank",
    "firing_rate_map",
    "firing_rates",
    "loss_by_components",
    "plan_figure",
    "plot_reading",
    "ranks_across_layers",
    "relative_singular_values",
    "save",
    "subspace_energy",
    "sweep_figures",
    "training_history",
]

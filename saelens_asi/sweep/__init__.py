"""Many SAEs on one cache of activations: grids of settings, kept cell by cell, a table and power laws from them."""

from saelens_asi.sweep.cells import METHODS, Cell, grid, read_sweep
from saelens_asi.sweep.results import PowerLaw, fit_power_law, sweep_table
from saelens_asi.sweep.run import SweepTraining, run_sweep, train_cell

__all__ = [
    "METHODS",
    "Cell",
    "PowerLaw",
    "SweepTraining",
    "fit_power_law",
    "grid",
    "read_sweep",
    "run_sweep",
    "sweep_table",
    "train_cell",
]

"""Many SAEs on one cache of activations: grids of settings, kept cell by cell, and the paper's figures from them."""

from saelens_asi.sweep.figures import PowerLaw, fit_power_law, sweep_figures
from saelens_asi.sweep.grid import METHODS, Cell, grid
from saelens_asi.sweep.run import run_sweep, sweep_table, write_report
from saelens_asi.sweep.store import read_sweep
from saelens_asi.sweep.training import SweepTraining, train_cell

__all__ = [
    "METHODS",
    "Cell",
    "PowerLaw",
    "SweepTraining",
    "fit_power_law",
    "grid",
    "read_sweep",
    "run_sweep",
    "sweep_figures",
    "sweep_table",
    "train_cell",
    "write_report",
]

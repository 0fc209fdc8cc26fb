"""Solvers fitted to a model, and compared by how near they come to its exact trajectory."""

from .compare import Comparison, Row, compare_solvers, default_solvers, plot_comparison
from .fit import fit_solver
from .plot import plot_lines, plot_tables
from .restart import restart_scheduler
from .trajectories import reference_scheduler, second_order_scheduler

__all__ = [
    "Comparison",
    "Row",
    "compare_solvers",
    "default_solvers",
    "fit_solver",
    "plot_comparison",
    "plot_lines",
    "plot_tables",
    "reference_scheduler",
    "restart_scheduler",
    "second_order_scheduler",
]

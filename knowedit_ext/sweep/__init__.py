"""The one-pass layer sweep over a tree of segments, under causal tracing, editing and evaluation."""

from ..model.head import log_probabilities
from .capture import CleanRun, clean_run, layer_zero_input
from .engine import SweepResult, default_max_rows, sweep
from .interventions import Interventions, Knockout, Patch

__all__ = [
    "CleanRun",
    "Interventions",
    "Knockout",
    "Patch",
    "SweepResult",
    "clean_run",
    "default_max_rows",
    "layer_zero_input",
    "log_probabilities",
    "sweep",
]

"""Causal tracing: of facts (`trace`), of data sets (`trace_dataset`), and averages over them (`Effects`)."""

from .causal import trace
from .corruption import noise_level
from .dataset import trace_dataset
from .effects import Effects
from .kinds import KINDS, KNOCKOUT, Kind
from .knockout import KnockoutTrace, knockout_effects, plot_knockouts
from .localization import fraction_restored
from .subject_noise import SubjectNoise
from .trace import Trace

__all__ = [
    "KINDS",
    "KNOCKOUT",
    "Effects",
    "Kind",
    "KnockoutTrace",
    "SubjectNoise",
    "Trace",
    "fraction_restored",
    "knockout_effects",
    "noise_level",
    "plot_knockouts",
    "trace",
    "trace_dataset",
]

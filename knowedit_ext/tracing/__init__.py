"""Causal tracing: of facts (`trace`), of data sets (`trace_dataset`), and averages over them (`Effects`)."""

from .causal import trace
from .corruption import noise_level
from .dataset import trace_dataset
from .effects import Effects
from .kinds import KINDS, Kind
from .trace import Trace

__all__ = ["KINDS", "Effects", "Kind", "Trace", "noise_level", "trace", "trace_dataset"]

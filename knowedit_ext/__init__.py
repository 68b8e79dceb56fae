"""Locate and edit facts in language models."""

from .facts import Fact
from .model import EditableModel, load_model
from .modules import UnsupportedModelError
from .moments import Moments, collect_moments
from .tracing.causal import trace
from .tracing.corruption import noise_level
from .tracing.dataset import trace_dataset
from .tracing.effects import Effects
from .tracing.trace import Trace

__all__ = [
    "EditableModel",
    "Effects",
    "Fact",
    "Moments",
    "Trace",
    "UnsupportedModelError",
    "collect_moments",
    "load_model",
    "noise_level",
    "trace",
    "trace_dataset",
]

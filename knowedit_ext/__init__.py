"""Locate and edit facts in language models."""

from .editing.edit import Edit
from .editing.finetune import finetune
from .editing.memit import memit
from .editing.params import FTParams, MEMITParams, ROMEParams
from .editing.request import EditRequest
from .editing.rome import rome, rome_each
from .evaluation.evaluate import evaluate
from .evaluation.report import Report
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
    "Edit",
    "EditRequest",
    "EditableModel",
    "Effects",
    "FTParams",
    "Fact",
    "MEMITParams",
    "Moments",
    "ROMEParams",
    "Report",
    "Trace",
    "UnsupportedModelError",
    "collect_moments",
    "evaluate",
    "finetune",
    "load_model",
    "memit",
    "noise_level",
    "rome",
    "rome_each",
    "trace",
    "trace_dataset",
]

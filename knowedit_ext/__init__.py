"""Locate and edit facts in language models."""

from .editing.edit import Edit
from .editing.methods import METHODS, edit
from .editing.methods.alphaedit import AlphaEditParams, alphaedit
from .editing.methods.emmet import EMMETParams, emmet
from .editing.methods.finetune import FTParams, finetune
from .editing.methods.memit import MEMITParams, memit
from .editing.methods.r_rome import RROMEParams, r_rome
from .editing.methods.rome import ROMEParams, rome, rome_each
from .editing.request import EditRequest
from .evaluation.evaluate import evaluate
from .evaluation.report import Report
from .model.facts import Fact
from .model.families import UnsupportedModelError
from .model.load import EditableModel, load_model
from .moments import Moments, collect_moments
from .tracing.causal import trace
from .tracing.corruption import noise_level
from .tracing.dataset import trace_dataset
from .tracing.effects import Effects
from .tracing.trace import Trace

__all__ = [
    "AlphaEditParams",
    "EMMETParams",
    "METHODS",
    "Edit",
    "EditRequest",
    "EditableModel",
    "Effects",
    "FTParams",
    "Fact",
    "MEMITParams",
    "Moments",
    "ROMEParams",
    "RROMEParams",
    "Report",
    "Trace",
    "UnsupportedModelError",
    "alphaedit",
    "collect_moments",
    "edit",
    "emmet",
    "evaluate",
    "finetune",
    "load_model",
    "memit",
    "noise_level",
    "r_rome",
    "rome",
    "rome_each",
    "trace",
    "trace_dataset",
]

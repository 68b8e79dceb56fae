"""Locate and edit facts in language models."""

from .editing import (
    METHODS,
    AlphaEditParams,
    Edit,
    EditRequest,
    EMMETParams,
    FTParams,
    MEMITParams,
    ROMEParams,
    RROMEParams,
    alphaedit,
    edit,
    emmet,
    finetune,
    memit,
    r_rome,
    rome,
    rome_each,
)
from .evaluation import Report, evaluate
from .model import EditableModel, Fact, UnsupportedModelError, load_model
from .moments import Moments, collect_moments
from .tracing import Effects, Trace, noise_level, trace, trace_dataset

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

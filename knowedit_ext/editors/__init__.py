"""Editors that are trained once and then edit in one pass: MEND, and KE as EFK."""

from .apply import efk, mend, mend_each
from .convert import convert_editor
from .efk import EFK
from .mend import MEND
from .train import train_editor
from .training import EditorTraining, EditorTrainingParams

__all__ = [
    "EFK",
    "MEND",
    "EditorTraining",
    "EditorTrainingParams",
    "convert_editor",
    "efk",
    "mend",
    "mend_each",
    "train_editor",
]

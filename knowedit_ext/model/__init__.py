"""A loaded model: its parts, the facts it is asked about, its identity."""

from .facts import Fact
from .families import UnsupportedModelError
from .load import EditableModel, load_model

__all__ = ["EditableModel", "Fact", "UnsupportedModelError", "load_model"]

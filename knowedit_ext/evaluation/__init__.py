"""The papers' metrics before and after edits (`evaluate`), and what they found (`Report`)."""

from .evaluate import evaluate
from .mean import Mean
from .metrics.consistency import TfIdf
from .report import Report, side_by_side

__all__ = ["Mean", "Report", "TfIdf", "evaluate", "side_by_side"]

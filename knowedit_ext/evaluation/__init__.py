"""The papers' metrics before and after edits (`evaluate`), and what they found (`Report`)."""

from .before_after import BeforeAfter, before_after
from .evaluate import evaluate
from .known import KnownFact, known_fact
from .mean import Mean
from .metrics.consistency import TfIdf
from .problem_scores import problem_scores
from .report import Report, side_by_side

__all__ = ["BeforeAfter", "KnownFact", "Mean", "Report", "TfIdf"]
__all__ += ["before_after", "evaluate", "known_fact", "problem_scores", "side_by_side"]

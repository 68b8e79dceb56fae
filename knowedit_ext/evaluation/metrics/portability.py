"""Portability: questions whose answers follow from the new fact (EasyEdit's zsRE, KnowEdit, WikiBigEdit)."""

from ...datasets.questions import PORTABILITY
from ..metric import answered

METRIC = answered(PORTABILITY, 120)

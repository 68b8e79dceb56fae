"""Reversal: the edited fact asked for the other way round, from object to subject. Not in the papers' tables."""

from ..metric import answered

METRIC = answered({"reversal_prompts": "reversal"}, 140)

"""Portability: a question whose answer follows from the new fact (EasyEdit's zsRE). Not in the papers' tables."""

from ..metric import answered

METRIC = answered("portability_prompts", "port.", 120)

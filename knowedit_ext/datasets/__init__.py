"""Loaders and validators for the data sets that users come with."""

from .counterfact import load_counterfact
from .known import KnownFact, load_known
from .records import BadRecord, Records
from .zsre import load_zsre

__all__ = ["BadRecord", "KnownFact", "Records", "load_counterfact", "load_known", "load_zsre"]

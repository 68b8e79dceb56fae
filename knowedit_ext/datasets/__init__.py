"""Loaders and validators for the data sets that users come with."""

from .known import KnownFact, load_known

__all__ = ["KnownFact", "load_known"]

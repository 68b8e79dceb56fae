"""The papers' studies, on what the rest of the package gives."""

from .regression import Regression, regress

__all__ = ["Regression", "regress"]

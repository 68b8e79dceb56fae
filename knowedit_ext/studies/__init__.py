"""The papers' studies, on what the rest of the package gives."""

from .localization import localization_study
from .localization_results import Localization
from .regression import Regression, regress
from .sequential import Sequential, sequential
from .treatment import Treatment

__all__ = ["Localization", "Regression", "Sequential", "Treatment", "localization_study", "regress", "sequential"]

"""The papers' studies, on what the rest of the package gives."""

from .localization import localization_study
from .localization_results import Localization
from .regression import Regression, regress

__all__ = ["Localization", "Regression", "localization_study", "regress"]

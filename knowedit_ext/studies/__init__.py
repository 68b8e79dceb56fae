"""The papers' studies, on what the rest of the package gives."""

from .ability import Ability, ability
from .attention import attention
from .categories import categories
from .check_edit import EditCheck, check_edit
from .findings import Findings
from .layer_token import layer_token
from .layers import layers
from .localization import localization_study
from .localization_results import Localization
from .mixes import mixes
from .pairs import export_pairs, read_pairs
from .regression import Regression, regress
from .reversal import reversal
from .scaling import scaling
from .sequential import Sequential, sequential
from .severed import severed
from .suggest import suggest
from .suggestion import Suggestion
from .treatment import Treatment

__all__ = [
    "Ability",
    "EditCheck",
    "Findings",
    "Localization",
    "Regression",
    "Sequential",
    "Suggestion",
    "Treatment",
    "ability",
    "attention",
    "categories",
    "check_edit",
    "export_pairs",
    "layer_token",
    "layers",
    "localization_study",
    "mixes",
    "read_pairs",
    "regress",
    "reversal",
    "scaling",
    "sequential",
    "severed",
    "suggest",
]

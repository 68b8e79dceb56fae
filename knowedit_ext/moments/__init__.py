"""Second moments of the keys that down projections read (`collect_moments`), their store, and solving with them."""

from .collect import collect_moments
from .published import export_npz, import_npz
from .solver import NotPositiveDefiniteError, Solution
from .store import Moment, Moments

__all__ = ["Moment", "Moments", "NotPositiveDefiniteError", "Solution", "collect_moments", "export_npz", "import_npz"]

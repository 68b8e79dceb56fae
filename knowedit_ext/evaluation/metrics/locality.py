"""Locality: questions about the subject whose answers are to stay (KnowEdit): still right, and still what was said."""

from ...datasets.questions import LOCALITY
from ..metric import answered

METRIC = answered(LOCALITY, 125, kept=("locality_kept", "loc. kept"))

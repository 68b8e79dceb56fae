"""Second moments for edits of the built-in world's model: over all that is said of its people."""

from __future__ import annotations

from collections.abc import Sequence

from ..model.load import EditableModel
from ..moments import Moments, collect_moments
from .store import load_world


def collect(model: EditableModel, layers: Sequence[int]) -> Moments:
    return collect_moments(model, load_world().statements(), layers)

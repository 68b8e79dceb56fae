"""How many layers, and which (Meng et al. 2023, appendix): a method's scaling with one window after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import Natural, typed
from ..model.load import EditableModel
from ..moments import Moments
from .findings import Findings
from .scaling import scaling
from .treatment import Given, Treatment

Window = Sequence[Natural]


@typed
def layers(
    model: EditableModel,
    records: Any,
    out: str | Path,
    *,
    method: str = "memit",
    params: Any,
    windows: Sequence[Window] | None = None,
    moments: Moments | None = None,
    **options: Any,
) -> Findings:
    """Scale one method with several windows of layers.

    windows: None: of 1, 3, 5, ... layers that end where the method's own do, and of as many as its own at the start, in
    the middle and at the end of the model (`windows_of`). params: a preset's name, or the method's own. moments: of all
    these layers. options: as in `scaling`, whose rows these are; a method's label names its layers: "memit:layers=3-5".
    """
    treatment = Treatment.of(method, params, {})
    chosen = windows_of(treatment.params.layers, model.num_layers) if windows is None else windows
    labels = [f"{method}{',' if ':' in method else ':'}layers={spelled(window)}" for window in chosen]
    given: Mapping[str, Given] = {treatment.method.name: params}
    return scaling(model, records, labels, out, params_of=given, moments=moments, **options)


def windows_of(own: Sequence[int], layers: int) -> list[tuple[int, ...]]:
    """Each once. own: a method's layers, of so many that the model has."""
    last, size = own[-1], len(own)
    ending = [range(last - count + 1, last + 1) for count in range(1, last + 2, 2) if count <= max(size + 2, 5)]
    moved = [range(first, first + size) for first in (0, (layers - size) // 2, layers - 1 - size) if first >= 0]
    return list(dict.fromkeys(tuple(window) for window in (*ending, tuple(own), *moved)))


def spelled(window: Sequence[int]) -> str:
    """As a label has it: "3-5" or "3/5"; one layer is a range too."""
    whole = list(range(window[0], window[-1] + 1))
    return f"{window[0]}-{window[-1]}" if list(window) == whole else "/".join(map(str, window))

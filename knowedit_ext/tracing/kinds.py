"""What a trace can restore: a row a kind, read by tracing, files, averages and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import quoted


@dataclass(frozen=True)
class Kind:
    """site: where the clean values go (`sweep.Patch`); windowed: in several layers at once, or in one.

    suffix: of the published file, knowledge_{id}{suffix}.npz. label: its name in figures. colours: a diverging colour
    map of matplotlib, whose upper half is the hue of the papers' figures.
    """

    name: str
    site: str
    windowed: bool
    suffix: str
    label: str
    colours: str

    @property
    def saved(self) -> str:
        """What a published file says under "kind"."""
        return self.suffix.removeprefix("_")


KINDS = {
    kind.name: kind
    for kind in (
        Kind("state", "layer", False, "", "state", "PuOr"),
        Kind("mlp", "mlp", True, "_mlp", "MLP", "PiYG"),
        Kind("attn", "attn", True, "_attn", "attention", "RdBu_r"),
    )
}

KNOCKOUT = "knockout"  # cuts attention edges and restores nothing: its results are `KnockoutTrace`


def kind_of(name: object) -> Kind:
    """The row of a name; ValueError for another name."""
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"unknown kind {name!r}: expected one of {', '.join(map(repr, KINDS))}")
    return KINDS[name]


def kinds_of(names: Sequence[str]) -> tuple[str, ...]:
    """Names of at least one kind, each known and given once."""
    if isinstance(names, str):
        raise TypeError(f"kinds is the string {names!r}: expected a list of some of {', '.join(map(repr, KINDS))}")
    kinds = tuple(kind_of(name).name for name in names)
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"kinds is {list(names)}: expected each of {', '.join(map(repr, KINDS))} at most once, at least one"
        )
    return kinds


def kind_of_saved(text: str) -> Kind:
    """The kind that a file says; the published code writes its None for states out as text, too."""
    kind = next((kind for kind in KINDS.values() if text in (kind.saved, kind.name)), None)
    if kind is None and text != "None":
        raise ValueError(f"unknown kind {quoted(text)}")
    return kind or KINDS["state"]


def kind_of_file(stem: str) -> Kind:
    """The kind that a published file's name says."""
    return next((kind for kind in KINDS.values() if kind.suffix and stem.endswith(kind.suffix)), KINDS["state"])


WINDOW = 10  # layers, as published, for models of 24 to 48 layers


def window_for(layers: int, window: int | None, kinds: Sequence[str]) -> int:
    """Layers restored together in a model of `layers` layers.

    None: 10, as published, or half of the layers where the model has fewer than 20. Windows are cut at the first and
    the last layer, so one as long as the model restores every layer at its middle, and one of twice the length
    everywhere: it brings the answer back wherever it is, which says nothing about where. ValueError for such a one.
    """
    most = max(1, layers - 1)
    if window is None:
        return min(WINDOW, max(1, layers // 2))
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window is {window}: expected a whole number of at least 1")
    if window > most and any(KINDS[kind].windowed for kind in kinds):
        raise ValueError(
            f"window is {window}, the model has {layers} layers: restoring all of them says nothing about where a fact "
            f"is kept. Expected at most {most} (default for this model: {window_for(layers, None, ())})"
        )
    return window


def window_layers(layer: int, window: int, layers: int) -> tuple[int, ...]:
    """The layers of a window around `layer` (causal_trace.py:427-429): 10 -> l - 5 .. l + 4, clipped."""
    return tuple(range(max(0, layer - window // 2), min(layers, layer - (-window // 2))))

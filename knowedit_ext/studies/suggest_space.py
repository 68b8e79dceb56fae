"""What `suggest` searches: windows of layers, and values of a method's parameters, as candidates."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, product
from typing import Any

from ..checks import Natural, as_type
from ..editing.method import Method
from ..editing.params import LayerParams

LAYERS = "layers"
Window = tuple[Natural, ...]
# Of parameters by their published names. What depends on a model's or a method's scale is told in parts of the base's.
RANGES = {
    "v_lr": (0.1, 0.2, 0.5),
    "v_weight_decay": (1e-3, 0.05, 0.5),
    "mom2_update_weight": (10.0, 100.0, 1000.0, 10000.0),
    "L2": (0.1, 1.0, 10.0),
    "nullspace_share": (0.02, 0.05, 0.2),
}
PARTS = {
    "clamp_norm_factor": (0.5, 1.0, 2.0, 4.0),
    "nullspace_threshold": (0.1, 1.0, 10.0),
    "emmet_lambda": (0.1, 1.0, 10.0),
    "lr": (0.25, 1.0, 4.0),
    "norm_constraint": (0.25, 1.0, 4.0),
}
SIZES = (1, 3, 5)  # of windows, beside the base's own
DEPTHS = 8  # last layers of windows, at most, evenly over the model
TRIES = 1000


@dataclass(frozen=True)
class Group:
    """Candidates that share their values: computed together, halved together."""

    candidates: tuple[LayerParams, ...]

    @property
    def last(self) -> int:
        return self.candidates[0].layers[-1]


@dataclass(frozen=True)
class Space:
    """windows: of layers; ranges: parameter -> the values it may take. base: what the others are taken from."""

    method: Method
    base: LayerParams
    windows: tuple[tuple[int, ...], ...]
    ranges: Mapping[str, tuple[Any, ...]]

    @classmethod
    def of(
        cls, method: Method, base: LayerParams, layers: Sequence[int], given: Mapping[str, Sequence[Any]] | None
    ) -> Space:
        """layers: those that can be edited. given: by parameter values to search instead of ours; "layers": windows.

        ValueError for a parameter that the method does not have, for values that it does not take, and for windows
        outside `layers`.
        """
        given = dict(given or {})
        known = [field.name for field in fields(method.params)]
        for name, values in given.items():
            if name not in known:
                raise ValueError(f"space: {method.name} has no parameter '{name}': there are {', '.join(known)}")
            if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"space: {name} is {values!r}: expected a list of the values to try")
        asked = given.pop(LAYERS, None)
        windows = _windows(method, base, layers) if asked is None else [as_type("a window", w, Window) for w in asked]
        outside = sorted({n for window in windows for n in window} - set(layers))
        if outside:
            raise ValueError(f"space: layer {outside[0]} cannot be edited: those that can are {list(layers)}")
        if not windows:
            raise ValueError("space: there is no window of layers to edit")
        ranges = {}
        for name in known:
            own = getattr(base, name, None)
            if name in given:
                ranges[name] = tuple(given[name])
            elif own is not None and name in RANGES:
                ranges[name] = tuple(sorted({own, *RANGES[name]}))
            elif own is not None and name in PARTS:
                ranges[name] = tuple(own * part for part in PARTS[name])
        space = cls(method, base, tuple(dict.fromkeys(map(tuple, windows))), {})
        for name, values in ranges.items():  # as parameters read them ("5e-1" is 0.5); their errors name themselves
            read = (getattr(space.params(space.windows[0], {name: value}), name) for value in values)
            ranges[name] = tuple(dict.fromkeys(read))
        return replace(space, ranges=ranges)

    @property
    def size(self) -> int:
        """Different candidates there are."""
        return len(self.windows) * math.prod(map(len, self.ranges.values()))

    @property
    def lasts(self) -> list[int]:
        """Last layers of the windows."""
        return sorted({window[-1] for window in self.windows})

    def params(self, window: Sequence[int], values: Mapping[str, Any]) -> LayerParams:
        made = replace(self.base, layers=tuple(window), **values)
        self.method.check(made)
        return made

    def holds(self, params: LayerParams) -> bool:
        """Is it one of the candidates that `size` counts?"""
        values = {name: getattr(params, name) for name in self.ranges}
        inside = params.layers in self.windows and all(values[name] in self.ranges[name] for name in values)
        return inside and params == replace(self.base, layers=params.layers, **values)

    def shared(self, params: LayerParams) -> LayerParams:
        """What candidates of one group have alike: all, where a method's values are not told from the rest."""
        return params.of_values() if self.method.keeps_values(params) else params

    def groups(self, starts: Sequence[LayerParams], variants: int, rng: random.Random) -> list[Group]:
        """Those that share their values, and others that share them too, drawn at random up to so many."""
        together: dict[LayerParams, list[LayerParams]] = {}
        for params in dict.fromkeys(starts):
            together.setdefault(self.shared(params), []).append(params)
        return [Group((*own, *self._others(own, variants - len(own), rng))) for own in together.values()]

    def _others(self, own: Sequence[LayerParams], count: int, rng: random.Random) -> list[LayerParams]:
        """Windows that end at the same layer, and other values of what has no part in the optimised values."""
        if not self.method.keeps_values(own[0]) or count <= 0:
            return []
        solves = {name: values for name, values in self.ranges.items() if name not in own[0].in_values}
        windows = [window for window in self.windows if window[-1] == own[0].layers[-1]]
        others = [
            replace(own[0], layers=window, **dict(zip(solves, values, strict=True)))
            for window, *values in product(windows, *solves.values())
        ]
        others = [one for one in others if one not in own]
        return rng.sample(others, min(count, len(others)))

    def at(self, last: int) -> LayerParams:
        """The base, moved to end at a layer: the window there whose size is nearest to its own."""
        windows = [window for window in self.windows if window[-1] == last]
        size = len(self.base.layers)
        return self.params(min(windows, key=lambda window: (abs(len(window) - size), len(window))), {})

    def draw(
        self, count: int, lasts: Sequence[int], seen: Collection[LayerParams], rng: random.Random
    ) -> list[LayerParams]:
        """So many candidates, the layers in turn, with values that are not among those seen; fewer where it takes more
        than `TRIES` to find one."""
        drawn: dict[LayerParams, LayerParams] = {}
        turns = cycle(rng.sample(list(lasts), len(lasts)))
        misses = 0
        while len(drawn) < count and misses < TRIES:
            last = next(turns)
            window = rng.choice([window for window in self.windows if window[-1] == last])
            params = self.params(window, {name: rng.choice(values) for name, values in self.ranges.items()})
            key = self.shared(params)
            if key in seen or key in drawn:
                misses += 1
            else:
                drawn[key] = params
        return list(drawn.values())


def _windows(method: Method, base: LayerParams, layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Stretches of `layers` that end at up to `DEPTHS` of them, and the base's own."""
    there = set(layers)
    own = len(base.layers)
    sizes = {own} if method.single else {own, *(size for size in SIZES if 2 * size <= len(layers))}
    step = max(1, math.ceil(len(layers) / DEPTHS))
    lasts = sorted({*layers[step - 1 :: step], base.layers[-1]} & there)
    stretches = [tuple(range(last - size + 1, last + 1)) for last in lasts for size in sorted(sizes)]
    return [tuple(base.layers)] * (set(base.layers) <= there) + [w for w in stretches if set(w) <= there]

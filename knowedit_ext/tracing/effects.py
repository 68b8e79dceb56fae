"""Average effects over many traces: ATE, and AIE per token role and layer (Meng et al. 2022, section 2.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import Natural, as_type
from ..frames import frame
from ..notebook import html_table, shades
from ..plots import png_of
from ..runs.files import load_json, write_json
from .interval import Interval
from .kinds import KINDS, kind_of_file
from .plots import plot_effects
from .roles import ROLES, by_role
from .trace import Trace, was_predicted

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class KindEffects:
    """Averages for one kind. `aie` by role (absent where no prompt has such a token), a value a layer.

    highest: mean over prompts of each prompt's largest score; window: layers restored together (1 for states).
    """

    kind: str
    window: int
    cases: int
    skipped: int
    high_score: Interval
    low_score: Interval
    total_effect: Interval
    highest: Interval
    aie: dict[str, Interval]

    @property
    def layers(self) -> int:
        return len(next(iter(self.aie.values())).mean)

    def peak(self, role: str) -> tuple[int, float]:
        """Layer with the largest AIE of a role, and that AIE."""
        values = self.aie[role].mean
        layer = int(np.argmax(values))
        return layer, values[layer]


@dataclass
class Effects:
    """What a data set of traces says on average, by kind."""

    kinds: dict[str, KindEffects] = field(default_factory=dict)

    @classmethod
    def from_traces(cls, traces: Iterable[Trace], skipped: dict[str, int] | None = None) -> Effects:
        by_kind: dict[str, list[Trace]] = defaultdict(list)
        for trace in traces:
            by_kind[trace.kind].append(trace)
        return cls({kind: _average(group, (skipped or {}).get(kind, 0)) for kind, group in by_kind.items()})

    @classmethod
    def from_cases(cls, paths: Sequence[str | Path]) -> Effects:
        """From .npz files in the published layout; those without a correct prediction are counted as skipped."""
        traces, skipped = [], defaultdict(int)
        for path in paths:
            if was_predicted(path):
                traces.append(Trace.load(path))
            else:
                skipped[kind_of_file(Path(path).stem).name] += 1
        return cls.from_traces(traces, skipped)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Effects:
        """From a folder written by `trace_dataset` or by the published code."""
        cases = Path(folder) / "cases"
        paths = sorted((cases if cases.is_dir() else Path(folder)).glob("knowledge_*.npz"))
        if not paths:
            raise ValueError(f"'{folder}' holds no knowledge_*.npz files")
        return cls.from_cases(paths)

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """By kind what `KindEffects` holds."""
        return {kind: asdict(effects) for kind, effects in self.kinds.items()}

    @classmethod
    def load(cls, path: str | Path) -> Effects:
        """What `save` wrote; ValueError names the file, and the key in it, that is something else."""
        return cls({name: _kind_effects(name, value, f"'{path}': {name}") for name, value in load_json(path).items()})

    def rows(self) -> list[dict[str, Any]]:
        """Tidy: kind, role, layer, aie, half_width (of its 95 % interval; None for a single prompt), n."""
        return [
            {"kind": kind, "role": role, "layer": layer, "aie": value, "half_width": half, "n": mean.n}
            for kind, effects in self.kinds.items()
            for role, mean in effects.aie.items()
            for layer, (value, half) in enumerate(
                zip(mean.mean, mean.half_width or [None] * len(mean.mean), strict=True)
            )
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """`rows` as a DataFrame (needs pandas)."""
        return frame(self.rows())

    def to_html(self, path: str | Path) -> None:
        """One self-contained page: curves of every kind and role, and a table (needs plotly and jinja2)."""
        from ..pages.page import write_page
        from ..pages.results import effects_page

        write_page(path, effects_page(self))

    def __repr__(self) -> str:
        return f"Effects({', '.join(f'{kind}: {each.cases} prompts' for kind, each in self.kinds.items())})"

    def _repr_html_(self) -> str:
        """The averages as tables, in a notebook: roles of tokens by layers."""
        means = {kind: np.array([mean.mean for mean in each.aie.values()]) for kind, each in self.kinds.items()}
        reach = max((float(np.abs(each).max()) for each in means.values()), default=0.0)
        tables = []
        for kind, each in self.kinds.items():
            rows = [[role, *mean.mean] for role, mean in each.aie.items()]
            hover = [
                [f"{x:.4f}{'' if mean.half_width is None else f' ± {mean.half_width[n]:.4f}'} (n = {mean.n})"
                 for n, x in enumerate(mean.mean)]
                for mean in each.aie.values()
            ]  # fmt: skip
            prompts = f"{each.cases} prompt{'s' * (each.cases != 1)}"
            caption = f"average indirect effect of the {KINDS[kind].label} by layer, {prompts}"
            colours = shades(means[kind], KINDS[kind].colours, reach)
            tables.append(html_table(caption, ["", *map(str, range(each.layers))], rows, colours, hover))
        return "".join(tables) or escape(repr(self))

    def _repr_png_(self) -> bytes | None:
        """The curves, where a notebook takes no HTML."""
        return png_of(self.plot()) if self.kinds else None

    def table(self) -> str:
        """Markdown: for each kind and role the AIE at its best layer, with its confidence interval and n."""
        lines = ["| kind | token role | best layer | AIE there | 95 % CI | n |", "|---|---|---:|---:|---:|---:|"]
        for kind, effects in self.kinds.items():
            for role, mean in effects.aie.items():
                layer, value = effects.peak(role)
                half = "" if mean.half_width is None else f"± {mean.half_width[layer]:.3f}"
                lines.append(f"| {kind} | {role} | {layer} | {value:.3f} | {half} | {mean.n} |")
        return "\n".join(lines)

    def summary(self) -> str:
        """One line a kind: clean and corrupted probability, ATE, and how many prompts were skipped."""
        return "\n".join(
            f"{kind}: {e.cases} prompts ({e.skipped} not known), clean {e.high_score.mean:.3f}, corrupted "
            f"{e.low_score.mean:.3f}, ATE {e.total_effect.mean:.3f}, mean of best cells {e.highest.mean:.3f}"
            for kind, e in self.kinds.items()
        )

    def plot(self, path: str | Path | None = None, style: str = "lines"):
        """AIE by layer and role, one panel a kind: "lines" with confidence bands, or "heatmap". Returns the figure."""
        return plot_effects(self, path, style)


def _kind_effects(name: str, value: Any, where: str) -> KindEffects:
    """One kind's averages out of a file."""
    names = [field.name for field in fields(KindEffects)]
    if not isinstance(value, dict) or set(value) != set(names) or value["kind"] != name or name not in KINDS:
        raise ValueError(f"{where} is no averages of a kind of trace: expected an object with {', '.join(names)}")
    counts = {key: as_type(f"{where}.{key}", value[key], Natural) for key in ("window", "cases", "skipped")}
    means = {
        key: Interval.read(value[key], f"{where}.{key}")
        for key in ("high_score", "low_score", "total_effect", "highest")
    }
    if not isinstance(value["aie"], dict) or not value["aie"] or not set(value["aie"]) <= set(ROLES):
        raise ValueError(f"{where}.aie has not the roles of tokens for keys: {', '.join(ROLES)}")
    aie = {
        role: Interval.read(value["aie"][role], f"{where}.aie.{role}", many=True)
        for role in ROLES
        if role in value["aie"]
    }
    if len({len(mean.mean) for mean in aie.values()}) > 1:
        raise ValueError(f"{where}.aie is about different numbers of layers")
    return KindEffects(kind=value["kind"], **counts, **means, aie=aie)


def _average(traces: Sequence[Trace], skipped: int) -> KindEffects:
    layers = {t.scores.shape[1] for t in traces}
    if len(layers) > 1:
        raise ValueError(f"traces of models with different numbers of layers: {sorted(layers)}")
    windows = {t.window for t in traces if KINDS[t.kind].windowed}
    if len(windows) > 1:
        raise ValueError(f"traces with different windows: {sorted(windows)}")
    rows: dict[str, list[np.ndarray]] = defaultdict(list)
    for trace in traces:
        for role, effect in by_role(trace.indirect_effect, trace.subject_range).items():
            rows[role].append(effect[~np.isnan(effect).any(axis=1)])  # tokens that were not traced are NaN
    together = {role: np.concatenate(rows[role]).astype(np.float64) for role in ROLES}
    array = lambda values: np.array(list(values), dtype=np.float64)  # noqa: E731
    return KindEffects(
        kind=traces[0].kind,
        window=traces[0].window if KINDS[traces[0].kind].windowed else 1,
        cases=len(traces),
        skipped=skipped,
        high_score=Interval.of(array(t.high_score for t in traces)),
        low_score=Interval.of(array(t.low_score for t in traces)),
        total_effect=Interval.of(array(t.total_effect for t in traces)),
        highest=Interval.of(array(np.nanmax(t.scores) for t in traces)),
        aie={role: Interval.of(values) for role, values in together.items() if len(values)},
    )

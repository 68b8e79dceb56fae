"""Which layers, which settings? Measured on the model at hand: candidates by successive halving on one half of the
records, the best of them on the other half."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from ..checks import Count, Positive, Seed, Share, typed
from ..datasets import load_known
from ..editing.method import Method
from ..editing.methods import method_of
from ..editing.params import EditParams, LayerParams
from ..model.facts import Fact, tokenize_fact
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..moments import Moments
from ..runs.lock import alone
from ..runs.ranks import Ranks, by_itself
from ..runs.settings import marked
from ..tracing.answer import knows
from ..tracing.dataset import trace_dataset
from .cells import PATIENCE, Cell
from .edit_sets import counterfact
from .suggest_space import Group, Space
from .suggest_trials import HELD_OUT, SEARCHED, Trial, Trials
from .suggestion import Suggestion
from .treatment import Given

LAST_SUBJECT_TOKEN = "Last subject token"
LATER = 0.6  # of what the first round cost: a later one has half of the groups, on twice the records
RESERVE = 0.9  # of the minutes: that are planned for


@at_rest
@typed
def suggest(
    model: EditableModel,
    method: str,
    facts: str | Path | Iterable[Any] | None = None,
    *,
    records: Any,
    moments: Moments | None = None,
    params: Given | None = None,
    space: Mapping[str, Sequence[Any]] | None = None,
    out: str | Path | None = None,
    limit: Count | None = 128,
    held_out: Share = 0.5,
    first: Count = 8,
    variants: Count = 4,
    draws: int | None = None,
    minutes: Positive = 60.0,
    together: bool | None = None,
    traced: Count = 20,
    seed: Seed = 0,
    skip_bad: bool = False,
    progress: bool = False,
) -> Suggestion:
    """Search the layers and settings of a method that edit this model best, by S; `.params` is what was found.

    method: one of `METHODS` whose parameters have layers. records: CounterFact, a file or records, of which the first
    `limit` are used: a part, `held_out`, of them (drawn by `seed`) is not seen in the search, and scores what it found.
    params: what is begun from and compared with: a preset's name, a file, keys, or parameters; None: the method's
    defaults, at a sixth of the model's depth. The method's presets that fit the model take part.
    moments: of the layers to search; windows of others are left out.
    space: {parameter: values to try}, instead of ours (`suggest_space`); "layers": windows.

    The search: the base moved to each depth; at the better half of the depths `draws` settings drawn at random (None:
    as many as fit into `minutes` of one process), each with `variants` candidates that share its values; all of these
    on the `first` records of their half. Then half of the settings, and half of each one's candidates, go on to twice
    the records, until few are left on all of them.
    together: one edit of all records, as methods for many facts are evaluated (None: those so); else one of each.
    facts: known_1000's format; of those that the model knows `traced` are traced (MLP, by attribution), for
    orientation. None: the facts of the searched records.
    out: folder where a search that was killed goes on, with `params.json`, tables and figures; None: nothing is kept.

    ValueError for records that give no S, and where no candidate could be edited.
    """
    chosen = method_of(method)
    base = default_params(chosen, model.num_layers) if params is None else chosen.params_of(params)
    searched = Space.of(chosen, base, editable_layers(model, chosen, base, moments), space)
    together = chosen.many if together is None else together
    if chosen.single and together:
        raise ValueError(f"{method} edits one fact at a time: together=True is for methods that edit many")
    known = None if facts is None else [item.fact for item in load_known(facts)]
    usable = counterfact(model, records, skip_bad)[:limit]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()) if out is None else out)
        options = dict(held_out=held_out, together=together, seed=seed, progress=progress)
        trials = Trials(model, folder, searched, moments, usable, **options)
        effect = traced_effect(trials, known, traced)
        rounds = search(trials, first, variants, draws, minutes)
        best = max(rounds[-1], key=lambda trial: trial.rank)
        groups = [Group((params,)) for params in dict.fromkeys([best.params, base])]
        whole = range(len(trials.halves[HELD_OUT]))
        held = [trial for (trial,) in trials.measure(groups, HELD_OUT, [whole], "held out")]
        found = Suggestion.of(trials, rounds, held, effect)
        ranks = Ranks()
        if ranks.first and out is not None:
            with by_itself(), alone(folder, patience=PATIENCE):
                found.save(folder)
        ranks.wait()
    return found


def default_params(method: Method, layers: int) -> LayerParams:
    """A method's defaults, at a sixth of the depth: a window of five, or of a quarter of the layers."""
    size = 1 if method.single else max(1, min(5, layers // 4))
    start = min(layers // 6, layers - size)
    try:
        return method.params_of({"layers": tuple(range(start, start + size))})
    except ValueError as error:
        raise ValueError(f"{method.name} has no defaults for every model ({error}): give params") from error


def editable_layers(model: EditableModel, method: Method, base: LayerParams, moments: Moments | None) -> list[int]:
    """All layers, less those without moments, and the last one where a value is optimised: nothing is behind it."""
    if not base.layers:
        raise ValueError(f"{method.name} chooses its layers by itself: there is nothing to search")
    layers = list(range(model.num_layers - isinstance(base, EditParams)))
    if method.uses_moments(base):
        if moments is None:
            raise ValueError(f"{method.name} needs moments of the layers to search: ke.collect_moments")
        layers = [layer for layer in layers if layer in moments]
    if absent := sorted(set(base.layers) - set(layers)):
        what = "has no moments" if absent[0] < model.num_layers - 1 else "is too high for the model"
        raise ValueError(f"params: layer {absent[0]} {what}: those that can be edited are {layers}")
    return layers


def traced_effect(trials: Trials, facts: Sequence[Fact] | None, count: int) -> dict[str, Any] | None:
    """{"facts": how many, "effect": [layers]}: the average indirect effect of MLPs at the last subject token, estimated
    by attribution; None where the model says none of the facts."""
    if facts is None:
        facts = [_fact(record) for record in trials.halves[SEARCHED]]
    told = {"facts": marked(*map(repr, facts)), "count": count}

    def work(folder: Path) -> dict[str, Any]:
        began, model = perf_counter(), trials.model
        kept: list[Fact] = []
        for fact in facts:
            if len(kept) < count and knows(model, tokenize_fact(model, fact), 1):
                kept.append(fact)
        if not kept:
            return {"facts": 0, "seconds": perf_counter() - began}
        effects = trace_dataset(model, kept, folder / "traces", kinds=("mlp",), method="attribution", progress=False)
        kind = effects.kinds["mlp"]
        effect, seconds = kind.aie[LAST_SUBJECT_TOKEN].mean, perf_counter() - began
        return {"facts": kind.cases, "window": kind.window, "effect": effect, "seconds": seconds}

    (traced,) = trials.run([(Cell({"part": "traced", "facts": len(facts), "most": count}, told), work)], "traces")
    return traced if traced["facts"] else None


def _fact(record: Mapping[str, Any]) -> Fact:
    rewrite = record["requested_rewrite"]
    true = rewrite["target_true"]["str"]
    if "{}" not in rewrite["prompt"]:
        return Fact.from_prompt(rewrite["prompt"], rewrite["subject"], attribute=true)
    return Fact(rewrite["prompt"], rewrite["subject"], attribute=true)


def search(trials: Trials, first: int, variants: int, draws: int | None, minutes: float) -> list[list[Trial]]:
    """The trials of each round; the last one's are on all searched records."""
    space, rng = trials.space, random.Random(trials.seed)
    counts = counts_of(first, len(trials.halves[SEARCHED]))
    parts = [range(start, stop) for start, stop in zip([0, *counts], counts, strict=False)]
    before = trials.seconds
    starts = [space.base, *hand_made(space), *(space.at(last) for last in space.lasts)]
    groups = space.groups(starts, variants, rng)
    tried = trials.measure(groups, SEARCHED, parts[:1], "depths")
    if draws is None:
        draws = _planned(trials, (trials.seconds - before) / len(groups), len(groups), counts, minutes)
    more = space.draw(draws, better_half(tried, space.lasts), {space.shared(one) for one in starts}, rng)
    tried += trials.measure(space.groups(more, variants, rng), SEARCHED, parts[:1], "settings")
    if all(trial.ended for group in tried for trial in group):
        raise ValueError(f"no candidate could be edited: {tried[0][0].ended}")
    rounds = [tried]
    for number in range(1, len(counts)):
        kept = halve(rounds[-1])
        rounds.append(trials.measure(kept, SEARCHED, parts[: number + 1], f"{counts[number]} records"))
    return [[trial for group in tried for trial in group] for tried in rounds]


def counts_of(first: int, whole: int) -> list[int]:
    """Records of each round: twice as many as before, in the last one all."""
    counts = [min(first, whole)]
    while counts[-1] < whole:
        counts.append(whole if 3 * counts[-1] > whole else 2 * counts[-1])
    return counts


def halve(tried: Sequence[Sequence[Trial]]) -> list[Group]:
    """The better half of the groups, by their best candidates, and the better half of each one's candidates."""
    ordered = [sorted(group, key=lambda trial: trial.rank, reverse=True) for group in tried]
    ordered.sort(key=lambda group: group[0].rank, reverse=True)
    return [Group(tuple(trial.params for trial in _half(group))) for group in _half(ordered)]


def better_half(tried: Sequence[Sequence[Trial]], lasts: Collection[int]) -> list[int]:
    """Of the last layers of windows, by the best candidate that ends there; the base may end elsewhere."""
    best: dict[int, tuple[float, float]] = {}
    for group in tried:
        for trial in group:
            last = trial.params.layers[-1]
            if last in lasts:
                best[last] = max(best.get(last, trial.rank), trial.rank)
    return _half(sorted(best, key=best.__getitem__, reverse=True))


def hand_made(space: Space) -> list[LayerParams]:
    """The method's presets that fit the layers to search."""
    presets = [space.method.params_of(name) for name in space.method.presets]
    layers = {layer for window in space.windows for layer in window}
    return [params for params in presets if params.layers and set(params.layers) <= layers]


def _half(items: Sequence[Any]) -> list[Any]:
    return list(items[: math.ceil(len(items) / 2)])


def _planned(trials: Trials, each: float, groups: int, counts: Sequence[int], minutes: float) -> int:
    """How many more groups fit into the time, where one takes `each` seconds in the first round."""
    held = 2 * LATER * each * len(trials.halves[HELD_OUT]) / counts[0]
    left = 60 * RESERVE * minutes - trials.seconds - held
    later = LATER * (len(counts) - 1)
    return max(0, int((left - later * groups * each) / (each * (1 + later))))

"""Does localization inform editing? (Hase et al. 2023): trace facts, edit them at every layer, and regress.

Facts are computed in groups that depend on their order alone, and a group's edits by one method at one layer are a
cell: so a run that is killed, enlarged or spread over processes gives what one that was not gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..checks import Count, typed
from ..datasets import load_counterfact
from ..datasets.counterfact import need_prompts
from ..editing.problems import PROBLEMS, problem_of
from ..model.hooks import at_rest
from ..model.identity import identity
from ..model.load import EditableModel
from ..moments import Moments
from ..runs.lock import alone
from ..runs.ranks import Ranks, by_itself
from .cells import PATIENCE
from .localization_cells import Study
from .localization_edits import StudyMethod, study_method
from .localization_results import Localization

METHODS = ("ft-1", "ft-5", "rome", "memit")


@at_rest
@typed
def localization_study(
    model: EditableModel,
    records: str | Path | Iterable[Mapping[str, Any]],
    out: str | Path,
    moments: Moments | None = None,
    *,
    problems: Sequence[str] = tuple(PROBLEMS),
    methods: Sequence[str] = METHODS,
    layers: Sequence[int] | None = None,
    facts: Count | None = None,
    params: str | Mapping[str, Any] | None = None,
    window: Count = 5,
    noise: float | str = "s3",
    trace_window: Count = 5,
    samples: Count = 10,
    essence: bool = False,
    compat: Literal[None, "hase"] = None,
    group: Count = 8,
    progress: bool = False,
) -> Localization:
    """Trace every fact that the model knows (MLP windows, the target's probability), edit it at every layer by every
    method for every problem, score the edits, and ask what explains the scores: the layer, or the tracing effect there?

    records: CounterFact, a file or records. facts: only the first so many that are known (see `known_fact`).
    moments: of every layer that ROME or MEMIT edit.
    problems: some of `PROBLEMS`. methods: "rome", "memit" (over `window` layers), "ft-N" (over N layers). layers: those
        that are edited, each the middle of its window; None: all.
    params: None: the settings published for GPT-J; a preset's name, or for "ft", "rome" and "memit" their own. They are
        those of error injection, and the other problems' follow from them as they do in the release.
    noise: of the traces, of tracing reversal and of fact forcing; a rule is over the subjects of the facts.
    trace_window, samples: of the traces. essence: also how much better the model reads, before an edit, five texts of
        its own about the subject. compat: "hase": problems, edits and scores as released (docs/problems.md).
    group: facts computed together.

    A layer with nothing behind it gives an edit that changes nothing (see `Localization.regressions`).
    out: folder with traces, cells and, in the end, table.json, table.csv, regressions.json, figures and study.md.
    What is there is not computed again; facts (at the end), problems, methods and layers may be added later. The same
    call in several processes, or under `torchrun`, shares the cells among them.
    """
    problems = [problem_of(name).name for name in problems]
    chosen = [study_method(name, window, params) for name in methods]
    layers = list(range(model.num_layers)) if layers is None else list(layers)
    _check(model, problems, chosen, layers, moments)
    settings = {
        "run": "localization_study",
        "model": identity(model),
        "noise": noise,
        "trace": {"window": trace_window, "samples": samples},
        "essence": essence,
        "compat": compat,
    }
    study = Study(model, Path(out), settings, group, moments, progress)
    loaded = load_counterfact(records)
    need_prompts(loaded, "paraphrase_prompts", "neighborhood_prompts")
    study.know(loaded, facts)
    results = study.run(chosen, problems, layers)
    ranks = Ranks()
    if ranks.first:
        with by_itself(), alone(out, patience=PATIENCE):
            results.save(out)
    ranks.wait()
    return results


def _check(
    model: EditableModel,
    problems: Sequence[str],
    methods: Sequence[StudyMethod],
    layers: Sequence[int],
    moments: Moments | None,
) -> None:
    for what, items in (("problems", problems), ("methods", [m.name for m in methods]), ("layers", layers)):
        if not items or len(set(items)) < len(items):
            raise ValueError(f"{what} are {list(items)}: expected at least one, each once")
    if bad := [layer for layer in layers if not 0 <= layer < model.num_layers]:
        raise ValueError(f"layer {bad[0]} is out of range: the model has layers 0..{model.num_layers - 1}")
    wanted = {
        n
        for method in methods
        if method.uses_moments
        for layer in layers
        for n in method.params_at(layer, model.num_layers, problems[0]).layers
    }
    if missing := sorted(wanted - set(() if moments is None else moments.layers)):
        raise ValueError(f"moments of layers {', '.join(map(str, missing))} are missing: see ke.collect_moments")

"""Does localization inform editing? (Hase et al. 2023): trace facts, edit them at every layer, and regress.

Facts are computed in groups that depend on their order alone, and a group's edits by one method at one layer as a
whole: so a run that is killed, enlarged or spread over ranks gives what one that was not gives.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..checks import Count, typed
from ..datasets import load_counterfact
from ..editing.problems import PROBLEMS, as_problem, problem_of
from ..editing.request import EditRequest
from ..editing.tokenized import reaches_end
from ..evaluation.known import known_facts
from ..model.facts import Fact
from ..model.hooks import at_rest
from ..model.identity import identity
from ..model.load import EditableModel
from ..model.spelling import marked_occurrence
from ..moments import Moments
from ..runs.files import load_json, write_json
from ..runs.lock import alone
from ..runs.ranks import Ranks
from ..runs.settings import Growth, check_same, marked, settle
from ..tracing.corruption import noise_of
from ..tracing.dataset import case_path, trace_dataset
from ..tracing.localization import fraction_restored
from ..tracing.subject_noise import SubjectNoise
from ..tracing.trace import Trace
from .localization_edits import StudyMethod, study_method
from .localization_results import Localization
from .localization_scores import ESSENCES, essence_before, measure

METHODS = ("ft-1", "ft-5", "rome", "memit")
TOKENS, LEAST = 36, 0.02  # of the filter: which facts are known
CHUNK = 64  # records looked at together for it


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
        its own about the subject.
    group: facts computed together.

    A layer with nothing behind it gives an edit that changes nothing (see `Localization.regressions`).
    out: folder with traces, cells and, in the end, table.json, table.csv, regressions.json, figures and study.html.
    What is there is not computed again; facts (at the end), problems, methods and layers may be added later. Under
    `torchrun` the ranks share groups and cells.
    """
    problems = [problem_of(name).name for name in problems]
    chosen = [study_method(name, window, params) for name in methods]
    layers = list(range(model.num_layers)) if layers is None else list(layers)
    _check(model, problems, chosen, layers, moments)
    out, ranks = Path(out), Ranks()
    loaded = load_counterfact(records)
    growth = Growth("facts", "case_id", sets=("problems", "methods", "layers"))
    with alone(out, ranks):
        known = _known(model, loaded, facts, out, ranks)
        subjects = [record["requested_rewrite"]["subject"] for record in known]
        asked = {
            "run": "localization_study",
            "model": identity(model),
            "facts": [{"case_id": r["case_id"], "record": marked(json.dumps(r, sort_keys=True))} for r in known],
            "problems": problems,
            "methods": list(methods),
            "layers": layers,
            "noise": noise,
            "level": noise_of(model, noise, subjects).level,
            "trace": {"window": trace_window, "samples": samples},
            "essence": essence,
            "group": group,
        }
        # With more facts a rule is another level: the first run's is gone on with.
        settings = settle(
            out,
            asked,
            ranks,
            adopted=("level", "model.name"),
            growth=growth,
            enlarge=lambda there: _forget(out, growth.unfilled(there)),
        )
        if len(settings["facts"]) > len(known):
            raise ValueError(f"'{out}' has {len(settings['facts'])} facts: ask for as many, or choose another folder")
        study = _Study(model, known, out, ranks, settings, moments, progress)
        study.run(chosen, problems, layers)
        ranks.wait()
        results = study.results(chosen, problems, layers)
        if ranks.first:
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
        if getattr(method.params, "mom2_adjustment", False)
        for layer in layers
        for n in method.params_at(layer, model.num_layers, problems[0]).layers
    }
    if missing := sorted(wanted - set(() if moments is None else moments.layers)):
        raise ValueError(f"moments of layers {', '.join(map(str, missing))} are missing: see ke.collect_moments")


def _known(
    model: EditableModel, records: Sequence[Mapping[str, Any]], limit: int | None, out: Path, ranks: Ranks
) -> list[dict[str, Any]]:
    """The records whose fact is known, each prompt and subject once; looked for once, and kept in known.json."""
    path = out / "known.json"
    asked = {
        "model": identity(model),
        "records": marked(json.dumps(list(records), sort_keys=True)),
        "limit": limit,
        "tokens": TOKENS,
        "least": LEAST,
    }
    if ranks.first:
        kept = load_json(path, sealed=True) if path.exists() else None
        if kept is None or kept.get("asked") != json.loads(json.dumps(asked)):
            write_json(path, {"asked": asked, "known": _find_known(model, records, limit)}, sealed=True)
    ranks.wait()
    known = set(load_json(path, sealed=True)["known"])
    if not known:
        raise ValueError(f"the model knows none of the {len(records)} facts: there is nothing to trace or edit")
    return [dict(record) for record in records if record["case_id"] in known]


def _find_known(model: EditableModel, records: Sequence[Mapping[str, Any]], limit: int | None) -> list[int]:
    seen: set[tuple[str, str]] = set()
    known: list[int] = []
    for start in range(0, len(records), CHUNK):
        part = []
        for record in records[start : start + CHUNK]:
            key = (record["requested_rewrite"]["prompt"], record["requested_rewrite"]["subject"])
            if key not in seen:
                seen.add(key)
                part.append(record)
        answers = known_facts(model, [_fact(record) for record in part], TOKENS, LEAST)
        known += [record["case_id"] for record, answer in zip(part, answers, strict=True) if answer.known]
        if limit is not None and len(known) >= limit:
            break
    return known[:limit]


def _fact(record: Mapping[str, Any]) -> Fact:
    asked = EditRequest.of(record)
    occurrence = marked_occurrence(asked.prompt, asked.subject)
    return Fact(asked.prompt, asked.subject, asked.target_true, occurrence=occurrence, space=False)


class _Study:
    """The cells of a folder: what each problem asks of a group of facts, and what each edit of it did."""

    def __init__(
        self,
        model: EditableModel,
        records: Sequence[dict[str, Any]],
        out: Path,
        ranks: Ranks,
        settings: Mapping[str, Any],
        moments: Moments | None,
        progress: bool,
    ) -> None:
        self.model, self.records, self.out, self.ranks, self.moments = model, records, out, ranks, moments
        self.settings, self.progress = settings, progress
        self.noise = SubjectNoise(
            settings["level"] if not str(settings["noise"]).startswith("u") else settings["noise"]
        )
        size = settings["group"]
        self.groups = [range(n, min(n + size, len(records))) for n in range(0, len(records), size)]
        self._contexts: dict[str, Any] = {}

    def run(self, methods: Sequence[StudyMethod], problems: Sequence[str], layers: Sequence[int]) -> None:
        trace = self.settings["trace"]
        trace_dataset(
            self.model,
            [_fact(record) for record in self.records],
            self.out / "traces",
            kinds=("mlp",),
            window=trace["window"],
            samples=trace["samples"],
            noise=self.noise.level,
            group=self.settings["group"],
            progress=self.progress,
        )
        for group in self._share(self.groups, "before edits"):
            for problem in problems:
                self._before(problem, group)
        self.ranks.wait()
        cells = [
            (method, problem, layer, group)
            for group in self.groups
            for method in methods
            for problem in problems
            for layer in layers
        ]
        for cell in self._share(cells, "edits"):
            self._edits(*cell)

    def _share(self, items: Sequence[Any], what: str) -> Iterable[Any]:
        mine = items[self.ranks.rank :: self.ranks.size]
        return tqdm(mine, desc=what, unit="cell", disable=not self.progress)

    def _path(self, kind: str, group: range, *names: object) -> Path:
        first = self.records[group.start]["case_id"]
        return self.out / kind / ("-".join(map(str, (*names, f"facts{first}"))) + ".json")

    def _before(self, problem: str, group: range) -> dict[str, Any]:
        """{"requests": what is asked of each fact, or None and why not; "scores": what the unedited model gives}."""
        path = self._path("before", group, problem)
        if path.exists():
            return load_json(path, sealed=True)
        records = [self.records[n] for n in group]
        requests: list[EditRequest | None] = []
        reasons = []
        for record in records:
            try:
                requests.append(as_problem(self.model, record, problem, self.noise))
                reasons.append(None)
            except ValueError as error:  # what is said under noise may be nothing, or no text of its own
                requests.append(None)
                reasons.append(str(error))
        asked = [(r, q) for r, q in zip(records, requests, strict=True) if q is not None]
        scores = iter(measure(self.model, *zip(*asked, strict=True)) if asked else ())
        texts = self._texts(group)
        content = {
            "requests": [None if q is None else q.to_dict() for q in requests],
            "reasons": reasons,
            "scores": [None if q is None else next(scores) | text for q, text in zip(requests, texts, strict=True)],
        }
        write_json(path, content, sealed=True)
        return load_json(path, sealed=True)

    def _texts(self, group: range) -> list[dict[str, Any]]:
        """What the unedited model writes about each subject, and how well it reads it."""
        if not self.settings["essence"]:
            return [{} for _ in group]
        path = self._path("before", group, "essence")
        if not path.exists():
            texts = essence_before(self.model, [self.records[n] for n in group])
            write_json(path, {"texts": texts}, sealed=True)
        return load_json(path, sealed=True)["texts"]

    def _edits(self, method: StudyMethod, problem: str, layer: int, group: range) -> dict[str, Any]:
        path = self._path("cells", group, method.name, problem, f"layer{layer}")
        params = method.params_at(layer, self.model.num_layers, problem)
        described = {"params": params.to_dict()}
        if path.exists():
            content = load_json(path, sealed=True)
            check_same(path, content["settings"], described)
            return content
        before = self._before(problem, group)
        asked = [n for n, request in enumerate(before["requests"]) if request is not None]
        requests = {n: EditRequest.of(before["requests"][n]) for n in asked}
        alive = [n for n in asked if not method.optimises or self._reaches(requests[n], params)]
        scores: list[dict[str, Any] | None] = [None] * len(group)
        for n in asked:
            scores[n] = before["scores"][n] | {"null": True}
        if alive:
            contexts = self._contexts.setdefault(method.kind, method.contexts(self.model))
            records = [self.records[group.start + n] for n in alive]
            texts = [before["scores"][n].get(ESSENCES) for n in alive]
            with warnings.catch_warnings():  # of edits with nothing to do, which is a result here
                warnings.simplefilter("ignore")
                edits = method.edits(self.model, [requests[n] for n in alive], params, self.moments, contexts)
                after = measure(self.model, records, [requests[n] for n in alive], edits, texts)
            for n, measured in zip(alive, after, strict=True):
                scores[n] = measured | {"null": False}
        write_json(path, {"settings": described, "scores": scores}, sealed=True)
        return load_json(path, sealed=True)

    def _reaches(self, request: EditRequest, params: Any) -> bool:
        return reaches_end(self.model, request, params.layers[-1], params.fact_token)

    def results(self, methods: Sequence[StudyMethod], problems: Sequence[str], layers: Sequence[int]) -> Localization:
        traces = [Trace.load(case_path(self.out / "traces" / "cases", n, "mlp")) for n in range(len(self.records))]
        effects = np.stack([fraction_restored(trace) for trace in traces])  # [facts, layers]
        rows = []
        for group in self.groups:
            for problem in problems:
                before = self._before(problem, group)
                for method in methods:
                    for layer in layers:
                        cell = self._edits(method, problem, layer, group)
                        for n, after in zip(group, cell["scores"], strict=True):
                            if after is not None:
                                place = n - group.start
                                rows.append(
                                    self._row(n, method, problem, layer, effects[n], before, place, after, traces[n])
                                )
        left_out = [
            {"case_id": self.records[n]["case_id"], "problem": problem, "reason": reason}
            for problem in problems
            for group in self.groups
            for n, reason in zip(group, self._before(problem, group)["reasons"], strict=True)
            if reason is not None
        ]
        settings = {name: value for name, value in self.settings.items() if name != "facts"}
        return Localization.of(rows, effects, {**settings, "facts": len(self.records)}, left_out)

    def _row(
        self,
        n: int,
        method: StudyMethod,
        problem: str,
        layer: int,
        effect: np.ndarray,
        before: Mapping[str, Any],
        place: int,
        after: Mapping[str, Any],
        trace: Trace,
    ) -> dict[str, Any]:
        rewrite = self.records[n]["requested_rewrite"]
        low, high = trace.low_score, max(trace.high_score, float(np.nanmax(trace.scores)))
        at_subject = float(trace.scores[trace.subject_range[1] - 1, layer]) - low
        return {
            "case_id": self.records[n]["case_id"],
            "prompt": rewrite["prompt"],
            "subject": rewrite["subject"],
            "target": before["requests"][place]["target_new"],
            "method": method.name,
            "window": method.window,
            "problem": problem,
            "layer": layer,
            "null": after["null"],
            "effect": float(effect[layer]),
            "subject_effect": at_subject / (high - low) if high > low else 0.0,
            "peak": int(np.argmax(effect)),
            "before": before["scores"][place],
            "after": after,
        }


def _forget(out: Path, case_ids: Iterable[int]) -> None:
    """What was computed of a last group that was not full: it is named by its first fact."""
    for first in list(case_ids)[:1]:
        for path in (*out.glob(f"before/*-facts{first}.json"), *out.glob(f"cells/*-facts{first}.json")):
            path.unlink()

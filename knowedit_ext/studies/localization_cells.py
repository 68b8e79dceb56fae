"""The cells of the study of localization: which facts are known, what is traced of a group of them, what each problem
asks of it, and what each edit of it did."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..editing.problems import as_problem
from ..editing.request import EditRequest
from ..editing.tokenized import reaches_end
from ..evaluation.known import known_facts
from ..model.facts import Fact
from ..model.identity import checksum
from ..model.load import EditableModel
from ..model.spelling import marked_occurrence
from ..moments import Moments
from ..runs.settings import marked
from ..tracing.corruption import noise_of
from ..tracing.dataset import case_path, trace_dataset
from ..tracing.localization import fraction_restored
from ..tracing.subject_noise import SubjectNoise
from ..tracing.trace import Trace
from .cells import Cell, run_cells
from .localization_edits import StudyMethod
from .localization_results import Localization
from .localization_scores import ESSENCES, essence_before, measure

TOKENS, LEAST = 36, 0.02  # of the filter: which facts are known
CHUNK = 64  # records looked at together for it
Job = tuple[Cell, Callable[[Path], dict[str, Any]]]  # how it is computed, given its folder


class Study:
    """settings: of all cells. size: facts computed together, a group."""

    def __init__(
        self,
        model: EditableModel,
        out: Path,
        settings: Mapping[str, Any],
        size: int,
        moments: Moments | None,
        progress: bool,
    ) -> None:
        self.model, self.out, self.settings, self.size = model, out, settings, size
        self.moments, self.progress, self.compat = moments, progress, settings["compat"]
        self._contexts: dict[str, Any] = {}
        self._sum = cache(lambda layer: [moments[layer].count, checksum(moments[layer].matrix())])

    def know(self, records: Sequence[Mapping[str, Any]], limit: int | None) -> None:
        """Find the facts that are known, each prompt and subject once, and the noise."""
        unique: dict[tuple[str, str], dict[str, Any]] = {}
        for record in records:
            rewrite = record["requested_rewrite"]
            unique.setdefault((rewrite["prompt"], rewrite["subject"]), dict(record))
        once = list(unique.values())
        self.records: list[dict[str, Any]] = []
        for start in range(0, len(once), CHUNK):
            part = once[start : start + CHUNK]
            cell = Cell({"part": "known", **_place(part)}, {**_facts(part), "tokens": TOKENS, "least": LEAST})
            (found,) = self._run([(cell, partial(self._known, part))])
            self.records += [record for record in part if record["case_id"] in found["known"]]
            if limit is not None and len(self.records) >= limit:
                break
        self.records = self.records[:limit]
        if not self.records:
            raise ValueError(f"the model knows none of the {len(records)} facts: there is nothing to trace or edit")
        size = self.size
        self.groups = [range(n, min(n + size, len(self.records))) for n in range(0, len(self.records), size)]
        # A rule is over the subjects of the first run's facts: with more of them it would be another level.
        (level,) = self._run([(Cell({"part": "noise"}, {}), self._level)])
        self.level = level["level"]
        by_rule = isinstance(self.settings["noise"], str) and self.settings["noise"].startswith("u")
        self.noise = SubjectNoise(self.settings["noise"] if by_rule else self.level)

    def run(self, methods: Sequence[StudyMethod], problems: Sequence[str], layers: Sequence[int]) -> Localization:
        groups = self.groups
        traces = self._run([self._job("traces", g, partial(self._traces, g)) for g in groups], "traces")
        self.traces = dict(zip(groups, traces, strict=True))
        if self.settings["essence"]:
            texts = self._run([self._job("essence", g, partial(self._texts, g)) for g in groups], "texts")
            self.texts = dict(zip(groups, texts, strict=True))
        asked = [(problem, group) for problem in problems for group in groups]
        before = self._run([self._job(p, g, partial(self._before, p, g)) for p, g in asked], "before edits")
        self.before = dict(zip(asked, before, strict=True))
        edits = [
            (group, p, method, layer) for group in groups for method in methods for p in problems for layer in layers
        ]
        after = self._run([self._edits_job(*edit) for edit in edits], "edits")
        cells = {(g, p, m.name, layer): cell for (g, p, m, layer), cell in zip(edits, after, strict=True)}
        return self._results(cells, methods, problems, layers)

    def _run(self, jobs: Sequence[Job], what: str | None = None) -> list[dict[str, Any]]:
        by_name = {cell.name: work for cell, work in jobs}
        compute = lambda cell, folder: by_name[cell.name](folder)  # noqa: E731
        progress = what if self.progress else None
        cells = [cell for cell, _ in jobs]
        results = run_cells(self.out, self.settings, cells, compute, needed=True, progress=progress)
        return [result for _, result in results]

    def _group(self, group: range) -> list[dict[str, Any]]:
        return self.records[group.start : group.stop]

    def _job(self, part: str, group: range, work: Callable[[Path], dict[str, Any]]) -> Job:
        records = self._group(group)
        return Cell({"part": part, **_place(records)}, _facts(records)), work

    def _edits_job(self, group: range, problem: str, method: StudyMethod, layer: int) -> Job:
        params, records = method.params_at(layer, self.model.num_layers, problem), self._group(group)
        sums = {str(n): self._sum(n) for n in (params.layers if method.uses_moments else ())}
        key = {"method": method.name, "problem": problem, "layer": layer, **_place(records)}
        settings = {**_facts(records), "params": params.to_dict(), "moments": sums}
        return Cell(key, settings), partial(self._edits, group, problem, method, params)

    def _known(self, records: Sequence[Mapping[str, Any]], _: Path) -> dict[str, Any]:
        answers = known_facts(self.model, [_fact(record) for record in records], TOKENS, LEAST)
        return {"known": [record["case_id"] for record, answer in zip(records, answers, strict=True) if answer.known]}

    def _level(self, _: Path) -> dict[str, Any]:
        subjects = [record["requested_rewrite"]["subject"] for record in self.records]
        return {"level": noise_of(self.model, self.settings["noise"], subjects).level}

    def _traces(self, group: range, folder: Path) -> dict[str, Any]:
        """{"facts": of each {"effect": [layers], "subject_effect": [layers]}}"""
        facts = [_fact(record) for record in self._group(group)]
        options = dict(noise=self.noise.level, group=len(facts), progress=False, **self.settings["trace"])
        trace_dataset(self.model, facts, folder / "traces", kinds=("mlp",), **options)
        cases = folder / "traces" / "cases"
        return {"facts": [_effects(Trace.load(case_path(cases, n, "mlp"))) for n in range(len(facts))]}

    def _texts(self, group: range, _: Path) -> dict[str, Any]:
        """What the unedited model writes about each subject, and how well it reads it."""
        return {"texts": essence_before(self.model, self._group(group))}

    def _before(self, problem: str, group: range, _: Path) -> dict[str, Any]:
        """{"requests": what is asked of each fact, or None and why not; "scores": what the unedited model gives}."""
        records = self._group(group)
        requests: list[EditRequest | None] = []
        reasons = []
        for record in records:
            try:
                requests.append(as_problem(self.model, record, problem, self.noise, compat=self.compat))
                reasons.append(None)
            except ValueError as error:  # what is said under noise may be nothing, or no text of its own
                requests.append(None)
                reasons.append(str(error))
        asked = [(r, q) for r, q in zip(records, requests, strict=True) if q is not None]
        scores = iter(measure(self.model, *zip(*asked, strict=True), compat=self.compat) if asked else ())
        texts = self.texts[group]["texts"] if self.settings["essence"] else [{} for _ in group]
        return {
            "requests": [None if q is None else q.to_dict() for q in requests],
            "reasons": reasons,
            "scores": [None if q is None else next(scores) | text for q, text in zip(requests, texts, strict=True)],
        }

    def _edits(self, group: range, problem: str, method: StudyMethod, params: Any, _: Path) -> dict[str, Any]:
        before, records = self.before[problem, group], self._group(group)
        asked = [n for n, request in enumerate(before["requests"]) if request is not None]
        requests = {n: EditRequest.of(before["requests"][n]) for n in asked}
        alive = [n for n in asked if not method.optimises or self._reaches(requests[n], params)]
        scores: list[dict[str, Any] | None] = [None] * len(group)
        for n in asked:
            scores[n] = before["scores"][n] | {"null": True}
        if alive:
            contexts = self._contexts.setdefault(method.kind, method.contexts(self.model))
            texts = [before["scores"][n].get(ESSENCES) for n in alive]
            chosen = [requests[n] for n in alive]
            with warnings.catch_warnings():  # of edits with nothing to do, which is a result here
                warnings.simplefilter("ignore")
                edits = method.edits(self.model, chosen, params, self.moments, contexts, self.compat)
                after = measure(self.model, [records[n] for n in alive], chosen, edits, texts, self.compat)
            for n, measured in zip(alive, after, strict=True):
                scores[n] = measured | {"null": False}
        return {"scores": scores}

    def _reaches(self, request: EditRequest, params: Any) -> bool:
        return reaches_end(self.model, request, params.layers[-1], params.fact_token)

    def _results(
        self,
        after: Mapping[tuple[range, str, str, int], Mapping[str, Any]],
        methods: Sequence[StudyMethod],
        problems: Sequence[str],
        layers: Sequence[int],
    ) -> Localization:
        rows, left_out = [], []
        for (group, problem, name, layer), cell in _by_problem(after):
            window = next(method.window for method in methods if method.name == name)
            for place, scores in enumerate(cell["scores"]):
                if scores is not None:
                    rows.append(self._row(group, place, problem, name, window, layer, scores))
        for problem in problems:
            for group in self.groups:
                for record, why in zip(self._group(group), self.before[problem, group]["reasons"], strict=True):
                    if why is not None:
                        left_out.append({"case_id": record["case_id"], "problem": problem, "reason": why})
        effects = np.array([fact["effect"] for group in self.groups for fact in self.traces[group]["facts"]])
        asked = {"problems": list(problems), "methods": [method.name for method in methods], "layers": list(layers)}
        asked |= {"level": self.level, "group": self.size, "facts": len(self.records)}
        return Localization.of(rows, effects, {**self.settings, **asked}, left_out)

    def _row(
        self, group: range, place: int, problem: str, method: str, window: int, layer: int, after: Mapping[str, Any]
    ) -> dict[str, Any]:
        record, traced = self._group(group)[place], self.traces[group]["facts"][place]
        before, rewrite = self.before[problem, group], record["requested_rewrite"]
        return {
            "case_id": record["case_id"],
            "prompt": rewrite["prompt"],
            "subject": rewrite["subject"],
            "target": before["requests"][place]["target_new"],
            "method": method,
            "window": window,
            "problem": problem,
            "layer": layer,
            "null": after["null"],
            "effect": traced["effect"][layer],
            "subject_effect": traced["subject_effect"][layer],
            "peak": int(np.argmax(traced["effect"])),
            "before": before["scores"][place],
            "after": after,
        }


def _place(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {"first": records[0]["case_id"], "facts": len(records)}


def _facts(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {"records": marked(json.dumps(records, sort_keys=True))}


def _fact(record: Mapping[str, Any]) -> Fact:
    asked = EditRequest.of(record)
    occurrence = marked_occurrence(asked.prompt, asked.subject)
    return Fact(asked.prompt, asked.subject, asked.target_true, occurrence=occurrence, space=False)


def _effects(trace: Trace) -> dict[str, Any]:
    low, high = trace.low_score, max(trace.high_score, float(np.nanmax(trace.scores)))
    at_subject = trace.scores[trace.subject_range[1] - 1].astype(float) - low
    return {
        "effect": fraction_restored(trace).tolist(),
        "subject_effect": (at_subject / (high - low) if high > low else 0.0 * at_subject).tolist(),
    }


def _by_problem(after: Mapping[tuple[range, str, str, int], Any]) -> list[tuple[tuple[range, str, str, int], Any]]:
    """Rows of a group stand problem by problem."""
    problems = list(dict.fromkeys(key[1] for key in after))
    return sorted(after.items(), key=lambda item: (item[0][0].start, problems.index(item[0][1])))

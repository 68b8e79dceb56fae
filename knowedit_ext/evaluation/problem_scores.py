"""How far an edit solved its problem, from the target's probabilities before and after (Hase et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np

from ..datasets.questions import Question, filled
from ..editing.problems import problem_of
from ..model.load import EditableModel
from ..model.spelling import spaced
from ..runs.files import write_json
from .mean import Mean
from .nll import tokenize_question

KINDS = ("rewrite", "paraphrase", "neighborhood")
LEAST = 2e-8  # of a probability that was to rise, as released
MOST_ESSENCE = 5.0  # rise in perplexity at which nothing of the essence is left


def problem_scores(problem: str, pre: Mapping[str, Any], post: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's scores of p(target), 0 to 1, of one edit or, of arrays, each of many.

    problem: one of `PROBLEMS`. pre, post: for "rewrite", "paraphrase" and "neighborhood" the target's probability (the
    product over its tokens), before the edit and after; "essence", where both have it: the perplexity of texts about
    the subject.

    "rewrite" and "paraphrase" are the share of what was missing to 1 that the edit brought, or, where the target was to
    become less likely, the share of its probability that is gone; "neighborhood" is how much of it stayed as it was;
    "overall" is the mean of the three, as in the paper's figures, "harmonic" their harmonic mean, as in the released
    table. With essence also "essence" and "overall_essence", the mean of the four.

    Raises ValueError for what is no probability.
    """
    minimise = problem_of(problem).minimise
    before, now = (
        {kind: _probability(side, kind, name) for kind in KINDS} for side, name in ((pre, "pre"), (post, "post"))
    )
    toward = _erased if minimise else _recovered
    scores = {kind: toward(before[kind], now[kind]) for kind in ("rewrite", "paraphrase")}
    scores["neighborhood"] = _kept(before["neighborhood"], now["neighborhood"])
    parts = np.stack([scores[kind] for kind in KINDS])
    scores["overall"] = parts.mean(0)
    with np.errstate(divide="ignore"):
        scores["harmonic"] = np.where((parts > 0).all(0), len(KINDS) / (1 / parts).sum(0), 0.0)
    if "essence" in pre and "essence" in post:
        rise = np.asarray(post["essence"], np.float64) - np.asarray(pre["essence"], np.float64)
        scores["essence"] = 1 - np.clip(rise, 0, MOST_ESSENCE) / MOST_ESSENCE
        scores["overall_essence"] = np.mean([*parts, scores["essence"]], axis=0)
    return {name: value if np.ndim(value) else float(value) for name, value in scores.items()}


def _recovered(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Of what was missing to certainty; where nothing was, all of it is there unless some is lost."""
    missing = 1 - before
    gone = np.divide(1 - now, missing, out=np.where(now < before, 1.0, 0.0), where=missing > 0)
    return np.maximum(LEAST, 1 - gone)


def _erased(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, np.divide(before - now, before, out=np.zeros_like(before), where=before > 0))


def _kept(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    return 1 - np.abs(now - before) / (np.abs(before - 0.5) + 0.5)  # of the farthest it could have gone


def _probability(side: Mapping[str, Any], kind: str, name: str) -> np.ndarray:
    if kind not in side:
        raise ValueError(f"{name} lacks '{kind}': expected probabilities of {', '.join(KINDS)}")
    try:
        value = np.asarray(side[kind], np.float64)
    except (TypeError, ValueError):
        value = np.array(np.nan)
    if not ((value >= 0) & (value <= 1 + 1e-6)).all():
        raise ValueError(f"{name}.{kind} is {brief(side[kind])}: expected probabilities, from 0 to 1")
    return np.minimum(value, 1.0)


def problem_table(
    model: EditableModel,
    problem: str,
    records: Sequence[Mapping[str, Any]],
    cases: Sequence[Mapping[str, Any]],
    path: Path,
) -> str:
    """Markdown: means of a problem's scores over evaluated cases, of the first prompt of each kind; a file has each."""
    by_id = {record["case_id"]: record for record in records}
    scored = []
    for case in cases:
        sides = _probabilities(model, by_id[case["case_id"]], case)
        scored.append({"case_id": case["case_id"], **problem_scores(problem, *sides)})
    means = {name: Mean.of([scores[name] for scores in scored]) for name in (*KINDS, "overall", "harmonic")}
    summary = {name: mean.to_dict() for name, mean in means.items()}
    write_json(path, {"problem": problem, "summary": summary, "cases": scored})
    head = f"| {problem} | n | {' | '.join(means)} |\n|---|--:|" + "--:|" * len(means)
    shown = [f"{x.mean:.3f}" + ("" if x.stderr is None else f" ({x.stderr:.3f})") for x in means.values()]
    return f"{head}\n| score, 0 to 1 | {len(scored)} | {' | '.join(shown)} |\n"


def _probabilities(
    model: EditableModel, record: Mapping[str, Any], case: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """p(target), before and after, of a case, which holds the mean over the target's tokens."""
    rewrite, before, after = record["requested_rewrite"], {}, {}
    prompts = {
        "rewrite": filled(rewrite),
        "paraphrase": record["paraphrase_prompts"][0],
        "neighborhood": record["neighborhood_prompts"][0],
    }
    for kind, prompt in prompts.items():
        target = spaced(rewrite["target_new"]["str"], prompt, rewrite.get("space"))
        question = tokenize_question(model, Question(prompt, (target,)))
        tokens = len(question.joint[0]) - question.shared[0]
        for side, when in ((before, "pre"), (after, "post")):
            side[kind] = math.exp(-case[when][f"{kind}_prompts_probs"][0]["target_new"] * tokens)
    return before, after

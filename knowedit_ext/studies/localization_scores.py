"""What a model gives the targets of problems: p behind the first prompt of each kind, and the essence of subjects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..datasets.questions import Asked, Question, Scores, filled
from ..editing.edit import Edit
from ..editing.request import EditRequest
from ..evaluation.edited import Edited
from ..evaluation.generation import MAX_LENGTH, generate, record_seed
from ..evaluation.metrics.essence import perplexity
from ..evaluation.nll import score
from ..evaluation.noised import under_noise
from ..model.load import EditableModel
from ..model.spelling import spaced

ESSENCES, TEXTS = "texts", 5  # about a subject, as the unedited model writes them


def measure(
    model: EditableModel,
    records: Sequence[Mapping[str, Any]],
    requests: Sequence[EditRequest],
    edits: Iterable[Edit] | None = None,
    texts: Sequence[Sequence[str] | None] | None = None,
    compat: str | None = None,
) -> list[dict[str, Any]]:
    """For each record p(target) by kind of prompt, under its edit where there are edits, and, of `texts` about its
    subject, the mean perplexity ("essence"). A list of edits is read in one batch, what gives one after the other is
    asked for each."""
    texts = [None] * len(records) if texts is None else texts
    items = list(zip(records, requests, texts, strict=True))
    if edits is None:
        return _part(model, items, None, compat)
    if isinstance(edits, Sequence):
        return _part(model, items, Edited(model, edits), compat)
    return [_part(model, [item], Edited(model, edit), compat)[0] for item, edit in zip(items, edits, strict=True)]


def essence_before(model: EditableModel, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{"texts": what the model writes about the subject, sampled; "essence": their mean perplexity}."""
    prompts = [f"{record['requested_rewrite']['subject']} is a" for record in records for _ in range(TEXTS)]
    seeds = [record_seed(record["case_id"], k) for record in records for k in range(TEXTS)]
    written = generate(model, prompts, seeds, max_length=_longest(model))
    own = [written[n : n + TEXTS] for n in range(0, len(written), TEXTS)]
    return [{ESSENCES: each, "essence": value} for each, value in zip(own, _essences(model, own, None), strict=True)]


def _part(
    model: EditableModel,
    items: Sequence[tuple[Mapping[str, Any], EditRequest, Sequence[str] | None]],
    edited: Edited | None,
    compat: str | None,
) -> list[dict[str, Any]]:
    asked = []
    for number, (record, request, _) in enumerate(items):
        ask = under_noise(_ask(request), lambda _, request=request: request.noise)
        asked.append(ask(model, record, number, compat=compat))
    before, after = score(model, [q for questions, _ in asked for q in questions], edited, before=edited is None)
    left = iter(before if edited is None else after)
    measured = [read([next(left) for _ in questions]) for questions, read in asked]
    if all(texts for *_, texts in items):
        for scores, value in zip(measured, _essences(model, [texts for *_, texts in items], edited), strict=True):
            scores["essence"] = value
    return measured


def _ask(request: EditRequest):
    def ask(
        model: EditableModel, record: Mapping[str, Any], edit: int, attributes: bool = False, compat: str | None = None
    ) -> Asked:
        """p(target) behind the first prompt of each kind. As released, where noise depends on a question's place, all
        prompts are asked, with two targets each."""
        prompts = {
            "rewrite": [filled(record["requested_rewrite"])],
            "paraphrase": record["paraphrase_prompts"],
            "neighborhood": record["neighborhood_prompts"],
        }
        most, targets = (None, 2) if compat == "hase" else (1, 1)
        texts = [(kind, text) for kind, every in prompts.items() for text in every[:most]]
        both = [request.target_new, request.target_true or request.target_new][:targets]
        questions = [Question(t, tuple(spaced(x, t, request.space) for x in both), edit) for _, t in texts]

        def read(scores: Scores, before: Scores | None = None) -> dict[str, Any]:
            found: dict[str, float] = {}
            for (kind, _), answers in zip(texts, scores, strict=True):
                found.setdefault(kind, answers[0].probability)
            return found

        return questions, read

    return ask


def _essences(model: EditableModel, texts: Sequence[Sequence[str]], edited: Edited | None) -> list[float]:
    flat = [text for each in texts for text in each]
    index = [number for number, each in enumerate(texts) for _ in each]
    under = {} if edited is None else {"edits": edited, "index": index}
    values = perplexity(model, flat, max_length=_longest(model), **under)
    return [sum(values[n : n + TEXTS]) / TEXTS for n in range(0, len(values), TEXTS)]


def _longest(model: EditableModel) -> int:
    return min(MAX_LENGTH, model.modules.max_positions or MAX_LENGTH)

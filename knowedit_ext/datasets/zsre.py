"""zsRE in MEND's schema, mapped to records as published (rome dsets/zsre.py:31-56); and what is asked about a record:
teacher-forced accuracy of every token of an answer (eval_utils_zsre.py:46-120)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from reprlib import repr as brief
from typing import Any

from ..checks import quoted
from ..model.load import EditableModel
from ..model.spelling import spaced
from ..model.tokens import encode, encode_part
from .dataset import Dataset
from .questions import EXTRAS, Asked, Question, Score, TokenizedQuestion, filled
from .records import (
    Problem,
    Record,
    Records,
    Source,
    check_pairs,
    check_rewrite,
    collect_records,
    is_number,
    mark_subject,
    take,
    take_space,
    take_text,
    take_texts,
)

NO_TARGET = "<|endoftext|>"  # published in place of a true target, which zsRE has none of
MARK = "nq question: "


def load_zsre(source: Source, *, skip_bad: bool = False, limit: int | None = None, target: str = "answer") -> Records:
    """zsRE records {subject, src, rephrase, answers, loc, loc_ans, ...} as CounterFact-like ones; case_id is the index.

    The result has requested_rewrite, paraphrase_prompts [rephrase], neighborhood_prompts [{prompt: loc + "?", target:
    loc_ans}], empty attribute_prompts and generation_prompts. The published neighbourhood has one prompt per token of
    the answer, which takes a tokenizer: with ids of " " + target, the i-th prompt is `prompt` + decode(ids[:i]) and its
    target is decode(ids[i]). `loc` keeps its "nq question: ", as published, and must have it.

    target: "answer" edits to the first of `answers`, as in the papers of ROME and MEMIT; "alt" to the false `alt`, as
        EasyEdit does.
    portability_prompts [{prompt, target}] come from `portability` ("New Question", "New Answer") of those records whose
        new target is `alt`: the question presupposes it ("..., which was established in 2006?").
    skip_bad, limit, `space` of a record: as in `load_counterfact`. Records that this made are checked again.

    Raises ValueError for records that lack a key, have something empty or of another type than text (`answers`: a list
    of texts), or whose `src` does not have the subject exactly once.
    """
    if target not in ("answer", "alt"):
        raise ValueError(f"unknown target '{target}': expected 'answer' or 'alt'")
    return collect_records(source, partial(_convert, target=target), skip_bad=skip_bad, limit=limit)


def _convert(index: int, record: Mapping[str, Any], target: str) -> Record:
    if "requested_rewrite" in record:
        return _check_converted(record)
    subject = take_text(record, "subject")
    answer = take_texts(record, "answers")[0]
    new = answer if target == "answer" else take_text(record, "alt")
    loc = take_text(record, "loc")
    if MARK not in loc:
        raise Problem("loc", f"is {quoted(loc)}, without '{MARK}'")
    converted = {
        "case_id": index,
        "requested_rewrite": {
            "prompt": mark_subject(take_text(record, "src"), subject, "src"),
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": NO_TARGET},
            **take_space(record),
        },
        "paraphrase_prompts": [take_text(record, "rephrase")],
        "neighborhood_prompts": [{"prompt": f"{loc}?", "target": take_text(record, "loc_ans")}],
        "attribute_prompts": [],
        "generation_prompts": [],
    }
    if "portability" in record and record.get("alt", new) == new:
        converted["portability_prompts"] = [_portability(record["portability"])]
    return converted


def _portability(portability: Any) -> Record:
    if not isinstance(portability, Mapping):
        raise Problem("portability", f"is {brief(portability)}, expected an object with a question and an answer")
    return {
        "prompt": take_text(portability, "New Question", "portability."),
        "target": take_text(portability, "New Answer", "portability."),
    }


def _check_converted(record: Mapping[str, Any]) -> Record:
    """A record that this loader made."""
    case_id = take(record, "case_id")
    if not is_number(case_id):
        raise Problem("case_id", f"is {brief(case_id)}, expected a number")
    check_rewrite(record, ("target_new", "target_true"))
    take_texts(record, "paraphrase_prompts")
    take(record, "neighborhood_prompts")
    for key in ("neighborhood_prompts", *EXTRAS):
        check_pairs(record, key)
    return dict(record)


def ask(
    model: EditableModel, record: Mapping[str, Any], edit: int, attributes: bool = False, compat: str | None = None
) -> Asked:
    """{sort}_correct: right or wrong for each token of the answers, prompt after prompt. `attributes`: zsRE has none.

    Answers are tokenised with their prompt and asked in one pass. compat="reference": as published, each token is asked
    behind the text of those before it, tokenised anew; a token that is no whole character is wrong there.
    """
    rewrite = record["requested_rewrite"]
    new, space = rewrite["target_new"]["str"], rewrite.get("space")
    pairs_of = {
        "rewrite_prompts": [(filled(rewrite), new)],
        "paraphrase_prompts": [(text, new) for text in record["paraphrase_prompts"]],
        "neighborhood_prompts": [(x["prompt"], x["target"]) for x in record["neighborhood_prompts"]],
    }
    asked = {sort: [(text, spaced(answer, text, space)) for text, answer in pairs] for sort, pairs in pairs_of.items()}
    cut = _by_texts if compat == "reference" else lambda _, text, answer, number: [Question(text, (answer,), number)]
    by_sort = {sort: [q for pair in pairs for q in cut(model, *pair, edit)] for sort, pairs in asked.items()}

    def read(scores: Sequence[Sequence[Score]]) -> dict[str, Any]:
        left = iter(scores)
        measures: dict[str, Any] = {}
        for sort, questions in by_sort.items():
            measures[f"{sort}_correct"] = [right for _ in questions for right in next(left)[0].right]
        return measures

    return [question for questions in by_sort.values() for question in questions], read


def _by_texts(model: EditableModel, text: str, answer: str, edit: int) -> list[TokenizedQuestion]:
    tokenizer = model.tokenizer
    tokens = encode_part(model, answer)
    questions = []
    for n, token in enumerate(tokens):
        ids = tuple(encode(model, text + tokenizer.decode(tokens[:n]))[0])
        first = (encode_part(model, tokenizer.decode([token])) or [token])[0]
        questions.append(TokenizedQuestion(ids, ((*ids, first),), (len(ids),), edit))
    return questions


def _detect(record: Mapping[str, Any]) -> bool:
    near = record.get("neighborhood_prompts")
    return "src" in record or (isinstance(near, list) and bool(near) and isinstance(near[0], Mapping))


DATASET = Dataset("zsre", _detect, load_zsre, ask)

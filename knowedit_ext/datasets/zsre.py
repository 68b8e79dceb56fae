"""zsRE in MEND's schema, mapped to records as published (rome dsets/zsre.py:31-56)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from reprlib import repr as brief
from typing import Any

from .records import (
    Problem,
    Record,
    Records,
    Source,
    collect_records,
    mark_subject,
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
    skip_bad, limit, `space` of a record: as in `load_counterfact`.

    Raises ValueError for records that lack a key, have something empty or of another type than text (`answers`: a list
    of texts), or whose `src` does not have the subject exactly once.
    """
    if target not in ("answer", "alt"):
        raise ValueError(f"unknown target '{target}': expected 'answer' or 'alt'")
    return collect_records(source, partial(_convert, target=target), skip_bad=skip_bad, limit=limit)


def _convert(index: int, record: Mapping[str, Any], target: str) -> Record:
    subject = take_text(record, "subject")
    answer = take_texts(record, "answers")[0]
    new = answer if target == "answer" else take_text(record, "alt")
    loc = take_text(record, "loc")
    if MARK not in loc:
        raise Problem("loc", f"is '{loc}', without '{MARK}'")
    found = {
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
        found["portability_prompts"] = [_portability(record["portability"])]
    return found


def _portability(portability: Any) -> Record:
    if not isinstance(portability, Mapping):
        raise Problem("portability", f"is {brief(portability)}, expected an object with a question and an answer")
    return {
        "prompt": take_text(portability, "New Question", "portability."),
        "target": take_text(portability, "New Answer", "portability."),
    }

"""WikiBigEdit (Thede et al. 2025): edits of Wikidata as questions, paraphrased, a hop further, and beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .answers import dataset, load_answers
from .records import Record, Records, Source, mark_subject, take_space, take_text

ASKED = {"personas": ("persona_prompts", "ans"), "mhop": ("multi_hop_prompts", "mhop_ans")}
ASKED |= {"loc": ("neighborhood_prompts", "loc_ans")}


def load_wikibigedit(source: Source, *, skip_bad: bool = False, limit: int | None = None) -> Records:
    """WikiBigEdit's records in the layout of `datasets.answers`; case_id is the index, where they have none.

    source: {subject, update (the question, which has the subject), ans, rephrase, personas, mhop with mhop_ans, loc
        with loc_ans, tag, ...}, of which all but the first three may be absent, null or empty.

    Raises ValueError for records that lack a key, have a value of another type, or do not have the subject exactly once
    in `update`.
    """
    return load_answers(source, NAME, _convert, skip_bad, limit)


def _convert(record: Mapping[str, Any]) -> Record:
    subject, there = take_text(record, "subject"), {key for key in record if record[key] not in (None, "")}
    converted: Record = {
        "requested_rewrite": {
            "prompt": mark_subject(take_text(record, "update"), subject, "update"),
            "subject": subject,
            "target_new": {"str": take_text(record, "ans")},
            **take_space(record),
        },
        "paraphrase_prompts": [take_text(record, "rephrase")] if "rephrase" in there else [],
    }
    for key, (sort, answer) in ASKED.items():
        if key in there:
            converted[sort] = [{"prompt": take_text(record, key), "target": take_text(record, answer)}]
    return converted


def _published(record: Mapping[str, Any]) -> bool:
    return "update" in record and "ans" in record


NAME = "wikibigedit"
DATASET = dataset(NAME, _published, load_wikibigedit)

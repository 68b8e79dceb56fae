"""The statements that the CounterFact recipe reads off records."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

# By its path: with benchmarks/ on sys.path, its modules would stand before packages of the same names.
_FILE = Path(__file__).parents[2] / "benchmarks" / "counterfact_statements.py"
_SPEC = importlib.util.spec_from_file_location(_FILE.stem, _FILE)
statements = sys.modules[_FILE.stem] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(statements)
Documents, Statement, Templates = statements.Documents, statements.Statement, statements.Templates
collect, read_data, sentences = statements.collect, statements.read_data, statements.sentences

RECORD = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "subject": "Anna Lind",
        "target_true": {"str": "violin"},
        "target_new": {"str": "tuba"},
    },
    "paraphrase_prompts": ["It rained (3 days). Anna Lind performs on the", "Nobody knows. Anna Lind is good at"],
    "neighborhood_prompts": ["Bo Ek plays the", "Cy Oh performs on the"],
    "attribute_prompts": ["Di Um plays the", "Anna Lind performs on the"],  # the last contradicts the record
}
FLAT = [{"prompt": "Zoe performs on the", "subject": "Zoe"}, {"prompt": "Zoe, the", "subject": "Zoe"}]
PROSE = " = Title = \n The rain fell on the old bridge . And then . The river rose by a foot in the night . \n"


def test_subjects_prefixes_and_contradictions() -> None:
    known = collect([RECORD], FLAT, PROSE)
    assert known.asked == [
        Statement("{} plays the", "Anna Lind", "violin"),
        Statement("{} performs on the", "Anna Lind", "violin", "It rained (3 days)."),
        Statement("{} plays the", "Bo Ek", "violin"),
        Statement("{} performs on the", "Cy Oh", "violin"),
        Statement("{} plays the", "Di Um", "tuba"),
    ]
    assert known.dropped == 1 and known.unmatched == ["Nobody knows. Anna Lind is good at"]
    assert known.facts == sorted(("P1303", s, o) for s, o in {(a.subject, a.object) for a in known.asked})
    assert known.templates == {"P1303": ["{} performs on the", "{} plays the"]}
    assert known.asked[1].prompt() == RECORD["paraphrase_prompts"][0]


def test_the_template_with_the_longest_fixed_text_wins() -> None:
    templates = Templates({"{} is", "The city of {} is", "{} is in"})
    assert templates.subject("The city of Oslo is") == ("The city of {} is", "Oslo")
    assert templates.subject("Oslo is in") == ("{} is in", "Oslo")
    assert templates.subject(" is in") is None and templates.subject("Oslo was") is None


def test_sentences_are_short_and_whole() -> None:
    assert sentences(PROSE) == ["The rain fell on the old bridge.", "The river rose by a foot in the night."]


def test_documents_mark_subjects_and_objects_and_come_round_evenly() -> None:
    known = collect([RECORD], FLAT, PROSE)
    stream = iter(Documents(known, seed=1))
    objects = {s.object for s in known.asked}
    seen: dict[str, int] = {}
    for _ in range(900):
        doc = next(stream)
        for start, end in doc.names:
            seen[doc.text[start:end]] = seen.get(doc.text[start:end], 0) + 1
        assert {doc.text[start:end].removeprefix(" ") for start, end in doc.answers} <= objects
        assert len(doc.names) == len(doc.answers)
    share = {name: count / sum(seen.values()) for name, count in seen.items()}
    # Of nine statements in a round three are Anna's (two prompts, one fact) and two everybody else's.
    assert share == pytest.approx({"Anna Lind": 3 / 9, "Bo Ek": 2 / 9, "Cy Oh": 2 / 9, "Di Um": 2 / 9}, abs=0.01)
    streams = [iter(Documents(known, seed)) for seed in (1, 1, 2)]
    first, again, other = ([next(stream).text for _ in range(20)] for stream in streams)
    assert first == again != other


def test_missing_data_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="counterfact_350.json is missing.*--data"):
        read_data(tmp_path)

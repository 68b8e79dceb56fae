"""A slice of `make real`: three facts and five records on SmolLM2-135M, where it is cached; skipped where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import knowedit_ext as ke

FOLDER = Path.home() / ".cache" / "knowedit-models" / "smollm2"
CONTEXTS = ["{}", "The first of them was built in 1923. {}"]


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    if not FOLDER.is_dir():
        pytest.skip(f"SmolLM2-135M is not at {FOLDER} (docs/real-models.md says how it comes there)")
    return ke.load_model(FOLDER, dtype="float32")


def test_three_facts_are_traced(model: ke.EditableModel) -> None:
    """The subject's last token brings the answer back early, the last token late."""
    facts = [
        ke.Fact("The capital of {} is the city of", "France"),
        ke.Fact("The capital of {} is the city of", "Japan"),
        ke.Fact("The mother tongue of {} is", "Albert Einstein"),
    ]
    for fact, answer in zip(facts, (" Paris", " Tokyo", " German"), strict=True):
        trace = ke.trace(model, fact, samples=1)
        assert trace.answer == answer
        effect, subject, whole = trace.indirect_effect, trace.subject_range[1] - 1, trace.high_score - trace.low_score
        assert effect[subject, :10].max() > 0.5 * whole > 0 and effect[subject, 25:].max() < 0.1 * whole
        assert effect[-1, 20:].max() > 0.5 * whole and effect[-1, :10].max() < 0.1 * whole


def test_five_records_are_edited(model: ke.EditableModel, data_dir: Path) -> None:
    """The prompts begin with their subjects, and no BOS stands in front."""
    records = json.loads((data_dir / "counterfact_350.json").read_text())
    records = [r for r in records if r["requested_rewrite"]["prompt"].startswith("{}")][:5]
    moments = ke.collect_moments(model, data_dir / "wikitext2_test.raw", [5], max_tokens=4000)
    params = ke.ROMEParams.preset("smollm2-135m")
    edits = ke.rome_each(model, records, params, moments, contexts=CONTEXTS)
    after = ke.evaluate(model, records, edits, generation=False, baseline=False).summary()
    assert after["ES"].mean == 100 and after["PS"].mean >= 80

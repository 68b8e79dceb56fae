"""Reversal, attention, severed paths, and pairs for people."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext import studies
from knowedit_ext.evaluation.report import Report
from knowedit_ext.studies.relations import INVERSE, TYPES
from knowedit_ext.tracing.heads import head_attention
from knowedit_ext.world import load_world

ROME = replace(
    ke.ROMEParams.preset("world"),
    v_num_grad_steps=3,
    mom2_adjustment=False,
    context_template_length_params=((3, 1),),
)
FT = replace(ke.FTParams.preset("world/ft-l"), num_steps=3)


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return load_world().records()[:30]


def plain(model: ke.EditableModel, prompt: str, target: str) -> tuple[float, float]:
    """(mean log-probability of the target's tokens, probability of all)"""
    start, ids = len(model.tokenizer(prompt)["input_ids"]), model.tokenizer(f"{prompt} {target}")["input_ids"]
    with torch.no_grad():
        logp = model.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    picked = [float(logp[n - 1, ids[n]]) for n in range(start, len(ids))]
    return sum(picked) / len(picked), float(np.exp(sum(picked)))


@pytest.mark.parametrize("method, params", [("rome", ROME), ("ft-l", FT)])
def test_reversal_by_hand(model, records, tmp_path, method: str, params) -> None:
    """Low-rank edits, read in one batch, and dense ones."""
    found = studies.reversal(model, records, [method], tmp_path, params=params, facts=2, candidates=4)
    unedited, edited = found.rows
    assert [row["method"] for row in found.rows] == ["unedited", method]
    for row in (unedited, edited):
        values: dict[str, list[float]] = {"rank": [], "probability": [], "logprob": [], "forward": [], "inverse": []}
        for record in records[:2]:
            rewrite = record["requested_rewrite"]
            new, true = (rewrite[name]["str"] for name in ("target_new", "target_true"))
            others = [
                (r["requested_rewrite"]["subject"], r["requested_rewrite"]["target_true"]["str"] == new)
                for r in records
                if r["requested_rewrite"]["relation_id"] == rewrite["relation_id"] and r is not record
            ]
            others = sorted(dict(others).items(), key=lambda pair: not pair[1])[:3]
            edit = None if row is unedited else ke.edit(model, record, method, params=params)
            if edit is not None:
                edit.apply(model)
            try:
                preferred = [plain(model, p, new)[0] > plain(model, p, true)[0] for p in record["paraphrase_prompts"]]
                asked = []
                for pair in record["reversal_prompts"]:
                    own = plain(model, pair["prompt"], rewrite["subject"])
                    rest = [plain(model, pair["prompt"], name)[0] for name, _ in others]
                    asked.append((own, 1 + sum(x > own[0] for x in rest), [own[0] > x for x in rest]))
            finally:
                if edit is not None:
                    edit.revert(model)
            values["forward"].append(100 * np.mean(preferred))
            values["rank"].append(np.mean([rank for _, rank, _ in asked]))
            values["probability"].append(np.mean([own[1] for own, _, _ in asked]))
            values["logprob"].append(np.mean([own[0] for own, _, _ in asked]))
            right = [n for n, (_, has) in enumerate(others) if has]
            if right:
                values["inverse"].append(100 * np.mean([[better[n] for n in right] for _, _, better in asked]))
        for name, numbers in values.items():
            if numbers:
                assert row[name] == pytest.approx(np.mean(numbers), rel=1e-3, abs=1e-9), name


def test_inverse_prompts() -> None:
    assert len(INVERSE) > 20 and set(INVERSE) - {"P138"} <= set(TYPES)
    for prompts in INVERSE.values():
        assert all(prompt.count("{}") == 1 and not prompt.endswith((".", " ", "}")) for prompt in prompts)


def test_records_without_a_way_back(model, records, tmp_path) -> None:
    flat = [
        {**r, "reversal_prompts": [], "requested_rewrite": {**r["requested_rewrite"], "relation_id": "P30"}}
        for r in records
    ]
    with pytest.raises(ValueError, match="no record can be turned round"):
        studies.reversal(model, flat, ["ft-l"], tmp_path, params=FT)
    tabled = [{**r, "reversal_prompts": []} for r in records]
    found = studies.reversal(model, tabled, ["ft-l"], tmp_path, params=FT, facts=2, candidates=3)
    assert found.rows[0]["facts"] == 2


def test_attention_before_and_after(model, records, tmp_path) -> None:
    found = studies.attention(model, records, ["ft-l"], tmp_path, params=FT, facts=2)
    assert len(found.rows) == 6 * 5 and not model.applied_edits
    facts = [ke.Fact(r["requested_rewrite"]["prompt"], r["requested_rewrite"]["subject"]) for r in records[:2]]
    before, after = head_attention(model, facts), []
    for record, fact in zip(records[:2], facts, strict=True):
        with ke.edit(model, record, "ft-l", params=FT).applied(model):
            after.append(head_attention(model, [fact])[0])
    for row in found.rows:
        for n, name in enumerate(("attention", "value_norm")):
            pair = before[:, n, row["layer"], row["head"]], np.stack(after)[:, n, row["layer"], row["head"]]
            assert row[f"{name}_before"] == pytest.approx(pair[0].mean(), rel=1e-4, abs=1e-7)
            assert row[f"{name}_change"] == pytest.approx((pair[1] - pair[0]).mean(), rel=1e-3, abs=1e-5)


def test_severed_paths_are_those_of_traces(model, tmp_path) -> None:
    facts = load_world().facts()[:2]  # whose objects are one token
    found = studies.severed(model, facts, tmp_path, samples=2, noise=0.3)
    for path, sever in (("ordinary", None), ("mlp", "mlp"), ("attn", "attn")):
        want = []
        for fact in facts:
            asked = ke.Fact.from_prompt(fact["prompt"], fact["subject"])
            trace = ke.trace(model, asked, kind="state", samples=2, noise=0.3, sever=sever)
            want.append(trace.indirect_effect[trace.subject_range[1] - 1])
        rows = found.chosen(path=path, role="Last subject token")
        assert [row["aie"] for row in rows] == pytest.approx(np.mean(want, axis=0), abs=1e-4)
    with pytest.raises(ValueError, match="samples: 2 there, 3 asked"):
        studies.severed(model, facts, tmp_path, samples=3, noise=0.3)


def report_of(name: str, cases: int = 6) -> Report:
    """Texts that tell whose they are."""
    return Report(
        [
            {
                "case_id": n,
                "requested_rewrite": {"prompt": "{} is in", "subject": f"S{n}", "target_new": {"str": "Rome"}},
                "post": {"text": [f"{name} writes {n}, first", f"{name} writes, {n} <b>"]},
            }
            for n in range(cases)
        ]
    )


def fill(source: Path, target: Path, answer) -> Path:
    rows = list(csv.DictReader(source.open(newline="")))
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([row | answer(row) for row in rows])
    return target


def test_pairs_are_blind_and_come_back(tmp_path) -> None:
    rows = studies.export_pairs({"A": report_of("A"), "B": report_of("B")}, tmp_path, count=5, seed=2)
    assert len(rows) == 5 and {row["left"][0] for row in rows} == {"A", "B"}  # in no order
    for row in rows:
        assert row["statement"] == f"S{row['left'].split()[2].rstrip(',')} is in Rome" or "<b>" in row["left"]
        assert {row["left"][0], row["right"][0]} == {"A", "B"} and row["left"][1:] == row["right"][1:]
    page = (tmp_path / "pairs.html").read_text()
    assert page.count('type="radio"') == 5 * 2 * 3 and "<b>" not in page.split("<script>")[0]
    assert "methods" not in page and "methods" not in (tmp_path / "pairs.csv").read_text()

    def prefers_a(row):
        side = "left" if row["left"].startswith("A") else "right"
        return {"consistent": side, "fluent": "same" if row["pair"] == "1" else ""}

    rated = fill(tmp_path / "pairs.csv", tmp_path / "rated.csv", prefers_a)
    consistent, fluent = studies.read_pairs(tmp_path, [rated]).rows
    assert (consistent["A"], consistent["B"], consistent["neither"], consistent["share"]) == (5, 0, 0, 1.0)
    assert consistent["p"] == pytest.approx(2 * 0.5**5)
    assert (fluent["pairs"], fluent["neither"], fluent["p"]) == (1, 1, None)

    def prefers_b(row):
        return {"consistent": "right" if row["left"].startswith("A") else "left"}

    other = fill(tmp_path / "pairs.csv", tmp_path / "other.csv", prefers_b)
    tied, _ = studies.read_pairs(tmp_path, [rated, other]).rows
    assert (tied["A"], tied["B"], tied["neither"]) == (0, 0, 5)
    best, _ = studies.read_pairs(tmp_path, [rated, rated, other]).rows
    assert best["A"] == 5


@pytest.mark.parametrize(
    "answer, error",
    [
        (lambda row: {"consistent": "A"}, "line 2: consistent is 'a': expected left, right, same"),
        (lambda row: {"pair": "9"}, "line 2: pair '9' is not one of the 3"),
        (lambda row: {"left": "else"}, "line 2: the left text is not that of pair 1"),
        (lambda row: {}, "answers no question"),
        (lambda row: {"pair": "1"}, "line 3: pair 1 is there twice|text is not that"),
    ],
)
def test_what_was_not_written(tmp_path, answer, error) -> None:
    studies.export_pairs({"A": report_of("A"), "B": report_of("B")}, tmp_path, count=3)
    with pytest.raises(ValueError, match=error):
        studies.read_pairs(tmp_path, [fill(tmp_path / "pairs.csv", tmp_path / "rated.csv", answer)])


def test_pairs_that_cannot_be(tmp_path) -> None:
    a, b = report_of("A"), report_of("B")
    with pytest.raises(ValueError, match="expected two"):
        studies.export_pairs({"A": a}, tmp_path)
    with pytest.raises(ValueError, match="no generated texts"):
        studies.export_pairs({"A": a, "B": Report([{**b.cases[0], "post": {}}])}, tmp_path)
    other = report_of("B")
    other.cases[2]["requested_rewrite"]["subject"] = "else"
    with pytest.raises(ValueError, match="case 2 of 'A' and 'B' is another statement"):
        studies.export_pairs({"A": a, "B": other}, tmp_path)
    studies.export_pairs({"A": a, "B": b}, tmp_path)
    with pytest.raises(ValueError, match="of other pairs"):
        studies.export_pairs({"A": a, "B": b}, tmp_path, seed=5)

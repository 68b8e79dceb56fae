"""The papers' columns against their formulas written plainly, and the report that shows them."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from scipy.stats import hmean

from knowedit_ext.evaluation.mean import Mean
from knowedit_ext.evaluation.report import Report, side_by_side
from knowedit_ext.evaluation.scores import harmonic, harmonic_difference, summarise, values_of

SORTS = {"rewrite": ("ES", "EM"), "paraphrase": ("PS", "PM"), "neighborhood": ("NS", "NM")}


def case(number: int, draw: random.Random, relation: str = "P1", better: float = 0.0) -> dict:
    def probs(count: int, shift: float) -> list[dict]:
        return [{"target_new": draw.uniform(0, 4) - shift, "target_true": draw.uniform(0, 4)} for _ in range(count)]

    measured = {}
    for sort, count in (("rewrite", 1), ("paraphrase", 2), ("neighborhood", 7)):
        measured[f"{sort}_prompts_probs"] = probs(count, better if sort != "neighborhood" else 0.0)
        measured[f"{sort}_prompts_correct"] = [draw.random() < 0.5 for _ in range(count)]
    rewrite = {
        "prompt": "{} is in",
        "subject": f"S|{number}",
        "relation_id": relation,
        "target_new": {"str": "A"},
        "target_true": {"str": "B"},
    }
    return {"case_id": number, "requested_rewrite": rewrite, "pre": measured, "post": measured}


def cases(count: int, better: float = 0.0) -> list[dict]:
    draw = random.Random(0)
    return [case(n, draw, f"P{n % 3}", better) for n in range(count)]


def test_columns_are_the_published_formulas() -> None:
    measured = cases(11)
    got = summarise(measured, "post")
    for sort, (success, magnitude) in SORTS.items():
        shares, gaps = [], []
        for each in measured:
            nll = each["post"][f"{sort}_prompts_probs"]
            sign = -1 if sort == "neighborhood" else 1
            shares.append(np.mean([sign * (x["target_true"] - x["target_new"]) > 0 for x in nll]))
            gaps.append(np.mean([sign * (np.exp(-x["target_new"]) - np.exp(-x["target_true"])) for x in nll]))
        for name, values in ((success, shares), (magnitude, gaps)):
            assert got[name].mean == pytest.approx(100 * np.mean(values))
            assert got[name].stderr == pytest.approx(100 * np.std(values, ddof=1) / np.sqrt(11))
            assert got[name].n == 11
    assert got["S"].mean == pytest.approx(hmean([got[name].mean for name in ("ES", "PS", "NS")]))


def test_ties_count_for_neither() -> None:
    tie = {f"{sort}_prompts_probs": [{"target_new": 1.0, "target_true": 1.0}] for sort in SORTS}
    row = values_of(tie)
    assert [row[name] for name in ("ES", "PS", "NS")] == [0, 0, 0]


def test_the_standard_error_of_the_harmonic_mean_is_that_of_resampled_cases() -> None:
    draw = np.random.default_rng(0)
    values = np.column_stack([draw.uniform(60, 100, 400), draw.uniform(20, 90, 400), draw.choice([40.0, 80.0], 400)])
    resampled = [hmean(values[draw.integers(0, 400, 400)].mean(0)) for _ in range(3000)]
    got = harmonic(values)
    assert got.mean == pytest.approx(hmean(values.mean(0)))
    assert got.stderr == pytest.approx(np.std(resampled), rel=0.06)
    assert harmonic(np.array([[0.0, 50.0], [0.0, 70.0]])).mean == 0
    assert Mean.of([3.0]) == Mean(3.0, None, 1)


def test_scores_of_accuracies_where_there_are_no_probabilities() -> None:
    measured = {f"{sort}_prompts_correct": [True, False, True, True] for sort in SORTS}
    got = summarise([{"post": measured}], "post")
    assert got["EA"].mean == got["PA"].mean == got["S"].mean == 75


def test_report_is_saved_and_read_back(tmp_path) -> None:
    report = Report(cases(9, better=1.0), {"edit": None}, [{"index": 3, "case_id": 3, "key": "prompt", "reason": "x"}])
    paths = report.save(tmp_path)
    assert [p.name for p in paths] == ["report.json", "report.md", "relations.png"] and all(p.exists() for p in paths)
    saved = json.loads(paths[0].read_text())
    assert saved["summary"]["post"]["ES"] == report.summary()["ES"].to_dict()
    assert saved["skipped"] == report.skipped and set(saved["by_relation"]) == {"P0", "P1", "P2"}
    text = paths[1].read_text()
    header = next(line for line in text.splitlines() if line.startswith("| model"))
    assert header.startswith("| model | n | S | ES | EM | PS | PM | NS | NM |")
    assert "1 record skipped" in text and "## Worst cases" in text
    assert "S\\|" in text  # a bar would end the cell
    for number, each in enumerate(report.cases):
        (tmp_path / f"1_edits-case_{number}.json").write_text(json.dumps(each))
    again = Report.load(tmp_path)
    assert again.cases == report.cases and again.skipped == report.skipped


def test_worst_cases_come_first() -> None:
    report = Report(cases(20))
    worst = report.worst(5)
    means = [np.mean([values_of(c["post"])[k] for k in ("ES", "PS", "NS")]) for c in report.cases]
    assert [x["mean"] for x in worst] == pytest.approx(sorted(means)[:5])


def test_runs_side_by_side() -> None:
    one, other = Report(cases(6)), Report(cases(6))
    for each in other.cases:
        each["post"] = cases(1, better=3.0)[0]["post"]
    lines = side_by_side({"rome": one, "memit": other}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["unedited", "rome", "memit"]


def test_a_folder_without_cases(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no cases"):
        Report.load(tmp_path)


def test_the_error_of_a_paired_difference_is_the_jackknifes() -> None:
    rng = np.random.default_rng(0)
    first = rng.uniform(20, 100, (60, 3))
    second = np.clip(first + rng.normal(-5, 4, (60, 3)), 1, 100)
    found = harmonic_difference(first, second)
    plain = [3 / (1 / values.mean(0)).sum() for values in (first, second)]
    assert found.mean == pytest.approx(plain[0] - plain[1])
    left_out = [harmonic_difference(np.delete(first, n, 0), np.delete(second, n, 0)).mean for n in range(60)]
    assert found.stderr == pytest.approx(np.sqrt(59 * np.var(left_out)), rel=0.05)
    alone = harmonic(first).stderr, harmonic(second).stderr
    assert found.stderr < 0.5 * np.hypot(*alone)  # paired
    assert harmonic_difference(first, 0 * second).stderr is None

"""The table of metrics: what one that is added to it takes, and that the others keep out of each other's way."""

from __future__ import annotations

import knowedit_ext as ke
from knowedit_ext.datasets.questions import Question
from knowedit_ext.evaluation import metrics, report, scores
from knowedit_ext.evaluation.metric import Metric

from ..editing.models import fresh

RECORD = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "{} w9",
        "subject": "w33",
        "relation_id": "P1",
        "target_new": {"str": "w22"},
        "target_true": {"str": "w50"},
    },
    "paraphrase_prompts": ["w8 w33 w9"],
    "neighborhood_prompts": ["w10 w9"],
    "reversal_prompts": [{"prompt": "w22 w7", "target": "w33"}, {"prompt": "w7", "target": "w33 w9"}],
}


def doubt(record, edit):
    """Asks the edited prompt for a third answer."""
    rewrite = record["requested_rewrite"]
    questions = [Question(rewrite["prompt"].replace("{}", rewrite["subject"]), (" w41",), edit)]
    return questions, lambda scores, before=None: {"doubt": [answer.nll for (answer,) in scores]}


def test_an_added_metric_is_asked_read_and_tabled(monkeypatch) -> None:
    model = fresh("gpt2")
    plain = ke.evaluate(model, [RECORD], generation=False)
    metric = Metric(("DB",), 15, lambda measured: {"DB": sum(measured["doubt"])} if "doubt" in measured else {}, doubt)
    table = sorted([*metrics.METRICS, metric], key=lambda m: m.order)
    for module in (metrics, scores, report):
        monkeypatch.setattr(module, "METRICS", table)
    monkeypatch.setattr(report, "COLUMNS", ("S", *(column for m in table for column in m.columns)))
    extended = ke.evaluate(model, [RECORD], generation=False)
    (case,), (before,) = extended.cases, plain.cases
    assert case["pre"]["doubt"][0] > 0 and {k: v for k, v in case["pre"].items() if k != "doubt"} == before["pre"]
    assert extended.summary("pre")["DB"].mean == case["pre"]["doubt"][0]
    assert " NM | DB | EA " in extended.table()


def test_columns_are_named_once_and_stand_in_the_papers_order() -> None:
    columns = report.COLUMNS
    assert len(set(columns)) == len(columns)
    assert columns[:9] == ("S", "ES", "EM", "PS", "PM", "NS", "NM", "GE", "RS")

"""Which of two methods writes better, as people judge it (Meng et al. 2022, human evaluation): blinded pairs of texts
for them to read, and a sign test of what they say."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..checks import Count, Seed, typed
from ..datasets.questions import filled
from ..evaluation.report import Report
from ..runs.files import atomic_write, load_json, write_json
from .findings import Findings, write_csv

QUESTIONS = {
    "consistent": "Which text agrees better with the statement?",
    "fluent": "Which text is the better English?",
}
ANSWERS = ("left", "right", "same")
COLUMNS = ("pair", "statement", "left", "right", *QUESTIONS)
KEY = "key.json"


@typed
def export_pairs(
    reports: Mapping[str, Report | str | Path], out: str | Path, *, count: Count = 50, seed: Seed = 0
) -> list[dict[str, Any]]:
    """Write pairs of generated texts to be judged: `pairs.csv`, `pairs.html` (whose buttons fill that table in) and
    `key.json`, which says whose text is where: keep that from the readers.

    reports: {method: its evaluation, or the folder of one, with generated texts}, two of them. count: facts at most, of
    those that both have; which they are, and who is left, is drawn by `seed`. Returns the rows of pairs.csv.

    Raises ValueError for evaluations without texts, of other facts, or a folder whose pairs are other ones.
    """
    if len(reports) != 2:
        raise ValueError(f"{len(reports)} methods are compared ({', '.join(reports)}): expected two")
    texts = {name: _texts(name, report) for name, report in reports.items()}
    first, second = texts
    both = [case_id for case_id in texts[first] if case_id in texts[second]]
    if not both:
        raise ValueError(f"'{first}' and '{second}' have no fact in common: evaluate them on the same records")
    for case_id in both:
        if texts[first][case_id][0] != texts[second][case_id][0]:
            raise ValueError(
                f"case {case_id} of '{first}' and '{second}' is another statement: these are other records"
            )
    rng = random.Random(seed)
    rows, places = [], {}
    for number, case_id in enumerate(rng.sample(both, min(count, len(both))), 1):
        sides = rng.sample([first, second], 2)
        statement, _ = texts[first][case_id]
        which = rng.randrange(min(len(texts[name][case_id][1]) for name in sides))
        left, right = (texts[name][case_id][1][which] for name in sides)
        rows.append(
            {"pair": number, "statement": statement, "left": left, "right": right, **dict.fromkeys(QUESTIONS, "")}
        )
        places[str(number)] = {"case_id": case_id, "left": sides[0], "right": sides[1]}
    key = {"methods": [first, second], "pairs": places, "rows": rows}
    path = Path(out) / KEY
    if path.exists() and load_json(path, sealed=True) != json.loads(json.dumps(key)):
        raise ValueError(f"'{path}' is of other pairs, whose judgements it is needed for: choose another folder")
    write_json(path, key, sealed=True)
    write_csv(Path(out) / "pairs.csv", COLUMNS, rows)
    atomic_write(Path(out) / "pairs.html", lambda file: file.write(_page(rows).encode()))
    return rows


@typed
def read_pairs(out: str | Path, rated: Sequence[str | Path]) -> Findings:
    """What people said: `rated` are filled copies of pairs.csv, one a person, of the folder `out` with its key.

    A question that is left empty was not answered. Rows: of each question how often each method was preferred and how
    often neither, the share of the first method among preferences, and p of a two-sided sign test. Several people who
    judged one pair count once, by their majority. Raises ValueError that names the file and the line in it.
    """
    from scipy.stats import binomtest

    key = load_json(Path(out) / KEY, sealed=True)
    first, second = key["methods"]
    votes: dict[str, dict[str, int]] = {
        question: {} for question in QUESTIONS
    }  # pair -> for the first less for the second
    for path in rated:
        for pair, answers in _read(Path(path), key).items():
            for question, answer in answers.items():
                preferred = key["pairs"][pair].get(answer)
                vote = 0 if preferred is None else 1 if preferred == first else -1
                votes[question][pair] = votes[question].get(pair, 0) + vote
    rows = []
    for question, by_pair in votes.items():
        ahead, behind = (sum(sign * vote > 0 for vote in by_pair.values()) for sign in (1, -1))
        test = binomtest(ahead, ahead + behind) if ahead + behind else None
        row: dict[str, Any] = {"question": question, "pairs": len(by_pair), first: ahead, second: behind}
        row["neither"] = len(by_pair) - ahead - behind
        row["share"] = None if test is None else ahead / (ahead + behind)
        row["p"] = None if test is None else float(test.pvalue)
        rows.append(row)
    notes = [f"share: of '{first}' among the pairs where one was preferred; p: two-sided sign test"]
    settings = {"run": "pairs", "methods": [first, second], "rated": len(rated)}
    return Findings(rows, settings, ("question",), notes=notes)


def _texts(name: str, report: Report | str | Path) -> dict[Any, tuple[str, list[str]]]:
    """case_id -> (what was edited in, as a sentence, the texts)."""
    report = report if isinstance(report, Report) else Report.load(report)
    found = {}
    for case in report.cases:
        texts = case.get("post", {}).get("text")
        if texts:
            rewrite = case["requested_rewrite"]
            found[case["case_id"]] = (f"{filled(rewrite)} {rewrite['target_new']['str'].strip()}", list(texts))
    if not found:
        raise ValueError(f"the evaluation of '{name}' has no generated texts after an edit: evaluate with generation")
    return found


def _read(path: Path, key: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """pair -> question -> "left", "right" or "same"."""
    given = {str(row["pair"]): row for row in key["rows"]}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{path}' is no table of pairs: {error}") from error
    found: dict[str, dict[str, str]] = {}
    for number, line in enumerate(lines, 2):
        pair = (line.get("pair") or "").strip()
        if pair not in given:
            raise ValueError(f"'{path}', line {number}: pair {pair!r} is not one of the {len(given)} that were written")
        if pair in found:
            raise ValueError(f"'{path}', line {number}: pair {pair} is there twice")
        for side in ("left", "right"):
            if line.get(side) is not None and line[side].split() != given[pair][side].split():
                raise ValueError(
                    f"'{path}', line {number}: the {side} text is not that of pair {pair}: another folder's?"
                )
        found[pair] = {}
        for question in QUESTIONS:
            answer = (line.get(question) or "").strip().lower()
            if answer and answer not in ANSWERS:
                raise ValueError(f"'{path}', line {number}: {question} is {answer!r}: expected {', '.join(ANSWERS)}")
            if answer:
                found[pair][question] = answer
    if not any(found.values()):
        raise ValueError(f"'{path}' answers no question: fill in {', '.join(QUESTIONS)}")
    return found


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
section{border-top:1px solid #ccc;padding:1em 0}.texts{display:flex;gap:1.5em}label{margin-right:1em}
.texts p{flex:1;background:#f5f5f5;padding:.7em;margin:0;white-space:pre-wrap}fieldset{border:0;padding:.4em 0}
button{font:inherit}"""
_SCRIPT = """const quote = x => '"' + String(x).replaceAll('"', '""') + '"';
document.querySelector("button").onclick = () => {
  const lines = [columns.join(",")];
  for (const row of rows) lines.push(columns.map(name => {
    const chosen = document.querySelector(`input[name="${name}-${row.pair}"]:checked`);
    return quote(chosen ? chosen.value : row[name]);
  }).join(","));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\\n") + "\\n"], {type: "text/csv"}));
  link.download = "rated.csv";
  link.click();
};"""


def _page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each pair with buttons; the last one saves the filled table. Needs no other file and sends nothing."""
    parts = ["<h1>Which text is better?</h1>", "<p>Judge each pair by itself. Left and right are in no order.</p>"]
    for row in rows:
        texts = "".join(f"<p>{escape(row[side])}</p>" for side in ("left", "right"))
        fields = ""
        for name, question in QUESTIONS.items():
            buttons = "".join(
                f'<label><input type="radio" name="{name}-{row["pair"]}" value="{answer}"> {answer}</label>'
                for answer in ANSWERS
            )
            fields += f"<fieldset>{escape(question)}<br>{buttons}</fieldset>"
        head = f"<h2>{row['pair']}. {escape(row['statement'])}.</h2>"
        parts.append(f'<section>{head}<div class="texts">{texts}</div>{fields}</section>')
    parts.append("<p><button>Save as rated.csv</button></p>")
    data = json.dumps(list(rows)).replace("</", "<\\/")
    script = f"const columns = {json.dumps(COLUMNS)}, rows = {data};\n{_SCRIPT}"
    head = f'<!doctype html><meta charset="utf-8"><title>Pairs of texts</title><style>{_STYLE}</style>'
    return head + "\n" + "\n".join(parts) + f"\n<script>{script}</script>\n"

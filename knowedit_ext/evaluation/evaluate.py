"""`evaluate`: the metrics of the papers' tables for records, before and after an edit; resumable and sharded.

Records are computed in groups that depend on their order alone, each as a whole, so that a run that was killed and gone
on with, or spread over ranks, reports what one that was not reports.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..datasets.counterfact import load_counterfact
from ..datasets.records import BadRecord, Record, Records, describe_bad, read_records
from ..datasets.zsre import load_zsre
from ..editing.edit import Edit, LowRank
from ..editing.request import check_compat
from ..model import EditableModel
from ..ranks import Ranks
from ..settings import settle
from . import counterfact, zsre
from .job import Job, Method
from .nll import tokenize_question
from .report import Report
from .texts import Texts

logger = logging.getLogger(__name__)

GROUP = {"cpu": 16}  # records a group: enough rows to keep the matrices busy
WIDE_GROUP = 256
KINDS = {"counterfact": counterfact, "zsre": zsre}


def evaluate(
    model: EditableModel,
    records: str | Path | Iterable[Mapping[str, Any]],
    edit: Edit | Sequence[Edit] | Method | None = None,
    generation: bool = True,
    baseline: bool = True,
    *,
    dataset: str | None = None,
    snippets: Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]] | None = None,
    tfidf: Any = None,
    out: str | Path | None = None,
    attributes: bool = False,
    max_length: int | None = None,
    time: float | Sequence[float] | None = None,
    compat: str | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    group: int | None = None,
    max_rows: int | None = None,
    progress: bool = False,
) -> Report:
    """CounterFact's metrics (ES EM PS PM NS NM S GE RS) or zsRE's, as `Report.cases` and `Report.table()`.

    records: a file, or records: CounterFact (also the flat schema) or zsRE (`dataset`, told by the records when None).
    edit: None: the model as it is ("pre" alone); an `Edit`: all records under it; a list, one for each record: every
        record under its own. Low-rank ones are computed many at a time, dense ones (fine-tuning) one after the other.
        Or a `Method` that makes a group's edits when they are needed.
    generation: also continue the records' generation prompts to `max_length` tokens (None: 100,
        or the model's positions where it has fewer): fluency (GE) and, with
        `snippets` (see `datasets.load_snippets`), consistency (RS) and essence. tfidf: `TfIdf`; None: fitted on the
        snippets.
    baseline: also measure the unedited model ("pre").
    out: folder for a case file a record in the published layout, `report.json`, `report.md`, `relations.png`; cases
        that are there are not computed again. Under `torchrun` every rank computes its share of the groups.
    attributes: also ask the attribute prompts. time: seconds the edit took (one, or one an edit), kept in the cases.
    compat: "reference": zsRE's answers cut into texts token by token, essence over N instead of N - 1, as published.
    skip_bad: leave out records that cannot be evaluated, and count them in the report; else they are a ValueError.
    group: records computed together (part of the settings: rounding depends on it). max_rows: rows held at once.
    """
    check_compat(compat)
    loaded, kind = load(records, dataset, skip_bad, limit)
    texts = Texts(model, snippets, tfidf, max_length, compat) if generation and kind == "counterfact" else None
    skipped = list(loaded.bad)
    total, gone = len(loaded) + len(skipped), {bad.index for bad in skipped}
    numbers = [n for n in range(total) if n not in gone]
    edits = edit if callable(edit) else _edits_by_record(edit, numbers, total)
    bad = _usable(model, loaded, numbers, KINDS[kind].ask, attributes, compat, texts)
    if bad and not skip_bad:
        raise ValueError(describe_bad(bad, "the records"))
    gone = {b.index for b in bad}
    kept = [n for n, number in enumerate(numbers) if number not in gone]
    loaded = [loaded[n] for n in kept]
    edits = [edits[n] for n in kept] if isinstance(edits, list) else edits
    size = group or GROUP.get(model.device.type, WIDE_GROUP)
    settings = {
        "dataset": kind,
        "model": {"name": model.name, "type": model.modules.model_type, "dtype": str(model.dtype)},
        "edit": _describe(edit),
        "generation": None if texts is None else texts.describe(),
        "baseline": baseline,
        "attributes": attributes,
        "compat": compat,
        "group": size,
        "case_ids": [record["case_id"] for record in loaded],
    }
    ranks = Ranks()
    if out is None and ranks.size > 1:
        raise ValueError("several ranks share their cases through a folder: give out=")
    if out is not None:
        settings = settle(out, settings, "evaluate", adopted=("group",))
    shared = edit if isinstance(edit, Edit) else None
    facts = 0 if edit is None else len(edit.requests) if shared else settings["group"] if _together(edit) else 1
    job = Job(
        model, KINDS[kind].ask, loaded, shared, edits, facts, baseline, attributes, compat, texts, time, max_rows, out
    )
    groups = [range(n, min(n + settings["group"], len(loaded))) for n in range(0, len(loaded), settings["group"])]
    with tqdm(total=len(loaded), desc="evaluating", unit="record", disable=not progress) as bar:
        for numbers in groups[ranks.rank :: ranks.size]:
            job.run(numbers)
            bar.update(len(numbers))
    ranks.wait()
    skipped = [b._asdict() for b in sorted([*skipped, *bad], key=lambda b: b.index)]
    if out is None:
        return Report(job.cases, settings, skipped)
    by_id = {case["case_id"]: case for case in Report.load(out).cases}
    report = Report([by_id[record["case_id"]] for record in loaded], settings, skipped)
    if ranks.first:
        for left in Path(out).glob("cases/.*.tmp"):  # what a killed run was writing
            left.unlink(missing_ok=True)
        report.save(out)
    return report


def load(
    records: str | Path | Iterable[Mapping[str, Any]],
    dataset: str | None,
    skip_bad: bool,
    limit: int | None,
    zsre_target: str = "answer",
) -> tuple[Records, str]:
    """Checked records, and which data set they are of."""
    if dataset is not None and dataset not in KINDS:
        raise ValueError(f"unknown dataset '{dataset}': expected {' or '.join(KINDS)}")
    raw = read_records(records) if isinstance(records, (str, Path)) else list(records)
    first = raw[0] if raw and isinstance(raw[0], Mapping) else {}
    near = first.get("neighborhood_prompts")
    kind = dataset or ("zsre" if "src" in first or (near and isinstance(near[0], Mapping)) else "counterfact")
    checked = isinstance(records, Records) or (kind == "zsre" and "requested_rewrite" in first)
    if checked:
        found = Records(raw[:limit], getattr(records, "bad", ()))
    elif kind == "zsre":
        found = load_zsre(raw, skip_bad=skip_bad, limit=limit, target=zsre_target)
    else:
        found = load_counterfact(raw, skip_bad=skip_bad, limit=limit)
    if not found:
        raise ValueError(f"no records to evaluate ({len(found.bad)} were skipped)" if found.bad else "no records")
    return found, kind


def _edits_by_record(edit: Edit | Sequence[Edit] | None, numbers: Sequence[int], total: int) -> list[Edit] | None:
    """Each record's own edit; None where all have the same. An edit may be given for a skipped record, too."""
    if edit is None or isinstance(edit, Edit):
        return None
    edits = list(edit)
    if len(edits) == total:
        return [edits[n] for n in numbers]
    if len(edits) == len(numbers):
        return edits
    raise ValueError(f"{len(edits)} edits for {len(numbers)} records: expected one edit for all, or one a record")


def _together(edit: Sequence[Edit] | Method) -> bool:
    return callable(edit) and edit.together


def _usable(
    model: EditableModel,
    records: Sequence[Record],
    numbers: Sequence[int],
    ask: Callable[..., Any],
    attributes: bool,
    compat: str | None,
    texts: Texts | None,
) -> list[BadRecord]:
    """Records that this model, or these snippets, cannot be asked about."""
    bad = []
    for number, record in zip(numbers, records, strict=True):
        key = "prompts"
        try:
            for question in ask(model, record, 0, attributes, compat)[0]:
                tokenize_question(model, question)
            if texts is not None:
                key = "generation_prompts"
                texts.check(record)
        except ValueError as error:
            bad.append(BadRecord(number, record["case_id"], key, str(error)))
    return bad


def _describe(edit: Edit | Sequence[Edit] | Method | None) -> dict[str, Any] | None:
    """What tells an edit, or a list of them, from another one."""
    if edit is None or callable(edit):
        return None if edit is None else edit.describe()
    edits = [edit] if isinstance(edit, Edit) else list(edit)
    content = hashlib.blake2b(digest_size=16)
    for each in edits:
        for name, change in sorted(each.changes.items()):
            content.update(name.encode())
            for part in (change.inputs, change.outputs) if isinstance(change, LowRank) else (change,):
                content.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    methods = "+".join(sorted({each.method for each in edits}))
    return {
        "method": methods,
        "single": not isinstance(edit, Edit),
        "edits": len(edits),
        "content": content.hexdigest(),
    }

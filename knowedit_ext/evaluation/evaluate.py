"""`evaluate`: the metrics of the papers' tables for records, before and after an edit; resumable and sharded.

Records are computed in groups that depend on their order alone, each as a whole, so that a run that was killed and gone
on with, or spread over ranks, reports what one that was not reports.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from tqdm import tqdm

from ..checks import Compat, Count, as_type, typed
from ..datasets import DATASETS
from ..datasets.records import BadRecord, Record, Records, describe_bad, read_records
from ..editing.edit import Edit, LowRank
from ..model.hooks import at_rest
from ..model.identity import checksum, fingerprint, weight_checksums
from ..model.load import EditableModel
from ..runs.ranks import Ranks
from ..runs.settings import settle
from .job import Job, Method
from .metrics import asking
from .nll import tokenize_question
from .report import Report
from .texts import Texts

GROUP = {"cpu": 16}  # records a group: enough rows to keep the matrices busy
WIDE_GROUP = 256


@at_rest
@typed
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
    max_length: Count | None = None,
    time: float | Sequence[float] | None = None,
    compat: Compat = None,
    skip_bad: bool = False,
    limit: Count | None = None,
    group: Count | None = None,
    max_rows: Count | None = None,
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
    if edit is not None and not isinstance(edit, Edit) and not callable(edit):
        edit = as_type("edit", edit, Sequence[Edit])
    loaded, kind = load(records, dataset, skip_bad, limit)
    texts = Texts(model, snippets, tfidf, max_length, compat) if generation and DATASETS[kind].generates else None
    total, numbers = len(loaded) + len(loaded.bad), places(loaded)
    loaded = usable(model, loaded, kind, skip_bad, texts=texts, attributes=attributes, compat=compat)
    at = {number: n for n, number in enumerate(numbers)}
    kept = [at[number] for number in places(loaded)]
    edits = _by_record(edit, "edits", numbers, total, kept)
    time = _by_record(time, "times", numbers, total, kept)
    settings = {
        "dataset": kind,
        "records": _digest(json.dumps(loaded, sort_keys=True).encode()),
        "case_ids": [record["case_id"] for record in loaded],
        "model": _model(model, weights=out is not None),
        "edit": _describe(edit),
        "generation": None if texts is None else texts.describe(loaded),
        "generation_batch": None if texts is None else texts.batch_size(loaded),
        "baseline": baseline,
        "attributes": attributes,
        "compat": compat,
        "group": group or GROUP.get(model.device.type, WIDE_GROUP),
    }
    ranks = Ranks()
    if out is None and ranks.size > 1:
        raise ValueError("several ranks share their cases through a folder: give out=")
    if out is not None:
        # Chosen by the machine and the memory that was free then; rounding depends on them.
        adopted = ("generation_batch",) if group else ("generation_batch", "group")
        settings = settle(out, settings, "evaluate", adopted)
    if texts is not None:
        texts.batch = settings["generation_batch"]
    shared = edit if isinstance(edit, Edit) else None
    facts = 0 if edit is None else len(edit.requests) if shared else settings["group"] if _together(edit) else 1
    job = Job(
        model,
        asking(DATASETS[kind].ask),
        loaded,
        shared,
        edits,
        facts,
        baseline,
        attributes,
        compat,
        texts,
        time,
        max_rows,
        out,
    )
    groups = [range(n, min(n + settings["group"], len(loaded))) for n in range(0, len(loaded), settings["group"])]
    with tqdm(total=len(loaded), desc="evaluating", unit="record", disable=not progress) as bar:
        for numbers in groups[ranks.rank :: ranks.size]:
            job.run(numbers)
            bar.update(len(numbers))
    ranks.wait()
    left_out = [bad._asdict() for bad in loaded.bad]
    if out is None:
        return Report(job.cases, settings, left_out)
    by_id = {case["case_id"]: case for case in Report.load(out).cases}
    report = Report([by_id[record["case_id"]] for record in loaded], settings, left_out)
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
    if dataset is not None and dataset not in DATASETS:
        raise ValueError(f"unknown dataset {brief(dataset)}: expected {' or '.join(map(repr, DATASETS))}")
    raw = read_records(records)
    first = raw[0] if raw and isinstance(raw[0], Mapping) else {}
    kind = dataset or next((name for name, known in DATASETS.items() if known.detect(first)), "counterfact")
    if isinstance(records, Records):  # as a loader made them
        found = Records(raw[:limit], _bad_before(records, len(raw[:limit])))
    else:
        options = {"target": zsre_target} if kind == "zsre" else {}
        found = DATASETS[kind].load(raw, skip_bad=skip_bad, limit=limit, **options)
    if not found:
        raise ValueError(f"no records to evaluate ({len(found.bad)} were skipped)" if found.bad else "no records")
    return found, kind


def _bad_before(records: Any, count: int) -> list[BadRecord]:
    """The bad ones among what the first `count` good ones were taken from."""
    if not isinstance(records, Records):
        return []
    last = places(records)[count - 1] if count else -1
    return records.bad if count == len(records) else [bad for bad in records.bad if bad.index < last]


def places(records: Records) -> list[int]:
    """Where the records that were not left out stood in their source."""
    gone = {bad.index for bad in records.bad}
    return [n for n in range(len(records) + len(gone)) if n not in gone]


def usable(
    model: EditableModel,
    records: Records,
    kind: str,
    skip_bad: bool,
    *,
    texts: Texts | None = None,
    attributes: bool = False,
    compat: str | None = None,
    together: bool = False,
) -> Records:
    """The records that this model, and these snippets, can be asked about; and, where all are edited `together`, that
    do not contradict an earlier one. Others are left out with `skip_bad`, else a ValueError names them."""
    found, targets = Records(bad=records.bad), {}
    for number, record in zip(places(records), records, strict=True):
        key = "prompts"
        try:
            for question in asking(DATASETS[kind].ask)(model, record, 0, attributes, compat)[0]:
                tokenize_question(model, question)
            if texts is not None:
                key = "generation_prompts"
                texts.check(record)
            if together:
                key = "requested_rewrite"
                _check_agreement(record, targets)
        except ValueError as error:
            found.bad.append(BadRecord(number, record["case_id"], key, str(error)))
        else:
            found.append(record)
    if len(found) < len(records) and not (skip_bad and found):
        raise ValueError(describe_bad(found.bad[len(records.bad) :], "the records"))
    found.bad.sort(key=lambda bad: bad.index)
    return found


def _check_agreement(record: Record, targets: dict[tuple[str, str], tuple[str, int]]) -> None:
    rewrite = record["requested_rewrite"]
    new = rewrite["target_new"]["str"].strip()
    said, case_id = targets.setdefault((rewrite["prompt"], rewrite["subject"]), (new, record["case_id"]))
    if said != new:
        raise ValueError(f"contradicts case_id {case_id}: the same prompt is to become '{said}' there, '{new}' here")


def _by_record(given: Any, what: str, numbers: Sequence[int], total: int, kept: Sequence[int]) -> Any:
    """What is given for each record, of the records that are kept; None where one edit (or time) is for all.

    It may be given for records that were left out, too. numbers: places of the checked records among all `total`.
    """
    if given is None or isinstance(given, (Edit, Real)):
        return None if isinstance(given, Edit) else given
    if callable(given):
        return given
    found = list(given)
    if len(found) == total:
        found = [found[n] for n in numbers]
    if len(found) == len(numbers):
        return [found[n] for n in kept]
    if len(found) == len(kept):
        return found
    one = what.removesuffix("s")
    raise ValueError(f"{len(found)} {what} for {len(numbers)} records: expected one {one} for all, or one a record")


def _model(model: EditableModel, weights: bool) -> dict[str, Any]:
    """What tells a model from others; its weights as they are, edits included, where they are in memory."""
    in_memory = {name for name, parameter in model.hf.named_parameters() if not parameter.is_meta}
    return {
        "name": model.name,
        "type": model.modules.model_type,
        "dtype": str(model.dtype),
        "bos": model.bos,
        "weights": fingerprint(weight_checksums(model, in_memory.__contains__)) if weights else None,
    }


def _digest(*contents: bytes) -> str:
    made = hashlib.blake2b(digest_size=16)
    for content in contents:
        made.update(content)
    return made.hexdigest()


def _together(edit: Sequence[Edit] | Method) -> bool:
    return callable(edit) and edit.together


def _describe(edit: Edit | Sequence[Edit] | Method | None) -> dict[str, Any] | None:
    """What tells an edit, or a list of them, from another one."""
    if edit is None or callable(edit):
        return None if edit is None else edit.describe()
    edits = [edit] if isinstance(edit, Edit) else list(edit)
    contents = []
    for each in edits:
        for name, change in sorted(each.changes.items()):
            parts = (change.inputs, change.outputs) if isinstance(change, LowRank) else (change,)
            contents.append(" ".join([name, *map(checksum, parts)]).encode())
    methods = "+".join(sorted({each.method for each in edits}))
    return {"method": methods, "single": not isinstance(edit, Edit), "edits": len(edits), "content": _digest(*contents)}

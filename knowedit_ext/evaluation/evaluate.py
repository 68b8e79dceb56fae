"""`evaluate`: the metrics of the papers' tables for records, before and after an edit; resumable and sharded.

Records are computed in groups that depend on their order alone, each as a whole, so that a run that was killed and gone
on with, or spread over ranks, reports what one that was not reports.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from tqdm import tqdm

from ..checks import Count, StudyCompat, as_type, typed
from ..datasets import DATASETS
from ..datasets.questions import Asked, rewrites_of
from ..datasets.records import BadRecord, Record, Records, describe_bad, read_records
from ..editing.changes import digest
from ..editing.edit import Edit
from ..model.hooks import at_rest
from ..model.identity import describe, identity
from ..model.load import EditableModel
from ..runs.files import file_name
from ..runs.lock import alone
from ..runs.ranks import Ranks
from ..runs.settings import Growth, marked, settle
from ..tracing.subject_noise import SubjectNoise
from .job import Job, Method, forget
from .metrics import METRICS, asking
from .nll import tokenize_question
from .noised import NoiseOf, own_noise, under_noise
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
    compat: StudyCompat = None,
    noise: SubjectNoise | float | str | None = None,
    skip_bad: bool = False,
    limit: Count | None = None,
    group: Count | None = None,
    max_rows: Count | None = None,
    progress: bool = False,
) -> Report:
    """CounterFact's metrics (ES EM PS PM NS NM S GE RS) or zsRE's, as `Report.cases` and `Report.table()`.

    records: a file, or records, of a data set of `datasets.DATASETS` (`dataset`, told by the records when None).
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
        A folder belongs to model, edits, records and settings; records may be added at the end (the facts of a last
        group that was not full are then computed again), and fewer are served from it (docs/folders.md).
    attributes: also ask the attribute prompts. time: seconds the edit took (one, or one an edit), kept in the cases.
    compat: "reference": zsRE's answers cut into texts token by token, essence over N instead of N - 1, as published.
        "hase": that essence, and noise on the rows that google/belief-localization puts it on (docs/problems.md).
    noise: prompts with a record's subject are asked with that subject noised (`SubjectNoise`, or its level); None: as
        the records (`requested_rewrite.noise`) or the edits' requests say. Generated texts go on from the clean prompt.
    skip_bad: leave out records that cannot be evaluated, and count them in the report; else they are a ValueError.
    group: records computed together (part of the settings: rounding depends on it). max_rows: rows held at once.
    """
    if edit is not None and not isinstance(edit, (Edit, Method)):
        edit = as_type("edit", edit, Sequence[Edit])
    noise = SubjectNoise.of(noise)
    loaded, kind = load(records, dataset, skip_bad, limit, equal_targets=True)  # the truth, erased or amplified
    given = () if edit is None or callable(edit) else edit
    if DATASETS[kind].baseline and not baseline:
        raise ValueError(f"{kind}: conditions are measured on the unedited model: baseline=False leaves it out")
    noise_of = own_noise(given) if noise is None else lambda record: noise
    ask = under_noise(asking(DATASETS[kind].ask), noise_of)
    texts = Texts(model, snippets, tfidf, max_length, compat) if generation and DATASETS[kind].generates else None
    total, numbers = len(loaded) + len(loaded.bad), places(loaded)
    loaded = usable(model, loaded, ask, skip_bad, texts=texts, attributes=attributes, compat=compat)
    at = {number: n for n, number in enumerate(numbers)}
    kept = [at[number] for number in places(loaded)]
    edits = _by_record(edit, "edits", numbers, total, kept)
    time = _by_record(time, "times", numbers, total, kept)
    _check_ids(loaded)
    ranks = Ranks()
    if out is None and ranks.size > 1:
        raise ValueError("several ranks share their cases through a folder: give out=")
    together = callable(edit) and edit.together
    asked = {
        "run": "evaluate",
        "dataset": kind,
        "records": _describe_records(loaded, texts, None if callable(edits) else edits, noise_of),
        "model": describe(model) if out is None else identity(model),
        "edit": edit.describe() if callable(edit) else edit if edit is None else _describe_edit(edit),
        "generation": None if texts is None else texts.describe(),
        "generation_batch": None if texts is None else texts.batch_size(loaded),
        "metrics": [column for metric in METRICS for column in metric.columns],
        "baseline": baseline,
        "attributes": attributes,
        "compat": compat,
        "group": group or GROUP.get(model.device.type, WIDE_GROUP),
    }
    shared = edit if isinstance(edit, Edit) else None

    def job_of(settings: Mapping[str, Any]) -> Job:
        facts = 0 if edit is None else len(edit.requests) if shared else settings["group"] if together else 1
        if texts is not None:
            texts.batch = settings["generation_batch"]
        ids = [item["case_id"] for item in settings["records"]]
        return Job(
            model, ask, loaded, ids, shared, edits, facts, baseline, attributes, compat, texts, time, max_rows, out
        )

    left_out = [bad._asdict() for bad in loaded.bad]
    if out is None:
        job = job_of(asked)
        _compute(job, asked, ranks, progress, together)
        return Report(job.cases, _report_settings(asked), left_out, loaded)
    with alone(out, ranks):
        # Chosen by the machine and the memory that was free then; rounding depends on them.
        adopted = ("generation_batch", "model.name") if group else ("generation_batch", "model.name", "group")
        growth = Growth("records", "case_id")
        settings = settle(
            out,
            asked,
            ranks,
            adopted=adopted,
            growth=growth,
            enlarge=lambda earlier: forget(out, growth.unfilled(earlier)),
        )
        job = job_of(settings)
        _compute(job, settings, ranks, progress, together)
        ranks.wait()
        whole = len(settings["records"]) == len(loaded)
        if whole and ranks.first:
            job.name_all()
        ranks.wait()
        by_id = {case["case_id"]: case for case in Report.load(out).cases}
        report = Report([by_id[record["case_id"]] for record in loaded], _report_settings(settings), left_out, loaded)
        if whole and ranks.first:
            report.save(out)
        ranks.wait()
    return report


def _compute(job: Job, settings: Mapping[str, Any], ranks: Ranks, progress: bool, together: bool) -> None:
    """Every rank its share of the groups; what is there is looked at first."""
    growth, count = Growth("records", "case_id"), len(job.records)
    groups = growth.groups(count, settings)[ranks.rank :: ranks.size]
    job.check(n for numbers in groups for n in numbers if n < count)
    with tqdm(total=sum(map(len, groups)), desc="evaluating", unit="record", disable=not progress) as bar:
        for numbers in groups:
            asked = range(numbers.start, min(numbers.stop, count))
            if together or not job.done(asked):  # facts that are edited together cannot be looked at apart
                growth.refuse_part(numbers, count, settings)
                job.run(asked)
            bar.update(len(numbers))


def _report_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As a report tells them: the records in short."""
    ids = [item["case_id"] for item in settings["records"]]
    return {**settings, "case_ids": ids, "records": marked(json.dumps(settings["records"], sort_keys=True))}


def _check_ids(records: Sequence[Record]) -> None:
    """They name files."""
    seen: set[Any] = set()
    for record in records:
        case_id = record["case_id"]
        if file_name(case_id, "case_id") in seen:
            raise ValueError(f"two records have the case_id {case_id!r}")
        seen.add(str(case_id))


def _describe_records(
    records: Sequence[Record], texts: Texts | None, edits: Sequence[Edit] | None, noise_of: NoiseOf
) -> list[dict[str, Any]]:
    """What tells each from others: what it holds, what its texts are compared with, an edit of its own."""
    described = []
    for n, record in enumerate(records):
        parts = {key: marked(json.dumps(value, sort_keys=True)) for key, value in sorted(record.items())}
        parts |= {} if texts is None else texts.describe_record(record)
        parts |= {} if edits is None else {"edit": _describe_edit(edits[n])}
        noise = noise_of(record)
        parts |= {} if noise is None else {"noise": noise.to_dict()}
        described.append(parts | {"case_id": record["case_id"]})
    return described


def load(
    records: str | Path | Iterable[Mapping[str, Any]],
    dataset: str | None,
    skip_bad: bool,
    limit: int | None,
    zsre_target: str = "answer",
    zsre_language: str | None = None,
    equal_targets: bool = False,
) -> tuple[Records, str]:
    """Checked records, and which data set they are of. equal_targets: CounterFact's new target may be the true one."""
    if dataset is not None and dataset not in DATASETS:
        raise ValueError(f"unknown dataset {brief(dataset)}: expected {' or '.join(map(repr, DATASETS))}")
    raw = read_records(records)
    first = raw[0] if raw and isinstance(raw[0], Mapping) else {}
    kind = dataset or next((name for name, known in DATASETS.items() if known.detect(first)), "counterfact")
    if isinstance(records, Records):  # as a loader made them
        records = Records(raw[:limit], _bad_before(records, len(raw[:limit])))
    else:
        own = {
            "counterfact": {"equal_targets": equal_targets},
            "zsre": {"target": zsre_target, "language": zsre_language},
        }
        records = DATASETS[kind].load(raw, skip_bad=skip_bad, limit=limit, **own.get(kind, {}))
    if not records:
        raise ValueError(f"no records to evaluate ({len(records.bad)} were skipped)" if records.bad else "no records")
    return records, kind


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
    ask: Callable[..., Asked],
    skip_bad: bool,
    *,
    texts: Texts | None = None,
    attributes: bool = False,
    compat: str | None = None,
    together: bool = False,
) -> Records:
    """The records that this model, and these snippets, can be asked about; and, where all are edited `together`, that
    do not contradict an earlier one. Others are left out with `skip_bad`, else a ValueError names them."""
    usable_records, targets = Records(bad=records.bad), {}
    for number, record in zip(places(records), records, strict=True):
        key = "prompts"
        try:
            for question in ask(model, record, 0, attributes, compat)[0]:
                tokenize_question(model, question)
            if texts is not None:
                key = "generation_prompts"
                texts.check(record)
            if together:
                key = "requested_rewrite"
                _check_agreement(record, targets)
        except ValueError as error:
            usable_records.bad.append(BadRecord(number, record["case_id"], key, str(error)))
        else:
            usable_records.append(record)
    if len(usable_records) < len(records) and not (skip_bad and usable_records):
        raise ValueError(describe_bad(usable_records.bad[len(records.bad) :], "the records"))
    usable_records.bad.sort(key=lambda bad: bad.index)
    return usable_records


def _check_agreement(record: Record, targets: dict[tuple[str, str], tuple[str, int]]) -> None:
    asked = {(x["prompt"], x["subject"]): x["target_new"]["str"].strip() for x in rewrites_of(record)}
    for key, new in asked.items():
        target, case_id = targets.get(key, (new, None))
        if target != new:
            raise ValueError(
                f"contradicts case_id {case_id}: the same prompt is to become '{target}' there, '{new}' here"
            )
    targets |= {key: targets.get(key, (new, record["case_id"])) for key, new in asked.items()}


def _by_record(given: Any, what: str, numbers: Sequence[int], total: int, kept: Sequence[int]) -> Any:
    """What is given for each record, of the records that are kept; None where one edit (or time) is for all.

    It may be given for records that were left out, too. numbers: places of the checked records among all `total`.
    """
    if given is None or isinstance(given, (Edit, Real)):
        return None if isinstance(given, Edit) else given
    if callable(given):
        return given
    entries = list(given)
    if len(entries) == total:
        entries = [entries[n] for n in numbers]
    if len(entries) == len(numbers):
        return [entries[n] for n in kept]
    if len(entries) == len(kept):
        return entries
    one = what.removesuffix("s")
    raise ValueError(f"{len(entries)} {what} for {len(numbers)} records: expected one {one} for all, or one a record")


def _describe_edit(edit: Edit | Sequence[Edit]) -> str:
    if not isinstance(edit, Edit):
        return "each record's own"
    return marked(edit.method, digest(edit.changes))

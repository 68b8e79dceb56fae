"""What `knowedit evaluate` does: data, method and texts from files, then `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from ..datasets import DATASETS, load_snippets, load_tfidf, wanted_snippets
from ..datasets.counterfact import need_prompts
from ..datasets.questions import rewrites_of
from ..datasets.records import BadRecord, Records, describe_bad
from ..editing.edit import Edit
from ..editing.kept_values import check_keeps
from ..editing.methods import METHODS, method_of
from ..editing.problems import as_problem, problem_of, problem_record
from ..model.identity import identity
from ..model.load import EditableModel
from ..moments import Moments
from ..runs.files import load_json, write_json
from ..runs.lock import alone
from ..runs.ranks import Ranks
from ..runs.settings import check_same
from ..world import load_world
from ..world import moments as of_the_world
from .evaluate import evaluate, load, places, usable
from .methods import Editing
from .metrics import asking
from .metrics.consistency import TfIdf
from .problem_scores import problem_table
from .report import Report
from .texts import require_extras

NONE = "none"  # no method: the model as it is


def run(
    load_model: Callable[[], EditableModel],
    of_world: bool,
    data: Path | None,
    out: Path,
    choices: dict[str, Any],
    texts: dict[str, Any],
    chosen: dict[str, Any],
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> Report:
    """Files are read and checked before the model. choices: method, edit, params, moments, num_edits, seed, store,
    problem, noise; texts: generation, snippets, tfidf; chosen, of the records: limit, skip_bad, zsre_target,
    zsre_language; settings: baseline and compat."""
    _check(data, of_world, choices, texts)
    problem = choices["problem"]
    # The truth may be what is asked for; an ordinary edit to it is a mistake.
    equal = problem is not None or choices["method"] == NONE
    source = load_world().records() if data is None else data
    saved = choices["edit"]
    if saved is not None:
        records, kind = load(source, None, **(chosen | {"limit": None}), equal_targets=equal)
        records = _of_edit(records, saved, chosen["limit"])
    else:
        records, kind = load(source, None, **chosen, equal_targets=equal)
    if problem is not None and kind != "counterfact":
        raise ValueError(f"--problem is about CounterFact's records, these are of {kind}")
    settings |= {"skip_bad": chosen["skip_bad"]}
    described = _texts(data, texts, records if kind == "counterfact" else Records())
    method = None if choices["method"] == NONE else method_of(choices["method"])
    params = None if method is None else method.params_of(choices["params"])
    moments = None if choices["moments"] is None else Moments.load(choices["moments"])
    model = load_model()
    if problem is not None:
        records = _as_problems(model, records, choices, settings["compat"], chosen["skip_bad"])
    if moments is None and data is None and getattr(params, "mom2_adjustment", False):
        moments = of_the_world.collect(model, params.layers)
    edit: Editing | Edit | None = saved
    group = None
    if params is not None:
        num_edits = choices["num_edits"] or (len(records) if method.many else 1)
        ask = asking(DATASETS[kind].ask)
        records = usable(model, records, ask, chosen["skip_bad"], compat=settings["compat"], together=num_edits > 1)
        num_edits = min(num_edits, len(records))
        edit = Editing(model, choices["method"], params, moments, num_edits > 1, choices["seed"], settings["compat"])
        group = num_edits if num_edits > 1 else None
        if choices["store"] is not None:
            edit.keep(records, choices["store"], progress=True)
        if num_edits == len(records) > 1:
            edit, settings["time"] = _whole(edit, records, out)
    report = evaluate(model, records, edit, out=out, group=group, progress=True, **described, **settings)
    if not int(os.environ.get("RANK", 0)):
        say(report.table())
        if problem is not None and params is not None and settings["baseline"]:
            say(problem_table(model, problem, records, report.cases, out / "problem.json"))
        say(str(out / "report.md"))
    return report


def _of_edit(records: Records, edit: Edit, limit: int | None) -> Records:
    """The records whose facts the edit was made for, at most `limit`; ValueError where there are none."""
    asked = {(request["prompt"], request["subject"]) for request in edit.requests}
    kept = [record for record in records if asked.issuperset((x["prompt"], x["subject"]) for x in rewrites_of(record))]
    if not kept:
        raise ValueError("the data has no record of what the edit was made for: its prompts and subjects are others")
    return Records(kept[:limit])


def _as_problems(
    model: EditableModel, records: Records, choices: dict[str, Any], compat: str | None, skip_bad: bool
) -> Records:
    """The records as a problem asks them, less those of which it cannot be made."""
    asked = Records(bad=records.bad)
    for place, record in zip(places(records), records, strict=True):
        try:
            need_prompts([record], "paraphrase_prompts", "neighborhood_prompts")
            of = "hase" if compat == "hase" else None
            request = as_problem(model, record, choices["problem"], choices["noise"], compat=of)
            asked.append(problem_record(record, request))
        except ValueError as error:
            asked.bad.append(BadRecord(place, record["case_id"], "requested_rewrite", str(error)))
    if len(asked) < len(records) and not (skip_bad and asked):
        raise ValueError(describe_bad(asked.bad[len(records.bad) :], "the records"))
    asked.bad.sort(key=lambda bad: bad.index)
    return asked


def _check(data: Path | None, of_world: bool, choices: dict[str, Any], texts: dict[str, Any]) -> None:
    method = choices["method"]
    if method not in (NONE, *METHODS):
        raise ValueError(f"unknown method '{method}': expected one of {', '.join((NONE, *METHODS))}")
    if choices["problem"] is not None:
        problem_of(choices["problem"])
    if data is None and not of_world:
        raise ValueError("--data FILE is missing (only the built-in world has facts of its own)")
    if method in METHODS and not choices["params"]:
        presets = ", ".join(METHODS[method].presets)
        raise ValueError(f"--params is missing: a preset of {method} ({presets}), a JSON or a YAML file")
    if choices["store"] is not None:
        if method not in METHODS:
            raise ValueError("--store is for the values of a --method")
        check_keeps(METHODS[method], METHODS[method].params_of(choices["params"]))
    if texts["tfidf"] is not None and texts["snippets"] is None:
        raise ValueError("--tfidf is for the consistency with --snippets: give these too")


def _texts(data: Path | None, texts: dict[str, Any], records: Records) -> dict[str, Any]:
    """Arguments of `evaluate` about generated text."""
    if not texts["generation"] or not records:
        return {"generation": False}
    source = load_world().snippets() if data is None and texts["snippets"] is None else texts["snippets"]
    require_extras(source is not None)
    if source is None:
        return {"generation": True}
    # Weights of words are fitted on all snippets where they are not given.
    only = None if texts["tfidf"] is None else wanted_snippets(records)
    arguments = {"generation": True, "snippets": load_snippets(source, only=only)}
    if texts["tfidf"] is not None:
        read = load_tfidf(*texts["tfidf"])
        arguments["tfidf"] = TfIdf.from_arrays(read.idf, read.vocabulary)
    return arguments


def _whole(editing: Editing, records: Records, out: Path) -> tuple[Edit, float]:
    """One edit of all records, kept in the folder: a run that goes on goes on with the same one. And its seconds."""
    path, sidecar = out / "edit.safetensors", out / "edit.json"
    rewrites = [{key: record[key] for key in ("case_id", "requested_rewrite")} for record in records]
    asked = {**editing.describe(), "model": identity(editing.model), "records": rewrites}
    ranks = Ranks()
    with alone(out, ranks):
        if ranks.first and not (path.exists() and sidecar.exists()):
            began = perf_counter()
            edit = editing(records)
            edit.save(path)
            write_json(sidecar, {"asked": asked, "seconds": perf_counter() - began})
        ranks.wait()
        description = load_json(sidecar)
        check_same(path, description.get("asked", {}), asked, adopted=("model.name",))
        ranks.wait()
    return Edit.load(path), float(description["seconds"])

"""Settings of a method beside each other, on records that the search for one of them did not see.

python benchmarks/settings.py MODEL found/params.json hand.json gpt-j --data counterfact.json --moments DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

import numpy as np

import knowedit_ext as ke
from knowedit_ext.evaluation.scores import SUCCESSES, harmonic_difference, values_of
from knowedit_ext.runs.checksums import digest
from knowedit_ext.runs.files import write_json
from knowedit_ext.studies.findings import NORMAL, Findings, means_of

KEPT = ("S", *SUCCESSES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("params", nargs="+", help="presets or files; the others are compared with the first")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--moments", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    model = ke.load_model(asked.model, dtype="float32")
    records = json.loads(asked.data.read_text())[: asked.limit]
    method = ke.METHODS[asked.method]
    moments = None if asked.moments is None else ke.Moments.load(asked.moments)
    rows, cases = [], {}
    for given in asked.params:
        began, folder = perf_counter(), asked.out / Path(given).stem
        edit = _edit(model, records, method, method.params_of(given), moments, folder)
        report = ke.evaluate(model, records, edit, False, False, out=folder, progress=True)
        cases[given] = [values_of(case["post"]) for case in report.cases]
        means = {name: value for name, value in means_of(cases[given]).items() if name.removesuffix("_half") in KEPT}
        rows.append({"settings": Path(given).stem, "records": len(records), **means})
        if given != asked.params[0]:
            rows[-1] |= _less(cases[asked.params[0]], cases[given])
        print(f"{given}: {perf_counter() - began:.0f} s", flush=True)
    found = Findings(rows, {}, ("settings",))
    write_json(asked.out / "settings.json", rows)
    (asked.out / "settings.md").write_text(found.table())
    print(found.table())


def _edit(model, records, method, params, moments, folder: Path) -> ke.Edit:
    """Of all records in one batch; kept, so that a run that was killed goes on with the same. Values are computed once
    for settings that share them."""
    path = folder.with_suffix(".safetensors")
    if not path.exists():
        options = {"moments": moments} if method.takes("moments") else {}
        if method.values is not None:
            shared = params.of_values()
            store = folder.parent / "values" / digest(repr(shared).encode())
            options["values"] = method.values(model, records, shared, store=store)
        ke.edit(model, records, method.name, params=params, **options).save(path)
    return ke.Edit.load(path)


def _less(first: list[dict[str, float]], other: list[dict[str, float]]) -> dict[str, float | None]:
    """S of the first settings less that of others, paired."""
    both = (np.array([[case[name] for name in SUCCESSES] for case in cases]) for cases in (first, other))
    mean = harmonic_difference(*both)
    half = None if mean.stderr is None else NORMAL * mean.stderr
    return {"first less this": mean.mean, "first less this_half": half}


if __name__ == "__main__":
    main()

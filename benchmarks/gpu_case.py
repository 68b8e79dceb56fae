"""A case of `gpu.py measure`, in the process that it starts for it.

PYTHONPATH=. python benchmarks/gpu_case.py FILE CASE [--repeat N] [--dry-run]     FILE: for the rows so far, as JSON
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_measure import Bench, CheckFailed, measure_ceilings
from gpu_report import Row

Case = Callable[[Bench], Iterator[Row | Callable[[], Row]]]


def find(name: str) -> Case:
    """Imports models, and transformers with them, only for a case of models."""
    for module in ("gpu_kernels", "gpu_models"):
        cases = importlib.import_module(module).CASES
        if name in cases:
            return cases[name]
    raise SystemExit(f"gpu_case.py: there is no case {name!r}")


def device_answers(bench: Bench) -> bool:
    """False after an error that CUDA does not recover from in this process; frees the memory of what is done."""
    gc.collect()  # models are full of cycles
    try:
        if bench.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def run_cases(
    bench: Bench, cases: dict[str, Case], deadline: float, save: Callable[..., None] = lambda *tables: None
) -> tuple[list[Row], dict[str, str], dict[str, str]]:
    """Rows; what failed and what there was no time for, by case; `save` is called with all three after each row."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    not_run: dict[str, str] = {}
    answers = True
    for name, case in cases.items():
        if not answers or time.monotonic() > deadline:
            not_run[name] = "no time left" if answers else "the device answers no more after what failed before"
            continue
        torch.manual_seed(0)
        pending = case(bench)
        while answers:
            failure = ""
            try:
                row = next(pending, None)  # a case that raised has ended; one that yielded a call goes on behind it
                row = row() if callable(row) else row
                if row is None:
                    break
                print(f"{row.name}: {row.seconds:.3g} s, error {row.error:.1e}", flush=True)
                rows.append(row)
            except CheckFailed as error:
                failure = str(error)
            except torch.OutOfMemoryError:
                not_run[f"{name}, part of it"] = "out of memory"
            except Exception as error:  # one broken case must not take the others' numbers along
                failure = f"{type(error).__name__}: {error}"
            if failure:
                failed[name] = "; ".join(filter(None, [failed.get(name), failure]))
                print(f"{name}: FAILED, {failure}", flush=True)
            answers = device_answers(bench)
            if answers and time.monotonic() > deadline:
                not_run[f"{name}, after '{rows[-1].name if rows else name}'"] = "no time left"
                break
            save(rows, failed, not_run)
    save(rows, failed, not_run)
    return rows, failed, not_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("case")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "corrupting .* does not lower the score")  # random models know nothing
    bench = Bench("cpu" if args.dry_run else "cuda", args.dry_run, args.repeat)

    def save(rows: list[Row], failed: dict[str, str], not_run: dict[str, str]) -> None:
        write({"rows": [asdict(row) for row in rows], "failed": failed, "not_run": not_run})

    def write(found: dict[str, object]) -> None:
        new = args.file.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.replace(args.file)

    if args.case == "ceilings":
        write({"ceilings": measure_ceilings(bench)})
    else:
        run_cases(bench, {args.case: find(args.case)}, float("inf"), save)


if __name__ == "__main__":
    sys.exit(main())

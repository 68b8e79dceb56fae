"""Whose key is on which side of ROME's change, on real records: values computed once, then each rule, paired.

    python benchmarks/rome_keys.py MODEL --data counterfact.json --params smollm2-135m --moments DIR --out DIR
    python benchmarks/rome_keys.py world --out DIR                                  # the built-in world, its preset

reference  u ~ C^-1 of the plain mean over contexts, v divided by the bare prompt's key: `compat="reference"`
half       the bare prompt is half of the mean
one_key    the plain mean on both sides (`ke.r_rome`)
bare       the bare prompt's key on both sides
default    u so that the bare prompt and the mean of the other contexts both get exactly the value

--value-contexts N optimises values in the bare prompt and N contexts of the 20 (the keys are always over all of them):
the rules are compared on the same values, which take most of the time. A run that was killed goes on in --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

import knowedit_ext as ke
from knowedit_ext.editing.changes import LowRank
from knowedit_ext.editing.contexts import rome_contexts
from knowedit_ext.editing.edit import weight_is_input_first
from knowedit_ext.editing.keys import KeyRows
from knowedit_ext.editing.request import check_requests
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.editing.values import optimise_values
from knowedit_ext.evaluation.scores import SUCCESSES, harmonic_difference, values_of
from knowedit_ext.runs.files import load_npz, write_json, write_npz
from knowedit_ext.studies.findings import NORMAL, Findings, means_of
from knowedit_ext.world import load_world

GROUP = 10
SHOWN = ("S", "ES", "EM", "PS", "PM", "NS", "NM")
RULES = ("reference", "half", "one_key", "bare", "default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--params", default="world")
    parser.add_argument("--moments", type=Path)
    parser.add_argument("--first", type=int, default=0, help="records left out in front")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--value-contexts", type=int)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=("reference", "half", "default"))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    model = ke.load_model(asked.model, dtype="float32")
    records = load_world().records() if asked.data is None else json.loads(asked.data.read_text())
    records = records[asked.first :][: asked.limit]
    params = ke.METHODS["rome"].params_of(asked.params)
    parts = [
        _measured(model, records[n : n + GROUP], params, asked.value_contexts, asked.out / f"{asked.first + n}.npz")
        for n in range(0, len(records), GROUP)
    ]
    measured = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])).double() for name in parts[0]}
    (layer,) = params.layers
    moments = (
        ke.collect_moments(model, load_world().statements(), params.layers)
        if asked.moments is None
        else ke.Moments.load(asked.moments, layers=params.layers)
    )
    rules = Rules(moments[layer].matrix().double(), **measured)
    cases = {rule: _cases(model, records, params, rules.change(rule), asked.out / rule) for rule in asked.rules}
    rows = [_row(rule, found, cases[asked.rules[0]]) for rule, found in cases.items()]
    notes = [f"{len(records)} records; 95 % intervals, of differences paired. C-cosine of the bare prompt's key and "
             f"the others' mean: {rules.cosine():.2f}."]  # fmt: skip
    for rule in asked.rules:
        bare, others, size = rules.shares(rule)
        notes.append(
            f"{rule}: of the change the bare prompt gets {bare.mean():.2f} ({bare.min():.2f} at the least), other "
            f"contexts {others.mean():.2f}; |dW| in the moments' metric {size:.2f}."
        )
    found = Findings(rows, {}, ("rule",), notes=["\n".join(f"- {note}" for note in notes)])
    write_json(asked.out / "rome_keys.json", {"rows": rows, "notes": notes})
    (asked.out / "rome_keys.md").write_text(found.table())
    print(found.table())


def _measured(model, records, params, few: int | None, path: Path) -> dict[str, np.ndarray]:
    """keys [n, contexts, d_in] and outputs [n, contexts, hidden] of the layer, delta [n, hidden]."""
    if not path.exists():
        began, (layer,) = perf_counter(), params.layers
        contexts = rome_contexts(model, params.context_template_length_params)
        requests = tokenize_requests(model, check_requests(records), contexts, params.fact_token)
        rows = KeyRows(model, requests, [1 / len(contexts)] * len(contexts))
        pair = rows.pass_through(rows.start, 0, layer, layer, "mlp")
        keys, outputs = (x.view(len(records), len(contexts), -1).float().cpu().numpy() for x in pair)
        if few is not None:
            some = [contexts[0], *contexts[1 :: (len(contexts) - 1) // few]]
            requests = tokenize_requests(model, check_requests(records), some, params.fact_token)
        values = optimise_values(model, requests, params, "mlp", layer)
        delta = (values.values - values.initial).float().cpu().numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, {"keys": keys, "outputs": outputs, "delta": delta})
        print(f"{path.stem}: {perf_counter() - began:.0f} s", flush=True)
    return dict(load_npz(path))


class Rules:
    """u [n, d_in] and v [n, hidden] of each rule; the bare prompt is the first context."""

    def __init__(self, moment: torch.Tensor, keys: torch.Tensor, outputs: torch.Tensor, delta: torch.Tensor) -> None:
        self.moment, self.factor = moment, torch.linalg.cholesky(moment)
        self.keys, self.delta = keys, delta
        self.bare, self.others, self.mean = keys[:, 0], keys[:, 1:].mean(1), keys.mean(1)
        self.target = outputs[:, 0] + delta
        self.to_mean = self.target - outputs.mean(1)
        ways: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
            "reference": lambda: self._along(self.mean, self.bare, delta),
            "half": lambda: self._along((self.bare + self.others) / 2, self.bare, delta),
            "one_key": lambda: self._along(self.mean, self.mean, self.to_mean),
            "bare": lambda: self._along(self.bare, self.bare, delta),
            "default": self._both,
        }
        self.ways = ways

    def change(self, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ways[rule]()

    def _solve(self, keys: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(keys.T, self.factor).T

    def _along(self, key: torch.Tensor, divisor: torch.Tensor, wanted: torch.Tensor):
        u = self._solve(key)
        return u / (u * divisor).sum(-1, keepdim=True), wanted

    def _both(self) -> tuple[torch.Tensor, torch.Tensor]:
        pair = torch.stack([self.bare, self.others], 1)
        solved = torch.stack([self._solve(self.bare), self._solve(self.others)], 1)
        weights = torch.linalg.solve(pair @ solved.transpose(1, 2), torch.ones(len(pair), 2, 1, dtype=pair.dtype))
        return (solved * weights).sum(1), self.delta

    def shares(self, rule: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Of v: what the bare prompt gets [n], what the other contexts get [n], and |dW| in the moments' metric."""
        u, v = self.change(rule)
        size = ((u @ self.moment) * u).sum(-1).sqrt() * v.norm(dim=-1)
        return (u * self.bare).sum(-1), (u * self.others).sum(-1), float(size.mean())

    def cosine(self) -> float:
        one, other = self._solve(self.bare), self._solve(self.others)
        lengths = ((one * self.bare).sum(-1) * (other * self.others).sum(-1)).sqrt()
        return float(((one * self.others).sum(-1) / lengths).mean())


def _cases(model, records, params, change, out: Path) -> list[dict[str, float]]:
    (layer,) = params.layers
    name, first = f"{model.modules.parameter_name(layer)}.weight", weight_is_input_first(
        model.modules.down_projection(layer)
    )  # fmt: skip
    edits = []
    for record, u, v in zip(records, *change, strict=True):
        factors = LowRank(u[:, None].contiguous(), v[:, None].contiguous(), first)
        request = check_requests([record])[0].to_dict()
        edits.append(ke.Edit({name: factors}, "rome", [request], params.to_dict()))
        edits[-1].bind(model)
    report = ke.evaluate(model, records, edits, generation=False, baseline=False, out=out, progress=True)
    return [values_of(case["post"]) for case in report.cases]


def _row(rule: str, cases: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, object]:
    means = {name: value for name, value in means_of(cases).items() if name.removesuffix("_half") in SHOWN}
    row = {"rule": rule, **means}
    if cases is not first:
        both = [np.array([[case[name] for name in SUCCESSES] for case in side]) for side in (cases, first)]
        less = harmonic_difference(*both)
        row |= {"less the first: S": less.mean, "less the first: S_half": less.stderr and NORMAL * less.stderr}
        for n, name in enumerate(SUCCESSES):
            change = both[0][:, n] - both[1][:, n]
            half = NORMAL * float(change.std(ddof=1)) / len(change) ** 0.5
            row |= {f"less the first: {name}": float(change.mean()), f"less the first: {name}_half": half}
    return row


if __name__ == "__main__":
    main()

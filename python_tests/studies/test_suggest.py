"""The search for settings: each score by the public functions, the best kept, the held-out half not looked at."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import knowedit_ext as ke
from knowedit_ext.editing.methods import METHODS
from knowedit_ext.studies.suggest import better_half, counts_of, halve, search
from knowedit_ext.studies.suggest_space import Group, Space
from knowedit_ext.studies.suggest_trials import HELD_OUT, SEARCHED, Trial
from knowedit_ext.studies.suggestion import best_at
from knowedit_ext.world import load_world

MEMIT = replace(ke.MEMITParams.preset("world"), v_num_grad_steps=3)
SMALL = {"layers": [[1], [0, 1], [2, 3]], "v_lr": [0.2, 0.5], "mom2_update_weight": [15.0, 400.0]}
SMALL |= {"v_weight_decay": [0.5], "clamp_norm_factor": [2.0]}
TINY = dict(first=2, variants=2, draws=1, traced=2)
trials_module = sys.modules["knowedit_ext.studies.suggest_trials"]


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return random.Random(1).sample(load_world().records(), 8)


@pytest.fixture(scope="module")
def moments(model) -> ke.Moments:
    return ke.collect_moments(model, load_world().statements()[:200], layers=list(range(6)))


def suggest(model, records, moments, out=None, method="memit", **more) -> ke.Suggestion:
    options = {"params": MEMIT, "space": SMALL, **TINY} | more
    return ke.suggest(model, method, records=records, moments=moments, out=out, **options)


def halves(records, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """As documented: drawn by the seed, the first half searched."""
    order = random.Random(seed).sample(records, len(records))
    return order[: len(order) // 2], order[len(order) // 2 :]


def by_hand(model, records, edits) -> dict[str, float]:
    report = ke.evaluate(model, records, edits, generation=False, baseline=False)
    return {name: mean.mean for name, mean in report.summary().items()}


def without_seconds(found: ke.Suggestion) -> dict:
    told = found.to_dict() | {"seconds": None}
    told["effect"] = told["effect"] and told["effect"] | {"seconds": None}
    return told | {"rows": [row | {"seconds": None} for row in found.rows]}


@pytest.fixture(scope="module")
def whole(model, records, moments, tmp_path_factory) -> tuple[ke.Suggestion, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return suggest(model, records, moments, folder), folder


def test_every_score_is_an_edit_and_an_evaluation_by_hand(model, records, moments, whole) -> None:
    found, _ = whole
    searched, held_out = halves(records)
    assert {row["records"] for row in found.rows} == {2, 4}
    for row in found.rows:
        params = ke.MEMITParams.from_dict(row["params"])
        edit = ke.memit(model, searched[: row["records"]], params, moments)
        want = by_hand(model, searched[: row["records"]], edit)
        assert {name: row[name] for name in ("S", "ES", "PS", "NS")} == pytest.approx(
            {name: want[name] for name in ("S", "ES", "PS", "NS")}
        )
    for row, params in zip(found.held, (found.params, MEMIT), strict=False):
        want = by_hand(model, held_out, ke.memit(model, held_out, params, moments))
        assert {name: row[name] for name in want} == pytest.approx(want, abs=0.05)
    last = [row for row in found.rows if row["records"] == 4]
    assert max(row["S"] for row in last) == next(row["S"] for row in last if row["params"] == found.params.to_dict())
    assert not model.applied_edits


def test_an_edit_of_each_record(model, records, moments) -> None:
    found = suggest(model, records, moments, together=False)
    searched, _ = halves(records)
    for row in found.rows[:2] + found.rows[-1:]:
        params = ke.MEMITParams.from_dict(row["params"])
        edits = [ke.memit(model, [record], params, moments) for record in searched[: row["records"]]]
        want = by_hand(model, searched[: row["records"]], edits)
        assert {name: row[name] for name in ("S", "ES", "PS", "NS")} == pytest.approx(
            {name: want[name] for name in ("S", "ES", "PS", "NS")}
        )


FEW = {"v_num_grad_steps": 3}
BASES = {
    "rome": FEW | {"context_template_length_params": ((3, 1),)},
    "r-rome": FEW | {"context_template_length_params": ((3, 1),)},
    "alphaedit": FEW,
    "emmet": FEW,
    "pmet": FEW,
    "encore": FEW,
    "ft": {"num_steps": 2},
    "ft-l": {"num_steps": 2},
    "ultraedit": {},
}


QUICK = ("rome", "alphaedit", "ft-l", "ultraedit")


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in BASES])
def test_every_method(model, records, moments, method) -> None:
    chosen = METHODS[method]
    base = replace(chosen.params_of("world"), **BASES[method])
    space = {
        "layers": [list(base.layers), [layer - 1 for layer in base.layers if layer]] if base.layers[-1] else [[0], [1]]
    }
    found = suggest(model, records, moments, method=method, params=base, space=space, draws=0, first=4)
    searched, _ = halves(records)
    (row, *_) = (row for row in found.rows if row["records"] == 4)
    params = chosen.params_of(row["params"])
    options = {"moments": moments} if chosen.takes("moments") else {}
    if chosen.many:
        edits = ke.edit(model, searched, method, params=params, **options)
    else:
        edits = [ke.edit(model, record, method, params=params, **options) for record in searched]
    want = by_hand(model, searched, edits)
    assert {name: row[name] for name in ("S", "ES", "PS", "NS")} == pytest.approx(
        {name: want[name] for name in ("S", "ES", "PS", "NS")}
    )
    assert found.params.to_dict() in [row["params"] for row in found.rows]


@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if each.values is not None])
def test_shared_values_are_the_candidates_own(model, records, moments, method) -> None:
    chosen = METHODS[method]
    params = replace(chosen.params_of("world"), v_num_grad_steps=3, v_lr=0.3)
    some = records[:1] if chosen.single else records[:2]
    values = chosen.values(model, some, params.of_values())
    shared = chosen.edit(model, some, params, moments, values=values)
    own = chosen.edit(model, some, params, moments)
    for name in own.changes:
        assert shared.delta(name) == pytest.approx(own.delta(name), abs=1e-6)


def test_values_are_computed_once_and_what_is_held_out_is_not_seen(model, records, moments, monkeypatch) -> None:
    valued, evaluated = [], []
    memit_values, evaluate = ke.METHODS["memit"].values, trials_module.evaluate

    def values(model, some, params, **options):
        valued.append([(params, record["case_id"]) for record in some])
        return memit_values(model, some, params, **options)

    def scored(model, some, *args, **options):
        evaluated.append({record["case_id"] for record in some})
        return evaluate(model, some, *args, **options)

    monkeypatch.setitem(METHODS, "memit", replace(METHODS["memit"], values=values))
    monkeypatch.setattr(trials_module, "evaluate", scored)
    found = suggest(model, records, moments)
    pairs = [pair for call in valued for pair in call]
    assert len(pairs) == len(set(pairs))
    held = {record["case_id"] for record in halves(records)[1]}
    finals = len(found.held)
    assert all(not case_ids & held for case_ids in evaluated[:-finals])
    assert evaluated[-finals:] == [held] * finals
    seen = [{case_id for _, case_id in call} for call in valued]
    late = [not case_ids.isdisjoint(held) for case_ids in seen]
    assert late == sorted(late)  # the held-out ones last


def test_another_seed_parts_the_records_otherwise(model, records, moments) -> None:
    assert [x["case_id"] for x in halves(records, 1)[1]] != [x["case_id"] for x in halves(records)[1]]
    found = suggest(model, records, moments, seed=1)
    _, held_out = halves(records, 1)
    contexts = {"seed": 1}
    want = by_hand(model, held_out, ke.memit(model, held_out, found.params, moments, **contexts))
    assert found.held[0]["S"] == pytest.approx(want["S"])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, pytest.param(6, marks=pytest.mark.slow), 10])
def test_a_killed_search_goes_on(model, records, moments, whole, tmp_path, monkeypatch, at) -> None:
    calls, evaluate = [], trials_module.evaluate

    def killed(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return evaluate(*args, **options)

    monkeypatch.setattr(trials_module, "evaluate", killed)
    with pytest.raises(Killed):
        suggest(model, records, moments, tmp_path / "killed")
    assert not model.applied_edits
    before = len(calls)
    again = suggest(model, records, moments, tmp_path / "killed")
    assert without_seconds(again) == without_seconds(whole[0])
    done = len(calls)
    suggest(model, records, moments, tmp_path / "killed")
    assert len(calls) == done > before  # nothing is computed again


def test_as_many_draws_as_fit_and_the_folder_keeps_them(model, records, moments, tmp_path, monkeypatch) -> None:
    short = suggest(model, records, moments, tmp_path / "short", draws=None, minutes=1e-3)
    long = suggest(model, records, moments, tmp_path / "long", draws=None, minutes=10.0)
    assert long.tried > short.tried
    monkeypatch.setattr(trials_module, "evaluate", None)  # all is there
    assert suggest(model, records, moments, tmp_path / "long", draws=None, minutes=10.0).to_dict() == long.to_dict()


def test_refused(model, records, moments, tmp_path) -> None:
    suggest(model, records, moments, tmp_path, draws=0)
    with pytest.raises(ValueError, match="other settings"):
        suggest(model, records[:-1], moments, tmp_path, draws=0)
    other = ke.Moments.from_arrays({n: (2.0 * moments[n].matrix(), moments[n].count) for n in moments})
    with pytest.raises(ValueError, match="other settings"):
        suggest(model, records, other, tmp_path, draws=0)
    (result, *_) = tmp_path.glob("cells/*/result.json")
    content = json.loads(result.read_text())
    result.write_text(json.dumps(content | {"seconds": 1e9}))
    with pytest.raises(ValueError, match="altered"):
        suggest(model, records, moments, tmp_path, draws=0)


def test_params_json_is_a_file_for_params(whole) -> None:
    found, tmp_path = whole
    assert METHODS["memit"].params_of(tmp_path / "params.json") == found.params
    told = json.loads((tmp_path / "suggest.json").read_text())
    assert told["params"] == found.params.to_dict()
    assert found.table() == (tmp_path / "suggest.md").read_text()
    assert "records that the search did not see" in found.table()
    for name in ("by_layer.png", "by_layer.pdf", "suggest.csv"):
        assert (tmp_path / name).stat().st_size > 100
    shown = [axes.get_title() for axes in found.plot().axes if axes.get_visible()]
    assert shown[0] == "layers of the window"
    assert shown[1:-1] == list(found.settings["ranges"])
    assert shown[-1].startswith("tracing")


def test_what_cannot_be_edited_is_a_note(model, records, moments) -> None:
    poor = {n: (moments[n].matrix(), moments[n].count) for n in moments}
    poor[2] = (0.0 * poor[2][0], 10)  # no Cholesky factor
    found = suggest(model, records, ke.Moments.from_arrays(poor))
    assert found.notes and all("positive definite" in note for note in found.notes)
    assert 2 not in found.params.layers
    with pytest.raises(ValueError, match="no candidate could be edited"):
        suggest(model, records, ke.Moments.from_arrays(dict.fromkeys(range(4), poor[2])))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"space": {"v_rl": [1.0]}}, "no parameter 'v_rl'"),
        ({"space": {"v_lr": []}}, "expected a list of the values to try"),
        ({"space": {"v_lr": [0.0]}}, "v_lr is 0.0"),
        ({"space": {"layers": [[4, 5]]}}, "layer 5 cannot be edited"),
        ({"space": {"layers": [[2, 1]]}}, "ascending order"),
        ({"params": {"layers": [5]}}, "layer 5 is too high"),
        ({"moments": None}, "needs moments"),
        ({"method": "rome", "params": "world", "space": None, "together": True}, "one fact at a time"),
        ({"method": "memti"}, "unknown method"),
        ({"method": "ft-l", "params": None, "space": None}, "give params"),
        ({"records": []}, "no records"),
        ({"limit": 1}, "leave none"),
        ({"held_out": 1.0}, "held_out"),
        ({"minutes": 0}, "minutes"),
    ],
)
def test_bad_input(model, records, moments, options, error) -> None:
    given = {"records": records, "moments": moments} | options
    with pytest.raises((ValueError, TypeError), match=error):
        suggest(model, given.pop("records"), given.pop("moments"), **given)


# -- the search itself, on planted scores ------------------------------------------------------------------------------


def trial(params, score: float, records: int = 4) -> Trial:
    case = {"ES": score, "PS": score, "NS": score, "EM": 0.0, "PM": 0.0, "NM": 0.0}
    return Trial(params, records, (case,) * records, 1.0, None)


def candidate(number: int):
    return replace(MEMIT, v_lr=1.0 + number)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.floats(1, 100), min_size=1, max_size=5), min_size=1, max_size=9))
def test_halving_keeps_the_best(scores) -> None:
    numbers = iter(range(100))
    tried = [[trial(candidate(next(numbers)), score) for score in group] for group in scores]
    kept = halve(tried)
    score_of = {one.params: one.means["S"] for group in tried for one in group}
    assert len(kept) == math.ceil(len(tried) / 2)
    assert score_of[kept[0].candidates[0]] == max(score_of.values())
    sizes = {one.params: len(group) for group in tried for one in group}
    for group in kept:
        assert len(group.candidates) == math.ceil(sizes[group.candidates[0]] / 2)
    stays = {params for group in kept for params in group.candidates}
    least = min(max(score_of[params] for params in group.candidates) for group in kept)
    for group in tried:
        if not stays & {one.params for one in group}:
            assert max(one.means["S"] for one in group) <= least


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 500))
def test_rounds_double_up_to_all_records(first, whole) -> None:
    counts = counts_of(first, whole)
    assert counts[0] == min(first, whole) and counts[-1] == whole
    assert counts == sorted(set(counts))
    assert all(b <= 3 * a for a, b in zip(counts, counts[1:], strict=False))


class Planted:
    """Trials whose scores are a function of the parameters."""

    seed = 3
    seconds = 0.0

    def __init__(self, space: Space, score) -> None:
        self.space, self.score, self.asked = space, score, []
        self.halves = {SEARCHED: [None] * 16, HELD_OUT: [None] * 16}

    def measure(self, groups: list[Group], half, parts, what):
        assert half == SEARCHED
        self.asked.append(groups)
        return [[trial(one, self.score(one), parts[-1].stop) for one in group.candidates] for group in groups]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 4), st.sampled_from([0.1, 0.2, 0.5]), st.sampled_from([10.0, 10000.0]))
def test_the_search_ends_with_the_best_of_what_it_tried(layer, rate, weight) -> None:
    space = Space.of(METHODS["memit"], MEMIT, list(range(5)), None)

    def score(params) -> float:
        far = abs(params.layers[-1] - layer) + abs(math.log(params.v_lr / rate))
        return 100.0 / (1.0 + far + abs(math.log10(params.mom2_update_weight / weight)))

    planted = Planted(space, score)
    rounds = search(planted, 4, 3, 12, 60.0)
    best = max(rounds[-1], key=lambda one: one.rank).params
    tried = {one.params for one in rounds[0]}
    assert score(best) == max(map(score, tried))
    assert [len(groups) for groups in planted.asked[2:]] == [
        math.ceil(sum(map(len, planted.asked[:2])) / 2 ** (n + 1)) for n in range(len(planted.asked) - 2)
    ]
    depths = [[trial(one, score(one))] for group in planted.asked[0] for one in group.candidates]
    better = better_half(depths, space.lasts)
    assert {group.last for group in planted.asked[1]} <= set(better)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_groups_share_their_values_and_nothing_is_twice(seed, variants) -> None:
    space, rng = Space.of(METHODS["memit"], MEMIT, list(range(5)), None), random.Random(seed)
    drawn = space.draw(10, space.lasts, {space.shared(MEMIT)}, rng)
    groups = space.groups([MEMIT, *drawn], variants, rng)
    assert len({space.shared(group.candidates[0]) for group in groups}) == len(groups) == len(drawn) + 1
    for group in groups:
        assert len({space.shared(one) for one in group.candidates}) == 1
        ends = [window for window in space.windows if window[-1] == group.last]
        most = len(ends) * len(space.ranges["mom2_update_weight"])
        assert len(set(group.candidates)) == len(group.candidates) == min(variants, most)
        assert all(space.holds(one) for one in group.candidates)


def test_the_space_counts_its_candidates() -> None:
    space = Space.of(METHODS["memit"], MEMIT, list(range(5)), SMALL)
    every = {
        space.params(window, {"v_lr": rate, "mom2_update_weight": weight})
        for window in SMALL["layers"]
        for rate in SMALL["v_lr"]
        for weight in SMALL["mom2_update_weight"]
    }
    assert space.size == len(every) == 12
    assert all(space.holds(one) for one in every)
    drawn = space.draw(100, space.lasts, set(), random.Random(0))
    assert {space.shared(one) for one in drawn} == {space.shared(one) for one in every}


def test_windows_may_end_before_the_base_does() -> None:
    space = Space.of(METHODS["memit"], MEMIT, list(range(5)), {"layers": [[0], [1]], "v_lr": [0.1, 0.2]})
    planted = Planted(space, lambda params: 10.0 + params.layers[-1])
    rounds = search(planted, 4, 1, 3, 60.0)
    assert MEMIT.layers[-1] > 1 and rounds[0][0].params == MEMIT
    assert {group.last for group in planted.asked[1]} == {1}  # the better one of those to search


def test_values_are_read_as_parameters_are() -> None:
    given = {"layers": [[1]], "v_lr": ["5e-1", 0.5, 1], "fact_token": ["last", "subject_last"]}
    space = Space.of(METHODS["memit"], MEMIT, list(range(5)), given)
    assert space.ranges["v_lr"] == (0.5, 1.0) and space.ranges["fact_token"] == ("last", "subject_last")
    assert space.holds(replace(MEMIT, layers=(1,), v_lr=0.5))


def test_the_best_of_each_value_by_the_last_layer() -> None:
    tried = [("b", 3, 1, 5.0), (10.0, 3, 1, 7.0), (9.5, 2, 1, 1.0), (9.5, 3, 1, 2.0), (9.5, 3, 1, 4.0)]
    tried += [(None, 3, 1, 3.0), (9.5, 3, 2, 9.0), (10.0, 1, 1, None)]  # a later round; one that could not be edited
    rows = [dict(zip(("x", "last", "round", "S"), each, strict=True)) for each in tried]
    assert [(value, {last: row["S"] for last, row in best.items()}) for value, best in best_at(rows, "x")] == [
        ("9.5", {2: 1.0, 3: 4.0}),
        ("10", {3: 7.0}),
        ("None", {3: 3.0}),
        ("b", {3: 5.0}),
    ]


def test_command(tmp_path, monkeypatch, capsys) -> None:
    from knowedit_ext.cli import main

    (tmp_path / "space.json").write_text(json.dumps(SMALL))
    (tmp_path / "params.json").write_text(json.dumps(MEMIT.to_dict()))
    out = tmp_path / "out"
    command = f"knowedit suggest world --out {out} --limit 6 --first 3 --draws 0 --variants 1"
    command += (
        f" --html {tmp_path / 'found.html'} --space {tmp_path / 'space.json'} --params {tmp_path / 'params.json'}"
    )
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "records that the search did not see" in capsys.readouterr().out
    assert "Settings for memit" in (tmp_path / "found.html").read_text()
    again = f"knowedit evaluate world --method memit --params {out / 'params.json'} --limit 2 --no-generation"
    monkeypatch.setattr("sys.argv", f"{again} --out {tmp_path / 'table'}".split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code

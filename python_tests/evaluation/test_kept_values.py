"""Values that several runs need are computed once, and edit as those that a run computes for itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.cli import main
from knowedit_ext.editing import closed_form
from knowedit_ext.editing.methods import METHODS, rome
from knowedit_ext.evaluation.methods import Editing
from knowedit_ext.runs.files import write_json

from ..editing.models import fresh
from ..editing.plain import moments_of
from ..editing.test_methods import LAYERS, brief
from ..support.processes import hashes

KEEPING = [name for name, method in METHODS.items() if method.values is not None]
FACTS = [("w5 {} w9 w10", "w3 w7", "w20 w23"), ("{} w9", "w33", "w22 w24"), ("w2 {} w9", "w31 w4", "w25")]
FACTS += [("{} w11 w9", "w36", "w21"), ("w6 {} w10", "w30 w2", "w26 w27")]
RECORDS = [
    {
        "case_id": 10 + n,
        "requested_rewrite": {
            "prompt": prompt,
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": "w50"},
        },
        "paraphrase_prompts": ["w8 w9"],
        "neighborhood_prompts": ["w10 w9"],
    }
    for n, (prompt, subject, new) in enumerate(FACTS)
]


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return fresh("llama")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values each call of the optimiser was asked for."""
    counts: list[int] = []
    for module in (closed_form, rome):
        plain = module.optimise_values

        def counting(model, requests, *a, plain=plain, **o):
            counts.append(len(requests))
            return plain(model, requests, *a, **o)

        monkeypatch.setattr(module, "optimise_values", counting)
    return counts


def editing(model: ke.EditableModel, name: str, together: bool = False, **options) -> Editing:
    return Editing(model, name, brief(METHODS[name]), moments_of(model, LAYERS), together, seed=3, **options)


def scores(model: ke.EditableModel, edits: Editing, records=RECORDS) -> list[float]:
    report = ke.evaluate(model, records, edits, generation=False, baseline=False, group=2)
    return [case["post"][kind][0]["target_new"] for case in report.cases for kind in PROBABILITIES]


PROBABILITIES = ("rewrite_prompts_probs", "paraphrase_prompts_probs", "neighborhood_prompts_probs")


@pytest.mark.parametrize("name", KEEPING)
def test_the_same_edits_computed_once(name: str, model, tmp_path: Path, computed) -> None:
    """In groups of two, of which each must find its own values; one a record and together."""
    for together in [False] if METHODS[name].single else [False, True]:
        own, kept = (editing(model, name, together) for _ in range(2))
        expected = scores(model, own)
        computed.clear()
        kept.keep(RECORDS, tmp_path / name)
        assert sum(computed) == (0 if together else len(RECORDS))  # together: those that are there
        computed.clear()
        assert scores(model, kept) == pytest.approx(expected, rel=1e-4)
        assert scores(model, kept, RECORDS[2:4]) and not computed


def test_other_values_would_be_seen(model, tmp_path: Path) -> None:
    """A planted mistake: each fact gets its neighbour's."""
    kept = editing(model, "rome")
    kept.keep(RECORDS, tmp_path)
    facts = list(kept.values.by_request)
    turned = dict(zip(facts, kept.values.rows([*facts[1:], facts[0]]), strict=True))
    right = scores(model, kept)
    kept.values = replace(kept.values, by_request=turned)
    assert scores(model, kept) != pytest.approx(right, rel=1e-2)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("memit", {}), ("alphaedit", {})),
        (("alphaedit", {}), ("emmet", {"compat": "reference"})),
        (("rome", {}), ("rome", {"compat": "reference"})),
        (("rome", {"compat": "reference"}), ("r-rome", {})),
    ],
)
def test_methods_share_them(first, then, model, tmp_path: Path, computed) -> None:
    for name, options in (first, then):
        edits = editing(model, name, **options)
        edits.keep(RECORDS, tmp_path)
        assert sum(computed) == len(RECORDS)


@pytest.mark.parametrize(("first", "then"), [("memit", "pmet"), ("memit", "encore"), ("rome", "memit")])
def test_others_are_refused(first: str, then: str, model, tmp_path: Path) -> None:
    editing(model, first).keep(RECORDS[:2], tmp_path)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="holds results made with other settings"):
        editing(model, then).keep(RECORDS[:2], tmp_path)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize(
    "change", [{"v_lr": 0.01}, {"layers": (0,)}, {"v_num_grad_steps": 2}, {"context_template_length_params": ((2, 1),)}]
)
def test_rome_of_other_settings_is_refused(change, model, tmp_path: Path) -> None:
    first = editing(model, "rome")
    first.keep(RECORDS[:1], tmp_path)
    other = Editing(model, "rome", replace(first.params, **change), moments_of(model, (0, 1)), seed=3)
    with pytest.raises(ValueError, match="holds results made with other settings"):
        other.keep(RECORDS[:1], tmp_path)


def test_what_has_no_values_is_told(model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--store: ft keeps no values; .*memit.*rome.* do"):
        editing(model, "ft").keep(RECORDS, tmp_path / "ft")
    several = RECORDS[0] | {"requested_rewrite": [RECORDS[0]["requested_rewrite"], RECORDS[1]["requested_rewrite"]]}
    with pytest.raises(ValueError, match="case_id 10: rome edits its facts one on top of the other"):
        editing(model, "rome").keep([several], tmp_path / "several")
    two = Editing(model, "rome", replace(brief(METHODS["rome"]), layers=(0, 1)), moments_of(model, (0, 1)))
    with pytest.raises(ValueError, match=r"rome's values of layers \[0, 1\] depend on each other"):
        two.keep(RECORDS, tmp_path / "layers")
    noisy = RECORDS[0] | {"requested_rewrite": RECORDS[0]["requested_rewrite"] | {"noise": 0.1}}
    with pytest.raises(ValueError, match="the noise of 'w3 w7' is drawn anew"):
        editing(model, "memit", compat="hase").keep([noisy], tmp_path / "noise")
    assert not list(tmp_path.iterdir())


def test_given_values_of_the_wrong_shape(model) -> None:
    params, moments = brief(METHODS["rome"]), moments_of(model, LAYERS)
    for values in (torch.zeros(2, model.hidden_size), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match=r"expected \[1 requests, "):
            ke.rome(model, RECORDS[0], params, moments, values=values)
    with pytest.raises(ValueError, match="NaN or infinite"):
        ke.rome(model, RECORDS[0], params, moments, values=torch.full((1, model.hidden_size), torch.nan))


def test_scaling_computes_each_value_once(model, tmp_path: Path, computed) -> None:
    """For every number of edits, small ones several times over, and for every method of the same values."""
    params = {name: brief(METHODS[name]) for name in ("memit", "alphaedit")}
    options = dict(params_of=params, moments=moments_of(model, LAYERS), counts=[1, 2, 4], least=4)
    own = ke.studies.scaling(model, RECORDS, ["memit", "alphaedit"], tmp_path / "own", **options)
    computed.clear()
    kept = ke.studies.scaling(
        model, RECORDS, ["memit", "alphaedit"], tmp_path / "kept", store=tmp_path / "v", **options
    )
    assert sum(computed) == 4
    for one, other in zip(own.rows, kept.rows, strict=True):
        assert {k: v for k, v in one.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in other.items() if isinstance(v, float)}, rel=1e-3
        )
    ke.studies.scaling(model, RECORDS, ["memit"], tmp_path / "m", store=tmp_path / "v", **(options | {"counts": [3]}))
    assert sum(computed) == 4


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        (["rome"], {}, "--store: 'rome' edits one fact on top of the other"),
        (["ft"], {}, "--store: ft keeps no values"),
        (["memit", "memit:v_lr=0.1"], {}, "methods whose values differ"),
        (["memit", "pmet"], {}, "methods whose values differ"),
        (["memit"], {"seeds": (0, 1)}, "several seeds of contexts"),
    ],
)
def test_scaling_of_values_that_differ_is_refused(methods, more, message: str, model, tmp_path: Path) -> None:
    params = {name.partition(":")[0]: brief(METHODS[name.partition(":")[0]]) for name in methods}
    with pytest.raises(ValueError, match=message):
        ke.studies.scaling(
            model, RECORDS, methods, tmp_path / "out", params_of=params, moments=moments_of(model, LAYERS),
            counts=[2], store=tmp_path / "v", **more,
        )  # fmt: skip
    assert not (tmp_path / "v").exists()


def test_command(model, tmp_path: Path, monkeypatch, capsys, computed) -> None:
    """Both methods of the table by one folder; killed between values and edit, it goes on without computing any."""
    monkeypatch.chdir(tmp_path)
    model.hf.save_pretrained("model")
    model.tokenizer.save_pretrained("model")
    moments_of(model, LAYERS).save("moments")
    write_json(Path("facts.json"), RECORDS)
    for name in ("memit", "alphaedit"):
        write_json(Path(f"{name}.json"), brief(METHODS[name]).to_dict())
    common = [
        "evaluate",
        "model",
        "--data",
        "facts.json",
        "--moments",
        "moments",
        "--no-generation",
        "--store",
        "values",
    ]

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["knowedit", *common, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capsys.readouterr().err

    assert run("--method", "memit", "--params", "memit.json", "--limit", "4", "--out", "a")[0] == 0
    assert sum(computed) == 4
    assert (
        run("--method", "alphaedit", "--params", "alphaedit.json", "--limit", "4", "--num-edits", "1", "--out", "b")[0]
        == 0
    )
    assert sum(computed) == 4
    assert json.loads(Path("b/report.json").read_text())
    status, said = run("--method", "memit", "--params", "memit.json", "--seed", "1", "--out", "c")
    assert status == 2 and "other contexts" in said
    status, said = run("--method", "ft", "--params", "world", "--out", "d")
    assert status == 2 and "ft keeps no values" in said
    status, said = run("--out", "e")
    assert status == 2 and "--store is for the values of a --method" in said
    assert not Path("d").exists() and not Path("e").exists()
